"""Runtime plugin of cri-dispatcher: pods in a Docker Engine."""
