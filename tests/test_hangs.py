"""What hangs on the machine stops no sample: real files, mounts and disks that do not answer.

The scene plays in namespaces of its own: FIFOs are mounted over /proc/PID/cmdline, an automount
has a daemon that never answers, and the file system of STATE_DIRECTORY is frozen.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from conftest import KEY, AgentProcess, eventually, running_agents
from dashboard import Dashboard
from test_side_by_side import block_disk, inside, libc, mount, need, out, plug_in

HANGING = 50
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h
AUTOFS_IOC_CATATONIC = 0x9362  # linux/auto_fs.h


def start_process(folder: Path, name: str) -> int:
    """Start a process of this name that waits; return its pid."""
    program = folder / name
    if not program.exists():
        shutil.copy("/bin/sleep", program)
    pid = subprocess.Popen([program, "300"]).pid
    eventually(lambda: Path(f"/proc/{pid}/comm").read_text() == f"{name}\n")
    return pid


def hide_cmdline(folder: Path, pid: int) -> Path:
    """Let a read of a process' command line block; return the FIFO that it waits for."""
    fifo = folder / f"cmdline-{pid}"
    os.mkfifo(fifo)
    out("mount", "--bind", fifo, f"/proc/{pid}/cmdline")
    return fifo


def hang_mount(path: str) -> int:
    """Mount an automount whose daemon does not answer; return the daemon's pid."""
    os.mkdir(path)
    daemon = os.fork()
    if daemon == 0:
        os.setpgid(0, 0)
        reader, writer = os.pipe()
        options = f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
        if libc.mount(b"stuck", path.encode(), b"autofs", 0, options.encode()) == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            top = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            signal.sigwait({signal.SIGTERM})  # it reads nothing of what it is asked at `reader`
            fcntl.ioctl(top, AUTOFS_IOC_CATATONIC, 0)  # all who wait get an error
        os._exit(reader)
    eventually(lambda: f" {path} " in Path("/proc/self/mountinfo").read_text(), 20, path)
    return daemon


class Systemd:
    """The notify socket: what came on it, and when."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)
        self.messages: list[bytes] = []

    def has(self, message: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self._socket.recv(4096))
        return any(message in one.split(b"\n") for one in self.messages)


def release(fifo: Path, pid: int) -> None:
    out("umount", "--lazy", f"/proc/{pid}/cmdline")
    with contextlib.suppress(OSError):  # nobody waits at most of them
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


def has_ended(agent: AgentProcess) -> bool:
    return len(agent.lines("no longer hangs$")) == len(agent.lines("(?<!longer) hangs$"))


def scene_all_hangs(folder: str, disk: str, seconds: float) -> dict[str, Any]:
    plug_in()
    place = Path(folder)
    mount("-t", "tmpfs", "scene", "/media")
    mount(disk, "/media/state")
    start_process(place, "redis-server")
    stuck = [start_process(place, "node") for _ in range(HANGING)]
    fifos = [hide_cmdline(place, pid) for pid in stuck]
    automount = hang_mount("/media/stuck")
    systemd = Systemd(place)
    state = os.open("/media/state", os.O_RDONLY)
    with Dashboard(KEY) as server, running_agents(place) as start, contextlib.ExitStack() as stack:
        began = time.monotonic()
        agent = start(
            server.url, NODE_ROLE="auto", DISK_PATHS="/,/media/stuck", CHECK_MODE="listen",
            NOTIFY_SOCKET=systemd.path, STATE_DIRECTORY="/media/state",
        )
        eventually(lambda: systemd.has(b"READY=1"), 60)
        ready_s = time.monotonic() - began
        fcntl.ioctl(state, FIFREEZE, 0)
        stack.callback(fcntl.ioctl, state, FITHAW, 0)
        eventually(lambda: len(server.stored()) >= 2, 60)
        time.sleep(seconds)
        threads = len(os.listdir(f"/proc/{agent.process.pid}/task"))
        rows = server.query("SELECT timestamp, disk_used_percent, processes"
                            " FROM metrics_system ORDER BY timestamp")
        log = agent.output
        stack.close()
        os.kill(automount, signal.SIGTERM)
        os.waitpid(automount, 0)
        for fifo, pid in zip(fifos, stuck):
            release(fifo, pid)
        with contextlib.suppress(AssertionError):  # the test shows the log
            eventually(lambda: has_ended(agent), 60)
        count = len(server.stored())
        eventually(lambda: len(server.stored()) > count + 1, 60)
        last = server.query("SELECT processes, disk_used_percent FROM metrics_system"
                            " ORDER BY timestamp DESC LIMIT 1")[0]
        rest = len(os.listdir(f"/proc/{agent.process.pid}/task"))
        code = agent.stop()
    return {"ready_s": ready_s, "last": last, "state": os.listdir("/media/state"),
            "threads": (threads, rest), "rows": rows, "log": log,
            "whole": agent.output, "code": code}


def test_all_hangs_at_once(tmp_path: Path) -> None:
    """50 command lines, an automount and the file system of the state: samples go on."""
    need("ip", "mkfs.ext4")
    seconds = float(os.environ.get("HANG_SECONDS", "12"))
    with block_disk(32) as disk:
        out("mkfs.ext4", "-q", disk)
        found = inside(scene_all_hangs, folder=str(tmp_path), disk=disk, seconds=seconds)
    print(found["whole"], {name: found[name] for name in ("ready_s", "threads", "state")})
    assert found["ready_s"] < 5 + os.getloadavg()[0]  # a second more for each that waits here
    times = [datetime.fromisoformat(row[0].rstrip("Z")).timestamp() for row in found["rows"]]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(gaps) >= seconds - 3
    assert max(gaps[3:]) < 2.5, gaps  # what is new costs a second once
    for _, disk_used_percent, processes in found["rows"]:
        known = json.loads(processes)
        assert known["redis"]["status"] == "running"
        assert not {"haraka", "wildduck", "zonemta"} & known.keys()  # one of the 50 may be it
        assert disk_used_percent is None  # what hangs may be the fullest
    hang = [line for line in found["log"].splitlines() if line.endswith(" hangs")]
    assert len(hang) == len(set(hang))
    # on a busy machine a sample may wait, and its file too
    others = [line for line in hang if "STATE_DIRECTORY" not in line]
    assert len(others) == 4 + 1 + 1  # four are enough of a kind
    # three threads and a timer; six that hang; five workers at rest, one of each kind
    assert found["threads"][0] <= 4 + 6 + 5 and found["threads"][1] <= 4 + 5
    # those behind the four may hang for a moment, while one after the other is released
    lines = found["whole"].splitlines()
    ends = [line for line in lines if line.endswith(" no longer hangs")]
    assert len(ends) == sum(line.endswith(" hangs") for line in lines) - len(ends) >= len(hang)
    assert "haraka" in json.loads(found["last"][0]) and found["last"][1] > 0
    assert "services" in found["state"]
    assert found["code"] == 0 and "Traceback" not in found["whole"]


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
