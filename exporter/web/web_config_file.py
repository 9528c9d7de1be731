"""The file of ``--web.config.file`` while the agent runs: read at the start, at SIGHUP, and when it has changed.

What is broken never comes into force: the old configuration stays, the log says why, and
``kvm_exporter_web_config_reload_success`` is 0 until a file is right again. A certificate that is replaced before its
key is such a case, for a moment. TLS cannot be switched on or off in a running agent, and the last authentication
cannot be taken away: whoever scrapes would not notice, and a slip of the pen would open what was closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from exporter.logs.rate_limit import RateLimitedLog
from exporter.web.request_limit import RequestLimit
from exporter.web.tls import ServerContext, load_context, read_small_file
from exporter.web.web_config import WebConfig, describe_web_config, parse_web_config
from exporter.web.yaml_mapping import ConfigError

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration in force: what the file says, what was made of it, and the state of its files before that."""

    config: WebConfig
    context: ServerContext | None
    limit: RequestLimit | None
    state: object


def load_web_config(path: Path, clock: Callable[[], float] = time.monotonic) -> LoadedConfig:
    """Read the file and all that it names; raises ConfigError.

    The state of each file is read before the file: what changes in between is seen at the next check.
    """
    try:
        main_state = _read_state((path,))
        text = read_small_file(path)
    except OSError as err:
        raise ConfigError(f"{path}: it cannot be read: {err.strerror or err}") from err
    config = parse_web_config(text, path)
    state = main_state + _read_state(config.tls.files if config.tls else ())
    context = load_context(config.tls) if config.tls else None
    limit = RequestLimit(config.rate_limit, clock) if config.rate_limit else None
    return LoadedConfig(config, context, limit, state)


class WebConfigFile:
    """The file and the configuration in force; raises ConfigError where there is none to begin with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reloading = asyncio.Lock()
        self._rate_limited_log = RateLimitedLog()
        # Told of the configuration before and the one now.
        self.on_reload: Callable[[LoadedConfig, LoadedConfig], None] | None = None
        self.reload_succeeded = True
        self.current = load_web_config(path)
        self._state = self.current.state
        fields = {"file": str(path), "has": describe_web_config(self.current.config)}
        log.info("web configuration", extra={"fields": fields})

    @property
    def protects(self) -> bool:
        """Whether clients are asked who they are, or cannot be overheard."""
        return self.current.config.tls is not None or self.current.config.authenticates

    async def watch(self, check_seconds: float = CHECK_SECONDS) -> None:
        """Reload whenever a file has changed, for as long as nobody cancels it."""
        while True:
            await asyncio.sleep(check_seconds)
            try:
                if await asyncio.to_thread(self._read_state_now) != self._state:
                    await self.reload("changed")
            except Exception as err:  # noqa: BLE001 - else no change would ever be noticed again
                self._state, self.reload_succeeded = None, False  # the next check reads everything anew
                self._rate_limited_log.write(logging.ERROR, "web configuration not checked", err=repr(err))

    def _read_state_now(self) -> object:
        tls = self.current.config.tls
        return _read_state((self._path, *(tls.files if tls else ())))

    async def reload(self, reason: str) -> None:
        """Read everything anew, and let it come into force if it is right."""
        async with self._reloading:
            state = await asyncio.to_thread(self._read_state_now)
            fields = {"file": str(self._path), "reason": reason}
            try:
                loaded = await asyncio.to_thread(load_web_config, self._path)
                _refuse_switch(self._path, self.current.config, loaded.config)
            except Exception as err:  # noqa: BLE001 - whatever is wrong, the old one stays, and that is told
                # Where it was not the file's fault, as without fds, it is tried again at the next check.
                is_refused = isinstance(err, ConfigError)
                self._state, self.reload_succeeded = state if is_refused else None, False
                told = err if is_refused else repr(err)
                text = "web configuration not reloaded, the old one stays"
                self._rate_limited_log.write(logging.ERROR, text, **fields, err=told)
                return
            if loaded.config.rate_limit == self.current.config.rate_limit:  # a reload is no fresh burst
                loaded = replace(loaded, limit=self.current.limit)
            before, self.current = self.current, loaded
            self._state, self.reload_succeeded = loaded.state, True
            if self.on_reload:
                self.on_reload(before, loaded)
            log.info(
                "web configuration reloaded", extra={"fields": fields | {"has": describe_web_config(loaded.config)}}
            )


def _refuse_switch(path: Path, old: WebConfig, new: WebConfig) -> None:
    if (old.tls is None) is not (new.tls is None):
        raise ConfigError(f"{path}: switching TLS {'off' if old.tls else 'on'} takes a restart of the agent")
    if old.authenticates and not new.authenticates:
        raise ConfigError(f"{path}: taking the last authentication away takes a restart of the agent")


def _read_state(files: Iterable[Path]) -> tuple[object, ...]:
    """Return what changes when one of the files does."""
    return tuple(_read_stat(file) for file in files)


def _read_stat(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as err:
        return err.errno
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
