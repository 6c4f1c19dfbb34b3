"""What a virtual machine boots: a kernel, and an initramfs with the agent and the modules that it loads."""
