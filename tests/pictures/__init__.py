"""The pictures of docs/pictures: ``make pictures``.

- ``day``: the day that the dashboards show, of hosts of `tests.live.simulated_fleet`;
- ``answers``: what Prometheus says to a dashboard's queries, as Grafana's data source hands it to panels;
- ``dashboards``: draws them with Grafana's own components in Chromium (``npm/``, ``viewer/``);
- ``status_page``, ``terminal``: pictures of the real agent, on its simulated host;
- ``png``: makes files small.
"""
