"""Writes the dashboards in ``grafana/dashboards/``: ``python -m grafana.builder``.

The JSON files are what Grafana imports, and they stand in the repository; nobody edits them. A test builds them again
and compares.

Plain functions and dataclasses make them, not grafana-foundation-sdk: four kinds of panels are in use, and its output
changes with the version of Grafana that a release of it was made for, of which pip picks the last one published and
not the newest Grafana. Names of metrics and labels come from ``exporter.prometheus.metrics``, so that a query that asks
for something else cannot be written.

- ``queries``: pieces of PromQL;
- ``colors``: what a colour means, and the texts that values are shown as;
- ``layout``: the dashboard around the panels: variables, links, places; ``annotations``: marks over the graphs;
- ``panels``, ``tables``: the kinds of panels;
- ``first_screen``: who is stalled, and which alerts fire;
- ``fleet`` (with ``fleet_members``), ``host`` (with ``host_agent``), ``vm`` (with ``vm_identity``): the dashboards.
"""
