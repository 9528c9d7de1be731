"""Which processes hold VMs, and at which fds."""
