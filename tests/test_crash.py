"""A thread that crashes goes on; one that keeps crashing is left to systemd's watchdog."""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY, ROOT, AgentProcess, eventually, v1_only
from dashboard import Dashboard

# A real agent, quick, in which a method raises the first `sys.argv[3]` times that it is called.
CRASHING = """
import dataclasses, os, sys
import tinomail_agent as a
a.PRIME_S, a.CRASH_PAUSE_S, a.HANG_AFTER_S = 0.1, 0.2, 0.5
if sys.argv[1] == "memory":
    rss = int(sys.argv[2]) * a.MIB
    a.own_rss_bytes = lambda: rss
    sys.argv[1:] = ["Collector", "collect", "0"]
owner, name = getattr(a, sys.argv[1]), sys.argv[2]
left, real = int(sys.argv[3]), getattr(owner, name)

def crashing(*args, **named):
    global left
    left -= 1
    if left >= 0:
        raise KeyError("a bug with the key in it: " + os.environ["API_KEY"])
    return real(*args, **named)

setattr(owner, name, crashing)
config = a.load_config(os.environ, os.devnull)
a.set_up_logging(config.log_level, config.api_key, os.environ)
config = dataclasses.replace(config, heartbeat_interval=200)
sys.exit(a.Agent(config, os.environ).run())
"""
# In each thread, what its loop calls, and what it says.
THREADS = {
    "collector": ("Collector", "collect", "the collector failed"),
    "sender": ("Sender", "step", "the sender failed"),
}
every_thread = pytest.mark.parametrize("thread", THREADS)


class Start:
    def __init__(self, folder: Path, dashboard: Dashboard) -> None:
        self._folder = folder
        self._environ = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DASHBOARD_URL": dashboard.url,
            "DASHBOARD_API": dashboard.api, "API_KEY": KEY, "NODE_ROLE": "haraka",
            "ZONEMTA_URL": "off",  # one may run on this machine
            "CHECK_PORTS": "1",
        }

    def __call__(self, thread: str, times: int, **environ: str) -> AgentProcess:
        """thread: or "memory", and then `times` is what the agent takes of it, in MiB."""
        owner_and_name = THREADS[thread][:2] if thread in THREADS else (thread,)
        return AgentProcess(
            self._folder / "log", {**self._environ, **environ},
            ["-c", CRASHING, *owner_and_name, str(times)],
        )


def time_of(line: str) -> datetime:
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")


@v1_only
@every_thread
def test_a_crash_is_logged_counted_and_survived(
    thread: str, tmp_path: Path, dashboard: Dashboard
) -> None:
    process = Start(tmp_path, dashboard)(thread, 3)
    try:
        eventually(lambda: len(dashboard.stored()) >= 3)
        assert process.stop() == 0
    finally:
        process.process.kill()
    assert len(process.lines(THREADS[thread][2])) == 1
    assert len(process.lines("^Traceback")) == 1
    assert KEY not in process.output
    counters = process.counters()
    assert counters["crashes"] == (3 if thread == "sender" else 0)
    if not process.lines("cannot read|hangs"):  # on a machine under load these count, too
        assert counters["collect"] == (0 if thread == "sender" else 3)
    assert counters["delivered"] == counters["sampled"]


@v1_only
@every_thread
def test_one_that_keeps_crashing_is_left_to_the_watchdog(
    thread: str, tmp_path: Path, dashboard: Dashboard
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        notify.settimeout(0.2)
        process = Start(tmp_path, dashboard)(
            thread, 10**6, NOTIFY_SOCKET=path, WATCHDOG_USEC="3000000"
        )
        try:
            eventually(lambda: process.lines(THREADS[thread][2]))
            if thread == "collector":
                # never ready: systemd's TimeoutStartSec ends it
                time.sleep(2)
                with pytest.raises(TimeoutError):
                    notify.recv(4096)
                return
            eventually(lambda: process.lines(f"the {thread} hangs: leaving it to systemd"))
            crash, hang = process.lines(" failed; | hangs: ")
            # not before the watchdog's own time; a busy machine takes longer
            assert time_of(hang) - time_of(crash) >= timedelta(seconds=3)
            with pytest.raises(TimeoutError):
                while True:  # what was sent before
                    notify.recv(4096)
            time.sleep(2)
            with pytest.raises(TimeoutError):
                notify.recv(4096)
        finally:
            process.process.kill()
            process.process.wait(10)


@v1_only
@pytest.mark.parametrize("mib", [64, 65])
def test_an_agent_that_is_too_large_asks_systemd_for_a_restart(
    mib: int, tmp_path: Path, dashboard: Dashboard
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        notify.settimeout(120)
        process = Start(tmp_path, dashboard)("memory", mib, NOTIFY_SOCKET=path)
        try:
            told = [notify.recv(4096).decode().split("\n")[0] for _ in range(2)]
            assert process.stop() == 0
        finally:
            process.process.kill()
    assert told == ["READY=1", "WATCHDOG=trigger" if mib > 64 else "WATCHDOG=1"]
    assert len(process.lines("CRITICAL .*MEMORY_LIMIT_MB=64 allows.*: 65 MiB")) == (mib > 64)


@v1_only
def test_without_systemd_nobody_is_asked_for_a_restart(
    tmp_path: Path, dashboard: Dashboard
) -> None:
    process = Start(tmp_path, dashboard)("memory", 1000)
    try:
        eventually(lambda: len(dashboard.stored()) >= 3)
        assert process.stop() == 0
    finally:
        process.process.kill()
    assert process.lines("CRITICAL") == []
