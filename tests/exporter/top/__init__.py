"""The table of ``top``."""
