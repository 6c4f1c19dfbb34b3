"""Network plugin of cri-dispatcher: pod networks by CNI plugins."""
