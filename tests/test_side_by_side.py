"""Side by side with ss, df, ip and /proc/diskstats, on the real kernel.

Each test plays a scene in mount, network and process namespaces of its own, where nothing else
moves: this file runs itself there (`inside`), takes the agent's numbers and the tool's, and
hands both back. Mounts, sockets, processes and `mount -o loop` end with the namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import logging
import mmap
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ROOT, eventually, make_config
from dashboard import SYSTEM

import tinomail_agent as agent

pytestmark = pytest.mark.alone

APT_PACKAGES = (
    "btrfs-progs", "dmsetup", "e2fsprogs", "iproute2", "mount", "squashfs-tools", "util-linux",
    "xorriso",
)
TOOLS_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NOBODY = 65534
MIB = 1024 * 1024
KIB = 1024

Scene = Callable[..., dict[str, Any]]


# --- what the tests and the scenes share


def out(*command: str | Path) -> str:
    environ = {**os.environ, "LC_ALL": "C", "PATH": TOOLS_PATH}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def lacking(what: str) -> None:
    """Skip on a developer's machine; CI must have it all."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {what} (apt-get install {' '.join(APT_PACKAGES)})")
    pytest.skip(f"{what} is not to be had here")


def need(*tools: str) -> None:
    for tool in tools:
        if not shutil.which(tool, path=TOOLS_PATH):
            lacking(tool)


def modprobe(module: str) -> None:
    """Load a module, if this kernel has modules."""
    if program := shutil.which("modprobe", path=TOOLS_PATH):
        subprocess.run([program, "-q", module], check=False, stderr=subprocess.DEVNULL)


def need_filesystem(name: str) -> None:
    modprobe(name)
    if name not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"this kernel has no {name}")


NAMESPACES = (
    "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
)


def inside(scene: Scene, **arguments: Any) -> dict[str, Any]:
    """Play a scene of a file in namespaces of its own; return what it returns."""
    need("unshare")
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        lacking("root, with the right to make namespaces")
    done = subprocess.run(
        [*NAMESPACES, sys.executable, inspect.getfile(scene), scene.__name__,
         json.dumps(arguments)],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def as_nobody(look: Callable[[], Any]) -> Any:
    """Return what a process without privileges sees, as the agent's unit is one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            prctl(PR_SET_DUMPABLE, 1)  # else /proc/self is root's; an execve would do the same
            with open(writer, "w") as stream:
                json.dump(look(), stream)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    assert os.waitpid(child, 0)[1] == 0, "see above"
    return json.loads(text)


# linux/prctl.h
PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_MM, PR_SET_MM_MAP = 4, 15, 35, 14
libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: int | bytes) -> None:
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*arguments, 0, 0, 0)]
    if libc.prctl(option, *values[:4]):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


class Lines(logging.Handler):
    """Keeps what the agent logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def samples(
    count: int = 2, primed: Callable[[], Any] = lambda: None, **collector: Any
) -> dict[str, Any]:
    """Return so many samples of one collector, and all that it logged."""
    handler = Lines()
    agent.log.addHandler(handler)
    try:
        one = agent.Collector(make_config(check_mode="listen", check_ports="1"), **collector)
        one.prime()
        primed()
        taken = []
        for _ in range(count):
            time.sleep(0.1)  # a few ticks of the CPU's clock
            taken.append(agent.unpack(one.collect().packed))
    finally:
        agent.log.removeHandler(handler)
    return {"samples": taken, "log": handler.lines}


def plug_in() -> None:
    """Give the scene an interface, as every node has; without one the network is missing."""
    out("ip", "link", "set", "lo", "up")
    out("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far")


# --- TCP as ss counts it

HOLDERS = 10  # processes; each stays below a limit of 1,024 open files
PAIRS, HALF_CLOSED, CLOSED = 125, 10, 25  # for each holder and family


def hold_sockets() -> list[socket.socket]:
    """Make a holder's share of the sockets, in both families; return those to keep open."""
    kept: list[socket.socket] = []
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((host, 0), family=family) as listener:

            def pair(to: socket.socket = listener) -> tuple[socket.socket, socket.socket]:
                client = socket.socket(to.family)
                client.connect(to.getsockname()[:2])
                return client, to.accept()[0]

            for _ in range(PAIRS):  # both ends are in this namespace: two ESTABLISHED
                kept.extend(pair())
            for number in range(HALF_CLOSED):  # the server's end stays in CLOSE_WAIT
                client, server = pair()
                kept.append(server)
                if number % 2:
                    client.close()  # FIN_WAIT2 without a socket: sockstat's tw holds it
                else:
                    client.shutdown(socket.SHUT_WR)
                    kept.append(client)
                server.recv(1)  # its end of the stream has come
            for _ in range(CLOSED):
                client, server = pair()
                client.close()  # the one that closes first waits ...
                server.recv(1)  # ... and both would, if they closed at once
                server.close()
    return kept


def hold_odd_states() -> list[socket.socket]:
    """Make a few sockets in each state that is rare, in both families; return them."""
    kept = []
    for family, host, away in (
        (socket.AF_INET, "127.0.0.1", "10.9.0.9"), (socket.AF_INET6, "::1", "fd00::9"),
    ):
        listener = socket.create_server((host, 0), family=family)
        kept.append(listener)
        for is_last_ack in (False, True, True):  # one in FIN_WAIT1, two in LAST_ACK
            client = socket.create_connection(listener.getsockname()[:2])
            server = listener.accept()[0]
            closing, other = (server, client) if is_last_ack else (client, server)
            if is_last_ack:
                other.shutdown(socket.SHUT_WR)
            closing.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    closing.send(bytes(64 * KIB))
            closing.close()  # what it has sent is not read: its end waits for that
            kept.append(other)
        for _ in range(4):  # SYN_SENT
            client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            client.connect_ex((away, 25))
            kept.append(client)
    return kept


def ss_counts(family: str) -> dict[str, int]:
    return Counter(line.split()[0] for line in out("ss", family, "-Htan").splitlines())


def scene_tcp() -> dict[str, Any]:
    plug_in()
    for command in (
        "link set far up", "link set eth0 up", "addr add 10.9.0.1/24 dev eth0",
        "-6 addr add fd00::1/64 dev eth0 nodad",
        "neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        "-6 neigh add fd00::9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
    ):
        out("ip", *command.split())
    odd = hold_odd_states()
    reader, writer = os.pipe()
    for _ in range(HOLDERS):
        if os.fork() == 0:
            kept = hold_sockets()
            os.write(writer, b".")
            signal.pause()
            os._exit(len(kept))  # never comes here: the namespace ends first
    ready = b""
    while len(ready) < HOLDERS:
        ready += os.read(reader, HOLDERS)
    before = ss_counts("-4"), ss_counts("-6")
    seen = as_nobody(samples)
    assert before == (ss_counts("-4"), ss_counts("-6")), "it moved while we looked"
    return {"ss": before, "odd": len(odd), **seen}


def test_tcp_as_ss_with_thousands_of_sockets() -> None:
    """Exactly as ss, whatever the states of the other sockets."""
    need("ss", "ip")
    found = inside(scene_tcp)
    for family in found["ss"]:  # the scene is what it should be, half of it in each family
        assert (family["ESTAB"], family["TIME-WAIT"], family["CLOSE-WAIT"]) == (2501, 250, 100)
        assert [family[state] for state in ("FIN-WAIT-1", "LAST-ACK", "SYN-SENT")] == [1, 2, 4]
    for sample in found["samples"]:
        system = sample["system"]
        assert system["tcp_established"] == 5002
        assert system["tcp_time_wait"] == 500
        assert system["tcp_close_wait"] == 200
    assert found["log"] == []


# --- disks as df shows them


@contextlib.contextmanager
def block_disk(size_mib: int) -> Iterator[str]:
    """A block device that is neither a loop nor in use: a zram disk made for the test.

    Loop devices are not counted as disks, and few machines have a spare partition.
    """
    modprobe("zram")
    control = Path("/sys/class/zram-control")
    if os.geteuid() != 0:
        lacking("root")
    if not control.is_dir():
        pytest.skip("this kernel has no zram, the only disk that a test can make for itself")
    number = (control / "hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(f"{size_mib}M")
        yield f"/dev/zram{number}"
    finally:

        def removed() -> bool:  # the namespace's mounts end a moment after its processes
            try:
                (control / "hot_remove").write_text(number)
            except OSError:
                return False
            return True

        eventually(removed, 15, f"zram{number} is free")


@pytest.fixture
def disks() -> Iterator[Callable[[int], str]]:
    with contextlib.ExitStack() as stack:
        yield lambda size_mib: stack.enter_context(block_disk(size_mib))


def make_image(fstype: str, folder: Path) -> Path:
    """Make a file that holds a file system of this type, with a file in it."""
    content = folder / "content"
    content.mkdir(exist_ok=True)
    (content / "file").write_bytes(os.urandom(300 * KIB))
    image = folder / f"image.{fstype}"
    if fstype == "squashfs":
        need("mksquashfs")
        out("mksquashfs", content, image, "-quiet", "-no-progress")
    elif fstype == "iso9660":
        need("xorriso")
        out("xorriso", "-as", "mkisofs", "-quiet", "-o", image, content)
    else:
        need(f"mkfs.{fstype}")
        with image.open("wb") as stream:
            stream.truncate((128 if fstype == "btrfs" else 16) * MIB)
        out(f"mkfs.{fstype}", "-q", image)
    return image


DF = ("df", "-B1", "--output=source,fstype,used,avail,target")
Disk = tuple[int, int]  # bytes used, bytes available to users


def df_disks(fstypes: set[str]) -> dict[str, Disk]:
    """Return mount -> what df shows of "/" and of the file systems of these types."""
    rows = [line.split(None, 4) for line in out(*DF).splitlines()[1:]]
    return {
        target: (int(used), int(avail))
        for source, fstype, used, avail, target in rows
        if target == "/"
        or (fstype in fstypes and not source.startswith("/dev/loop") and target != "/boot")
    }


def fill(folder: str, leave_bytes: int) -> None:
    """Fill a file system until only this much is left, even of what is root's."""
    with open(f"{folder}/filling", "wb") as stream, contextlib.suppress(OSError):
        while True:  # until no space is left on device
            stream.write(os.urandom(16 * KIB))
            stream.flush()
    left = os.statvfs(folder)
    assert left.f_bavail == 0
    if leave_bytes:
        size = os.path.getsize(f"{folder}/filling")
        reserved = (left.f_bfree - left.f_bavail) * left.f_frsize
        os.truncate(f"{folder}/filling", size - leave_bytes - reserved)


def look_at_disks(fstypes: set[str]) -> dict[str, Any]:
    """Return the agent's rows beside those of df, in the namespace as it is now."""
    return {"df": df_disks(fstypes), **as_nobody(lambda: samples(1))}


def mount(*arguments: str) -> None:
    target = Path(arguments[-1])
    if target.parts[:2] == ("/", "media"):
        target.mkdir(parents=True, exist_ok=True)
    out("mount", *arguments)


def scene_disks(folder: str, second: str, home: str, squashfs: str) -> dict[str, Any]:
    found = {}
    plug_in()
    mount("-t", "tmpfs", "scene", "/media")  # room for mount points
    mount(second, "/var/mail")
    mount(home, "/home")
    fill("/var/mail", leave_bytes=MIB // 4)
    fill("/home", leave_bytes=0)
    os.mkdir("/var/mail/joe")
    mount("--bind", "/var/mail", "/media/mail with blank\\")
    mount("--bind", "/var/mail/joe", "/media/joe")
    mount("-o", "loop", squashfs, "/media/snap")
    mount("-t", "tmpfs", "-o", "size=1m", "full", "/media/tmpfs")
    fill("/media/tmpfs", leave_bytes=0)
    found["plain"] = look_at_disks({"ext4"})

    enter_sandbox(Path(folder))
    found["sandbox"] = look_at_disks({"ext4"})

    # As ProtectHome=yes does, and any mount on top of another.
    mount("--bind", "/media/tmpfs", "/home")
    mount("-t", "tmpfs", "hides", "/var/mail")
    found["hidden"] = look_at_disks({"ext4"})
    return found


def enter_sandbox(folder: Path) -> None:
    """Build what systemd's namespace.c does for the unit, and move this namespace into it.

    ProtectSystem=strict, ProtectHome=read-only, PrivateTmp, StateDirectory, in a new root.
    """
    root, private = folder / "unit-root", folder / "private-tmp"
    root.mkdir()
    private.mkdir()
    out("mount", "--rbind", "/", root)
    out("mount", "--bind", private, f"{root}/tmp")
    out("mount", "--bind", private, f"{root}/var/tmp")
    for path in ("/home", "/var/lib", "/media"):
        out("mount", "--rbind", f"{root}{path}", f"{root}{path}")
    out("mount", "-o", "remount,bind,ro", f"{root}/home")
    out("mount", "-o", "remount,bind,ro", root)
    os.chdir("/")
    out("sh", "-c", f"cd '{root}' && pivot_root . . && umount -l .")
    os.chdir("/")


def same_as_df(seen: dict[str, Any]) -> dict[str, float]:
    """Compare the agent's rows with those of df; return mount -> percent."""
    system = seen["samples"][0]["system"]
    rows = {row["mount"]: row for row in system["disks"]}
    assert set(rows) == set(seen["df"])
    for target, (used, available) in seen["df"].items():
        moves = 64 * MIB if target == "/" else 0  # others write to "/" meanwhile
        share = 100 * used / (used + available)
        assert rows[target]["used_percent"] == pytest.approx(share, abs=0.1)
        assert rows[target]["free_bytes"] == pytest.approx(available, abs=moves)
    percents = {target: row["used_percent"] for target, row in rows.items()}
    assert system["disk_used_percent"] == max(percents.values())
    assert system["disk_free_bytes"] == rows[max(percents, key=lambda t: percents[t])]["free_bytes"]
    return percents


def test_disks_as_df(tmp_path: Path, disks: Callable[[int], str]) -> None:
    """A second, fuller disk and a full /home, first bare and then from within the sandbox."""
    need_filesystem("squashfs")
    need("df", "mkfs.ext4", "pivot_root")
    second, home = disks(64), disks(48)
    for device in (second, home):
        out("mkfs.ext4", "-q", device)
    image = str(make_image("squashfs", tmp_path))
    found = inside(
        scene_disks, folder=str(tmp_path), second=second, home=home, squashfs=image
    )

    for name in ("plain", "sandbox"):
        percents = same_as_df(found[name])
        assert {"/", "/home", "/var/mail"} <= set(percents)
        assert percents["/home"] == 100.0
        assert percents["/var/mail"] > percents["/"]
        assert found[name]["log"] == []

    # Only the bind mount still leads to the second disk; nothing leads to the full /home.
    percents = same_as_df(found["hidden"])
    assert "/media/mail with blank\\" in percents
    assert not {"/home", "/var/mail"} & set(percents)
    assert found["hidden"]["log"] == []


def scene_mounted(source: str, fstype: str, options: str) -> dict[str, Any]:
    mount("-t", "tmpfs", "scene", "/media")
    mount("-t", fstype, "-o", options, source, "/media/it")
    shown = [line.split()[4] for line in out(*DF).splitlines()[1:]]
    return {"df_shows_it": "/media/it" in shown, **as_nobody(lambda: samples(1))}


@pytest.mark.parametrize("fstype", ["squashfs", "iso9660", "ext4", "btrfs"])
def test_an_image_is_no_disk(fstype: str, tmp_path: Path) -> None:
    """Whatever is in it: a loop-mounted file takes its room on the disk that holds the file."""
    need_filesystem(fstype)
    image = make_image(fstype, tmp_path)
    found = inside(scene_mounted, source=str(image), fstype=fstype, options="loop")
    assert found["df_shows_it"]
    assert "/media/it" not in [row["mount"] for row in found["samples"][0]["system"]["disks"]]


def test_squashfs_is_no_disk_on_a_block_device_either(
    tmp_path: Path, disks: Callable[[int], str]
) -> None:
    """A live system's root image is full by nature; so are CDs."""
    need_filesystem("squashfs")
    device = disks(16)
    with open(device, "r+b") as stream:
        stream.write(make_image("squashfs", tmp_path).read_bytes())
    found = inside(scene_mounted, source=device, fstype="squashfs", options="ro")
    assert found["df_shows_it"]
    assert "/media/it" not in [row["mount"] for row in found["samples"][0]["system"]["disks"]]


def scene_btrfs(device: str) -> dict[str, Any]:
    mount("-t", "tmpfs", "scene", "/media")
    mount(device, "/media/pool")
    for name in ("@home", "@mail"):
        out("btrfs", "subvolume", "create", f"/media/pool/{name}")
    Path("/media/pool/@mail/letters").write_bytes(os.urandom(30 * MIB))
    out("umount", "/media/pool")
    mount("-o", "subvol=@home", device, "/home")
    mount("-o", "subvol=@mail", device, "/var/mail")
    return look_at_disks({"btrfs"})


def test_btrfs_is_one_disk_with_all_its_subvolumes(disks: Callable[[int], str]) -> None:
    """df shows a row for each, all of them with the numbers of the one file system."""
    need_filesystem("btrfs")
    need("mkfs.btrfs", "btrfs")
    device = disks(256)
    out("mkfs.btrfs", "-q", device)
    found = inside(scene_btrfs, device=device)
    assert found["df"].pop("/var/mail") == found["df"]["/home"]
    assert "/home" in same_as_df(found)


# --- the network as ip shows it

DATAGRAMS, DATAGRAM_BYTES = 400, 1000
HERE, THERE = ("10.9.0.1", 9000), ("10.9.0.2", 9000)


def socket_in(pid: int) -> socket.socket:
    """Return a UDP socket that lives in the network namespace of another process."""
    with open("/proc/self/ns/net") as home, open(f"/proc/{pid}/ns/net") as other:
        assert libc.setns(other.fileno(), 0) == 0
        try:
            return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        finally:
            assert libc.setns(home.fileno(), 0) == 0


def make_network() -> int:
    """Make a bridge br0 with eth0 in it, one end of a veth pair; the other is in the world.

    Also tun0 and vx0, tunnels. Returns the pid of a process in the world's namespace.
    """
    out("mount", "-t", "sysfs", "sysfs", "/sys")  # sysfs shows the namespace it is mounted in
    ours = os.readlink("/proc/self/ns/net")
    world = subprocess.Popen(["unshare", "--net", "sleep", "100"]).pid
    eventually(lambda: os.readlink(f"/proc/{world}/ns/net") != ours)
    there = ("nsenter", "-t", str(world), "-n")
    for enter in ((), there):  # no neighbour discovery: nothing moves but what we send
        out(*enter, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
        out(*enter, "ip", "link", "set", "lo", "up")
    for command in (
        f"link add eth0 type veth peer name far netns {world}",
        "link add br0 type bridge",
        "link set eth0 master br0",
        "link set eth0 up",
        f"addr add {HERE[0]}/24 dev br0",
        "link set br0 up",
        "tuntap add tun0 mode tun",
        "addr add 10.7.0.1/24 dev tun0",
        "link set tun0 up",
        "link add vx0 type vxlan id 7 remote 203.0.113.1 dstport 4789",
        "addr add 10.8.0.1/24 dev vx0",
        "link set vx0 up",
    ):
        out("ip", *command.split())
    out(*there, "ip", "addr", "add", f"{THERE[0]}/24", "dev", "far")
    out(*there, "ip", "link", "set", "far", "up")
    # The kernel would ask again for a neighbour that it has not heard of for 5 s.
    for enter, device, other, far in (
        ((), "br0", THERE, (*there, "ip")), (there, "far", HERE, ("ip",)),
    ):
        [facts] = json.loads(out(*far, "-j", "link", "show", "far" if not enter else "br0"))
        out(*enter, "ip", "neigh", "replace", other[0], "lladdr", facts["address"],
            "dev", device, "nud", "permanent")
    return world


def link_counters() -> dict[str, list[int]]:
    """Return interface -> [bytes received, sent, errors receiving, sending] of `ip -s link`."""
    links = {one["ifname"]: one["stats64"] for one in json.loads(out("ip", "-s", "-j", "link"))}
    return {
        name: [stats[way][what] for what in ("bytes", "errors") for way in ("rx", "tx")]
        for name, stats in links.items()
    }


def settled_counters() -> dict[str, list[int]]:
    """Return link_counters() once all is delivered: a busy kernel does so after the send."""
    seen = [link_counters()]

    def is_still() -> bool:
        time.sleep(0.2)
        seen.append(link_counters())
        return seen[-1] == seen[-2]

    eventually(is_still, what="the counters come to rest")
    return seen[-1]


def reaches(one: socket.socket, other: socket.socket, address: tuple[str, int]) -> bool:
    """Tell whether the link is up and the neighbour known."""
    with contextlib.suppress(OSError):
        one.sendto(b"?", address)
    return bool(select.select([other], [], [], 0.1)[0]) and bool(other.recv(1))


def send_traffic(here: socket.socket, there: socket.socket) -> None:
    for _ in range(DATAGRAMS):
        here.sendto(bytes(DATAGRAM_BYTES), THERE)
        there.sendto(bytes(DATAGRAM_BYTES), HERE)
    for _ in range(3):
        there.sendto(bytes(DATAGRAM_BYTES), HERE)  # so that the two ways differ


def spoil_traffic() -> None:
    """Give vx0 errors both ways: no route to its other end, and a frame it must not take."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with contextlib.suppress(OSError):
            sock.sendto(b"lost", ("10.8.0.2", 9))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 3)  # outer: congestion experienced,
        mac = bytes.fromhex(Path("/sys/class/net/vx0/address").read_text().replace(":", ""))
        inner = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20, 0, 0, 64, 17, 0, b"\x0a\x08\0\2",
                            b"\x0a\x08\0\1")  # inner: not capable of it (RFC 6040)
        header = struct.pack("!II", 0x08000000, 7 << 8)  # RFC 7348
        sock.sendto(header + mac + b"\x02far!!" + b"\x08\0" + inner, ("127.0.0.1", 4789))


def scene_network(interfaces: str, sys_root: str) -> dict[str, Any]:
    world = make_network()
    now = [0.0]
    collector = agent.Collector(
        make_config(net_interfaces=interfaces), sys_root=sys_root, clock=lambda: now[0]
    )
    here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    there = socket_in(world)
    with here, there, open("/dev/net/tun", "r+b", buffering=0) as tun:
        here.bind(HERE)
        there.bind(THERE)
        eventually(lambda: reaches(here, there, THERE) and reaches(there, here, HERE))
        before = settled_counters()
        collector.readers["network"]()
        assert before == link_counters(), "it moved while we looked"
        send_traffic(here, there)
        spoil_traffic()
        attach = struct.pack("16sH22x", b"tun0", 0x1001)  # IFF_TUN | IFF_NO_PI
        assert libc.ioctl(tun.fileno(), 0x400454CA, attach) == 0  # TUNSETIFF
        tun.write(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20, 0, 0, 64, 17, 0, bytes(4), bytes(4)))
        after = settled_counters()
        now[0] = 10.0
        found = collector.readers["network"]()
        assert after == link_counters(), "it moved while we looked"
    return {"before": before, "after": after, "agent": found}


def hardware_tree(folder: Path) -> str:
    """Return a made-up /sys in which eth0 alone has hardware behind it."""
    (folder / "sys/class/net/eth0/device").mkdir(parents=True)
    return str(folder / "sys")


@pytest.mark.parametrize(
    ("interfaces", "hardware", "expected"),
    [
        ("auto", False, ["eth0"]),  # neither the bridge on top of it nor a tunnel through it
        ("auto", True, ["eth0"]),
        ("br0", False, ["br0"]),
        ("eth0,vx0", False, ["eth0", "vx0"]),
    ],
)
def test_network_as_ip(
    interfaces: str, hardware: bool, expected: list[str], tmp_path: Path
) -> None:
    need("ip", "nsenter")
    if not os.path.exists("/dev/net/tun"):
        lacking("/dev/net/tun")
    sys_root = hardware_tree(tmp_path) if hardware else "/sys"
    found = inside(scene_network, interfaces=interfaces, sys_root=sys_root)
    before, after = found["before"], found["after"]
    moved = {name: [b - a for a, b in zip(before[name], after[name])] for name in after}
    for name in ("eth0", "br0"):  # the scene is what it should be
        assert min(moved[name][:2]) > DATAGRAMS * DATAGRAM_BYTES
    assert min(moved["tun0"][0], *after["vx0"][2:]) > 0
    assert found["agent"] == {
        "net_rx_bytes_sec": round(sum(moved[name][0] for name in expected) / 10),
        "net_tx_bytes_sec": round(sum(moved[name][1] for name in expected) / 10),
        "net_rx_errors": sum(after[name][2] for name in expected),
        "net_tx_errors": sum(after[name][3] for name in expected),
    }


def test_network_of_this_machine_as_ip() -> None:
    """Interfaces with hardware and nothing else: errors between two readings of ip's."""
    need("ip")
    hardware = [path.parent.name for path in Path("/sys/class/net").glob("*/device")]
    if not hardware:
        pytest.skip("no interface here has hardware behind it: a container")
    collector = agent.Collector(make_config())
    low = link_counters()
    assert sorted(agent.choose_interfaces("/sys/class/net", low)) == sorted(hardware)
    found = collector.readers["network"]()
    high = link_counters()
    for column, name in ((2, "net_rx_errors"), (3, "net_tx_errors")):
        least, most = (sum(now[one][column] for one in hardware) for now in (low, high))
        assert least <= found[name] <= most


def scene_lonely() -> dict[str, Any]:
    out("mount", "-t", "sysfs", "sysfs", "/sys")
    seen: dict[str, Any] = as_nobody(samples)
    return seen


def test_without_a_network_there_are_no_network_numbers() -> None:
    """With nothing but lo (PrivateNetwork=yes) 0 bytes per second would be a made-up 0."""
    found = inside(scene_lonely)
    is_left_out(found, "net_rx_bytes_sec", "net_tx_bytes_sec", "net_rx_errors", "net_tx_errors")
    assert found["log"] == [
        left_out("network", "no interface but lo, or none of NET_INTERFACES")
    ]


# --- disk bytes as /proc/diskstats counts them

WRITTEN = 16 * MIB


def disk_counters() -> dict[str, tuple[int, int]]:
    """Return device -> (bytes read, bytes written), as iostat(1) computes them."""
    rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    return {row[2]: (int(row[5]) * 512, int(row[9]) * 512) for row in rows}


def scene_disk_io(image: str, stacked: bool) -> dict[str, Any]:
    """Write through a loop device, and a dm device on top of it if `stacked`, to the disk."""
    out("mount", "-t", "tmpfs", "scene", "/media")
    loop = out("losetup", "--find", "--show", image).strip()
    name = f"tinomail-{os.getpid()}-{time.monotonic_ns()}"
    now = [0.0]
    collector = agent.Collector(make_config(), clock=lambda: now[0])
    with contextlib.ExitStack() as stack:
        stack.callback(out, "losetup", "--detach", loop)
        if stacked:
            sectors = out("blockdev", "--getsz", loop).strip()
            out("dmsetup", "create", name, "--table", f"0 {sectors} linear {loop} 0")
            stack.callback(out, "dmsetup", "remove", "--retry", name)
        top = f"/dev/mapper/{name}" if stacked else loop
        mount("-t", "ext4", top, "/media/it")
        stack.callback(out, "umount", "/media/it")
        outer = [disk_counters()]
        collector.readers["disk_io"]()
        inner = [disk_counters()]
        with open("/media/it/file", "wb") as stream:
            stream.write(os.urandom(WRITTEN))
            stream.flush()
            os.fsync(stream.fileno())
        with open(image, "rb") as stream:  # back from the disk, not from the page cache
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while stream.read(MIB):
                pass
        inner.append(disk_counters())
        now[0] = 10.0
        found = collector.readers["disk_io"]()
        outer.append(disk_counters())
        kinds = dict(line.split() for line in out("lsblk", "-dno", "KNAME,TYPE").splitlines())
        moving = os.path.basename(os.path.realpath(top))
    return {"inner": inner, "outer": outer, "agent": found, "kinds": kinds, "moving": moving}


@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "dm"])
def test_disk_bytes_as_diskstats(stacked: bool) -> None:
    """What goes through a loop or dm device reaches the disk below, and is counted there."""
    need("losetup", "lsblk", "mkfs.ext4", "dmsetup")
    if os.geteuid() != 0:
        lacking("root")
    if stacked:
        modprobe("dm-mod")
        if " device-mapper" not in Path("/proc/misc").read_text():
            pytest.skip("this kernel has no device mapper")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        image = Path(folder, "disk")
        with image.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, 3 * WRITTEN)
        out("mkfs.ext4", "-q", image)
        found = inside(scene_disk_io, image=str(image), stacked=stacked)
    disks = [
        name for name, kind in found["kinds"].items()
        if kind == "disk" and not name.startswith("zram")
    ]

    def grown(counters: list[dict[str, list[int]]], column: int) -> int:
        return sum(counters[1][name][column] - counters[0][name][column] for name in disks)

    before, after = found["inner"]
    moving = found["moving"]
    assert after[moving][1] - before[moving][1] >= WRITTEN  # the scene is what it should be
    for column, name in enumerate(("disk_read_bytes_sec", "disk_write_bytes_sec")):
        shown = found["agent"][name] * 10
        assert grown(found["inner"], column) - 10 <= shown <= grown(found["outer"], column) + 10
        assert shown >= WRITTEN


# --- what is missing is left out and said once; what is odd does no harm


def left_out(name: str, why: str) -> str:
    """Return the agent's line about what it cannot read."""
    return f"cannot read {name}: {why}; it is left out of the samples"


def is_left_out(found: dict[str, Any], *names: str) -> None:
    """See that these metrics alone are absent, from every sample, and that each is a sample."""
    for sample in found["samples"]:
        assert sorted({*SYSTEM, "processes"} - {*sample["system"], *sample}) == sorted(names)
        assert sample["agent"]["collect_errors"] > 0


def scene_hidepid(folder: str, option: str) -> dict[str, Any]:
    start_daemon(folder)
    all_seen = as_nobody(samples)
    out("mount", "-o", f"remount,hidepid={option}", "/proc")
    return {"before": all_seen, "after": as_nobody(samples), "root": samples()}


def start_daemon(folder: str) -> subprocess.Popen[bytes]:
    """Start a process that passes for Redis: the name of a native server is its program's."""
    program = f"{folder}/redis-server"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "100"])
    eventually(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "redis-server\n")
    return process


@pytest.mark.parametrize("option", ["1", "2"])
def test_hidepid_leaves_processes_out(option: str, tmp_path: Path) -> None:
    """`not_found` for a daemon that runs would be a lie."""
    found = inside(scene_hidepid, folder=str(tmp_path), option=option)
    for name in ("before", "root"):
        assert found[name]["samples"][1]["processes"]["redis"]["status"] == "running"
        assert "processes" not in "".join(found[name]["log"])
    assert not ["processes" for sample in found["after"]["samples"] if "processes" in sample]
    lines = [line for line in found["after"]["log"] if "processes" in line]
    assert lines == [
        left_out("processes", "other users' processes are hidden (hidepid on /proc)")
    ]


def scene_no_sockstat(folder: str) -> dict[str, Any]:
    """Show a /proc whose net has tcp alone."""
    plug_in()
    proc = Path(folder, "proc")
    (proc / "net").mkdir(parents=True)
    for entry in os.listdir("/proc"):
        if entry != "net":
            (proc / entry).symlink_to(f"/proc/{entry}")
    (proc / "net/tcp").symlink_to("/proc/net/tcp")
    return samples(proc=str(proc))


def test_no_sockstat(tmp_path: Path) -> None:
    """/proc/net/tcp has it all, at a cost for each socket; without IPv6 there is no tcp6."""
    need("ip")
    found = inside(scene_no_sockstat, folder=str(tmp_path))
    for sample in found["samples"]:
        assert set(SYSTEM) - set(sample["system"]) == {"listen_overflows"}
        assert sample["agent"]["collect_errors"] == 0
    assert found["log"] == []


def scene_no_net(folder: str) -> dict[str, Any]:
    plug_in()
    out("mount", "--bind", folder, f"/proc/{os.getpid()}/net")
    return samples()


def test_no_proc_net_at_all(tmp_path: Path) -> None:
    need("ip")
    found = inside(scene_no_net, folder=str(tmp_path))
    is_left_out(
        found, "net_rx_bytes_sec", "net_tx_bytes_sec", "net_rx_errors", "net_tx_errors",
        "tcp_established", "tcp_time_wait", "tcp_close_wait", "listen_overflows",
    )
    assert found["log"] == [
        left_out("network", "No such file or directory (/proc/net/dev)"),
        left_out("tcp_connections", "No such file or directory (/proc/net/tcp)"),
    ]


def scene_no_sys_block(over: str) -> dict[str, Any]:
    plug_in()
    out("mount", "-t", "tmpfs", "nothing", over)
    seen: dict[str, Any] = as_nobody(samples)
    return seen


@pytest.mark.parametrize(
    ("over", "why"),
    [("/sys/block", "no disk in /sys/block"), ("/sys", "No such file or directory (/sys/block)")],
)
def test_no_sys_block(over: str, why: str) -> None:
    """As in many containers; /proc/diskstats alone does not tell what stands on what."""
    need("ip")
    found = inside(scene_no_sys_block, over=over)
    is_left_out(found, "disk_read_bytes_sec", "disk_write_bytes_sec")
    assert found["log"] == [left_out("disk_io", why)]


def scene_vanishing(folder: str, after: str) -> dict[str, Any]:
    """End a process just after this was read of it; "listing": after the listing of /proc."""
    plug_in()
    listing, reading = os.listdir, agent.read_bytes
    running: list[subprocess.Popen[bytes]] = []
    ended: list[int] = []

    def end_if(is_time: Callable[[int], bool]) -> None:
        if running and is_time(running[0].pid):
            daemon = running.pop()
            daemon.kill()
            daemon.wait()
            ended.append(daemon.pid)

    def list_and_end(path: str) -> list[str]:
        found = listing(path)
        end_if(lambda pid: after == "listing" and path == "/proc")
        return found

    def read_and_end(path: str, limit: int = -1) -> bytes:
        found = reading(path, limit)
        end_if(lambda pid: path == f"/proc/{pid}/{after}")
        return found

    with mock.patch.object(os, "listdir", list_and_end), \
            mock.patch.object(agent, "read_bytes", read_and_end):
        seen = samples(primed=lambda: running.append(start_daemon(folder)))
    return {**seen, "ended": ended}


@pytest.mark.parametrize("after", ["listing", "stat", "cgroup", "cmdline"])
def test_a_process_that_vanishes(after: str, tmp_path: Path) -> None:
    need("ip")
    found = inside(scene_vanishing, folder=str(tmp_path), after=after)
    assert found["ended"]
    assert found["samples"][1]["processes"]["redis"]["status"] == "not_found"
    assert found["samples"][1]["agent"]["collect_errors"] == 0
    assert found["log"] == []


LONG_BYTES = 8 * MIB


def show_long_cmdline(start: bytes) -> None:
    """Become, in a child, a process with a command line of 8 MiB.

    execve takes 6 MiB at most (fs/exec.c: 3/4 of _STK_LIM), but a process may move what the
    kernel shows of it, as those that set their title do.
    """
    if os.fork() == 0:
        place = mmap.mmap(-1, LONG_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        place.write(start.ljust(LONG_BYTES - 1, b"x") + b"\0")
        address = ctypes.addressof(ctypes.c_char.from_buffer(place))
        # struct prctl_mm_map: all stays as proc_pid_stat(5) shows it, but for the arguments
        field = [0, *map(int, Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[1:])]
        code, stack, data, env = field[23:25], field[25], field[42:44], field[47:49]
        heap = [field[44], field[44]]
        layout = [*code, *data, *heap, stack, address, address + LONG_BYTES, *env]
        packed = struct.pack("=11QQIi", *layout, 0, 0, -1)
        prctl(PR_SET_MM, PR_SET_MM_MAP, packed, len(packed))
        prctl(PR_SET_NAME, b"node")
        signal.pause()


def cmdlines() -> list[bytes]:
    """Return the command lines of all processes, the shortest first."""
    return sorted((path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")), key=len)


def scene_long(folder: str) -> dict[str, Any]:
    plug_in()
    shell = shutil.copy("/bin/sh", f"{folder}/redis-server")
    resource.setrlimit(resource.RLIMIT_STACK, (64 * MIB, resource.RLIM_INFINITY))
    arguments = ["x" * 128_000] * 45
    subprocess.Popen(["redis-server", "-c", "sleep 100; :", *arguments], executable=shell)
    show_long_cmdline(b"node\0/opt/haraka/bin/haraka\0-c\0/etc/haraka\0")
    eventually(lambda: [len(c) // MIB for c in cmdlines()[-2:]] == [5, 8])
    reading, sizes = agent.read_bytes, []

    def read(path: str, limit: int = -1) -> bytes:
        data = reading(path, limit)
        if path.endswith("/cmdline"):
            sizes.append(len(data))
        return data

    def look() -> dict[str, Any]:
        with mock.patch.object(agent, "read_bytes", read):
            seen = samples()
        times = []
        for _ in range(5):  # each asks about every process anew
            worker = agent.Worker(10.0, agent.Problems())
            started = time.perf_counter()
            agent.ProcessTable("/proc", time.monotonic, lambda *_: None, worker).read()
            times.append(time.perf_counter() - started)
        return {**seen, "most_read": max(sizes), "seconds": min(times)}

    seen: dict[str, Any] = as_nobody(look)
    return seen


def test_a_command_line_of_8_mib(tmp_path: Path) -> None:
    """Its first 4 KiB are read, and tell what it is."""
    need("ip")
    found = inside(scene_long, folder=str(tmp_path))
    processes = found["samples"][1]["processes"]
    assert processes["haraka"]["status"] == processes["redis"]["status"] == "running"
    assert found["most_read"] == 4096
    assert found["seconds"] < 0.2  # on a slow machine
    assert found["log"] == []


def scene_odd_names(folder: str) -> dict[str, Any]:
    plug_in()
    place = os.fsencode(folder)
    titles = (b"\xff\xfe) R 1 (\n\xe9", b"Haraka (m\xfcnchen)", b"redis-server \xff:6379")
    for title in titles:
        program = place + b"/" + title.split(b" \xff")[0]
        shutil.copy(b"/bin/cat", program)
        subprocess.Popen([title], executable=program, stdin=subprocess.PIPE)
    eventually(lambda: {title + b"\0" for title in titles} <= set(cmdlines()))
    mount("-t", "tmpfs", "scene", "/media")
    os.mkdir(b"/media/\xff\n")
    subprocess.run([b"mount", b"--bind", b"/", b"/media/\xff\n"], check=True)
    seen: dict[str, Any] = as_nobody(samples)
    return seen


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, blanks, parentheses, line breaks: in comm, cmdline and mounts."""
    need("ip")
    found = inside(scene_odd_names, folder=str(tmp_path))
    processes = found["samples"][1]["processes"]
    assert processes["haraka"]["status"] == processes["redis"]["status"] == "running"
    assert found["samples"][1]["agent"]["collect_errors"] == 0
    assert found["log"] == []


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
