"""The status page, from plain values to HTML; does no I/O."""
