"""How lines are written: formatters, the journal, the rate limit."""
