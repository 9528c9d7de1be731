"""The commands: serve, once, check, drill; a file each, which ``exporter/cli.py`` calls, and what they share."""
