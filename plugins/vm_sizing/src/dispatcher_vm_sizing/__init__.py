"""Sizer plugin of cri-dispatcher: how large a virtual machine a pod needs."""
