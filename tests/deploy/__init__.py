"""Tests of `deploy/`: what installs the agent and keeps it within bounds."""
