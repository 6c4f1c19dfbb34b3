"""What the VM plugins share: placing a machine monitor, its network on the host, its arguments, and talking to it."""
