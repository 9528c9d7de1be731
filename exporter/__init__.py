"""Turns snapshots of a host into Prometheus metrics and serves them; ``kvm/`` knows nothing of it."""
