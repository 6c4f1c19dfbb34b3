"""Stream plugin of cri-dispatcher: exec, attach and port-forward."""
