"""Tests of what the agent and the service manager tell each other."""
