"""Tests that run inside the lab, one directory for each state of lockdown; collected nowhere else.

They read KVM with readers of their own (`kvm_readers`, `perf_reader`), so that what the project's
readers say is compared with something that shares no line with them.
"""
