"""The few functions of libbpf 1.x that this program uses, through ctypes, typed, raising OSError.

libbpf and not bpf(2) by hand: it moves the fields of the kernel's structs to where the running kernel and its modules
have them (CO-RE), and that is most of its code. Distributions call the package libbpf1 or libbpf; the library is called
libbpf.so.1 everywhere. It loads libelf and zlib and nothing else.

libbpf's messages go to Python's log at level debug. Those of the last failure are kept by ``Messages``, because the
verifier's reason is in them and nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from kvm.errors import SourceUnavailable

log = logging.getLogger(__name__)

LIBRARY = "libbpf.so.1"
OLD_LIBRARY = "libbpf.so.0"
KEPT_MESSAGES = 50
# kernel/bpf/bpf_lru_list.h: LOCAL_FREE_TARGET
LRU_FREE_PER_CPU = 128
# gcc and clang pass a va_list on x86-64 as the address of a struct of 24 bytes (System V ABI, AMD64 supplement, 3.5.7)
VA_LIST_BYTES = 24

_P, _INT, _U32, _SIZE, _STR = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_char_p
_PRINT = ctypes.CFUNCTYPE(_INT, _INT, _STR, _P)
TakeSample = ctypes.CFUNCTYPE(_INT, _P, _P, _SIZE)

# tools/lib/bpf/libbpf.h and bpf.h: name, result, arguments
_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("libbpf_set_print", _P, (_PRINT,)),
    ("libbpf_version_string", _P, ()),
    ("libbpf_num_possible_cpus", _INT, ()),
    ("bpf_object__open_mem", _P, (_P, _SIZE, _P)),
    ("bpf_object__load", _INT, (_P,)),
    ("bpf_object__close", None, (_P,)),
    ("bpf_object__find_program_by_name", _P, (_P, _STR)),
    ("bpf_object__find_map_by_name", _P, (_P, _STR)),
    ("bpf_map__fd", _INT, (_P,)),
    ("bpf_map__set_max_entries", _INT, (_P, _U32)),
    ("bpf_map_get_next_key", _INT, (_INT, _P, _P)),
    ("bpf_map_lookup_elem", _INT, (_INT, _P, _P)),
    ("bpf_map_delete_elem", _INT, (_INT, _P)),
    ("bpf_program__fd", _INT, (_P,)),
    ("bpf_program__set_autoload", _INT, (_P, ctypes.c_bool)),
    ("bpf_program__set_attach_target", _INT, (_P, _INT, _STR)),
    ("bpf_program__attach", _P, (_P,)),
    ("bpf_program__attach_iter", _P, (_P, _P)),
    ("bpf_prog_test_run_opts", _INT, (_INT, _P)),
    ("bpf_link__fd", _INT, (_P,)),
    ("bpf_link__destroy", _INT, (_P,)),
    ("bpf_iter_create", _INT, (_INT,)),
    ("ring_buffer__new", _P, (_INT, TakeSample, _P, _P)),
    ("ring_buffer__epoll_fd", _INT, (_P,)),
    ("ring_buffer__consume", _INT, (_P,)),
    ("ring_buffer__free", None, (_P,)),
)


class Messages:
    """Takes libbpf's messages to the log, and keeps the last ones of each thread."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._vsnprintf = ctypes.CDLL(None).vsnprintf
        self._vsnprintf.argtypes = (_P, _SIZE, _STR, _P)
        self.callback = _PRINT(self._take)

    def kept(self) -> deque[str]:
        """Return this thread's last messages, oldest first."""
        if not hasattr(self._of_thread, "kept"):
            self._of_thread.kept = deque(maxlen=KEPT_MESSAGES)
        kept: deque[str] = self._of_thread.kept
        return kept

    def _take(self, _level: int, format_: bytes, arguments: int) -> int:
        # vsnprintf consumes a va_list, and is called twice: once for the length.
        copy = ctypes.create_string_buffer(ctypes.string_at(arguments, VA_LIST_BYTES), VA_LIST_BYTES)
        length: int = self._vsnprintf(None, 0, format_, copy)
        buffer = ctypes.create_string_buffer(length + 1)
        self._vsnprintf(buffer, length + 1, format_, arguments)
        message = buffer.value.decode(errors="replace").strip()
        log.debug("libbpf", extra={"fields": {"message": message}})
        self.kept().append(message)
        return length


class Library:
    """libbpf.so.1 with typed functions; ``open_library`` makes one."""

    def __init__(self, cdll: ctypes.CDLL, messages: Messages) -> None:
        self.messages = messages
        self._functions: dict[str, Callable[..., int | None]] = {}
        for name, result, arguments in _FUNCTIONS:
            function = getattr(cdll, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._functions["libbpf_set_print"](messages.callback)

    def call(self, name: str, *arguments: object) -> int:
        """Call a function; a negative number or a null pointer is raised as OSError."""
        self.messages.kept().clear()
        result = self._functions[name](*arguments)
        if result is None or result < 0:
            number = ctypes.get_errno() if result is None else -result
            raise OSError(number, os.strerror(number), name)
        return result

    def call_void(self, name: str, *arguments: object) -> None:
        """Call a function whose result tells nothing."""
        self._functions[name](*arguments)

    @property
    def version(self) -> str:
        """The library's version, as it says it."""
        return ctypes.string_at(self.call("libbpf_version_string")).decode()

    def count_lru_entries(self, wanted: int) -> int:
        """Return how large an LRU map has to be to keep so many entries on this machine; raises OSError.

        Each CPU sets free ones aside for itself, so that the others evict what they would not have to: on 128 CPUs, all
        of a map of 16,384.
        """
        return wanted + LRU_FREE_PER_CPU * self.call("libbpf_num_possible_cpus")


def open_library(name: str = LIBRARY) -> Library:
    """Load libbpf; raises SourceUnavailable with what to install."""
    try:
        cdll = ctypes.CDLL(name, use_errno=True)
        return Library(cdll, _messages())
    except (OSError, AttributeError) as err:
        with contextlib.suppress(OSError):
            ctypes.CDLL(OLD_LIBRARY)
            raise SourceUnavailable(
                f"{OLD_LIBRARY} is too old, {name} is needed", "install libbpf 1.0 or later"
            ) from err
        raise SourceUnavailable(
            f"{name} cannot be loaded ({err})", "apt install libbpf1, or dnf install libbpf"
        ) from err


_kept_messages: list[Messages] = []


def _messages() -> Messages:
    """Return the one taker of messages: libbpf has one print function a process, and may call it until the end."""
    if not _kept_messages:
        _kept_messages.append(Messages())
    return _kept_messages[0]
