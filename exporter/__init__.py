"""Turns looks at a host into Prometheus metrics and serves them; knows ``kvm/``, and ``kvm/`` does not know it."""
