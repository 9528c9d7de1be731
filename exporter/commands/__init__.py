"""The commands: serve, once, top, check, drill; a file each, which ``exporter/cli.py`` calls, and what they share."""
