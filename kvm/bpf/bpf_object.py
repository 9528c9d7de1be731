"""BPF object files in the kernel: their programs, maps and links, and what these write."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from kvm.bpf.libbpf import Library, TakeSample

# Maps, programs, and what libbpf tries out before. Short of fds it takes what it could not try for what this kernel
# cannot do, and remembers that for as long as the process lives.
LOAD_FDS: Final = 24

_P, _INT, _U32, _SIZE, _STR = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_char_p


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


class BpfObject:
    """One object file: opened on construction, loaded by ``load``, closed by ``close`` with all links made from it.

    ``types`` is the BTF that says where the kernel's structs have their fields, None for vmlinux's.
    """

    def __init__(self, library: Library, path: Path, types: bytes | None = None) -> None:
        self.library = library
        self._handle: int | None = None
        self._links: list[int] = []
        self._program_fds: dict[str, int] = {}
        self._has_read_types = False
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
        """Bring maps and programs into the kernel; raises OSError, EMFILE where fewer than LOAD_FDS fds are left."""
        with contextlib.ExitStack() as stack:
            for _ in range(LOAD_FDS):
                stack.callback(os.close, os.open("/", os.O_PATH | os.O_CLOEXEC))
        self._has_read_types = False
        self.library.call("bpf_object__load", self._handle)
        self._drop_types()

    def close(self) -> None:
        """Take everything out of the kernel again; may be called twice."""
        while self._links:
            self.library.call_void("bpf_link__destroy", self._links.pop())
        if self._handle is not None:
            if self._has_read_types:
                # What ``set_target`` has read of vmlinux and of each module, 6 MB and many fds, libbpf lets go of in
                # load only, be it in vain. (Of vmlinux's in close too since 1.3: Linux kernel commit 29d67fdebc42
                # "libbpf: Free btf_vmlinux when closing bpf_object".)
                with contextlib.suppress(OSError):
                    self.load()
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
        self._has_read_types = True
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
        self._callback = TakeSample(take)
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
