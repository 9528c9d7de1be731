"""Traces notify exits of single threads; only ``event.py`` calls perf_event_open."""
