"""A guest with QEMU's user networking that sends bytes to a port of the host's loopback, which it knows as 10.0.2.2.

Debian's kernel and busybox under emulation: KVM makes no difference to how packets leave a guest. Whatever the guest
is to send is a file of its initramfs; what came back goes out by a second serial line, so that no word of the kernel's
is in it.
"""

from __future__ import annotations

import base64
import http.client
import io
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.lab.cpio import CpioWriter
from tests.lab.debian import find_qemu10, open_kernel, open_userland
from tests.lab.modules import read_modules

HOST: Final = "10.0.2.2"
# Far above what is usual, half a minute.
GUEST_SECONDS: Final = 300.0
APPEND: Final = "console=ttyS0 quiet panic=-1 oops=panic random.trust_cpu=on tsc=reliable"
INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
for path in /requests/*; do
    echo "${path##*/} $(nc -w 60 %(host)s %(port)d <$path | base64 | tr -d '\\n')"
done >/dev/ttyS1
poweroff -f
"""


class Answer:
    """What came back of one request: ``status`` is 0 where nothing did."""

    def __init__(self, raw: bytes) -> None:
        self.status, self.body = 0, b""
        if raw:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.sendall(raw)
                theirs.shutdown(socket.SHUT_WR)
                response = http.client.HTTPResponse(ours)
                response.begin()
                self.status, self.body = response.status, response.read()


def write_guest(path: Path, port: int, requests: Mapping[str, bytes]) -> Path:
    """Write the guest's initramfs and return the kernel that boots it."""
    kernel, file = open_kernel("6.12"), io.BytesIO()
    writer = CpioWriter(file)
    writer.add_file("init", (INIT % {"host": HOST, "port": port}).encode(), executable=True)
    writer.add_file("bin/busybox", (open_userland().path / "usr/bin/busybox").read_bytes(), executable=True)
    writer.add_directory("dev")
    modules = read_modules(kernel, ("virtio_pci", "virtio_net"))
    writer.add_file("modules/order", "\n".join(modules).encode())
    for name, data in modules.items():
        writer.add_file(f"modules/{name}.ko", data)
    for name, data in requests.items():
        writer.add_file(f"requests/{name}", data)
    writer.close()
    path.write_bytes(file.getvalue())
    return kernel.image


def send_from_guest(directory: Path, port: int, requests: Mapping[str, bytes]) -> dict[str, Answer]:
    """Let a guest send each of the requests to a port of the host's loopback; returns what came back, by name."""
    image = write_guest(directory / "initramfs", port, requests)
    console, answers = directory / "console", directory / "answers"
    command: list[str | Path] = [find_qemu10(), "-accel", "tcg", "-cpu", "max", "-m", "256"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-kernel", image, "-initrd", directory / "initramfs", "-append", APPEND]
    command += ["-serial", f"file:{console}", "-serial", f"file:{answers}"]
    command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=GUEST_SECONDS)
    lines = [line.split(" ") for line in answers.read_text().splitlines()]
    found = {name: Answer(base64.b64decode(text)) for name, text in lines}
    assert set(found) == set(requests), console.read_text()
    return found
