"""Dashboards, alert rules and provisioning for Grafana and Prometheus."""
