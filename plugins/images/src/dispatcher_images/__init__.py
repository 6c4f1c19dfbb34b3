"""Image plugin of cri-dispatcher: one content-addressed OCI store behind every runtime."""
