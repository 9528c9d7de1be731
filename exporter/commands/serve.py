"""``serve`` and ``demo``: serve metrics over HTTP until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from exporter.commands.least_privilege import give_up_the_rest
from exporter.commands.lifetime import Lifetime, run_until_signalled
from exporter.flag_values import choose_paths, choose_statistics
from exporter.flags import LOOPBACK_ADDRESS, OPEN_ADDRESS, SOCKET_ADDRESS
from exporter.history.kept_total import KeptTotal, read_boot_id
from exporter.history.recorder import SnapshotRecorder
from exporter.prometheus.metrics import STATE_FILE_SUCCESS, WEB_CONFIG_RELOAD_SUCCESS, Metric
from exporter.service.heartbeat import Heartbeat, describe_state
from exporter.service.manager import open_service_manager
from exporter.service.sockets import take_sockets
from exporter.web.listeners import Address, ListenError, UnixAddress, find_address
from exporter.web.peer_credentials import TrustedPeers
from exporter.web.settings import ServerSettings
from exporter.wiring import build_collector, open_host, open_simulated_monitor, open_stall_monitor
from kvm.simulated.host import SimulatedHost

log = logging.getLogger(__name__)

HARMLESS_SIGNALS: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# A snapshot makes some thousand objects and lets go of as many, none of them in a circle. At Python's own thresholds of
# 700, 10 and 10 that had the collector run seven times a scrape of 10,000 vCPUs: a tenth of its time. But a connection
# leaves a circle of 7 objects, as asyncio's transport holds one of its own methods: at 50,000 a stranger's grew to 8 MB
# before they were looked for, and those of connections that lasted, for as long as ten times that.
GC_THRESHOLDS: Final = (10_000, 5, 5)


def run_server(arguments: argparse.Namespace) -> int:
    """Serve this host, or a simulated one, until a signal ends it."""
    for number in HARMLESS_SIGNALS:  # by default they would end the agent, and systemd would call that a success
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # a service manager that finds the agent hung sends SIGABRT: then the log says where it hangs
    # Importing aiohttp takes longer than all the rest of what the other commands do.
    from exporter.web.server import serve  # noqa: PLC0415
    from exporter.web.web_config_file import WebConfigFile  # noqa: PLC0415

    web_config = WebConfigFile(arguments.web_config_file) if arguments.web_config_file else None
    settings = build_settings(arguments, is_protected=bool(web_config and web_config.protects))
    # Before the first thread, as each has capabilities of its own; and sockets are opened with what is left.
    give_up_the_rest(arguments, (*settings.addresses, *settings.optional_addresses))
    gc.set_threshold(*GC_THRESHOLDS)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(open_service_manager(os.environ, os.getpid()))
        if arguments.command == "demo":
            simulated = SimulatedHost(selection=choose_statistics(arguments))
            recorder = SnapshotRecorder(simulated)
            monitor = open_simulated_monitor(arguments, recorder, simulated)
        else:
            host = open_host(
                arguments.sources, stack, paths=choose_paths(arguments), selection=choose_statistics(arguments)
            )
            recorder = SnapshotRecorder(host.reader)
            monitor = open_stall_monitor(arguments, recorder, host.vcpus)
        kept = open_kept_total(arguments)
        file_states: dict[Metric, Callable[[], bool]] = {}
        if web_config:
            file_states[WEB_CONFIG_RELOAD_SUCCESS] = lambda: web_config.reload_succeeded
        if kept:
            file_states[STATE_FILE_SUCCESS] = lambda: kept.succeeded
        first_total = kept.take() if kept else 0
        collector = build_collector(recorder, arguments, monitor, file_states, first_total)

        async def serve_until(stop: asyncio.Event, tell_ready: Callable[[], None]) -> None:
            await serve(collector, recorder, settings, stop, monitor, web_config=web_config, tell_ready=tell_ready)
            if kept:
                kept.keep(collector.total)

        def describe() -> str:
            report = monitor.report(with_verdicts=False)
            return describe_state(recorder.snapshot, report, time.monotonic(), has_failed=recorder.has_failed)

        heartbeat = Heartbeat(
            manager,
            describe,
            (lambda: recorder.reading_since, lambda: monitor.busy_since),
        )
        reload = web_config.reload if web_config else tell_nothing_to_reload
        asyncio.run(run_until_signalled(monitor, serve_until, heartbeat, Lifetime(manager, reload)))
    return 0


def open_kept_total(arguments: argparse.Namespace) -> KeptTotal | None:
    """Return what keeps the host's total over a restart, None where nothing is to."""
    if arguments.command == "demo" or arguments.state_file is None:
        return None
    return KeptTotal(arguments.state_file, read_boot_id(choose_paths(arguments).procfs))


def build_settings(arguments: argparse.Namespace, *, is_protected: bool) -> ServerSettings:
    """Return how to serve; takes the sockets that systemd has passed on. Raises BadSocket and ListenError."""
    passed = choose_passed(arguments.systemd_socket, take_sockets(os.environ, os.getpid()))
    addresses = () if passed else choose_addresses(arguments.listen_addresses, is_protected=is_protected)
    is_demo = arguments.command == "demo"
    # Not for a demo: its socket would stand where the host's own agent is asked.
    has_own_socket = arguments.listen_addresses or is_demo or SOCKET_ADDRESS in map(find_address, passed)
    return ServerSettings(
        addresses=tuple(admit_group(address, arguments.details_gid) for address in addresses),
        optional_addresses=()
        if has_own_socket
        else (admit_group(make_socket_directory(SOCKET_ADDRESS), arguments.details_gid),),
        passed_sockets=passed,
        is_simulated=is_demo,
        trusted_peers=TrustedPeers(os.geteuid(), arguments.details_gid),
        telemetry_path=arguments.telemetry_path,
        max_requests=arguments.max_requests,
        exporter_metrics=not arguments.disable_exporter_metrics,
        host_name=platform.node(),
    )


def choose_passed(wanted: bool, passed: Sequence[socket.socket]) -> tuple[socket.socket, ...]:
    """Return the sockets of systemd's to serve at; raises ListenError where there ought to be some."""
    if wanted and not passed:
        raise ListenError("--web.systemd-socket: no socket was passed on; is a .socket of the agent's unit active?")
    if wanted or not passed:
        return tuple(passed)
    addresses = ",".join(str(find_address(sock)) for sock in passed)
    remedy = "add --web.systemd-socket, or systemctl disable --now the .socket"
    fields = {"address": addresses, "remedy": remedy}
    log.warning("systemd's sockets are not served, and whoever connects there waits", extra={"fields": fields})
    for sock in passed:
        sock.close()
    return ()


def choose_addresses(wanted: Sequence[Address] | None, *, is_protected: bool) -> tuple[Address, ...]:
    """Return where to listen; unless somebody says where, on the network only if the web configuration protects it."""
    if wanted:
        return tuple(dict.fromkeys(wanted))
    if is_protected:
        return (OPEN_ADDRESS,)
    how = f"--web.config.file with TLS or users, or --web.listen-address={OPEN_ADDRESS} for a network that is trusted"
    log.info(
        "without TLS or authentication only this machine is served",
        extra={"fields": {"address": str(LOOPBACK_ADDRESS), "remedy": how}},
    )
    return (LOOPBACK_ADDRESS,)


def admit_group(address: Address, gid: int | None) -> Address:
    """Let a group connect to an address that is a Unix socket: it may see details there, so it must get there."""
    return replace(address, gid=gid) if isinstance(address, UnixAddress) else address


def make_socket_directory(address: UnixAddress) -> UnixAddress:
    """Make the directory of the default socket, where nobody has: a unit does by ``RuntimeDirectory=``."""
    with contextlib.suppress(OSError):  # listening there then says what is the matter
        Path(address.path).parent.mkdir(mode=0o755, exist_ok=True)
    return address


async def tell_nothing_to_reload(reason: str) -> None:
    """Say that there is no file to read anew."""
    log.info("nothing to reload without --web.config.file", extra={"fields": {"reason": reason}})
