"""Tests of the agent on a KVM with the project's patches, for emulated CPUs that take turns."""
