"""Tests for a kernel whose lockdown is ``none``."""
