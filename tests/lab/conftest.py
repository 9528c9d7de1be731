"""Keeps the tests that belong inside a booted kernel from being collected anywhere else."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("KVM_LAB_INSIDE") == "1" else ["inside"]
