"""The engine: polls counters, is triggered, and runs trace sessions; never imports ``exporter/web``."""
