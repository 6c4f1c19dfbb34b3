"""Pods in virtual machines of their own: the runtime plugin `hyper_vm`."""
