"""Decides which vCPU makes no forward progress, and writes the warning; pure, the clock is an argument."""
