"""Names and text of the metrics; the only user of prometheus_client."""
