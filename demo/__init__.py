"""A node on one machine: real pods in a private Docker Engine on a private network, routed by a policy file."""
