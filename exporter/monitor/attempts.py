"""Takes steps that must not end the stall monitor: a failure costs one step, and is logged when it changes."""

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
                fields = {"step": name, "err": repr(err)}
                log.error("a step of the stall monitor failed; it goes on", extra={"fields": fields})
                log.debug("a step of the stall monitor failed", exc_info=True)
            return False
        if self._reasons.pop(name, None):
            log.info("the stall monitor works again")
        return True
