"""SPDY/3.1 as kubelets and crictl speak it: bytes in, events out. No input or output happens in this package."""
