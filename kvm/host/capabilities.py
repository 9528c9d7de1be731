"""Gives up the capabilities that nothing needs: what this process never holds, nobody can take over with it.

Capabilities belong to a thread (capabilities(7)), so this is for the first one, before there are others: those that it
starts, and programs that it runs, have no more than it then has. With no_new_privs no program gives any back.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, NamedTuple

from kvm import abi, syscalls
from kvm.host.privileges import IMPLIED_BY

_NAMES: Final = {
    number: name for name, number in vars(abi).items() if re.match("CAP_[A-Z]", name) and isinstance(number, int)
}
# What a bit set has room for. Kernels have fewer, and answer EINVAL.
_ROOM: Final = 64


class GivenUp(NamedTuple):
    """What was given up: names of what is still held, how many capabilities are not any more, and what was refused.

    ``bounding_problem`` says why programs that gain capabilities by uid 0 or by their file may still have more;
    no_new_privs stands in the way of all but what root's own programs get.
    """

    kept: tuple[str, ...]
    dropped: int
    bounding_problem: str = ""


def choose_capabilities(needed: Collection[str], held: int) -> int:
    """Return what to keep of the bit set ``held``: what is needed, or what implies it where only that is held."""
    kept = 0
    for name in needed:
        found = getattr(abi, name) if held >> getattr(abi, name) & 1 else getattr(abi, IMPLIED_BY.get(name, name))
        kept |= 1 << found
    return kept & held


def give_up_capabilities(needed: Collection[str]) -> GivenUp:
    """Keep the capabilities that are needed, as far as they are held, and no other; raises OSError.

    To shrink the bounding set takes CAP_SETPCAP, which only root has by itself.
    """
    syscalls.prctl(abi.PR_SET_NO_NEW_PRIVS, 1)
    _effective, permitted, inheritable = syscalls.capget()
    kept = choose_capabilities(needed, permitted)
    problem = ""
    try:
        _shrink_bounding_set(kept)
    except OSError as err:
        problem = f"{err.strerror}: it takes CAP_SETPCAP"
    syscalls.capset(kept, kept, inheritable & kept)
    return GivenUp(name_capabilities(kept), (permitted & ~kept).bit_count(), problem)


def name_capabilities(capabilities: int) -> tuple[str, ...]:
    """Return the names of a bit set's capabilities, as far as they concern this program, in the kernel's order."""
    return tuple(name for number, name in sorted(_NAMES.items()) if capabilities >> number & 1)


def _shrink_bounding_set(kept: int) -> None:
    """Take out of the bounding set what is not kept; raises OSError."""
    for number in range(_ROOM):
        try:
            is_there = syscalls.prctl(abi.PR_CAPBSET_READ, number)
        except OSError:
            return  # EINVAL: this kernel has no more of them
        if is_there and not kept >> number & 1:
            syscalls.prctl(abi.PR_CAPBSET_DROP, number)
