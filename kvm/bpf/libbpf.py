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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvm import abi
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
_SAMPLE = ctypes.CFUNCTYPE(_INT, _P, _P, _SIZE)

# tools/lib/bpf/libbpf.h and bpf.h: name, result, arguments
_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("libbpf_set_print", _P, (_PRINT,)),
    ("libbpf_version_string", _P, ()),
    ("libbpf_num_possible_cpus", _INT, ()),
    ("libbpf_probe_bpf_helper", _INT, (_INT, _INT, _P)),
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
    ("ring_buffer__new", _P, (_INT, _SAMPLE, _P, _P)),
    ("ring_buffer__epoll_fd", _INT, (_P,)),
    ("ring_buffer__consume", _INT, (_P,)),
    ("ring_buffer__free", None, (_P,)),
)


class _TestRunOpts(ctypes.Structure):
    """struct bpf_test_run_opts (tools/lib/bpf/bpf.h); ``sz`` tells libbpf how much of it we know."""

    _fields_ = (
        ("sz", _SIZE),
        ("data_in", _P),
        ("data_out", _P),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("ctx_in", _P),
        ("ctx_out", _P),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("retval", _U32),
        ("repeat", _INT),
        ("duration", _U32),
        ("flags", _U32),
        ("cpu", _U32),
        ("batch_size", _U32),
    )


class _OpenOpts(ctypes.Structure):
    """struct bpf_object_open_opts (tools/lib/bpf/libbpf.h) as far as we need it: libbpf 0.6 and later have that."""

    _fields_ = (
        ("sz", _SIZE),
        ("object_name", _STR),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", _STR),
        ("reserved", _U32),
        ("kconfig", _STR),
        ("btf_custom_path", _STR),
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

    def has_bpf_loop(self) -> bool:
        """Tell whether this kernel knows bpf_loop() (v5.17), by trying; raises OSError.

        A tracing program cannot be tried without a function to trace; its helpers are those of a raw tracepoint.
        """
        return bool(self.call("libbpf_probe_bpf_helper", abi.BPF_PROG_TYPE_RAW_TRACEPOINT, abi.BPF_FUNC_loop, None))


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


class BpfObject:
    """One object file: opened on construction, loaded by ``load``, closed by ``close`` with all links made from it.

    ``types`` is the BTF that says where the kernel's structs have their fields, None for vmlinux's.
    """

    def __init__(self, library: Library, path: Path, types: bytes | None = None) -> None:
        self.library = library
        self._handle: int | None = None
        self._links: list[int] = []
        self._program_fds: dict[str, int] = {}
        self._types_fd = -1 if types is None else _keep_in_memory(types)
        content = path.read_bytes()
        options = _OpenOpts(sz=ctypes.sizeof(_OpenOpts))
        if self._types_fd >= 0:
            options.btf_custom_path = f"/proc/self/fd/{self._types_fd}".encode()
        try:
            self._handle = library.call("bpf_object__open_mem", content, len(content), ctypes.byref(options))
        except BaseException:
            self.close()
            raise

    def load(self) -> None:
        """Bring maps and programs into the kernel; raises OSError."""
        self.library.call("bpf_object__load", self._handle)
        self._drop_types()

    def close(self) -> None:
        """Take everything out of the kernel again; may be called twice."""
        while self._links:
            self.library.call_void("bpf_link__destroy", self._links.pop())
        if self._handle is not None:
            self.library.call_void("bpf_object__close", self._handle)
            self._handle = None
        self._drop_types()

    def _drop_types(self) -> None:
        if self._types_fd >= 0:
            os.close(self._types_fd)
            self._types_fd = -1

    def skip_program(self, name: str) -> None:
        """Leave a program out of ``load``."""
        self.library.call("bpf_program__set_autoload", self._find_program(name), False)

    def set_target(self, name: str, function: str) -> None:
        """Choose the kernel function that an fentry or fexit program is for; raises OSError, ESRCH if there is none."""
        self.library.call("bpf_program__set_attach_target", self._find_program(name), 0, function.encode())

    def set_entries(self, name: str, entries: int) -> None:
        """Set the size of a map, before ``load``."""
        self.library.call("bpf_map__set_max_entries", self._find_map(name), entries)

    def map_fd(self, name: str) -> int:
        """Return the fd of a map, or of a section of global variables such as ".bss"; the object owns it."""
        return self.library.call("bpf_map__fd", self._find_map(name))

    def read_map(self, name: str, key_bytes: int, value_bytes: int) -> dict[bytes, bytes]:
        """Read all of a hash map; a key that is deleted meanwhile is left out. Raises OSError."""
        fd = self.map_fd(name)
        found: dict[bytes, bytes] = {}
        key, value = ctypes.create_string_buffer(key_bytes), ctypes.create_string_buffer(value_bytes)
        previous = None
        while True:
            try:
                self.library.call("bpf_map_get_next_key", fd, previous, key)
            except FileNotFoundError:
                return found
            previous = ctypes.create_string_buffer(key.raw, key_bytes)
            if key.raw in found:
                return found  # the previous key is gone, so the kernel has begun anew
            with contextlib.suppress(FileNotFoundError):
                self.library.call("bpf_map_lookup_elem", fd, key, value)
                found[key.raw] = value.raw

    def delete_key(self, name: str, key: bytes) -> None:
        """Delete one key of a hash map; raises OSError, FileNotFoundError if it is not there."""
        self.library.call("bpf_map_delete_elem", self.map_fd(name), key)

    def run(self, name: str) -> None:
        """Run a program once, in this thread; raises OSError."""
        options = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts))
        self.library.call("bpf_prog_test_run_opts", self.program_fd(name), ctypes.byref(options))

    def program_fd(self, name: str) -> int:
        """Return the fd of a loaded program; the object owns it."""
        if name not in self._program_fds:
            self._program_fds[name] = self.library.call("bpf_program__fd", self._find_program(name))
        return self._program_fds[name]

    def attach(self, name: str) -> None:
        """Attach an fentry or fexit program; raises OSError."""
        self._links.append(self.library.call("bpf_program__attach", self._find_program(name)))

    def attach_iterator(self, name: str) -> int:
        """Return the fd of a new iterator link; the object owns it."""
        link = self.library.call("bpf_program__attach_iter", self._find_program(name), None)
        self._links.append(link)
        return self.library.call("bpf_link__fd", link)

    def _find_program(self, name: str) -> int:
        return self.library.call("bpf_object__find_program_by_name", self._handle, name.encode())

    def _find_map(self, name: str) -> int:
        return self.library.call("bpf_object__find_map_by_name", self._handle, name.encode())


def _keep_in_memory(content: bytes) -> int:
    """Return the fd of a file without a name: libbpf takes types by a path only."""
    fd = os.memfd_create("types", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_iterator(library: Library, link_fd: int, buffer: bytearray) -> Iterator[memoryview]:
    """Run an iterator from beginning to end, yielding what it writes; raises OSError."""
    fd = library.call("bpf_iter_create", link_fd)
    view = memoryview(buffer)
    try:
        while True:
            try:
                length = os.readv(fd, [buffer])
            except BlockingIOError:
                continue  # a million objects without output: the kernel lets others run, and wants to be asked on
            if not length:
                return
            yield view[:length]
    finally:
        view.release()
        os.close(fd)


class RingBuffer:
    """Delivers the records of a ring buffer map to ``on_record``; ``fd`` becomes readable when there are some."""

    def __init__(self, library: Library, map_fd: int, on_record: Callable[[bytes], None]) -> None:
        def take(_context: int, data: int, size: int) -> int:
            on_record(ctypes.string_at(data, size))
            return 0

        self._library = library
        self._callback = _SAMPLE(take)
        self._handle: int | None = library.call("ring_buffer__new", map_fd, self._callback, None, None)
        self.fd: int = library.call("ring_buffer__epoll_fd", self._handle)

    def consume(self) -> int:
        """Deliver what has come, without waiting, and return how many records that were."""
        return self._library.call("ring_buffer__consume", self._handle)

    def close(self) -> None:
        """Give the buffer back; may be called twice."""
        if self._handle is not None:
            self._library.call_void("ring_buffer__free", self._handle)
            self._handle = None
