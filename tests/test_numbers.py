"""Every number stands beside the tool that an administrator would check it with."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import KEY, StartAgent, eventually, make_config, v1_only
from dashboard import SYSTEM, Dashboard

import tinomail_agent as agent


def output_of(*command: str) -> str:
    environ = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environ, check=True, timeout=20
    ).stdout


def sample_now() -> dict[str, Any]:
    collector = agent.Collector(make_config(check_ports="1"))
    collector.prime()
    return agent.unpack(collector.collect().packed)


def agrees(truth: Callable[[], Any], ours: Callable[[], Any], tolerance: float = 0) -> None:
    """Compare while nothing moves: the truth must be the same before and after our reading."""

    def quiet() -> tuple[Any, Any] | None:
        before, found, after = truth(), ours(), truth()
        return (before, found) if before == after else None

    expected, found = eventually(quiet, 30, "the machine is never quiet", 0.05)
    assert found == pytest.approx(expected, abs=tolerance), (expected, found)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The first row that a real agent process left in the dashboard."""
    from conftest import running_agents

    folder = tmp_path_factory.mktemp("stored")
    with Dashboard(KEY) as server, running_agents(folder) as start:
        process = start(server.url)
        eventually(server.stored, 15, "a sample")
        names = [row[1] for row in server.query("PRAGMA table_info(metrics_system)")]
        row = server.query("SELECT * FROM metrics_system ORDER BY rowid LIMIT 1")[0]
        assert process.stop() == 0
    yield dict(zip(names, row))


def test_no_metric_is_absent_on_this_machine(stored: dict[str, Any]) -> None:
    assert [name for name in SYSTEM if stored[name] is None] == []
    assert json.loads(stored["agent"])["collect_errors"] == 0


@v1_only
def test_the_first_sample_has_real_rates(
    dashboard: Dashboard, start_agent: StartAgent
) -> None:
    """CPU and rates of the first sample are measured, not 0: with a load that runs beside."""
    load = subprocess.Popen(
        [sys.executable, "-c",
         "import os,time\nend=time.time()+20\nfd=os.open('load.bin',os.O_CREAT|os.O_WRONLY)\n"
         "while time.time()<end: os.pwrite(fd,bytes(1<<20),0); os.fdatasync(fd)"],
        cwd=os.environ.get("TMPDIR", "/var/tmp"),
    )
    try:
        process = start_agent(dashboard.url)
        eventually(dashboard.stored, 15)
        [row] = dashboard.query(
            "SELECT cpu_percent, disk_write_bytes_sec, cpu_cores FROM metrics_system LIMIT 1"
        )
        assert process.stop() == 0
    finally:
        load.kill()
        load.wait()
        Path(os.environ.get("TMPDIR", "/var/tmp"), "load.bin").unlink()
    assert row[0] > 1
    assert row[1] > 100_000
    assert len(json.loads(row[2])) == os.cpu_count()


def test_disk_as_df() -> None:
    def df() -> float:
        line = output_of("df", "--output=used,avail", "-B1", "/").splitlines()[1].split()
        return 100 * int(line[0]) / (int(line[0]) + int(line[1]))

    rows = sample_now()["system"]["disks"]
    root = next(row for row in rows if row["mount"] == "/")
    assert root["used_percent"] == pytest.approx(df(), abs=0.1)
    free = int(output_of("df", "--output=avail", "-B1", "/").splitlines()[1])
    assert root["free_bytes"] == pytest.approx(free, rel=0.01)


def test_memory_as_free() -> None:
    system = sample_now()["system"]
    values = output_of("free", "-b").splitlines()[1].split()
    total, available = int(values[1]), int(values[6])
    assert system["ram_total_bytes"] == total
    assert system["ram_used_bytes"] == pytest.approx(total - available, rel=0.02, abs=64 << 20)
    assert system["ram_used_percent"] == pytest.approx(
        100 * system["ram_used_bytes"] / system["ram_total_bytes"], abs=0.06
    )


def test_uptime_and_load_as_uptime() -> None:
    system = sample_now()["system"]
    up = float(Path("/proc/uptime").read_text().split()[0])
    assert system["uptime_seconds"] == pytest.approx(up, abs=2)
    shown = re.search(r"load average: ([\d.]+), ([\d.]+), ([\d.]+)", output_of("uptime"))
    assert shown
    assert system["load_avg"] == pytest.approx([float(v) for v in shown.groups()], abs=0.3)


def test_open_files_as_the_kernel() -> None:
    mine = [os.open(os.devnull, os.O_RDONLY) for _ in range(500)]
    try:
        truth = int(Path("/proc/sys/fs/file-nr").read_text().split()[0])
        # the kernel counts in batches per CPU
        assert sample_now()["system"]["open_files"] == pytest.approx(truth, abs=200)
    finally:
        for fd in mine:
            os.close(fd)


def test_cpu_as_proc_stat() -> None:
    def shares() -> tuple[int, int]:
        fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields[:8]), fields[3] + fields[4]

    collector = agent.Collector(make_config(check_ports="1"))
    collector.prime()
    total, idle = shares()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        pass
    found = agent.unpack(collector.collect().packed)["system"]["cpu_percent"]
    total_after, idle_after = shares()
    busy = 100 * (1 - (idle_after - idle) / (total_after - total))
    assert found == pytest.approx(busy, abs=5)
    assert found > 20


# --- TCP


def ss_count(state: str) -> int:
    return len(output_of("ss", "-Htan", "state", state).splitlines())


@pytest.fixture
def connections() -> Iterator[None]:
    """30 established, 6 close-wait and 4 time-wait sockets, in both families."""
    kept: list[socket.socket] = []
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        listener = socket.create_server((host, 0), family=family)
        kept.append(listener)

        def pair(to: socket.socket = listener) -> tuple[socket.socket, socket.socket]:
            client = socket.socket(to.family, socket.SOCK_STREAM)
            client.connect(to.getsockname()[:2])
            return client, to.accept()[0]

        for _ in range(7):
            kept.extend(pair())
        for _ in range(3):  # one side closes, the other does not: CLOSE_WAIT
            client, server = pair()
            kept.append(server)
            client.close()
        for _ in range(2):  # both close: TIME_WAIT at the first
            client, server = pair()
            client.close()
            server.close()
    eventually(lambda: ss_count("fin-wait-1") == 0, 10, "the closes are acknowledged")
    yield
    for one in kept:
        one.close()


@pytest.mark.parametrize(
    ("name", "state"),
    [("tcp_established", "established"), ("tcp_close_wait", "close-wait"),
     ("tcp_time_wait", "time-wait")],
)
def test_tcp_as_ss(name: str, state: str, connections: None) -> None:
    counter = agent.Collector(make_config(check_ports="1"))

    def ours() -> int:
        value: int = counter.readers["tcp_connections"]()[name]
        return value

    agrees(lambda: ss_count(state), ours)
    agrees(lambda: ss_count(state), ours)  # again, when the kernel's way of counting is known
    assert ours() > 0


def unexpected(name: str, why: str) -> None:
    raise AssertionError(f"{name}: {why}")


SNMP = b"Tcp: RtoAlgorithm CurrEstab InSegs\nTcp: 1 %d 5\n"


@pytest.mark.parametrize("includes", [True, False])
def test_both_kinds_of_kernel(includes: bool, tmp_path: Path) -> None:
    """CurrEstab holds CLOSE_WAIT on today's kernels, and did not before mid-2024."""
    net = tmp_path / "net"
    net.mkdir()
    now = agent.TcpCensus(0, 0, 0)
    walks_of_established = 0

    def count(*states: int) -> agent.TcpCensus:
        nonlocal walks_of_established
        walked = agent.TCP_ESTABLISHED in states
        walks_of_established += walked
        return now if walked else now._replace(established=0)

    counter = agent.TcpCounter(str(tmp_path), unexpected, count)
    for established, close_wait in ((10, 0), (10, 4), (12, 7), (3, 0), (3, 9)):
        now = agent.TcpCensus(established, close_wait, 1)
        (net / "snmp").write_bytes(SNMP % (established + close_wait * includes))
        assert counter.census() == now
    assert walks_of_established == 1  # when there first was a CLOSE_WAIT to tell by


def test_a_moving_count_teaches_nothing(tmp_path: Path) -> None:
    net = tmp_path / "net"
    net.mkdir()
    (net / "snmp").write_bytes(SNMP % 20)
    established = iter([17, 18])

    def count(*states: int) -> agent.TcpCensus:
        walked = agent.TCP_ESTABLISHED in states
        return agent.TcpCensus(next(established) if walked else 0, 2, 0)

    counter = agent.TcpCounter(str(tmp_path), unexpected, count)
    assert counter.census().established == 17  # neither 20 nor 18: one came in between
    assert counter.census().established == 18
    assert counter.census().established == 18  # known now: 20 - 2


def test_sockstat_and_snmp_that_lack_the_line() -> None:
    with pytest.raises(ValueError, match="no TCP line"):
        agent.parse_time_wait(b"sockets: used 8\n")
    with pytest.raises(ValueError):
        agent.parse_curr_estab(b"Ip: 1 2\n")


# --- disks


MOUNTINFO = """\
22 27 0:21 / /proc rw - proc proc rw
27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 27 254:2 / /var/mail rw - xfs /dev/mapper/mail rw
31 27 254:2 / /srv/mail rw - xfs /dev/mapper/mail rw
32 27 254:1 /var/tmp/systemd-private-1/tmp /tmp rw - ext4 /dev/vda1 rw
33 27 7:3 / /snap/core/1 ro - squashfs /dev/loop3 ro
34 27 7:4 / /mnt/image rw - ext4 /dev/loop4 rw
35 27 11:0 / /media/cdrom ro - iso9660 /dev/sr0 ro
36 27 8:1 / /boot/efi rw - vfat /dev/sda1 rw
37 27 0:40 / /mnt/nfs rw - nfs4 server:/export rw
38 37 8:33 / /mnt/nfs/inner rw - ext4 /dev/sdc1 rw
39 27 0:45 /@home /home rw - btrfs /dev/sdb1 rw
40 27 0:45 /@var /var/lib rw - btrfs /dev/sdb1 rw
41 27 0:46 / /tank rw - zfs tank rw
42 27 0:47 / /run rw - tmpfs tmpfs rw
43 27 0:48 / /home/joe/remote rw - fuse.sshfs joe@there: rw
44 27 259:7 / /mnt/with\\040blank\\134 rw - ext4 /dev/nvme0n1p7 rw
"""


def test_local_disks() -> None:
    disks = agent.local_disks(agent.parse_mountinfo(MOUNTINFO.encode()))
    assert {device: [mount.path for mount in found] for device, found in disks.items()} == {
        "254:1": ["/", "/tmp"],
        "254:2": ["/var/mail", "/srv/mail"],
        "0:45": ["/home", "/var/lib"],
        "0:46": ["/tank"],
        "259:7": ["/mnt/with blank\\"],
    }


def test_a_container_has_a_root_whatever_it_is() -> None:
    line = b"500 400 0:55 / / rw - overlay overlay rw,lowerdir=/a\n"
    [[mount]] = agent.local_disks(agent.parse_mountinfo(line)).values()
    assert (mount.path, mount.fstype) == ("/", "overlay")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", "/"), ("/var/mail", "/var/mail"), ("/var/mailbox", "/"), ("/var/mail/joe", "/var/mail")],
)
def test_the_mount_of_a_path(
    path: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = agent.parse_mountinfo(MOUNTINFO.encode())
    a_directory = os.lstat("/")
    monkeypatch.setattr(os, "lstat", lambda path: a_directory)
    assert agent.mount_of(path, mounts).path == expected


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "mail").symlink_to("shm")
    (tmp_path / "shm").symlink_to("/dev/shm")
    mounts = agent.parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    assert agent.mount_of(f"{tmp_path}/mail/", mounts).path == "/dev/shm"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match=r"No such file|symbolic links"):
        agent.mount_of(f"{tmp_path}/round/x", mounts)


def test_a_link_into_a_network_file_system_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mail").symlink_to("/mnt/nfs/mail")
    mounts = agent.parse_mountinfo(MOUNTINFO.encode())
    assert agent.mount_of(f"{tmp_path}/mail/joe", mounts).fstype == "nfs4"


def test_a_path_that_is_not_there_is_said(caplog: pytest.LogCaptureFixture) -> None:
    collector = agent.Collector(make_config(disk_paths="/nowhere,/"))
    assert len(collector.readers["disks"]()["disks"]) == 1
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("cannot read disk /nowhere of DISK_PATHS: No such file or directory")
    assert collector.collect_errors == 1


def test_disk_paths_choose(caplog: pytest.LogCaptureFixture) -> None:
    collector = agent.Collector(make_config(disk_paths="/, /usr"))
    system = collector.readers["disks"]()
    assert [row["mount"] for row in system["disks"]] == ["/"]


def test_the_fullest_disk_is_the_one_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = agent.Collector(make_config())
    sizes = {"/": (1000, 500, 400), "/tank": (1000, 100, 50)}

    def statvfs(path: str) -> os.statvfs_result:
        blocks, free, available = sizes[path]
        return os.statvfs_result((4096, 4096, blocks, free, available, 0, 0, 0, 0, 255))

    mounts = agent.parse_mountinfo(MOUNTINFO.encode())
    monkeypatch.setattr(agent, "parse_mountinfo", lambda _: [m for m in mounts if m.path in sizes])
    ids = {mount.path: mount.mount_id for mount in mounts}
    monkeypatch.setattr(agent, "visible_mount_id", lambda path, proc: ids[path])
    monkeypatch.setattr(os, "statvfs", statvfs)
    assert collector.readers["disks"]() == {
        "disk_used_percent": 94.7,  # 900 of 950
        "disk_free_bytes": 50 * 4096,
        "disks": [
            {"mount": "/tank", "used_percent": 94.7, "free_bytes": 50 * 4096},
            {"mount": "/", "used_percent": 55.6, "free_bytes": 400 * 4096},
        ],
    }


def test_a_network_file_system_is_never_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even when DISK_PATHS asks for it: a server that is away would hang the agent."""
    touched: list[str] = []
    monkeypatch.setattr(agent, "visible_mount_id", lambda path, proc: touched.append(path))
    monkeypatch.setattr(os, "lstat", touched.append)
    monkeypatch.setattr(agent, "read_bytes", lambda path: MOUNTINFO.encode())
    collector = agent.Collector(make_config(disk_paths="/mnt/nfs/mail"))
    with pytest.raises(ValueError, match="no local file system"):
        collector.readers["disks"]()
    assert touched == []


# --- rates: disks and network, on a made-up /proc and /sys


DISKSTATS = """\
   8       0 sda 10 0 {sda_read} 0 10 0 {sda_written} 0 0 0 0
   8       1 sda1 10 0 900000 0 10 0 900000 0 0 0 0
 253       0 dm-0 10 0 900000 0 10 0 900000 0 0 0 0
   9       0 md0 10 0 900000 0 10 0 900000 0 0 0 0
   7       0 loop0 10 0 900000 0 10 0 900000 0 0 0 0
 259       0 nvme0n1 10 0 {nvme_read} 0 10 0 0 0 0 0 0
 104       0 cciss/c0d0 1 0 {cciss} 0 1 0 0 0 0 0 0
 259       9 nvme0c0n1 10 0 900000 0 10 0 900000 0 0 0 0
"""


def make_machine(folder: Path, **counters: int) -> None:
    values = {"sda_read": 0, "sda_written": 0, "nvme_read": 0, "cciss": 0, **counters}
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc/diskstats").write_text(DISKSTATS.format(**values))
    for name in ("sda", "dm-0", "md0", "loop0", "nvme0n1", "cciss!c0d0", "nvme0c0n1"):
        device = folder / "sys/block" / name
        (device / "slaves").mkdir(parents=True, exist_ok=True)
        if name in ("sda", "nvme0n1", "cciss!c0d0", "nvme0c0n1"):
            (device / "device").mkdir(exist_ok=True)
        (device / "hidden").write_text("1\n" if name == "nvme0c0n1" else "0\n")
    (folder / "sys/block/dm-0/slaves/sda1").mkdir(exist_ok=True)


def machine_collector(folder: Path) -> tuple[agent.Collector, Any]:
    from conftest import FakeClock

    clock = FakeClock()
    collector = agent.Collector(
        make_config(), proc=str(folder / "proc"), sys_root=str(folder / "sys"),
        clock=clock.monotonic, now=clock.time,
    )
    return collector, clock


def test_disk_rates_count_each_physical_device_once(tmp_path: Path) -> None:
    make_machine(tmp_path)
    collector, clock = machine_collector(tmp_path)
    collector.readers["disk_io"]()
    clock.advance(10)
    make_machine(tmp_path, sda_read=1000, sda_written=20, nvme_read=500, cciss=100)
    assert collector.readers["disk_io"]() == {
        "disk_read_bytes_sec": 1600 * 512 // 10,
        "disk_write_bytes_sec": 20 * 512 // 10,
    }


def test_a_counter_that_went_backwards_gives_no_rate(tmp_path: Path) -> None:
    make_machine(tmp_path, sda_read=1000, nvme_read=1000)
    collector, clock = machine_collector(tmp_path)
    collector.readers["disk_io"]()
    clock.advance(10)
    make_machine(tmp_path, sda_read=10, nvme_read=9000, sda_written=100)
    found = collector.readers["disk_io"]()
    assert found == {"disk_read_bytes_sec": None, "disk_write_bytes_sec": 5120}
    clock.advance(10)
    assert collector.readers["disk_io"]()["disk_read_bytes_sec"] == 0


def test_no_rate_without_time() -> None:
    assert agent.rate({"a": (0, 0)}, {"a": (10, 10)}, 0) == (None, None)


def test_no_rate_without_a_device() -> None:
    assert agent.rate({}, {}, 10) == (None, None)
    assert agent.rate({}, {"sda": (5, 5)}, 10) == (None, None)


def test_no_interface_is_not_zero_traffic() -> None:
    collector = agent.Collector(make_config(net_interfaces="wan7"))
    with pytest.raises(ValueError, match="no interface but lo"):
        collector.readers["network"]()


def test_a_new_device_does_not_bring_its_past_with_it() -> None:
    before = {"sda": (100, 100)}
    after = {"sda": (200, 100), "sdb": (10**12, 10**12)}
    assert agent.rate(before, after, 10) == (10, 0)


class Nic:
    def __init__(self, received: int, sent: int, errors: int = 0) -> None:
        self.bytes_recv, self.bytes_sent = received, sent
        self.errin, self.errout = errors, errors + 1


def make_nics(folder: Path, hardware: tuple[str, ...], lower: dict[str, str]) -> None:
    for name in ("lo", "eth0", "eth1", "bond0", "br0", "veth1", "vf0"):
        (folder / "sys/class/net" / name).mkdir(parents=True)
    for name in hardware:
        (folder / "sys/class/net" / name / "device").mkdir()
    for upper, name in lower.items():
        (folder / "sys/class/net" / upper / f"lower_{name}").mkdir()


@pytest.mark.parametrize(
    ("hardware", "lower", "chosen"),
    [
        (("eth0", "eth1"), {"bond0": "eth0", "br0": "bond0"}, {"eth0", "eth1"}),
        ((), {"br0": "veth1"}, {"eth0", "eth1", "bond0", "veth1", "vf0"}),  # in a container
    ],
)
def test_no_interface_is_counted_on_top_of_its_lower_one(
    hardware: tuple[str, ...], lower: dict[str, str], chosen: set[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_nics(tmp_path, hardware, lower)
    names = [path.name for path in (tmp_path / "sys/class/net").iterdir()]
    assert set(agent.choose_interfaces(str(tmp_path / "sys/class/net"), names)) == chosen


def test_the_hidden_twin_of_an_interface_is_not_counted(tmp_path: Path) -> None:
    make_nics(tmp_path, ("eth0", "vf0"), {})
    (tmp_path / "sys/class/net/vf0/master").symlink_to("../eth0")
    base = str(tmp_path / "sys/class/net")
    assert agent.choose_interfaces(base, ["lo", "eth0", "vf0"]) == ["eth0"]


def test_network_rates_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nics(tmp_path, ("eth0", "eth1"), {})
    collector, clock = machine_collector(tmp_path)
    nics = {"lo": Nic(9, 9, 9), "eth0": Nic(1000, 100, 3), "eth1": Nic(0, 0)}
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic, nowrap: nics)
    collector.readers["network"]()
    clock.advance(5)
    nics = {"lo": Nic(999, 999, 9), "eth0": Nic(2000, 200, 4), "eth1": Nic(500, 50)}
    assert collector.readers["network"]() == {
        "net_rx_bytes_sec": 300, "net_tx_bytes_sec": 30, "net_rx_errors": 4, "net_tx_errors": 6,
    }


def test_interfaces_of_the_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nics = {"lo": Nic(9, 9, 1), "eth0": Nic(9, 9, 2)}
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic, nowrap: nics)
    collector = agent.Collector(make_config(net_interfaces="lo,wan7"))
    assert collector.readers["network"]()["net_rx_errors"] == 1
    assert collector.collect_errors == 1


# --- CPU


class Times:
    def __init__(self, **fields: float) -> None:
        self.__dict__.update(dict.fromkeys(agent.CPU_BUSY + agent.CPU_IDLE, 0.0) | fields)


def test_cpu_shares() -> None:
    before = [Times(), Times(user=5)]
    after = [Times(user=2, idle=5, iowait=3, guest=2), Times(user=5, steal=1, idle=3)]
    assert agent.cpu_shares(before, after) == (21.4, [20.0, 25.0])


def test_cpu_shares_without_time_or_with_another_number_of_cores() -> None:
    assert agent.cpu_shares([Times()], [Times()]) == (None, [None])
    assert agent.cpu_shares([Times()], [Times(user=1), Times(user=1)]) == (None, [])


def test_iowait_that_went_backwards() -> None:
    assert agent.cpu_shares([Times(iowait=9)], [Times(iowait=8, user=1, idle=1)])[0] == 50.0


# --- ports


@pytest.mark.parametrize("mode", ["connect", "listen"])
@pytest.mark.parametrize(
    ("family", "bind", "host"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::1"),
    ],
)
def test_ports(mode: str, family: int, bind: str, host: str) -> None:
    check = agent.check_by_connect if mode == "connect" else agent.check_by_listener
    with socket.create_server((bind, 0), family=family) as listener:
        port = listener.getsockname()[1]
        assert check(host, (port, 1)) == {port: True, 1: False}
    assert check(host, (port,)) == {port: False}


@pytest.mark.parametrize("v6only", [False, True])
def test_a_dual_stack_listener_serves_ipv4(v6only: bool) -> None:
    with socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=not v6only
    ) as listener:
        port = listener.getsockname()[1]
        assert agent.check_by_connect("127.0.0.1", (port,)) == {port: not v6only}
        assert agent.check_by_listener("127.0.0.1", (port,)) == {port: not v6only}


def test_an_ipv4_address_in_ipv6_clothes() -> None:
    with socket.socket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::ffff:127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert agent.check_by_connect("127.0.0.1", (port,)) == {port: True}
        assert agent.check_by_listener("127.0.0.1", (port,)) == {port: True}
        assert agent.check_by_listener("127.0.0.2", (port,)) == {port: False}


def test_a_listener_on_another_address_does_not_count() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        assert agent.check_by_listener("127.0.0.1", (port,)) == {port: False}
        assert agent.check_by_listener("127.0.0.2", (port,)) == {port: True}


def test_a_full_accept_queue_counts_as_down(deaf_port: int) -> None:
    assert agent.check_by_listener("127.0.0.1", (deaf_port,)) == {deaf_port: False}


def test_ports_that_do_not_answer_cost_the_limit_once(deaf_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        up = listener.getsockname()[1]
        started = time.monotonic()
        found = agent.check_by_connect("127.0.0.1", (1, deaf_port, up, 2))
        took = time.monotonic() - started
    assert found == {1: False, deaf_port: False, up: True, 2: False}
    assert agent.PORT_CHECK_LIMIT_S <= took < agent.PORT_CHECK_LIMIT_S + 1


def test_nothing_is_sent_and_the_connection_is_closed_in_order() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        agent.check_by_connect("127.0.0.1", (listener.getsockname()[1],))
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b""


def test_a_port_that_connects_to_itself_is_down() -> None:
    """A free port in the local range may be picked as our own source port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.connect(one.getsockname())  # TCP's simultaneous open, with itself
        assert agent._is_connected(one) is False


def test_out_of_local_ports_is_not_a_verdict_on_the_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EADDRNOTAVAIL)
    with pytest.raises(OSError, match="assign requested address"):
        agent.check_by_connect("127.0.0.1", (25,))


def test_ports_by_role() -> None:
    collector = agent.Collector(make_config(node_role="haraka"))
    assert list(collector._read_services()) == ["port_25"]
    collector = agent.Collector(make_config(check_ports="7,8", check_host="::1"))
    assert collector._read_services() == {"port_7": False, "port_8": False}


def test_netlink_error_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without tcp_diag answers with an error: the metric is absent, not 0."""
    reply = struct.pack("=IHHIIi", 36, agent.NLMSG_ERROR, 0, 1, 0, -2) + bytes(16)
    monkeypatch.setattr(socket.socket, "recv", lambda *_: reply)
    with pytest.raises(OSError, match="No such file"):
        agent.count_tcp(agent.TCP_ESTABLISHED)
