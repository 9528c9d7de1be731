"""Pictures of the dashboards on the simulated day, drawn in Chromium by Grafana's own components.

``npm/`` pins these (Apache-2.0), ``viewer/`` is the page that puts them together. Nothing here is of Grafana's server
or of its data source for Prometheus, which are under another licence.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.grafana.dashboard_queries import Json, read_dashboards
from tests.live.chromium import Tab, open_tab
from tests.live.history_writer import JOB, write_history
from tests.live.monitored_hosts import find_rule_files
from tests.live.prometheus_server import Prometheus, open_prometheus
from tests.pictures import day
from tests.pictures.answers import View, ask_dashboard
from tests.pictures.png import shrink
from tests.pictures.site import open_site

# A usual small screen.
WIDTH, HEIGHT = 1366, 768
DRAW_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Picture:
    """A picture of a dashboard: the whole page, or what a screen shows of it before anybody scrolls."""

    name: str
    dashboard: str
    instance: str = ""
    vm: str = ""
    whole: bool = True

    def make_view(self, dashboard: Json) -> View:
        choices, texts = {}, {"job": "All", "instance": "All"}
        if self.instance:
            choices = {"job": JOB, "instance": self.instance}
            texts = dict(choices)
        if self.vm:
            choices["vm"], texts["vm"] = self.vm, day.STALLED_VM_TEXT
        return View(dashboard, day.END, choices, texts)


def list_pictures() -> tuple[Picture, ...]:
    """Return what is drawn: the fleet; host and VM of the one that is stuck; a host whose agent is dead."""
    return (
        Picture("fleet-first-screen", "kvm-notify-fleet", whole=False),
        Picture("fleet", "kvm-notify-fleet"),
        Picture("host", "kvm-notify-host", day.STALLED_HOST),
        Picture("host-dead", "kvm-notify-host", day.DEAD_HOST, whole=False),
        Picture("vm", "kvm-notify-vm", day.STALLED_HOST, day.find_stalled_vm()),
    )


@dataclass(frozen=True)
class Painter:
    """What drawing takes: a Prometheus that has the day, the viewer's address and files, and a browser."""

    prometheus: Prometheus
    url: str
    web: Path
    tab: Tab

    def draw(self, picture: Picture, dashboard: Json, directory: Path) -> Path:
        """Write one picture; raises RuntimeError where the page says that something went wrong."""
        view = picture.make_view(dashboard)
        (self.web / "task.json").write_text(json.dumps(ask_dashboard(view, self.prometheus)))
        self.tab.resize(WIDTH, HEIGHT)
        self.tab.open(f"{self.url}/index.html?end={view.end * 1000:.0f}")
        self.tab.wait_until("window.drawn !== null", DRAW_SECONDS)
        if (drawn := self.tab.evaluate("window.drawn")) != "ok":
            raise RuntimeError(f"{picture.name}: {drawn}")
        if problems := self.tab.list_problems():
            raise RuntimeError(f"{picture.name}: {problems}; {self.tab.list_requests()}")
        path = directory / f"{picture.name}.png"
        self.tab.make_status_view(path, picture.whole)
        return path


def draw_dashboards(directory: Path, pictures: Iterable[Picture]) -> None:
    """Write pictures of the dashboards; takes a minute."""
    dashboards = {dashboard["uid"]: dashboard for dashboard in read_dashboards()}
    with tempfile.TemporaryDirectory(prefix="pictures-") as temporary:
        web, history = Path(temporary) / "web", Path(temporary) / "day"
        web.mkdir()
        history.mkdir()
        write_history(history, find_rule_files(), day.END, day.make_day(), day.SAMPLING, alerts=True)
        with open_prometheus(history, {}) as prometheus, open_site(web) as url, open_tab() as tab:
            painter = Painter(prometheus, url, web, tab)
            for picture in pictures:
                shrink(painter.draw(picture, dashboards[picture.dashboard], directory))
