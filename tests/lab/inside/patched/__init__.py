"""Tests for a KVM with the project's patches: what it counts, traces and warns of."""
