"""Ports for servers that are given theirs: none is given twice on this machine, and the kernel gives none of them out.

A port found by binding to 0 and closing may be taken by a server of another test before it is used.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

FIRST, LAST = 10_000, 30_000  # below the kernel's own (net.ipv4.ip_local_port_range)


def free_port() -> int:
    path = Path(tempfile.gettempdir()) / f"vgg-test-ports-{os.getuid()}"
    with open(path, "a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or FIRST)
        while True:
            port = port + 1 if port < LAST else FIRST
            try:
                socket.create_server(("127.0.0.1", port)).close()
                break
            except OSError:
                continue  # somebody's server
        file.truncate(0)
        file.write(str(port))
    return port
