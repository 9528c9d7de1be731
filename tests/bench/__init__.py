"""Benchmarks: how the agent does on a host full of vCPUs, as ratios within one run."""
