"""Does what must not end the watch, whatever happens: what goes wrong costs one step, and is said when it changes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Attempts:
    """The steps that may fail, each with the reason why it does."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    async def take(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Take a step, and tell whether it has gone well."""
        name = step.__qualname__
        try:
            await step()
        except Exception as err:
            if self._reasons.get(name) != repr(err):
                self._reasons[name] = repr(err)
                log.error("watching for stalls failed, and goes on", extra={"fields": {"step": name, "err": repr(err)}})
                log.debug("watching for stalls failed", exc_info=True)
            return False
        if self._reasons.pop(name, None):
            log.info("watching for stalls works again")
        return True
