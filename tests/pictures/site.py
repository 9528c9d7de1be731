"""Serves the viewer of ``viewer/`` to a browser: what esbuild makes of it, Grafana's icons, and its font."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from tests.agents import ROOT

INSTALLED: Final = ROOT / ".cache" / "pictures-npm"
MODULES: Final = INSTALLED / "node_modules"
VIEWER: Final = Path(__file__).parent / "viewer"
ICONS: Final = MODULES / "@grafana" / "ui" / "dist" / "public" / "img" / "icons"
# Where Grafana's styles look for its font, and the file of it that npm brings.
FONTS: Final = {
    f"/fonts/inter/Inter-{name}.woff2": MODULES / f"@fontsource/inter/files/inter-latin-{weight}-normal.woff2"
    for name, weight in (("Regular", 400), ("Medium", 500))
}
KINDS: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class _Site(BaseHTTPRequestHandler):
    web = Path()

    def do_GET(self) -> None:
        path = self.find_file(self.path.partition("?")[0])
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", KINDS.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def find_file(self, name: str) -> Path:
        if name.startswith("/img/icons/"):
            return ICONS / name.removeprefix("/img/icons/")
        return FONTS.get(name) or (VIEWER if name == "/index.html" else self.web) / name.lstrip("/")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def open_site(web: Path) -> Iterator[str]:
    """Build the viewer into ``web`` and serve it, with whatever else is put there; the address."""
    subprocess.run(["node", str(INSTALLED / "build.mjs"), str(VIEWER), str(web)], check=True)
    handler = type("Site", (_Site,), {"web": web})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
