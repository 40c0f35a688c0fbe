"""Loopback connections for the bench, both ends held here: `python load.py COUNT ADDRESS`.

Prints a line when all are up; they last until stdin ends. Closed by RST, which leaves no
TIME_WAIT behind.
"""

from __future__ import annotations

import resource
import socket
import struct
import sys

RESET_AT_CLOSE = struct.pack("ii", 1, 0)


def connect(count: int, address: str) -> list[socket.socket]:
    """Return both ends of `count` connections to one address."""
    ends = []
    with socket.create_server((address, 0), backlog=16) as listener:
        target = listener.getsockname()
        for _ in range(count):
            client = socket.create_connection(target)
            server, _ = listener.accept()
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                ends.append(end)
    return ends


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ends = connect(int(sys.argv[1]), sys.argv[2])
    print(len(ends), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
