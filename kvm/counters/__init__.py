"""The ways to read counters, one file each, behind the interface in ``source.py``."""
