"""A user whom agents of tests know, for clients that come over TCP."""

from __future__ import annotations

import base64
from pathlib import Path

USER, PASSWORD = "test", "test"
# bcrypt of the password, at the lowest cost.
_HASH = "$2b$04$P4kUNNKnwaat7wTf4Y.KleeIlRTYEdAw7nep0a1UyxEp2.Wi2OzZq"
HEADERS = {"Authorization": "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}


def write_web_config(directory: Path | str) -> Path:
    """Write a web configuration that asks for this user's password."""
    path = Path(directory) / "web.yml"
    path.write_text(f"basic_auth_users:\n  {USER}: {_HASH}\n")
    return path
