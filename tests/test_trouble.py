"""Figures that predict trouble, each beside the tool that shows it, under a load that moves it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, AgentProcess, eventually, make_config
from dashboard import Dashboard
from test_numbers import agrees, output_of

import tinomail_agent as agent

LISTENER = """
import socket
listener = socket.create_server(("127.0.0.1", 0), backlog=64)
print(listener.getsockname()[1], flush=True)
while True:
    listener.accept()[0].close()
"""


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            pytest.skip(f"there is no {program}")


def body_of(collector: agent.Collector) -> dict[str, Any]:
    return agent.unpack(collector.collect().packed)


# --- accept queues


@pytest.fixture
def daemon() -> Iterator[tuple[int, int]]:
    """A process that accepts; (its pid, its port)."""
    process = subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE)
    assert process.stdout
    yield process.pid, int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()


def recv_q(port: int) -> int:
    need("ss")
    return int(output_of("ss", "-Hltn", f"sport = :{port}").split()[1])


def test_a_hung_daemon_shows_in_the_third_sample(daemon: tuple[int, int]) -> None:
    pid, port = daemon
    collector = agent.Collector(make_config(check_ports=port))
    seen = []
    for number in range(5):
        if number == 2:
            eventually(lambda: recv_q(port) == 0)
            os.kill(pid, signal.SIGSTOP)
        expected = recv_q(port)
        body = body_of(collector)
        assert body["services"] == {f"port_{port}": True}
        seen.append(body["accept_queue"][f"port_{port}"])
        assert seen[-1] == expected or number < 2
    assert seen[2:] == [0, 1, 2]
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: body_of(collector)["accept_queue"] == {f"port_{port}": 0})


@pytest.mark.parametrize("has_sock_diag", [True, False])
def test_in_listen_mode_one_client_that_waits_shows(
    has_sock_diag: bool, daemon: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EPROTONOSUPPORT, "no tcp_diag")

    if not has_sock_diag:
        monkeypatch.setattr(agent, "dump_tcp", refuse)
    pid, port = daemon
    collector = agent.Collector(make_config(check_ports=f"{port},1", check_mode="listen"))
    os.kill(pid, signal.SIGSTOP)
    for _ in range(3):  # no check of ours adds to it
        assert body_of(collector)["accept_queue"] == {f"port_{port}": 0}
    with socket.create_connection(("127.0.0.1", port)):
        assert recv_q(port) == 1
        assert body_of(collector)["accept_queue"] == {f"port_{port}": 1}


def test_all_listeners_of_a_port_count() -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0), reuse_port=True))
        port = first.getsockname()[1]
        stack.enter_context(socket.create_server(("127.0.0.1", port), reuse_port=True))
        other = stack.enter_context(socket.create_server(("::1", port), family=socket.AF_INET6))
        for _ in range(10):  # the kernel spreads them over the first two
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        stack.enter_context(socket.create_connection(other.getsockname()[:2]))
        assert agent.accept_queues((port, 1)) == {port: 11}


# --- services


def test_uptime_as_ps_and_a_crash_loop_shows(tmp_path: Path) -> None:
    need("ps")
    program = shutil.copy(str(shutil.which("sleep")), tmp_path / "tm-crasher")
    collector = agent.Collector(make_config(check_ports="1", watch_processes="crasher=tm-crasher"))

    def row() -> dict[str, Any]:
        found: dict[str, Any] = body_of(collector)["processes"]["crasher"]
        return found

    assert "uptime_seconds" not in row()
    uptimes = []
    for _ in range(2):
        with subprocess.Popen([program, "300"]) as process:
            eventually(lambda: row()["pid"] == process.pid)
            eventually(lambda: row()["uptime_seconds"] >= 2, step_s=0.2)
            agrees(lambda: int(output_of("ps", "-o", "etimes=", "-p", str(process.pid))),
                   lambda: row()["uptime_seconds"], tolerance=1)
            uptimes.append(row()["uptime_seconds"])
            process.kill()
            process.wait()
    with subprocess.Popen([program, "300"]) as process:
        eventually(lambda: row()["pid"] == process.pid)
        assert row()["status"] == "running"
        assert row()["uptime_seconds"] < max(uptimes)
        process.kill()


# --- disks

# In a mount namespace: a small ext4 in three states, beside df and /proc/mounts.
DISK_SCENE = """
import json, os, re, subprocess, sys
import tinomail_agent as agent

image, place = sys.argv[1:]

def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

def look():
    config = agent.load_config({"DASHBOARD_URL": "http://127.0.0.1:9", "API_KEY": "k" * 20,
                                "DISK_PATHS": place}, os.devnull)
    [row] = agent.Collector(config).readers["disks"]()["disks"]
    mount = next(l.split() for l in open("/proc/mounts") if l.split()[1] == place)
    df = run("df", "--output=ipcent", place).split()[1].rstrip("%")
    return {"ours": row, "df": df, "options": mount[3].split(","), "device": mount[0]}

run("mkfs.ext4", "-q", "-N", "64", image)
run("mount", "-o", "loop,errors=remount-ro", image, place)
found = {"fresh": look()}
try:
    for number in range(1000):
        open(f"{place}/{number}", "w").close()
except OSError as error:
    found["error"] = error.errno
found["full"] = look()
run("mount", "-o", "remount,bind,ro", place)
found["mount_alone"] = look()
run("mount", "-o", "remount,bind,rw", place)
run("mount", "-o", "remount,ro", place)
found["read_only"] = look()
run("mount", "-o", "remount,rw", place)
trigger = f"/sys/fs/ext4/{os.path.basename(found['fresh']['device'])}/trigger_fs_error"
if os.path.exists(trigger):
    with open(trigger, "w") as stream:
        stream.write("made by a test")
    found["after_error"] = look()
run("umount", place)
print(json.dumps(found))
"""


def test_inodes_and_read_only_as_df_and_proc_mounts(tmp_path: Path) -> None:
    need("mkfs.ext4", "df")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("needs root, with the right to make namespaces")
    image = tmp_path / "disk"
    image.write_bytes(b"")
    os.truncate(image, 4 << 20)
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", DISK_SCENE, image, tmp_path / "place"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("error") == errno.ENOSPC
    for one in found.values():
        assert 0 <= int(one["df"]) - one["ours"]["inodes_used_percent"] < 1  # df rounds up
    assert found["fresh"]["ours"]["inodes_used_percent"] < 50
    assert found["full"]["ours"]["inodes_used_percent"] == 100
    assert found["full"]["ours"]["used_percent"] < 90
    states = {name: one["ours"]["read_only"] for name, one in found.items()}
    # systemd's sandbox makes a mount read-only: that says nothing about the disk
    assert states.pop("mount_alone") is False and "ro" in found["mount_alone"]["options"]
    assert states.pop("after_error", True) is True
    assert states == {"fresh": False, "full": False, "read_only": True}
    assert "ro" in found["read_only"]["options"] and "rw" in found["full"]["options"]


def test_without_inodes_there_is_no_share_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = os.statvfs_result((4096, 4096, 1000, 500, 400, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: answer)
    [row] = agent.Collector(make_config(disk_paths="/")).readers["disks"]()["disks"]
    assert "inodes_used_percent" not in row


# --- memory and CPU


def test_swap_as_free(tmp_path: Path) -> None:
    need("free")

    def ours() -> list[int]:
        found = agent.read_memory("/proc")
        return [found["swap_total_bytes"], found["swap_used_bytes"]]

    agrees(lambda: [int(n) for n in output_of("free", "-b").splitlines()[2].split()[1:3]], ours)
    (tmp_path / "meminfo").write_text(
        "MemTotal: 1000 kB\nMemAvailable: 250 kB\nSwapTotal: 4096 kB\nSwapFree: 1024 kB\n"
    )
    found = agent.read_memory(str(tmp_path))
    assert (found["swap_total_bytes"], found["swap_used_bytes"]) == (4096 * 1024, 3072 * 1024)
    assert found["ram_used_percent"] == 75


@pytest.mark.alone
def test_iowait_and_steal_as_mpstat() -> None:
    need("mpstat")
    collector = agent.Collector(make_config())
    collector.readers["cpu"]()
    rows = output_of("mpstat", "8", "1").splitlines()
    found = collector.readers["cpu"]()
    names = next(row for row in rows if "%iowait" in row).split()
    values = next(row for row in rows if row.startswith("Average:")).split()[-(len(names) - 1):]
    shown = dict(zip(names[1:], values))
    for name in ("iowait", "steal"):
        assert found[f"cpu_{name}_percent"] == pytest.approx(float(shown[f"%{name}"]), abs=5)


def test_iowait_and_steal_of_all_cores_together(tmp_path: Path) -> None:
    meter = agent.Meter(time.monotonic)
    # user nice system idle iowait irq softirq steal
    (tmp_path / "stat").write_text("cpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 500 0 0 0 0 0 0\n")
    assert agent.read_cpu(str(tmp_path), meter)["cpu_steal_percent"] is None
    (tmp_path / "stat").write_text("cpu0 0 0 0 600 200 0 0 0 0 0\ncpu1 0 0 0 1200 0 0 0 96 0 0\n")
    found = agent.read_cpu(str(tmp_path), meter)
    assert (found["cpu_iowait_percent"], found["cpu_steal_percent"]) == (12.5, 6.0)
    assert found["cpu_percent"] == 6.0  # steal is no idle time, iowait is


# Reads pages of a file that is larger than the memory of its cgroup.
HOG = """
import mmap, sys
with open(sys.argv[1], "rb") as stream:
    pages = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    while True:
        for at in range(0, len(pages), 4096):
            pages[at]
"""


@contextlib.contextmanager
def small_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A cgroup with little memory; skips where none can be made."""
    base = Path("/sys/fs/cgroup/memory")
    name = "memory.limit_in_bytes" if base.is_dir() else "memory.max"
    folder = (base if base.is_dir() else base.parent) / f"tm-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no cgroup of our own: {error}")
    try:
        yield folder
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def start_in(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    shell = f"echo $$ >{folder}/cgroup.procs; exec \"$@\""
    return subprocess.Popen(["sh", "-c", shell, "sh", *command], stderr=subprocess.DEVNULL)


def stalled_us(name: str) -> int:
    found = re.search(r"some .*total=(\d+)", Path("/proc/pressure", name).read_text())
    assert found
    return int(found[1])


@pytest.mark.alone
def test_pressure_as_the_kernel_under_a_load() -> None:
    if not Path("/proc/pressure").is_dir():
        pytest.skip("this kernel does not measure pressure")
    meter = agent.Meter(time.monotonic)

    def measure(seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        agent.read_pressure("/proc", meter)
        started, before = time.monotonic(), {n: stalled_us(n) for n in ("cpu", "memory", "io")}
        time.sleep(seconds)
        found = agent.read_pressure("/proc", meter)["pressure"]
        lasted = time.monotonic() - started
        truth = {n: (stalled_us(n) - old) / lasted / 1e4 for n, old in before.items()}
        return found, truth

    image = Path(os.environ.get("TMPDIR", "/var/tmp"), f"tm-hog-{os.getpid()}")
    with small_cgroup(16 << 20) as folder:
        try:
            with image.open("wb") as stream:
                stream.write(os.urandom(1 << 20) * 64)
                os.fsync(stream.fileno())  # its pages must not stay in our own cgroup
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            hogs = [start_in(folder, sys.executable, "-c", HOG, str(image)) for _ in range(4)]
            try:
                found, truth = eventually(
                    lambda: (pair := measure(4))[1]["memory"] > 5 and pair, what="memory pressure"
                )
            finally:
                for hog in hogs:
                    hog.kill()
                    hog.wait()
        finally:
            image.unlink()
    print(found, truth)
    for name, share in truth.items():
        assert found[name] == pytest.approx(min(100, share), abs=5), (found, truth)
    assert found["memory"] > 0 and found["io"] > 0


def test_pressure_that_went_backwards_gives_no_value(tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    now = 0.0
    meter = agent.Meter(lambda: now)

    def read(**totals: int) -> Any:
        nonlocal now
        now += 10
        for name, total in totals.items():
            (tmp_path / "pressure" / name).write_text(
                f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n"
                f"full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
            )
        return agent.read_pressure(str(tmp_path), meter)

    assert read(cpu=0, io=5_000_000) == {"pressure": None}  # the first reading: no base
    assert read(cpu=2_500_000, io=6_000_000) == {"pressure": {"cpu": 25.0, "io": 10.0}}
    assert read(cpu=2_500_000, io=1_000) == {"pressure": {"cpu": 0.0}}
    assert read(cpu=22_500_000, io=2_001_000) == {"pressure": {"cpu": 100.0, "io": 20.0}}


@pytest.mark.alone
def test_an_oom_kill_counts() -> None:
    def truth() -> int:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    before = agent.read_oom_kills("/proc")["oom_kills"]
    agrees(truth, lambda: agent.read_oom_kills("/proc")["oom_kills"])
    with small_cgroup(16 << 20) as folder:
        eater = start_in(folder, sys.executable, "-c", "b'1' * (256 << 20)")
        assert eater.wait(120) == -signal.SIGKILL
    eventually(lambda: agent.read_oom_kills("/proc")["oom_kills"] > before)
    agrees(truth, lambda: agent.read_oom_kills("/proc")["oom_kills"])


@pytest.mark.alone
def test_listen_overflows_as_nstat(deaf_port: int) -> None:
    need("nstat")

    def truth() -> int:
        return int(output_of("nstat", "-asz", "TcpExtListenOverflows").split()[-2])

    def ours() -> int:
        found: int = agent.read_listen_overflows("/proc")["listen_overflows"]
        return found

    before = ours()
    with socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", deaf_port))
        eventually(lambda: ours() > before)
    agrees(truth, ours)


# --- what a kernel may lack


def test_a_kernel_without_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No error, no line: of an administrator nobody expects another kernel."""
    for name in ("1", "self", "sys", "diskstats", "stat", "loadavg", "uptime"):
        (tmp_path / name).symlink_to(f"/proc/{name}")
    memory = Path("/proc/meminfo").read_text()
    (tmp_path / "meminfo").write_text(re.sub(r"Swap\w+:.*\n", "", memory))
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill_of_another_kind 7\n")
    (tmp_path / "net").mkdir()
    for name in ("snmp", "sockstat", "tcp", "tcp6"):
        (tmp_path / "net" / name).symlink_to(f"/proc/net/{name}")
    (tmp_path / "net/netstat").write_text("TcpExt: SyncookiesSent\nTcpExt: 5\n")
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/cpu").touch()
    read = agent.read_bytes

    def off(path: str, limit: int = -1) -> bytes:
        if path.endswith("pressure/cpu"):  # CONFIG_PSI_DEFAULT_DISABLED (kernel/sched/psi.c)
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return read(path, limit)

    monkeypatch.setattr(agent, "read_bytes", off)
    config = make_config(check_ports="1", zonemta_url="off")
    collector = agent.Collector(config, proc=str(tmp_path))
    collector.prime()
    time.sleep(agent.PRIME_S)
    with caplog.at_level(logging.DEBUG):
        body = body_of(collector)
    assert caplog.records == [] and body["agent"]["collect_errors"] == 0
    assert not {"swap_used_bytes", "swap_total_bytes", "pressure", "oom_kills",
                "listen_overflows"} & set(body["system"])
    assert "accept_queue" not in body  # nobody listens at port 1
    assert not [line for line in agent.describe_sample(body) if re.match("swap|pressure|oom", line)]


def test_check_shows_what_is_in_trouble(deaf_port: int) -> None:
    collector = agent.Collector(make_config(check_ports=deaf_port, check_mode="listen"))
    collector.prime()
    body = body_of(collector)
    for row in body["system"]["disks"]:
        row.update(read_only=True, inodes_used_percent=100.0)
    lines = list(agent.describe_sample(body))
    assert [line for line in lines if "inodes_used_percent 100.0" in line
            and "read_only yes" in line]
    waiting = body["accept_queue"][f"port_{deaf_port}"]
    assert [line.split() for line in lines[-2:]] == [
        [f"port_{deaf_port}", "no"], ["accept_queue", f"port_{deaf_port}", str(waiting)],
    ]
    assert waiting > 0


# --- what another version left on disk

FIRST_RELEASE = "847807b"  # 1.0.0
NEW = {"accept_queue", "uptime_seconds", "inodes_used_percent", "read_only", "swap_used_bytes",
       "swap_total_bytes", "cpu_iowait_percent", "cpu_steal_percent", "pressure", "oom_kills",
       "listen_overflows"}


def known_to_the_first(body: dict[str, Any]) -> dict[str, Any]:
    """Return what 1.0.0 takes from a sample: it chooses the fields of its own time by name."""
    system = {n: value for n, value in body["system"].items()
              if n not in NEW or n == "uptime_seconds"}
    if "disks" in system:
        system["disks"] = [{n: v for n, v in row.items() if n not in NEW}
                           for row in system["disks"]]
    processes = {service: {n: value for n, value in row.items() if n not in NEW}
                 for service, row in body["processes"].items()}
    rest = {name: body[name] for name in ("timestamp", "services", "agent")}
    return {**rest, "system": system, "processes": processes}


@pytest.mark.parametrize(
    ("is_upgrade", "api"),
    # 1.0.0 delivers nothing to tinomail-monitor as it is deployed
    [(True, "v1"), (True, "tinomail-monitor"), (False, "v1")],
    ids=["upgrade", "upgrade-monitor", "downgrade"],
)
def test_samples_of_another_version_are_delivered_whole(
    is_upgrade: bool, api: str, tmp_path: Path
) -> None:
    source = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{FIRST_RELEASE}:tinomail_agent.py"], capture_output=True
    )
    if source.returncode:
        pytest.skip("there is no history with 1.0.0 in it")
    old, state = tmp_path / "old_agent.py", tmp_path / "state"
    old.write_bytes(source.stdout)
    versions = [old, ROOT / "tinomail_agent.py"]
    first, second = versions if is_upgrade else versions[::-1]

    def start(program: Path, url: str) -> AgentProcess:
        environ = {
            "PATH": os.environ["PATH"], "DASHBOARD_URL": url, "API_KEY": KEY, "NODE_ID": "mta-01",
            "NODE_ROLE": "haraka", "HEARTBEAT_INTERVAL": "1000", "DASHBOARD_API": api,
            "STATE_DIRECTORY": str(state),
        }
        return AgentProcess(tmp_path / f"{program.stem}.log", environ, [str(program)])

    def saved() -> dict[str, dict[str, Any]]:
        bodies = [agent.unpack(path.read_bytes()) for path in state.glob("buffer/*.sample")]
        return {body["timestamp"]: body for body in bodies}

    with Dashboard(KEY, api=api) as server:
        server.fault = "503"
        writer = start(first, server.url)
        eventually(lambda: len(saved()) >= 4)
        assert writer.stop() == 0
        left = saved()
        server.fault = "off"
        reader = start(second, server.url)
        eventually(lambda: set(left) <= set(server.stored()))
        assert reader.stop() == 0
        assert reader.lines("damaged|torn|refused [1-9]|REFUSED") == []
        if api == "v1":
            came = {post.body["timestamp"]: post.body for post in server.posts
                    if post.status == 201 and "system" in post.body}
            for stamp, body in left.items():
                role = body.pop("role")
                assert role == "haraka" and ("oom_kills" in body["system"]) is not is_upgrade
                expected = body if is_upgrade else known_to_the_first(body)
                assert came[stamp] == {**expected, "node_id": "mta-01"}
    assert not set(left) & set(saved())
