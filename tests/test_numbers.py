"""Every number stands beside the tool that an administrator would check it with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import KEY, FakeClock, StartAgent, eventually, make_config, v1_only
from dashboard import SYSTEM, Dashboard

import tinomail_agent as agent

pytestmark = pytest.mark.alone


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
    """Compare while nothing moves: the truth and our reading must be the same twice."""

    def quiet() -> tuple[Any, Any] | None:
        before, found, again, after = truth(), ours(), ours(), truth()
        return (before, found) if before == after and found == again else None

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


def test_a_sockstat_that_lacks_the_line() -> None:
    with pytest.raises(agent.READ_ERRORS):
        agent.parse_sockstat(b"sockets: used 8\n")


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
    disks = agent.MountTable(agent.parse_mountinfo(MOUNTINFO.encode())).local_disks()
    assert {mounts[0].device: mounts[0].path for mounts in disks} == {
        "254:1": "/",
        "254:2": "/var/mail",
        "0:45": "/home",
        "0:46": "/tank",
        "11:0": "/media/cdrom",  # local, but always full: that shows when it is read
        "259:7": "/mnt/with blank\\",
    }


def test_a_container_has_a_root_whatever_it_is() -> None:
    line = b"500 400 0:55 / / rw - overlay overlay rw,lowerdir=/a\n"
    [[mount]] = agent.MountTable(agent.parse_mountinfo(line)).local_disks()
    assert (mount.path, mount.fstype) == ("/", "overlay")


def disks_of(*lines: str) -> list[str]:
    table = agent.MountTable(agent.parse_mountinfo("\n".join(lines).encode()))
    return [mounts[0].path for mounts in table.local_disks()]


ROOT_ON_DISK = "27 1 254:1 / / rw - ext4 /dev/vda1 rw"


def test_what_is_hidden_below_another_mount_is_no_disk() -> None:
    below = "30 27 8:1 / /srv/mail rw - xfs /dev/sda1 rw"
    assert disks_of(ROOT_ON_DISK, below) == ["/", "/srv/mail"]
    assert disks_of(ROOT_ON_DISK, below, "31 30 0:5 / /srv/mail rw - tmpfs none rw") == ["/"]
    assert disks_of(ROOT_ON_DISK, below, "31 27 0:5 / /srv rw - tmpfs none rw") == ["/"]
    assert disks_of(ROOT_ON_DISK, "30 27 8:1 / /srv/mail//deleted rw - xfs /dev/sda1 rw") == ["/"]


def test_btrfs_on_a_loop_device_is_no_disk() -> None:
    """Its device number does not tell."""
    assert disks_of(ROOT_ON_DISK, "30 27 0:50 / /mnt/image rw - btrfs /dev/loop9 rw") == ["/"]


def test_a_remote_root_is_not_read() -> None:
    mounts = agent.parse_mountinfo(b"27 1 0:40 / / rw - nfs4 server:/root rw\n")
    with pytest.raises(OSError, match="are not read"):
        agent.MountTable(mounts).find("/")


def test_of_a_disk_that_is_mounted_twice_the_whole_and_the_short_path_are_shown() -> None:
    disk = "8:1 {} {} rw - xfs /dev/sda1 rw"
    some, whole = disk.format("/some", "/a"), disk.format("/", "/srv/mail")
    again = disk.format("/", "/mnt/mail/of/all")
    assert disks_of(f"30 27 {some}", f"31 27 {again}", f"32 27 {whole}") == ["/srv/mail"]


def test_a_root_upon_another_root() -> None:
    """As an initramfs leaves it, the first its own parent; and a chroot(2) without any."""
    assert disks_of("1 1 0:2 / / rw - rootfs rootfs rw", ROOT_ON_DISK) == ["/"]
    assert disks_of("30 27 8:1 / /srv/mail rw - xfs /dev/sda1 rw") == ["/srv/mail"]


@pytest.mark.parametrize("fstype", ["nfs4", "9p", "ceph", "fuse.sshfs", "fuseblk", "virtiofs"])
def test_below_a_remote_root_lie_local_disks(fstype: str) -> None:
    """All leads through "/". Below any other remote mount the way may hang."""
    root = f"27 1 0:40 / / rw - {fstype} server:/root rw"
    disk = "30 27 8:1 / /var/mail rw - xfs /dev/sda1 rw"
    assert disks_of(root, disk) == ["/var/mail"]
    far = f"28 27 8:2 / /mnt rw - {fstype} server:/mnt rw"
    assert disks_of(root, far, "30 28 8:1 / /mnt/mail rw - xfs /dev/sda1 rw") == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [("rw,fd=5,timeout=300,minproto=5,direct", ["/"]), ("rw,fd=5,timeout=0,direct", ["/", "/a"])],
)
def test_an_automount_with_a_timeout_is_left_alone(options: str, expected: list[str]) -> None:
    automount = f"30 27 0:9 / /a rw - autofs systemd-1 {options}"
    assert disks_of(ROOT_ON_DISK, automount, "31 30 8:1 / /a rw - ext4 /dev/sda1 rw") == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", "/"), ("/var/mail", "/var/mail"), ("/var/mailbox", "/"), ("/var/mail/joe", "/var/mail")],
)
def test_the_mount_of_a_path(path: str, expected: str) -> None:
    mounts = agent.parse_mountinfo(MOUNTINFO.encode())
    found, mount = agent.MountTable(mounts).find(path)
    assert (found, mount.path) == (path, expected)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "mail").symlink_to("shm")
    (tmp_path / "shm").symlink_to("/dev/shm")
    mounts = agent.parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    table = agent.MountTable(mounts)
    path, mount = table.find(f"{tmp_path}/mail/joe")
    assert (path, mount.path) == ("/dev/shm/joe", "/dev/shm")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic links"):
        agent.read_disk(table, f"{tmp_path}/round/x")


def test_a_link_into_a_network_file_system_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mail").symlink_to("/mnt/nfs/mail")
    mounts = agent.parse_mountinfo(MOUNTINFO.encode())
    with pytest.raises(OSError, match="are not read"):
        agent.MountTable(mounts).find(f"{tmp_path}/mail/joe")


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
    monkeypatch.setattr(os, "statvfs", statvfs)
    assert collector.readers["disks"]() == {
        "disk_used_percent": 94.7,  # 900 of 950
        "disk_free_bytes": 50 * 4096,
        "disks": [
            {"mount": "/tank", "used_percent": 94.7, "free_bytes": 50 * 4096, "read_only": False},
            {"mount": "/", "used_percent": 55.6, "free_bytes": 400 * 4096, "read_only": False},
        ],
    }


@pytest.mark.parametrize(
    ("option", "free", "share"), [("ro", 0, None), ("rw", 0, 100.0), ("ro", 1, 100.0)]
)
def test_always_full_is_what_is_read_only_without_a_free_block(
    option: str, free: int, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = os.statvfs_result((4096, 4096, 1000, free, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: answer)
    mount = agent.Mount(30, 27, "8:1", "/", "/srv", "ext4", "/dev/sda1", (option,))
    row = agent.read_disk(agent.MountTable([mount]), "/srv")
    assert (row and row["used_percent"]) == share


def test_a_mount_that_cannot_be_entered_leaves_the_others_of_its_disk() -> None:
    table = agent.MountTable(
        agent.Mount(number, 27, "8:1", "/", path, "ext4", "/dev/sda1", ("rw",))
        for number, path in ((30, "/nowhere/at/all"), (31, "/"))
    )
    row = agent.read_disk(table, "/nowhere/at/all", "/")
    assert row and row["mount"] == "/"
    with pytest.raises(OSError):
        agent.read_disk(table, "/nowhere/at/all")


def test_a_network_file_system_is_never_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even when DISK_PATHS asks for it: a server that is away would hang the agent."""
    touched: list[str] = []
    monkeypatch.setattr(os, "statvfs", touched.append)
    monkeypatch.setattr(agent, "read_bytes", lambda path: MOUNTINFO.encode())
    collector = agent.Collector(make_config(disk_paths="/mnt/nfs/mail"))
    with pytest.raises(ValueError, match="no local file system"):
        collector.readers["disks"]()
    assert touched == []


def test_a_disk_that_hangs_is_no_emptier_disk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its row and the fullest disk's figures are missing until it answers; the others are there."""
    mounts = agent.parse_mountinfo(MOUNTINFO.encode())
    some = [m for m in mounts if m.path in ("/", "/var/mail", "/tank")]
    monkeypatch.setattr(agent, "parse_mountinfo", lambda _: some)
    hangs = threading.Event()
    answers = os.statvfs_result((4096, 4096, 1000, 500, 400, 0, 0, 0, 0, 255))

    def statvfs(path: str) -> os.statvfs_result:
        if path == "/var/mail":
            hangs.wait(60)
        return answers

    monkeypatch.setattr(os, "statvfs", statvfs)
    collector = agent.Collector(make_config())
    for _ in range(3):
        found = collector.readers["disks"]()
        assert {row["mount"] for row in found["disks"]} == {"/", "/tank"}
        assert not {"disk_used_percent", "disk_free_bytes"} & found.keys()
    hangs.set()
    eventually(lambda: "disk_used_percent" in collector.readers["disks"](), 30)
    said = [record.getMessage() for record in caplog.records
            if "hangs" in record.getMessage() and record.levelname == "WARNING"]
    assert said == [
        "disk /var/mail hangs",
        "cannot read disk_used_percent: a disk hangs, and may be the fullest; "
        "it is left out of the samples",
    ]


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
    make_machine(tmp_path, sda_read=10, nvme_read=9000)
    found = collector.readers["disk_io"]()
    assert found == {"disk_read_bytes_sec": None, "disk_write_bytes_sec": None}
    clock.advance(10)
    make_machine(tmp_path, sda_read=30, nvme_read=9000)
    assert collector.readers["disk_io"]()["disk_read_bytes_sec"] == 20 * 512 // 10


@pytest.mark.parametrize(
    ("readings", "rates"),
    [
        ((1000, 1100, 0, 1300, 1400), [10, None, 10, 10]),  # one bad reading
        ((1000, 1100, 0, 0, 1400), [10, None, 0, 140]),  # two
        ((1000, 1100, 50, 150, 250), [10, None, 10, 10]),  # a reset
        ((1000, 1100, 500, 200, 300), [10, None, None, 10]),  # two resets
        ((1000, 1100, 1050, 1150), [10, 0, 10]),  # it fell a little, as iowait may
    ],
)
def test_one_bad_reading_is_never_the_base(
    readings: tuple[int, ...], rates: list[int | None]
) -> None:
    clock = FakeClock()
    meter = agent.Meter(clock.monotonic)
    assert meter.rates({"sda": (readings[0], 0)}) == {}
    found = []
    for reading in readings[1:]:
        clock.advance(10)
        found.append(agent.total_rates(meter.rates({"sda": (reading, 0)}))[0])
    assert found == rates


def test_no_rate_without_time_or_a_device() -> None:
    meter = agent.Meter(FakeClock().monotonic)
    meter.rates({"sda": (0, 0)})
    assert agent.total_rates(meter.rates({"sda": (10, 10)})) == (None, None)
    assert agent.total_rates({"sda": [1.0, 2.0], "sdb": None}) == (None, None)
    assert agent.total_rates({}) == (None, None)


def test_no_interface_is_not_zero_traffic() -> None:
    collector = agent.Collector(make_config(net_interfaces="wan7"))
    with pytest.raises(ValueError, match="no interface but lo"):
        collector.readers["network"]()


def test_a_new_device_does_not_bring_its_past_with_it() -> None:
    clock = FakeClock()
    meter = agent.Meter(clock.monotonic)
    meter.rates({"sda": (100, 100)})
    clock.advance(10)
    rates = meter.rates({"sda": (200, 100), "sdb": (10**12, 10**12)})
    assert agent.total_rates(rates) == (10, 0)


@pytest.mark.parametrize("heads_count", [False, True])
@pytest.mark.parametrize("paths", [1, 2])
def test_nvme_multipath_counts_at_its_paths_or_at_the_disk(
    heads_count: bool, paths: int, tmp_path: Path
) -> None:
    names = ["nvme0n1", *(f"nvme0c{n}n1" for n in range(paths))]
    for name in names:
        (tmp_path / "sys/block" / name / "device").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    collector, clock = machine_collector(tmp_path)
    found = {}
    for sectors in (1000, 2000):
        rows = [f"259 0 {name} 1 0 {sectors} 0 1 0 {sectors} 0 0 0 0" for name in names]
        if not heads_count:
            rows[0] = "259 0 nvme0n1 0 0 0 0 0 0 0 0 0 0 0"
        (tmp_path / "proc/diskstats").write_text("\n".join(rows) + "\n")
        found = collector.readers["disk_io"]()
        clock.advance(10)
    expected = 1000 * 512 // 10 * (1 if heads_count else paths)
    assert found == {"disk_read_bytes_sec": expected, "disk_write_bytes_sec": expected}


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


def test_the_port_of_a_switch_is_not_counted_on_top_of_its_conduit(tmp_path: Path) -> None:
    make_nics(tmp_path, ("eth0", "eth1", "veth1", "vf0"), {"eth1": "eth0"})
    base = tmp_path / "sys/class/net"
    (base / "veth1/type").write_text("1\n")
    for name in ("eth1", "veth1"):
        (base / name / "uevent").write_text(f"DEVTYPE=dsa\nINTERFACE={name}\n")
    (base / "vf0/master").symlink_to("../eth0")  # eth0 is a paravirtual interface, ...
    (base / "eth0/lower_vf0").symlink_to("../vf0")  # ... in which vf0 is counted
    present = ["lo", "eth0", "eth1", "veth1", "vf0"]
    assert agent.choose_interfaces(str(base), present) == ["eth0"]


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


def cpu_shares(*readings: str) -> list[tuple[Any, Any]]:
    """Return what the CPU reader makes of readings of /proc/stat, 10 s apart."""
    clock = FakeClock()
    with tempfile.TemporaryDirectory() as folder:
        meter = agent.Meter(clock.monotonic)
        found = []
        for rows in readings:
            Path(folder, "stat").write_text(f"cpu  9 9 9 9 9 9 9 9 9 9\n{rows}intr 1 2 3\n")
            one = agent.read_cpu(folder, meter)
            shares = {row["core"]: row["percent"] for row in one["cpu_cores"] or ()}
            found.append((one["cpu_percent"], shares))
            clock.advance(10)
    return found[1:]


def test_cpu_shares() -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice; guest is in user already
    before = "cpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 500 0 0 0 0 0 0 0 0 0\n"
    after = "cpu0 200 0 0 500 300 0 0 0 200 0\ncpu1 500 0 0 300 0 0 0 100 0 0\n"
    assert cpu_shares(before, after) == [(21.4, {0: 20.0, 1: 25.0})]
    assert cpu_shares(before, before) == [(None, {})]


def test_a_core_that_goes_off_and_comes_back() -> None:
    """It keeps its number; its idle time may start anew while its busy time goes on."""
    both = "cpu0 {} 0 0 {} 0 0 0 0 0 0\ncpu3 {} 0 0 {} 0 0 0 0 0 0\n"
    one = "cpu0 {} 0 0 {} 0 0 0 0 0 0\n"
    shares = cpu_shares(
        both.format(1000, 100_000, 5000, 118_089), both.format(1010, 100_990, 5010, 140),
        both.format(1020, 101_980, 5110, 1040), one.format(1030, 102_970),
        both.format(1040, 103_960, 5120, 50), both.format(1140, 104_860, 5130, 1040),
    )
    assert shares == [
        (1.0, {0: 1.0}), (5.5, {0: 1.0, 3: 10.0}), (1.0, {0: 1.0}), (1.0, {0: 1.0}),
        (5.5, {0: 10.0, 3: 1.0}),
    ]


def test_iowait_that_went_backwards() -> None:
    before, after = "cpu0 0 0 0 0 900 0 0 0\n", "cpu0 100 0 0 100 890 0 0 0\n"
    assert cpu_shares(before, after) == [(50.0, {0: 50.0})]


def test_one_reading_of_zeros_is_no_busy_core() -> None:
    rows = [f"cpu0 {10 + n} 0 0 {99_000 + 99 * n} 0 0 0 0\n" for n in range(3)]
    zeros = "cpu0 0 0 0 0 0 0 0 0\n"
    assert cpu_shares(rows[0], zeros, rows[1], rows[2]) == [
        (None, {}), (1.0, {0: 1.0}), (1.0, {0: 1.0}),
    ]


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


def test_both_families_count_without_sock_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("no tcp_diag")

    monkeypatch.setattr(agent, "dump_tcp", refuse)
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((host, 0), family=family) as listener:
            address = listener.getsockname()[:2]
            assert agent.check_by_listener(host, (address[1],)) == {address[1]: True}
            before = agent.read_tcp("/proc")["tcp_established"]
            with contextlib.ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(socket.create_connection(address))
                assert agent.read_tcp("/proc")["tcp_established"] >= before + 60


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


def test_an_accept_queue_that_holds_its_limit_takes_one_more() -> None:
    """As the kernel sees it (sk_acceptq_is_full): more than the backlog is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            [one] = [one for one in agent.listeners() if one.port == port]
            assert (one.queued, one.limit) == (1, 1)
            assert agent.check_by_listener("127.0.0.1", (port,)) == {port: True}
            assert agent.check_by_connect("127.0.0.1", (port,)) == {port: True}
            assert agent.check_by_listener("127.0.0.1", (port,)) == {port: False}


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


def test_a_port_that_connects_to_itself_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A free port in the local range may be picked as our own source port."""
    connect = socket.socket.connect_ex

    def from_the_same_port(sock: socket.socket, address: tuple[str, int]) -> int:
        sock.bind(address)
        return connect(sock, address)  # TCP's simultaneous open, with itself

    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    monkeypatch.setattr(socket.socket, "connect_ex", from_the_same_port)
    assert agent.check_by_connect("127.0.0.1", (port,)) == {port: False}


def test_out_of_local_ports_is_not_a_verdict_on_the_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EADDRNOTAVAIL)
    with pytest.raises(OSError, match="assign requested address"):
        agent.check_by_connect("127.0.0.1", (25,))


def test_ports_of_the_settings() -> None:
    def checked(**settings: Any) -> dict[str, bool]:
        found: dict[str, bool] = agent.unpack(
            agent.Collector(make_config(**settings)).collect().packed
        )["services"]
        return found

    assert list(checked(node_role="haraka")) == ["port_25"]
    assert checked(check_ports="7,8", check_host="::1") == {"port_7": False, "port_8": False}


def test_netlink_error_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without tcp_diag answers with an error: the metric is absent, not 0."""
    reply = struct.pack("=IHHIIi", 36, agent.NLMSG_ERROR, 0, 1, 0, -2) + bytes(16)
    monkeypatch.setattr(socket.socket, "recv", lambda *_: reply)
    with pytest.raises(OSError, match="No such file"):
        list(agent.dump_tcp(agent.TCP_ESTABLISHED))
