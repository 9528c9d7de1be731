"""A simulated host, for the demo and for tests of everything above it."""
