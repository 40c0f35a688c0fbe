"""The collector: processes, roles, what happens when something cannot be read, and time."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FakeClock, eventually
from conftest import make_config as config_of
from dashboard import SAMPLE

import tinomail_agent as agent


def make_config(**settings: Any) -> agent.Config:
    """Return a Config; a ZoneMTA that runs on this machine is not asked."""
    return config_of(**{"zonemta_url": "off", **settings})


def body_of(collector: agent.Collector) -> dict[str, Any]:
    """Take a sample, once enough time has passed for the kernel's ticks to tell the CPU shares."""
    time.sleep(0.06)
    return agent.unpack(collector.collect().packed)


# --- the table of processes, on a made-up /proc


@pytest.mark.parametrize("comm", ["a) b", ") S 1 1", "redis-server", "(x", "\xff"])
def test_stat_with_any_comm(comm: str) -> None:
    rest = "S 7 " + " ".join(str(i) for i in range(5, 53))
    found = agent.parse_stat(f"42 ({comm}) {rest}\n".encode())
    # fields 14 and 15 are utime and stime, 20 the threads, 22 the start (proc_pid_stat(5))
    assert found == agent.Process(42, comm, "S", 7, 14 + 15, 20, 22)


@pytest.mark.parametrize("data", [b"", b"1 (a", b"1 (a) S 1 1", b"x (a) S " + b"1 " * 30])
def test_a_torn_stat_cannot_be_read(data: bytes) -> None:
    with pytest.raises(agent.READ_ERRORS):
        agent.parse_stat(data)


class FakeProc:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.add(1, "systemd", ppid=0)

    def add(
        self, pid: int, comm: str, cmdline: bytes = b"", *, ppid: int = 1, state: str = "S",
        ticks: int = 0, start: int = 100, anon: int = 1024, shared: int = 512,
        cgroup: str = "0::/\n", threads: int = 1,
    ) -> None:
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        rest = [state, ppid, *[0] * 9, ticks, *[0] * 5, threads, 0, start, *[0] * 30]
        (folder / "stat").write_text(f"{pid} ({comm}) {' '.join(map(str, rest))}\n")
        (folder / "cmdline").write_bytes(cmdline)
        (folder / "cgroup").write_text(cgroup)
        pages = [1000, *(kib * 1024 // agent.PAGE_BYTES for kib in (anon + shared, shared))]
        (folder / "statm").write_text(" ".join(map(str, [*pages, 0, 0, 0, 0])) + "\n")

    def remove(self, pid: int) -> None:
        for path in (self.root / str(pid)).iterdir():
            path.unlink()
        (self.root / str(pid)).rmdir()


def unexpected(name: str, why: str) -> None:
    raise AssertionError(f"{name}: {why}")


def make_table(proc: FakeProc, clock: FakeClock, **more: Any) -> agent.ProcessTable:
    worker = agent.Worker(10.0, agent.Problems())
    return agent.ProcessTable(str(proc.root), clock.monotonic, unexpected, worker, **more)


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_all_processes_of_a_service_count(proc: FakeProc, clock: FakeClock) -> None:
    def add(ticks: int) -> None:
        proc.add(50, "rspamd", ppid=1, start=500, ticks=ticks, anon=2048, shared=8192)
        proc.add(51, "rspamd", ppid=50, start=510, ticks=ticks * 2, anon=4096, shared=10240)
        proc.add(52, "rspamd", ppid=50, start=510, ticks=ticks * 3, anon=4096, shared=9216)

    table = make_table(proc, clock)
    add(10)
    table.read()
    clock.advance(2)
    add(10 + agent.CLOCK_TICKS // 10)  # 0.1, 0.2 and 0.3 s more in 2 s: 30 % of a core
    found = table.read()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - 500 / agent.CLOCK_TICKS
    assert found["rspamd"].pop("uptime_seconds") == pytest.approx(age, abs=60)
    assert found["rspamd"] == {
        "status": "running", "pid": 50, "cpu_percent": 30.0,
        # 2 of the first, what the forked ones have more, and what the largest has of files but
        # for common libraries
        "memory_mb": 10.0,
    }
    assert found["redis"] == {"status": "not_found", "pid": None, "memory_mb": 0, "cpu_percent": 0}
    assert set(found) == {"zonemta", "wildduck", "haraka", "rspamd", "redis", "mongodb"}


def test_the_oldest_is_the_main_one_of_several(proc: FakeProc, clock: FakeClock) -> None:
    proc.add(90, "redis-server", start=300)
    proc.add(80, "redis-server", start=400)
    table = make_table(proc, clock)
    assert table.read()["redis"]["pid"] == 90


def test_a_child_of_the_same_moment_is_not_the_main_one(proc: FakeProc, clock: FakeClock) -> None:
    """Its pid may be lower, once the kernel has given away the highest."""
    proc.add(900, "rspamd", start=500)
    proc.add(52, "rspamd", start=500, ppid=900)
    assert make_table(proc, clock).read()["rspamd"]["pid"] == 900


@pytest.mark.parametrize(("state", "status"), [("R", "running"), ("D", "running"),
                                               ("T", "stopped"), ("t", "stopped"),
                                               ("Z", "stopped")])
def test_status(state: str, status: str, proc: FakeProc, clock: FakeClock) -> None:
    proc.add(90, "mongod", state=state)
    table = make_table(proc, clock)
    assert table.read()["mongodb"]["status"] == status


def test_a_title_that_comes_late_is_seen(proc: FakeProc, clock: FakeClock) -> None:
    table = make_table(proc, clock)
    proc.add(70, "node", b"node\0server.js\0")
    assert table.read()["wildduck"]["status"] == "not_found"
    proc.add(70, "wildduck", b"wildduck\0\0\0")
    assert table.read()["wildduck"]["pid"] == 70


def test_a_yes_is_asked_again(proc: FakeProc, clock: FakeClock) -> None:
    """npm is `node npm-cli.js` before it sets its title; a wrapper may call exec()."""
    table = make_table(proc, clock)
    unit = "0::/system.slice/wildduck.service\n"
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME) * agent.CLOCK_TICKS)  # it has just started
    proc.add(70, "node", b"node\0server.js\0", cgroup=unit, start=now)
    assert table.read()["wildduck"]["pid"] == 70
    proc.add(70, "node", b"node\0/usr/bin/nodemon\0server.js\0", cgroup=unit, start=now)
    assert table.read()["wildduck"]["status"] == "not_found"
    proc.add(70, "node", b"node\0server.js\0", cgroup=unit, start=now)
    assert table.read()["wildduck"]["pid"] == 70
    proc.add(70, "npm start", b"npm start\0\0\0", cgroup=unit, start=now)
    assert table.read()["wildduck"]["status"] == "not_found"


def test_a_dead_daemon_stays_what_it_was(proc: FakeProc, clock: FakeClock) -> None:
    """A zombie's command line is empty: Haraka's name would be node."""
    table = make_table(proc, clock)
    proc.add(70, "node", b"node\0/opt/haraka/bin/haraka\0")
    assert table.read()["haraka"]["status"] == "running"
    proc.add(70, "node", b"", state="Z")
    assert table.read()["haraka"]["status"] == "stopped"
    proc.add(71, "node", b"node\0/opt/haraka/bin/haraka\0", start=200)
    found = table.read()["haraka"]
    assert (found["status"], found["pid"]) == ("running", 71)


def test_threads_that_outlive_the_main_one(proc: FakeProc, clock: FakeClock) -> None:
    proc.add(70, "mongod", b"", state="Z", threads=3)
    assert make_table(proc, clock).read()["mongodb"]["status"] == "running"


MAIN_THREAD_ENDS = """
import ctypes, threading, time
open("/proc/self/comm", "w").write("mongod")
block = bytearray(40 << 20)
threading.Thread(target=time.sleep, args=(300,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def only(folder: Path, *pids: int) -> str:
    """Return a /proc with these real processes alone: others of their names may run here."""
    for pid in (1, *pids):
        (folder / str(pid)).symlink_to(f"/proc/{pid}")
    return str(folder)


def test_a_real_process_whose_main_thread_has_ended(tmp_path: Path) -> None:
    """It reads as a zombie without command line; its other threads run on."""
    process = subprocess.Popen([sys.executable, "-c", MAIN_THREAD_ENDS])
    try:
        stat = Path(f"/proc/{process.pid}/stat")
        eventually(lambda: b") Z " in stat.read_bytes(), 60)
        worker = agent.Worker(10.0, agent.Problems())
        here = only(tmp_path, process.pid)
        found = agent.ProcessTable(here, time.monotonic, unexpected, worker).read()["mongodb"]
        assert (found["status"], found["pid"]) == ("running", process.pid)
        assert found["memory_mb"] > 40
    finally:
        process.kill()
        process.wait()


def test_a_helper_beside_the_daemon_is_none(proc: FakeProc, clock: FakeClock) -> None:
    """The unit tells of a bare script, unless a process in it is the daemon by its own title."""
    unit = "0::/system.slice/wildduck.service\n"
    other = "0::/system.slice/wildduck@2.service\n"
    table = make_table(proc, clock)
    proc.add(70, "node", b"node\0index.js\0", cgroup=unit, start=50, anon=9000)
    assert table.read()["wildduck"]["pid"] == 70
    proc.add(71, "wildduck", b"wildduck\0\0", cgroup=unit, anon=2048, shared=0)
    found = table.read()["wildduck"]
    assert (found["pid"], found["memory_mb"]) == (71, 2.0)
    proc.add(72, "imap-store", b"imap-store\0\0", cgroup=other, anon=1024, shared=0)
    found = table.read()["wildduck"]
    assert (found["pid"], found["memory_mb"]) == (71, 3.0)


def test_a_dead_process_of_its_name_makes_no_other_a_helper(
    proc: FakeProc, clock: FakeClock
) -> None:
    unit = "0::/system.slice/wildduck.service\n"
    proc.add(70, "node", b"node\0index.js\0", cgroup=unit)
    proc.add(71, "wildduck", state="Z", cgroup=unit)
    found = make_table(proc, clock).read()["wildduck"]
    assert (found["status"], found["pid"]) == ("running", 70)


def test_what_may_be_a_service_and_hangs_is_not_reported_as_missing(
    proc: FakeProc, clock: FakeClock
) -> None:
    """Another process shows that Haraka runs; of the other services on Node nothing is known."""
    missing: list[str] = []
    table = agent.ProcessTable(
        str(proc.root), clock.monotonic, lambda name, why: missing.append(name),
        agent.Worker(0.5, agent.Problems()),
    )
    proc.add(60, "node", b"node\0/opt/haraka/bin/haraka\0")
    proc.add(70, "node")
    (proc.root / "70/cmdline").unlink()
    os.mkfifo(proc.root / "70/cmdline")
    for _ in range(agent.LOOK_AGAIN + 1):
        missing.clear()
        found = table.read()
        assert found["haraka"]["pid"] == 60
        assert found["redis"]["status"] == "not_found"
        assert sorted(missing) == ["wildduck", "zonemta"] and not {*missing} & {*found}
    os.close(os.open(proc.root / "70/cmdline", os.O_WRONLY | os.O_NONBLOCK))


def test_the_children_of_a_zonemta_that_bears_another_name(
    proc: FakeProc, clock: FakeClock
) -> None:
    """For a moment they bear their script's name: the main process stays the main one."""
    unit = "0::/system.slice/zone-mta.service\n"
    table = make_table(proc, clock)
    proc.add(70, "relay: master p", b"relay: master process\0\0", cgroup=unit)
    proc.add(71, "node", b"node\0/opt/zone-mta/services/sender.js\0", cgroup=unit, ppid=70)
    found = table.read()["zonemta"]
    assert (found["status"], found["pid"], found["memory_mb"]) == ("running", 70, 2.0)
    proc.add(70, "zone-mta: maste", b"zone-mta: master process\0\0", cgroup=unit)
    found = table.read()["zonemta"]
    assert (found["status"], found["pid"], found["memory_mb"]) == ("running", 70, 2.0)


def test_a_new_process_with_an_old_pid_brings_no_absurd_rate(
    proc: FakeProc, clock: FakeClock
) -> None:
    table = make_table(proc, clock)
    proc.add(60, "mongod", ticks=500_000, start=100)
    table.read()
    clock.advance(10)
    proc.add(60, "mongod", ticks=3, start=200)
    assert table.read()["mongodb"]["cpu_percent"] < 1


def test_the_cpu_time_of_a_process_that_has_just_started_counts(
    proc: FakeProc, clock: FakeClock
) -> None:
    """As of a daemon in a crash loop. Of one that ran before the agent, nothing is known yet."""
    table = make_table(proc, clock)
    table.read()
    clock.advance(10)
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME) * agent.CLOCK_TICKS)
    proc.add(60, "mongod", ticks=2 * agent.CLOCK_TICKS, start=now)
    proc.add(61, "redis-server", ticks=2 * agent.CLOCK_TICKS, start=now - 60 * agent.CLOCK_TICKS)
    found = table.read()
    assert (found["mongodb"]["cpu_percent"], found["redis"]["cpu_percent"]) == (20.0, 0.0)


def test_cpu_time_that_goes_back(proc: FakeProc, clock: FakeClock) -> None:
    """Neither the reading that fell nor the one after it gives an absurd figure."""
    table = make_table(proc, clock)
    shares = []
    for ticks in (50_000, 50_100, 900, 50_300, 50_400):
        proc.add(60, "mongod", ticks=ticks)
        shares.append(table.read()["mongodb"]["cpu_percent"])
        clock.advance(10)
    assert shares == [0.0, 10.0, 0.0, 10.0, 10.0]


def test_a_process_that_ends_while_we_look(proc: FakeProc, clock: FakeClock) -> None:
    proc.add(60, "mongod")
    (proc.root / "61").mkdir()  # nothing left in it
    (proc.root / "60/statm").unlink()
    found = make_table(proc, clock).read()["mongodb"]
    assert (found["pid"], found["memory_mb"]) == (60, 0.0)


def test_hidden_processes_are_not_reported_as_missing(
    proc: FakeProc, caplog: pytest.LogCaptureFixture
) -> None:
    proc.remove(1)
    collector = agent.Collector(make_config(check_ports="1"), proc=str(proc.root))
    with caplog.at_level(logging.WARNING):
        bodies = [body_of(collector) for _ in range(3)]
    assert all("processes" not in body for body in bodies)
    said = [r.getMessage() for r in caplog.records if "read processes" in r.getMessage()]
    assert said == ["cannot read processes: other users' processes are hidden (hidepid on /proc); "
                    "it is left out of the samples"]


def test_real_processes_are_found_and_measured(tmp_path: Path) -> None:
    """A process of our own whose program bears the name of a daemon, and one that looks like it."""
    script = "import time\nblock = bytearray(64 << 20)\nblock[::4096] = bytes(len(block) // 4096)\n"
    daemon = tmp_path / "mongod"
    daemon.symlink_to(sys.executable)
    environ = {**os.environ, "PYTHONHOME": sys.base_prefix}
    real = subprocess.Popen(
        [str(daemon), "-S", "-c", script + "print(1, flush=True)\nwhile True: pass"],
        env=environ, stdout=subprocess.PIPE,
    )
    alike = subprocess.Popen(["tail", "-f", "/dev/null", "--pid", str(real.pid)])
    try:
        assert real.stdout and real.stdout.readline()
        (tmp_path / "proc").mkdir()
        table = agent.ProcessTable(
            only(tmp_path / "proc", real.pid, alike.pid), time.monotonic, unexpected,
            agent.Worker(10.0, agent.Problems()),
        )
        table.read()
        time.sleep(1.0)
        found = table.read()["mongodb"]
        ps = psutil.Process(real.pid)
        assert found["pid"] == real.pid
        assert found["status"] == "running"
        assert found["memory_mb"] == pytest.approx(ps.memory_info().rss / agent.MIB, rel=0.1)
        assert found["memory_mb"] > 64
        assert found["cpu_percent"] > 2  # it spins, as far as a busy machine lets it
        os.kill(real.pid, 19)  # SIGSTOP
        eventually(lambda: table.read()["mongodb"]["status"] == "stopped", 5)
    finally:
        for one in (alike, real):
            one.kill()
            one.wait()
        assert real.stdout
        real.stdout.close()
    assert table.read()["mongodb"]["status"] == "not_found"


def test_a_wrapper_that_becomes_the_daemon_under_the_same_name(
    proc: FakeProc, clock: FakeClock
) -> None:
    """exec() keeps pid, start time and, if the script bears the daemon's name, comm."""
    table = make_table(proc, clock)
    proc.add(70, "redis-server", b"/bin/bash\0/usr/local/bin/redis-server\0")
    assert table.read()["redis"]["status"] == "not_found"
    (proc.root / "70/cmdline").write_bytes(b"/usr/bin/redis-server 127.0.0.1:6379\0")
    found = [table.read()["redis"]["status"] for _ in range(agent.LOOK_AGAIN)]
    assert found[-1] == "running"


@pytest.mark.parametrize(("age_s", "times"), [(5, agent.LOOK_AGAIN), (9999, 1)])
def test_a_no_is_looked_at_now_and_then(
    age_s: float, times: int, proc: FakeProc, clock: FakeClock
) -> None:
    """A process may call exec(), most often when it is young; of most, nothing is read mostly."""
    table = make_table(proc, clock)
    started = time.clock_gettime(time.CLOCK_BOOTTIME) - age_s
    for pid in range(70, 90):
        proc.add(pid, "bash", b"bash\0", start=int(started * agent.CLOCK_TICKS))
    read: list[str] = []
    real = agent.read_bytes

    def count(path: str, limit: int = -1) -> bytes:
        read.append(path)
        return real(path, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "read_bytes", count)
        table.read()
        read.clear()
        for _ in range(agent.LOOK_AGAIN):
            table.read()
    assert sum("/1/stat" not in path for path in read) == 20 * times
    proc.add(75, "redis-server", b"redis-server *:6379\0")
    found = [table.read()["redis"]["status"] for _ in range(agent.LOOK_AGAIN)]
    assert "running" in found and found[-1] == "running"


def test_a_node_process_that_changes_its_script_is_seen(
    proc: FakeProc, clock: FakeClock
) -> None:
    table = make_table(proc, clock)
    proc.add(70, "node", b"node\0other.js\0")
    assert table.read()["wildduck"]["status"] == "not_found"
    proc.add(70, "node", b"node\0/opt/wildduck/server.js\0")
    assert table.read()["wildduck"]["status"] == "running"


def test_watched_processes(proc: FakeProc, clock: FakeClock) -> None:
    proc.add(60, "master", b"/usr/lib/postfix/sbin/master\0-w\0")
    proc.add(61, "a-very-long-nam", b"x\0")
    config = make_config(watch_processes="postfix=master, long=a-very-long-name-indeed,x=none")
    collector = agent.Collector(config, proc=str(proc.root))
    found = agent.unpack(collector.collect().packed)["processes"]
    assert {name: p["pid"] for name, p in found.items() if name not in agent.SERVICES} == {
        "postfix": 60, "long": 61, "x": None,
    }


# --- memory, by cgroup


def make_cgroup(root: Path, path: str, pids: str, stat: str) -> None:
    folder = root / path.strip("/")
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").write_text(pids)
    (folder / "memory.stat").write_text(stat)


V1 = "8:memory:/system.slice/rspamd.service\n0::/system.slice/rspamd.service\n"
V2 = "0::/system.slice/rspamd.service\n"


@pytest.mark.parametrize(
    ("cgroup", "path", "stat"),
    [
        (V2, "system.slice/rspamd.service", "anon 10485760\nfile 99999999\nfile_mapped 2097152\n"),
        (V1, "memory/system.slice/rspamd.service",
         "cache 99999999\ntotal_rss 10485760\ntotal_mapped_file 2097152\n"),
    ],
)
@pytest.mark.parametrize(
    ("procs", "memory_mb"),
    [
        # its own: the 10 that the kernel accounts for, and the 6 of the program in the largest
        # 12 shared (the rest are libraries that others use too), of which 2 are in the account
        ("50\n51\n", 16.0),
        ("50\n51\n99\n", 22.0),  # another process is in it: 8 + 8, and the same 6
        ("", 22.0),
    ],
)
def test_memory_is_what_the_cgroup_accounts_for(
    cgroup: str, path: str, stat: str, procs: str, memory_mb: float,
    proc: FakeProc, clock: FakeClock, tmp_path: Path,
) -> None:
    root = tmp_path / "cgroups"
    make_cgroup(root, path, procs, stat)
    for pid in (50, 51):
        proc.add(pid, "rspamd", cgroup=cgroup, anon=8 * 1024, shared=12 * 1024)
    table = make_table(proc, clock, cgroup_root=str(root))
    assert table.read()["rspamd"]["memory_mb"] == memory_mb


@pytest.mark.parametrize("has_cgroup", [False, True])
def test_little_memory_of_files_and_shared_counts(
    has_cgroup: bool, proc: FakeProc, clock: FakeClock, tmp_path: Path
) -> None:
    """1,000 KiB of its own, and 700 of its program or of shared memory."""
    root, path = tmp_path / "cgroups", "system.slice/mongod.service"
    if has_cgroup:
        make_cgroup(root, path, "50\n", f"anon {1000 * 1024}\nfile_mapped {700 * 1024}\n")
    proc.add(50, "mongod", cgroup=f"0::/{path}\n", anon=1000,
             shared=0 if has_cgroup else agent.COMMON_LIBRARIES_KIB + 700)
    table = make_table(proc, clock, cgroup_root=str(root))
    assert table.read()["mongodb"]["memory_mb"] == 1.7


@pytest.mark.parametrize("anon", [4096, 7 << 20])
def test_memory_that_was_charged_elsewhere(
    anon: int, proc: FakeProc, clock: FakeClock, tmp_path: Path
) -> None:
    """A process that was moved into its cgroup later left its pages with the one before."""
    root = tmp_path / "cgroups"
    make_cgroup(root, "system.slice/rspamd.service", "50\n", f"anon {anon}\nfile_mapped 0\n")
    proc.add(50, "rspamd", cgroup=V2, anon=8 * 1024, shared=1024)
    table = make_table(proc, clock, cgroup_root=str(root))
    assert table.read()["rspamd"]["memory_mb"] == 8.0


def test_the_program_of_node_is_shared_between_services(
    proc: FakeProc, clock: FakeClock, tmp_path: Path
) -> None:
    """Its 36 MiB are charged to whoever read them first, often to a run that has ended."""
    root = tmp_path / "cgroups"
    for name, title, pids in (
        ("haraka", "Haraka (worker)", (50,)), ("zone-mta", "zone-mta: x", (60, 61, 62)),
    ):
        unit = f"system.slice/{name}.service"
        make_cgroup(root, unit, "\n".join(map(str, pids)), "anon 52428800\nfile_mapped 0\n")
        for pid in pids:
            proc.add(
                pid, title[:15], f"{title}\0\0".encode(), cgroup=f"0::/{unit}\n", anon=9999,
                shared=42 * 1024,
            )
    table = make_table(proc, clock, cgroup_root=str(root))
    found = table.read()
    assert (found["haraka"]["memory_mb"], found["zonemta"]["memory_mb"]) == (50 + 9, 50 + 27)


def test_the_program_of_node_is_shared_with_tools_beside_the_service(
    proc: FakeProc, clock: FakeClock
) -> None:
    proc.add(50, "node", b"node\0/opt/haraka/bin/haraka\0", cgroup="0::/pm2\n", shared=42 * 1024)
    proc.add(51, "npm start", b"npm start\0\0", cgroup="0::/pm2\n")
    proc.add(52, "bash", b"bash\0", cgroup="0::/pm2\n")
    proc.add(53, "node", b"node\0other.js\0", cgroup="0::/elsewhere\n")
    assert make_table(proc, clock).read()["haraka"]["memory_mb"] == 1 + 36 / 2


def test_two_instances_with_a_cgroup_each(
    proc: FakeProc, clock: FakeClock, tmp_path: Path
) -> None:
    root = tmp_path / "cgroups"
    for pid in (50, 51):
        name = f"system.slice/redis@{pid}.service"
        make_cgroup(root, name, f"{pid}\n", "anon 3145728\nfile_mapped 1048576\n")
        proc.add(pid, "redis-server", cgroup=f"0::/{name}\n", anon=1024)
    table = make_table(proc, clock, cgroup_root=str(root))
    assert table.read()["redis"]["memory_mb"] == 8.0


@pytest.mark.parametrize("cgroup", ["0::/\n", "0::/../outside\n", "", "1:cpu:/x\n"])
def test_a_cgroup_that_is_not_the_services_own(
    cgroup: str, proc: FakeProc, clock: FakeClock, tmp_path: Path
) -> None:
    proc.add(50, "rspamd", cgroup=cgroup, anon=1024, shared=7 * 1024)
    table = make_table(proc, clock, cgroup_root=str(tmp_path / "no"))
    assert table.read()["rspamd"]["memory_mb"] == 2.0


# --- roles


def running(*names: str) -> dict[str, bool]:
    return {name: name in names for name in agent.SERVICES}


def beat(seen: agent.ServicesSeen, clock: FakeClock, count: int, *names: str) -> str:
    """Let so many samples pass in which these services run; return the role."""
    for _ in range(count):
        clock.advance(15)
        seen.update(running(*names))
    return seen.role()


def test_the_role_is_the_first_of_what_is_at_home(clock: FakeClock) -> None:
    seen = agent.ServicesSeen(clock=clock.monotonic)
    assert beat(seen, clock, 2, "redis", "wildduck") == "unknown"
    assert beat(seen, clock, 1, "redis") == "redis"  # three in a row; WildDuck had two
    assert beat(seen, clock, 3, "rspamd") == "rspamd"  # redis is only restarting
    assert seen.services() == ["rspamd", "redis"]
    assert beat(seen, clock, 3, "zonemta", "wildduck", "haraka") == "zonemta-outbound"


def test_after_ten_minutes_it_takes_ten_minutes(clock: FakeClock) -> None:
    """What any local user starts for a moment, under whatever name, changes nothing."""
    seen = agent.ServicesSeen(clock=clock.monotonic)
    assert beat(seen, clock, 40, "redis") == "redis"
    assert beat(seen, clock, 39, "redis", "zonemta") == "redis"
    assert beat(seen, clock, 1, "redis") == "redis"
    assert beat(seen, clock, 40, "redis", "zonemta") == "redis"
    assert beat(seen, clock, 1, "redis", "zonemta") == "zonemta-outbound"


def test_what_is_absent_for_a_week_has_moved_out(clock: FakeClock, tmp_path: Path) -> None:
    first = agent.ServicesSeen(str(tmp_path), clock=clock.monotonic)
    assert beat(first, clock, 3, "wildduck", "redis") == "wildduck"
    assert json.loads((tmp_path / "services").read_text()) == {"wildduck": 0, "redis": 0}
    day = 24 * 240
    assert beat(first, clock, 5 * day, "redis") == "wildduck"
    again = agent.ServicesSeen(str(tmp_path), clock=clock.monotonic)  # the agent's next run
    assert beat(again, clock, 2 * day - 300, "redis") == "wildduck"
    assert beat(again, clock, 600, "redis") == "redis"
    assert json.loads((tmp_path / "services").read_text()) == {"redis": 0}


def test_what_came_back_is_not_saved_as_absent(clock: FakeClock, tmp_path: Path) -> None:
    """Else the next run would forget it after the rest of the 7 days."""
    seen = agent.ServicesSeen(str(tmp_path), clock=clock.monotonic)
    beat(seen, clock, 3, "wildduck")
    beat(seen, clock, 5 * 240 + 1)
    assert json.loads((tmp_path / "services").read_text())["wildduck"] >= 5 * 3600
    beat(seen, clock, 1, "wildduck")
    assert json.loads((tmp_path / "services").read_text()) == {"wildduck": 0}


def test_of_a_service_that_is_missing_in_a_sample_nothing_is_known(clock: FakeClock) -> None:
    """Its command line hangs: it is neither running nor absent."""
    seen = agent.ServicesSeen(clock=clock.monotonic)
    for known in ({"redis": True}, {}, {"redis": True}, {}, {"redis": True}):
        seen.update(known)
    assert seen.role() == "redis"


def test_the_role_of_version_1_0_0_is_taken_over_once(clock: FakeClock, tmp_path: Path) -> None:
    (tmp_path / "role").write_text("wildduck\n")
    seen = agent.ServicesSeen(str(tmp_path), clock=clock.monotonic)
    assert beat(seen, clock, 1) == "wildduck"
    assert os.listdir(tmp_path) == ["services"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"redis": "x"}', '{"redis": null}', '{"redis": [0]}', "[" * 4000,
             '{"redis": -1, "nginx": 0}', '{"redis": NaN}', '{"redis": Infinity}', "\xff"],
)
def test_a_damaged_file_is_no_news(text: str, clock: FakeClock, tmp_path: Path) -> None:
    (tmp_path / "services").write_text(text, "latin-1")
    seen = agent.ServicesSeen(str(tmp_path), clock=clock.monotonic)
    assert beat(seen, clock, 1) == "unknown"
    assert beat(seen, clock, 3, "redis") == "redis"
    assert json.loads((tmp_path / "services").read_text()) == {"redis": 0}


def test_a_disk_that_fails_costs_the_memory_alone(
    clock: FakeClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "gone"
    seen = agent.ServicesSeen(str(folder), clock=clock.monotonic)
    assert beat(seen, clock, 9, "redis") == "redis"
    folder.mkdir()
    beat(seen, clock, 1, "redis")
    assert json.loads((folder / "services").read_text()) == {"redis": 0}
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("writing the list of services failed: No such file or directory")


def test_a_disk_that_hangs_delays_one_sample(
    clock: FakeClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was remembered is read when the disk is back, and is not overwritten before."""
    os.mkfifo(tmp_path / "services")
    seen = agent.ServicesSeen(str(tmp_path), clock=clock.monotonic)
    assert beat(seen, clock, 1, "redis") == "unknown"
    started = time.monotonic()
    assert beat(seen, clock, 4, "redis") == "redis"
    assert time.monotonic() - started < agent.HANG_LIMIT_S
    stuck = (tmp_path / "services").rename(tmp_path / "stuck")
    (tmp_path / "services").write_text('{"rspamd": 5}')
    stuck.write_bytes(b"")
    eventually(lambda: beat(seen, clock, 1, "redis") == "rspamd", 30)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said[0] == "reading the list of services hangs" and len(said) == 1


@pytest.mark.parametrize(
    ("role", "services", "ports"),
    [
        ("auto", ["zonemta", "redis"], (587, 12080, 6379)),
        ("auto", ["wildduck", "haraka"], (993, 995, 25)),
        ("auto", [], agent.MAIL_PORTS),
        ("wildduck", ["zonemta"], agent.MAIL_PORTS),
        ("zonemta-local", ["redis"], (587, 12080)),
        ("zonemta-fra1", ["redis"], (587, 12080)),
        ("edge", ["redis", "haraka"], (6379, 25)),
        ("edge", [], agent.MAIL_PORTS),
    ],
)
def test_ports(role: str, services: list[str], ports: tuple[int, ...]) -> None:
    assert agent.ports_of(role, services) == ports


def test_ports_follow_what_is_at_home(proc: FakeProc) -> None:
    collector = agent.Collector(make_config(), proc=str(proc.root))
    seen: list[tuple[str, list[str]]] = []
    for comm, samples in (("", 1), ("redis-server", 3), ("rspamd", 3)):
        if comm:
            proc.add(200 + len(seen), comm)
        for _ in range(samples):
            sample = collector.collect()
        body = agent.unpack(sample.packed)
        seen.append((body["role"], sorted(body["services"])))
    assert seen == [
        ("unknown", sorted(f"port_{port}" for port in agent.MAIL_PORTS)),
        ("redis", ["port_6379"]),
        ("rspamd", ["port_11334", "port_6379"]),
    ]


def test_once_goes_by_what_runs_at_that_moment(proc: FakeProc) -> None:
    proc.add(5, "redis-server")
    seen = agent.ServicesSeen(at_once=True)
    collector = agent.Collector(make_config(), proc=str(proc.root), seen=seen)
    sample = collector.collect()
    assert agent.unpack(sample.packed)["role"] == "redis"
    assert list(agent.unpack(sample.packed)["services"]) == ["port_6379"]


def test_a_role_that_was_set_stays(proc: FakeProc) -> None:
    proc.add(5, "wildduck", b"wildduck\0")
    collector = agent.Collector(make_config(node_role="zonemta-local"), proc=str(proc.root))
    assert agent.unpack(collector.collect().packed)["role"] == "zonemta-local"


# --- what cannot be read


def test_a_sample_of_this_machine_keeps_the_contract() -> None:
    collector = agent.Collector(make_config())
    collector.prime()
    body = body_of(collector)
    del body["role"], body["seen"]
    assert SAMPLE({"node_id": "mta-01", **body}) == ""
    assert body["agent"]["collect_errors"] == 0


def test_a_first_sample_without_a_first_reading_has_no_rates() -> None:
    collector = agent.Collector(make_config(check_ports="1"))
    system = body_of(collector)["system"]
    assert "cpu_percent" not in system and "net_rx_bytes_sec" not in system
    assert system["ram_total_bytes"] > 0


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        ("net_io_counters", {"net_rx_bytes_sec", "net_tx_bytes_sec", "net_rx_errors",
                             "net_tx_errors"}),
    ],
)
@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(1), OSError(5, "Input/output error"), RuntimeError("no such"),
              NotImplementedError("not here"), KeyError("iowait"), ValueError("torn"),
             TypeError("it is None"), AttributeError("no iowait"), struct.error("short")],
    ids=lambda error: type(error).__name__,
)
def test_a_metric_that_fails_is_left_out_said_once_and_counted(
    function: str, gone: set[str], error: Exception,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    collector = agent.Collector(make_config(check_ports="1"))
    collector.prime()
    whole = set(body_of(collector)["system"])
    monkeypatch.setattr(psutil, function, fail)
    with caplog.at_level(logging.WARNING):
        bodies = [body_of(collector) for _ in range(3)]
    assert whole - set(bodies[-1]["system"]) == gone
    assert [body["agent"]["collect_errors"] for body in bodies] == [1, 2, 3]
    assert len(caplog.records) == 1
    assert "is left out of the samples" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("net", {"tcp_established", "tcp_close_wait", "tcp_time_wait", "listen_overflows"}),
        ("meminfo", {"ram_used_percent", "ram_used_bytes", "ram_total_bytes", "swap_used_bytes",
                     "swap_total_bytes"}),
        ("stat", {"cpu_percent", "cpu_cores", "cpu_iowait_percent", "cpu_steal_percent"}),
        ("loadavg", {"load_avg"}),
        ("uptime", {"uptime_seconds"}),
        ("sys/fs/file-nr", {"open_files"}),
        ("diskstats", {"disk_read_bytes_sec", "disk_write_bytes_sec"}),
        ("self/mountinfo", {"disk_used_percent", "disk_free_bytes", "disks"}),
    ],
)
def test_a_proc_that_lacks_a_file(
    missing: str, gone: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A container may lack any of them: a sample all the same, and a line that says which."""
    proc = tmp_path / "proc"
    for name in ("1", "self", "net", "sys", "diskstats", "stat", "loadavg", "uptime", "meminfo"):
        (proc / name).parent.mkdir(exist_ok=True)
        (proc / name).symlink_to(f"/proc/{name}")
    collector = agent.Collector(make_config(check_ports="1"), proc=str(proc))
    collector.prime()
    whole = set(body_of(collector)["system"])
    assert gone <= whole
    parts = missing.split("/")
    (proc / parts[0]).unlink()
    if len(parts) > 1:  # the directory, without that one file
        (proc / parts[0]).mkdir()
        for entry in Path("/proc", parts[0]).iterdir():
            if entry.name != parts[1]:
                (proc / parts[0] / entry.name).symlink_to(entry)
        if parts[0] == "sys":
            (proc / "sys/fs").mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            body = body_of(collector)
    assert whole - set(body["system"]) == gone
    assert len(caplog.records) == 1
    assert f"proc/{missing}" in caplog.records[0].getMessage()


def test_files_of_an_lxcfs_that_is_stuck(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container a process answers for them: a reader waits for it without limit."""
    monkeypatch.setattr(agent, "FILES_LIMIT_S", 2.0)
    proc = tmp_path / "proc"
    proc.mkdir()
    for name in ("1", "self", "net", "sys", "stat", "diskstats", "meminfo", "vmstat"):
        (proc / name).symlink_to(f"/proc/{name}")
    (proc / "pressure").mkdir()
    texts = {"uptime": "4711.0 1.0\n", "loadavg": "0.1 0.2 0.3 1/9 9\n"}
    for name in (*texts, "pressure/cpu"):
        os.mkfifo(proc / name)
    with caplog.at_level(logging.INFO):
        collector = agent.Collector(make_config(check_ports="1"), proc=str(proc))
        for _ in range(2):
            system = body_of(collector)["system"]
            assert not {"uptime_seconds", "load_avg", "pressure"} & system.keys()
            assert "ram_used_bytes" in system and "disks" in system
        for name, text in texts.items():
            (proc / name).write_text(text)  # lxcfs is back; the readers that wait have it
            (proc / name).unlink()
            (proc / name).write_text(text)
        system = eventually(lambda: (found := body_of(collector)["system"]).get("uptime_seconds")
                            and "load_avg" in found and found)
    assert (system["uptime_seconds"], system["load_avg"]) == (4711, [0.1, 0.2, 0.3])
    lines = [r.getMessage() for r in caplog.records]
    assert [lines.count(f"/proc/{name} {what}") for name in texts
            for what in ("hangs", "no longer hangs")] == [1, 1, 1, 1]


def test_a_list_of_mounts_that_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with ZFS, which gives no name of a mount while it receives."""
    for entry in Path("/proc").iterdir():
        if entry.name != "self" and not entry.name.isdigit():
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "1").symlink_to("/proc/1")
    (tmp_path / "net").unlink()
    (tmp_path / "net").symlink_to(f"/proc/{os.getpid()}/net")
    (tmp_path / "self").mkdir()
    os.mkfifo(tmp_path / "self/mountinfo")
    with caplog.at_level(logging.WARNING):
        collector = agent.Collector(make_config(check_ports="1"), proc=str(tmp_path))
        for _ in range(2):
            system = body_of(collector)["system"]
            assert not {"disks", "disk_used_percent", "disk_free_bytes"} & system.keys()
            assert "ram_used_bytes" in system
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("the list of mounts hangs") == 1


def test_no_sys_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collector = agent.Collector(make_config(check_ports="1"), sys_root=str(tmp_path))
    collector.prime()
    with caplog.at_level(logging.WARNING):
        system = body_of(collector)["system"]
    assert "disk_read_bytes_sec" not in system
    assert "net_rx_bytes_sec" in system  # without sysfs: all but lo
    assert [r.getMessage() for r in caplog.records] == [
        f"cannot read disk_io: No such file or directory ({tmp_path}/block); "
        "it is left out of the samples"
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_what_is_no_number_never_reaches_the_wire(
    bad: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = agent.Collector(make_config(check_ports="1"))
    collector.readers = {"load": lambda: {"x": bad, "y": 1}}
    body = body_of(collector)
    assert body["system"] == {"y": 1}
    assert body["agent"]["collect_errors"] == 1


def test_a_mount_that_cannot_be_read_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    collector = agent.Collector(make_config())
    monkeypatch.setattr(os, "statvfs", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            body = body_of(collector)
    assert "disks" not in body["system"]
    said = [r.getMessage() for r in caplog.records if "disk /" in r.getMessage()]
    assert said == ["cannot read disk /: Permission denied; it is left out of the samples"]


def test_out_of_file_descriptors_is_no_verdict_on_the_daemons(
    proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real = agent.read_bytes

    def fail(path: str, limit: int = -1) -> bytes:
        if "/90/" in path:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, limit)

    proc.add(90, "redis-server")
    monkeypatch.setattr(agent, "read_bytes", fail)
    collector = agent.Collector(make_config(check_ports="1"), proc=str(proc.root))
    assert "processes" not in body_of(collector)


def test_a_crash_of_a_reader_is_logged_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, float]:
        return {"x": 1 / 0}

    collector = agent.Collector(make_config(check_ports="1"))
    collector.readers = {"load": fail}
    for _ in range(3):
        collector.guarded(collector.collect)
    assert collector.collect_errors == 3
    assert len(caplog.records) == 1 and caplog.records[0].exc_info


# --- time


def test_timestamps() -> None:
    assert agent.iso_utc(1_750_000_000.0) == "2025-06-15T15:06:40.000Z"
    assert agent.iso_utc(1_750_000_000.9999) == "2025-06-15T15:06:40.999Z"


def test_a_clock_that_steps_back_changes_no_rate(tmp_path: Path) -> None:
    """The wall clock goes back an hour; the beat and the rates go by the monotonic one."""
    clock = FakeClock()
    collector = agent.Collector(
        make_config(check_ports="1"), clock=clock.monotonic, now=clock.time
    )
    collector.prime()
    bodies = []
    for step in (0.0, -3600.0, 0.0):
        clock.advance(15)
        clock.wall += step
        bodies.append(agent.unpack(collector.collect().packed))
    stamps = [body["timestamp"] for body in bodies]
    assert stamps == ["2025-06-15T15:06:55.000Z", "2025-06-15T14:07:10.000Z",
                      "2025-06-15T14:07:25.000Z"]
    for body in bodies:
        assert 0 <= body["system"]["net_rx_bytes_sec"] < 10**10
        assert 0 <= body["system"]["disk_read_bytes_sec"] < 10**10
        assert body["agent"]["collect_ms"] == 0.0


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (100.0, 115.0),  # in time
        (103.0, 115.0),  # it took 3 s
        (114.9, 115.0),
        (115.0, 130.0),  # it took a whole interval
        (131.0, 145.0),
        (100.0 + 86_400, 100.0 + 86_400 + 15),  # a suspended machine: no burst
        (99.0, 115.0),
    ],
)
def test_missed_ticks_are_skipped(now: float, expected: float) -> None:
    assert agent.next_tick(100.0, now, 15.0) == expected


def test_a_sample_is_small() -> None:
    collector = agent.Collector(make_config())
    collector.prime()
    request = agent.V1.sample(agent.unpack(collector.collect().packed), "mta-01.example.com", "k")
    assert len(request.body) < 2000


def test_the_same_bytes_each_time() -> None:
    collector = agent.Collector(make_config(check_ports="1"))
    packed = collector.collect().packed
    first = agent.V1.sample(agent.unpack(packed), "mta-01", "k")
    time.sleep(1.1)  # gzip has a time in its header
    assert agent.V1.sample(agent.unpack(packed), "mta-01", "k") == first
    assert b"mta-01" not in packed and not re.search(rb"node_id", json.dumps(
        agent.unpack(packed)).encode())


# --- the names of cores, interfaces and services


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (["vethx"], ["eth0"]),  # docker0 with a container, in a container whose way out is eth0
        (["eth0", "vethx"], ["eth0", "vethx"]),  # all in a bridge: which one leads out is not seen
        ([], ["eth0", "vethx"]),
    ],
)
def test_the_port_of_a_bridge_is_not_counted_on_top(
    ports: list[str], expected: list[str], tmp_path: Path
) -> None:
    for name in ("eth0", "vethx", "docker0", "lo"):
        folder = tmp_path / "class/net" / name
        folder.mkdir(parents=True)
        (folder / "type").write_text("1\n")
        (folder / "uevent").write_text("")
    for name in ports:
        (tmp_path / "class/net" / name / "master").mkdir()
        (tmp_path / "class/net/docker0" / f"lower_{name}").mkdir()
    if not ports:
        (tmp_path / "class/net/docker0/lower_x").mkdir()
    base = str(tmp_path / "class/net")
    assert agent.choose_interfaces(base, ("lo", "eth0", "docker0", "vethx")) == expected


def test_a_watched_program_takes_nothing_from_the_mail_services(
    proc: FakeProc, clock: FakeClock
) -> None:
    proc.add(70, "node", b"node\0/opt/wildduck/server.js\0")
    proc.add(71, "node", b"node\0/opt/webmail/server.js\0")
    table = make_table(proc, clock, watched=[("webmail", "node")])
    found = table.read()
    assert (found["wildduck"]["pid"], found["webmail"]["pid"]) == (70, 71)
    with pytest.raises(agent.SettingsError, match="redis-server is reported anyway, as redis"):
        make_config(watch_processes="cache=redis-server")
