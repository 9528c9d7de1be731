"""Gives up what the flags do not need, before anything is served: a capability that is not held cannot be abused."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Final

from exporter.flag_values import choose_paths
from exporter.web.listeners import Address, TcpAddress, UnixAddress
from kvm.host.capabilities import give_up_capabilities
from kvm.host.paths import HostPaths
from kvm.host.privileges import Privileges, read_privileges

log = logging.getLogger(__name__)

FIRST_FREE_PORT: Final = 1024


def find_features(arguments: argparse.Namespace) -> frozenset[str]:
    """Return the names of the features that the flags of serve or demo switch on, as Privileges has them."""
    if arguments.command == "demo":
        return frozenset()
    sources = {f"source {name}" for name in arguments.sources}
    return frozenset({*sources, "owners", "RIPs", "lockdown", *(["trigger"] if arguments.trigger_bpf else [])})


def find_needed(arguments: argparse.Namespace, addresses: Iterable[Address], privileges: Privileges) -> frozenset[str]:
    """Return the capabilities that the features need on this host, and those to listen at these addresses."""
    wanted = find_features(arguments)
    needed = {name for feature in privileges.find_features() if feature.name in wanted for name in feature.needs}
    for address in addresses:
        if isinstance(address, TcpAddress) and 0 < address.port < FIRST_FREE_PORT:
            needed.add("CAP_NET_BIND_SERVICE")
        if isinstance(address, UnixAddress) and address.gid is not None:
            needed.add("CAP_CHOWN")
    return frozenset(needed)


def give_up_the_rest(arguments: argparse.Namespace, addresses: Iterable[Address]) -> None:
    """Give up every other capability, as far as that is allowed, and tell; raises nothing."""
    paths = HostPaths() if arguments.command == "demo" else choose_paths(arguments)
    needed = find_needed(arguments, addresses, read_privileges(paths.procfs, paths.sysfs))
    try:
        given_up = give_up_capabilities(needed)
    except OSError as err:
        remedy = "let the service call prctl(2) and capset(2): its seccomp filter forbids them"
        log.warning("capabilities are not given up", extra={"fields": {"err": str(err), "remedy": remedy}})
        return
    fields = {"kept": ",".join(given_up.kept) or "none", "dropped": given_up.dropped}
    if given_up.bounding_problem:
        fields["bounding_set"] = given_up.bounding_problem
    log.info("capabilities that no flag needs are given up", extra={"fields": fields})
