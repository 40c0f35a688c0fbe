"""Tries from inside the service's sandbox what a bug in the agent could be used for.

Runs as the main program of a copy of the unit (test_sandbox.py). Prints JSON: name -> "yes" or why
not. The numbers of system calls are those of x86_64 and, from 425 on, of every machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NOT_LOOKED_AT = ("/proc", "/sys")


def syscall(number: int, *args: Any) -> None:
    if LIBC.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def bind(kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))


def listen() -> None:
    with socket.socket() as sock:
        sock.listen()  # unbound: the kernel takes a port


def connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), 5).close()


def read(path: str) -> None:
    with open(path, "rb") as stream:
        stream.read(1)


def writable() -> list[str]:
    """Return the folders in which a file can be made."""
    found = []
    for folder, names, _ in os.walk("/"):
        names[:] = [name for name in names if os.path.join(folder, name) not in NOT_LOOKED_AT]
        path = os.path.join(folder, "probe")
        try:
            with open(path, "x"):
                found.append(folder)
            os.unlink(path)
        except OSError:
            pass
    return found


def run(path: str) -> None:
    pid = os.posix_spawn(path, [path], {})  # subprocess would need a pipe
    if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(status, f"it ended with {status}")


def run_from(folder: str) -> None:
    """Run a program that was written to a folder."""
    path = shutil.copy("/bin/true", os.path.join(folder, "probe"))
    try:
        os.chmod(path, 0o700)
        run(path)
    finally:
        os.unlink(path)


TRIALS: dict[str, Callable[[], object]] = {
    "run a program": lambda: run("/bin/true"),
    "listen on a TCP port": listen,
    "bind a TCP port": lambda: bind(socket.SOCK_STREAM),
    "bind a UDP port": lambda: bind(socket.SOCK_DGRAM),
    "connect to a port": lambda: connect(int(sys.argv[1])),
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "memfd": lambda: os.memfd_create("probe"),
    "pipe": os.pipe,
    "io_uring": lambda: syscall(425, 1, ctypes.create_string_buffer(128)),
    "keyring": lambda: syscall(250, 1, ctypes.c_char_p(b"probe")),  # KEYCTL_JOIN_SESSION_KEYRING
    "SysV shared memory": lambda: syscall(29, 0, 4096, 0o1600),
    "message queue": lambda: syscall(240, ctypes.c_char_p(b"probe"), os.O_CREAT, 0o600, None),
    "lock memory": lambda: syscall(151, 1),  # mlockall
    "user namespace": lambda: syscall(272, 0x10000000),  # unshare(CLONE_NEWUSER)
    "ptrace": lambda: syscall(101, 16, os.getppid(), 0, 0),
    "writable and executable memory": lambda: __import__("mmap").mmap(-1, 4096, prot=7),
    "change the clock": lambda: syscall(227, 0, ctypes.create_string_buffer(16)),
    "set its priority": lambda: os.nice(-5),
    "read /etc/shadow": lambda: read("/etc/shadow"),
    "read the settings of root": lambda: read("/etc/tinomail-agent/agent.env"),
    "read the environment of PID 1": lambda: read("/proc/1/environ"),
    "read /dev/kmsg": lambda: read("/dev/kmsg"),
    "signal PID 1": lambda: os.kill(1, 0),
}


def answer(trial: Callable[[], object]) -> str:
    try:
        trial()
    except Exception as error:
        return str(error)
    return "yes"


def main() -> int:
    folders = writable()
    found: dict[str, Any] = {name: answer(trial) for name, trial in TRIALS.items()}
    found["write"] = folders
    found["run what it wrote"] = {folder: answer(partial(run_from, folder)) for folder in folders}
    print(json.dumps(found, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
