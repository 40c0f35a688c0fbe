"""What a node meets: addresses that move, clocks and host names that come late, disks, signals.

Each test is a real agent process against real servers on loopback. Those that need an /etc/hosts,
a host name or a network of their own run this file again in new namespaces, as root.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KEY, ROOT, AgentProcess, StartAgent, eventually, running_agents, v1_only
from dashboard import Dashboard

import tinomail_agent as agent

pytestmark = [pytest.mark.long, v1_only]

LIMIT_S = 90.0


def late_node_id() -> str:
    """Return an id whose second sample comes as late after the first as can be."""
    return max((f"mta-{n}" for n in range(2000)), key=lambda name: agent.first_pause_s(name, 1))


def waits(process: AgentProcess, wanted: int = 0) -> bool:
    """Ask an agent for its counters; tell whether so many samples wait, or fewer."""
    return counters_of(process)["waiting"] <= wanted


def counters_of(process: AgentProcess) -> dict[str, int]:
    asked = len(process.lines(" sampled, "))
    process.process.send_signal(signal.SIGUSR1)
    eventually(lambda: len(process.lines(" sampled, ")) > asked, LIMIT_S)
    return {name: int(count) for count, name in
            re.findall(r"(\d+) (\w+)", process.lines(" sampled, ")[-1])}


class Notify:
    """Stands for systemd at NOTIFY_SOCKET: when it was told READY=1 and WATCHDOG=1."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self.ready_at = 0.0
        self.pings: list[float] = []
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._socket.recv(4096):
                if b"READY=1" in message:
                    self.ready_at = time.monotonic()
                if b"WATCHDOG=1" in message:
                    self.pings.append(time.monotonic())

    def longest_silence_s(self) -> float:
        times = [self.ready_at, *self.pings, time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.fixture
def notify(tmp_path: Path) -> Notify:
    return Notify(tmp_path / "notify")


class Slow(Dashboard):
    """Stores a sample, and then takes its time to say so."""

    delay_s = 0.0
    slow_path = "/system"  # the end of the path

    def take(self, path: str, headers: Any, body: Any, problem: str) -> tuple[int, Any]:
        answer = super().take(path, headers, body, problem)
        if path.endswith(self.slow_path):
            self.release.wait(self.delay_s)
        return answer


class Choosy(Dashboard):
    """Refuses the fifth sample with 422 whenever it comes."""

    refused = ""

    def take(self, path: str, headers: Any, body: Any, problem: str) -> tuple[int, Any]:
        if path.endswith("/system"):
            if not self.refused and len(self.stored()) == 4:
                self.refused = body["timestamp"]
            if body["timestamp"] == self.refused:
                return 422, {"success": False, "error": "system.load_avg"}
        return super().take(path, headers, body, problem)


# --- the dashboard's word


@pytest.mark.parametrize("status", [422, 500])
def test_the_one_sample_that_is_refused_for_ever_is_given_up_and_no_other_is_late(
    status: int, start_agent: StartAgent
) -> None:
    server = Choosy(KEY) if status == 422 else Dashboard(KEY)
    with server:
        process = start_agent(server.url, heartbeat_ms=1000, CHECK_PORTS="1")
        if status == 500:
            eventually(lambda: len(server.stored()) >= 4, LIMIT_S)
            server.fault = "500"
            poison = eventually(
                lambda: [p.body["timestamp"] for p in server.posts if p.status == 500], LIMIT_S
            )[0]
            server.poison, server.fault = poison, "poison"
        eventually(lambda: process.lines("refused 1 samples for good"), LIMIT_S)
        assert process.stop() == 0
        counters = process.counters()
        assert counters["refused"] == 1 and counters["dropped"] == 0
        assert counters["sampled"] == counters["delivered"] + 1 + counters["waiting"]
        stored = server.stored()
        assert stored == sorted(stored)  # each came before the next one was taken
        refusals = [p for p in server.posts if p.status == status]
        assert len(refusals) >= agent.STRIKES


@pytest.mark.usefixtures("api")
def test_a_slow_backend_gets_one_sample_twice_at_most(tmp_path: Path) -> None:
    """It stores at once, answers after the deadline, and keeps a row for each post."""
    server = Slow(KEY, api="tinomail-monitor")
    with server, running_agents(tmp_path, "tinomail-monitor") as start:
        server.delay_s, server.slow_path = 0.7, ""  # all of it is slow
        process = start(server.url, heartbeat_ms=1000, deadlines=(0.5, 15.0), CHECK_PORTS="1")
        eventually(lambda: len(set(server.stored())) >= 21, LIMIT_S)
        assert process.stop() == 0
        rows = Counter(server.stored())
        assert sum(count > 1 for count in rows.values()) <= 1, rows
        assert max(rows.values()) <= 2
        assert process.counters()["delivered"] >= 20


def test_refusals_do_not_flood_the_log(start_agent: StartAgent, dashboard: Dashboard) -> None:
    process = start_agent(dashboard.url, heartbeat_ms=100, CHECK_PORTS="1", BUFFER_SIZE="1000")
    eventually(lambda: len(dashboard.stored()) >= 2, LIMIT_S)
    for _ in range(8):  # refusals count as long as the dashboard takes other samples
        dashboard.fault = "422"
        count = len(dashboard.posts)
        eventually(lambda wanted=count + 12: len(dashboard.posts) > wanted, LIMIT_S)  # type: ignore[misc]
        dashboard.fault = "off"
        stored = len(dashboard.stored())
        eventually(lambda wanted=stored + 3: len(dashboard.stored()) > wanted, LIMIT_S)  # type: ignore[misc]
    assert process.stop() == 0
    assert len(process.lines("refused .* for good")) <= 1
    # eight outages, each said once when it began and once when it ended
    assert len(process.lines("WARNING")) <= 2 + 2 * 8, process.output


def test_dropped_samples_are_told_in_each_episode(start_agent: StartAgent) -> None:
    server = Slow(KEY)
    with server:
        process = start_agent(server.url, heartbeat_ms=100, CHECK_PORTS="1", BUFFER_SIZE="10")
        for episode in (1, 2):
            server.delay_s = 0.4
            eventually(
                lambda wanted=episode: len(process.lines("the oldest samples")) >= wanted,  # type: ignore[misc]
                LIMIT_S,
            )
            time.sleep(2)
            assert len(process.lines("the oldest samples")) == episode
            server.delay_s = 0.0
            eventually(
                lambda wanted=episode: len(process.lines("no more samples")) >= wanted, LIMIT_S  # type: ignore[misc]
            )
        assert process.stop() == 0
        counters = process.counters()
        assert counters["dropped"] > 0
        assert counters["sampled"] == sum(
            counters[name] for name in ("delivered", "refused", "dropped", "waiting"))


# --- addresses and trust


def test_a_ca_file_that_is_replaced_is_read_again(
    tmp_path: Path, start_agent: StartAgent
) -> None:
    old, new, foreign = trustme.CA(), trustme.CA(), trustme.CA()
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(old.cert_pem.bytes())

    def pem(authority: trustme.CA, name: str) -> tuple[str, str]:
        path = tmp_path / name
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
        return str(path), str(path)

    with Dashboard(KEY, tls=pem(old, "old.pem")) as server:
        process = start_agent(server.url, heartbeat_ms=200, CHECK_PORTS="1",
                              CA_BUNDLE=str(bundle), BUFFER_SIZE="1000")
        eventually(lambda: len(server.stored()) >= 3, LIMIT_S)
        replacement = tmp_path / "bundle.new"
        replacement.write_bytes(old.cert_pem.bytes() + new.cert_pem.bytes())
        replacement.replace(bundle)
        assert server.tls
        server.tls.load_cert_chain(pem(new, "new.pem")[0])
        server.drop_connections()
        count = len(server.stored())
        eventually(lambda: len(server.stored()) > count + 3, LIMIT_S, "with the new CA")
        server.tls.load_cert_chain(pem(foreign, "foreign.pem")[0])
        server.drop_connections()
        eventually(lambda: process.lines("does not trust"), LIMIT_S)
        count = len(server.stored())
        time.sleep(1)
        assert len(server.stored()) == count
        server.tls.load_cert_chain(str(tmp_path / "new.pem"))
        eventually(lambda: waits(process, 1), LIMIT_S, "all delivered", 0.3)
        assert process.stop() == 0


# --- time, names and disks

UNDERLAY = {
    # A clock of 1970 until the file of CASE_CLOCK exists.
    "clock": """
import os, time
real, began = time.time, time.time()
class Clock:
    def __call__(self):
        return real() if os.path.exists(os.environ["CASE_CLOCK"]) else real() - began + 20
time.time = Clock()
""",
    # Each sample file fails once with EIO when it is read.
    "disk": """
import builtins, errno, io, os
real, seen = builtins.open, set()
def failing(file, mode="r", *args, **named):
    if isinstance(file, str) and file.endswith(".sample") and mode == "rb" and file not in seen:
        seen.add(file)
        raise OSError(errno.EIO, os.strerror(errno.EIO), file)
    return real(file, mode, *args, **named)
builtins.open = io.open = failing
""",
}


def underlay(folder: Path, name: str) -> str:
    """Return a PYTHONPATH on which this code runs before the agent."""
    place = folder / f"below-{name}"
    place.mkdir()
    (place / "sitecustomize.py").write_text(UNDERLAY[name])
    return f"{place}:{ROOT}"


@pytest.mark.parametrize("fault", ["off", "503"])
def test_no_sample_has_a_time_before_the_clock_is_set(
    fault: str, tmp_path: Path, start_agent: StartAgent, dashboard: Dashboard, notify: Notify
) -> None:
    clock = tmp_path / "clock"
    dashboard.fault = fault
    process = start_agent(
        dashboard.url, PYTHONPATH=underlay(tmp_path, "clock"), CASE_CLOCK=str(clock),
        NOTIFY_SOCKET=notify.path, CHECK_PORTS="1",
    )
    eventually(lambda: process.lines("clock shows 1970-01-01: no samples"), LIMIT_S)
    eventually(lambda: notify.ready_at, LIMIT_S, "ready all the same")
    time.sleep(3)
    assert dashboard.posts == []
    assert len(process.lines("clock shows")) == 1
    clock.touch()
    dashboard.fault = "off"
    eventually(lambda: len(dashboard.stored()) >= 3, LIMIT_S)
    assert process.lines("the clock is set: taking samples")
    assert process.stop() == 0
    assert min(dashboard.stored()) > "2026-11-01"


def waiting_on_disk(start: StartAgent, dashboard: Dashboard, state: Path, count: int) -> int:
    """Let an agent collect samples in an outage; return how many are on disk."""
    dashboard.fault = "refuse"
    process = start(dashboard.url, heartbeat_ms=100, CHECK_PORTS="1", STATE_DIRECTORY=str(state))
    eventually(lambda: len(list(state.glob("buffer/*.sample"))) >= count, LIMIT_S)
    assert process.stop() == 0
    dashboard.fault = "off"
    assert len(list(state.glob("buffer/*.sample"))) == process.counters()["waiting"]
    return process.counters()["waiting"]


def test_files_that_cannot_be_read_at_once_are_delivered_later(
    tmp_path: Path, start_agent: StartAgent, dashboard: Dashboard
) -> None:
    state = tmp_path / "state"
    count = waiting_on_disk(start_agent, dashboard, state, 5)
    process = start_agent(
        dashboard.url, heartbeat_ms=200, CHECK_PORTS="1", STATE_DIRECTORY=str(state),
        PYTHONPATH=underlay(tmp_path, "disk"),
    )
    eventually(lambda: process.lines(f"loaded {count} undelivered samples"), LIMIT_S)
    eventually(lambda: waits(process), LIMIT_S, "all delivered", 0.3)
    assert process.stop() == 0
    assert len(process.lines("cannot read saved samples")) == 1
    assert process.lines("damaged") == []
    counters = process.counters()
    assert counters["loaded"] == count
    assert counters["delivered"] == count + counters["sampled"] == len(dashboard.stored())
    assert list(state.glob("buffer/*.sample")) == []


WRONG: list[tuple[str, Any]] = [
    ("role", []), ("role", {}), ("role", 5), ("role", None), ("timestamp", []),
    ("timestamp", 17), ("system", None), ("system", []), ("processes", "x"),
    ("processes", [[]]), ("services", 7), ("services", None), ("agent", []),
    ("system", {"load_avg": {}, "disks": 5, "cpu_cores": [None]}),
]


def test_wrong_types_in_a_saved_sample_do_not_stop_a_start(
    tmp_path: Path, start_agent: StartAgent, dashboard: Dashboard
) -> None:
    state = tmp_path / "state"
    count = waiting_on_disk(start_agent, dashboard, state, 3)
    files = sorted(state.glob("buffer/*.sample"))
    good = json.loads(zlib.decompress(files[0].read_bytes()))
    for number, (name, value) in enumerate(WRONG, int(files[-1].stem) + 1):
        bad = {**good, "timestamp": f"2026-11-25T10:00:00.{number % 1000:03}Z", name: value}
        path = files[0].with_name(f"{number:012}.sample")
        path.write_bytes(zlib.compress(json.dumps(bad).encode()))
    process = start_agent(
        dashboard.url, heartbeat_ms=200, CHECK_PORTS="1", STATE_DIRECTORY=str(state)
    )
    eventually(lambda: len(dashboard.stored()) > count + 5, LIMIT_S)
    eventually(lambda: waits(process), LIMIT_S, "all delivered", 0.3)
    assert process.stop() == 0
    assert "Traceback" not in process.output
    counters = process.counters()
    assert counters["crashes"] == 0
    assert counters["delivered"] + counters["refused"] == counters["loaded"] + counters["sampled"]
    assert list(state.glob("buffer/*.sample")) == []


def test_a_stop_lets_the_post_under_way_end(tmp_path: Path, start_agent: StartAgent) -> None:
    server = Slow(KEY)
    with server:
        server.delay_s = 1.5
        state = str(tmp_path / "state")
        process = start_agent(server.url, STATE_DIRECTORY=state, CHECK_PORTS="1")
        for _ in range(2):  # in the midst of a post
            count = len(server.stored())
            eventually(lambda wanted=count: len(server.stored()) > wanted, LIMIT_S)  # type: ignore[misc]
        began = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began < 6 + 5  # the second one for a busy machine
        server.delay_s = 0.0
        again = start_agent(server.url, STATE_DIRECTORY=state, CHECK_PORTS="1")
        eventually(lambda: again.lines("registered as"), LIMIT_S)
        eventually(lambda: waits(again), LIMIT_S, "all delivered", 0.3)
        assert again.stop() == 0
        assert {post.status for post in server.posts} == {201}  # nothing came twice
        first, second = process.counters(), again.counters()
        assert len(server.stored()) == first["sampled"] + second["sampled"]


# --- signals and the watchdog


def test_a_storm_of_sigusr1_does_not_starve_the_watchdog(
    start_agent: StartAgent, dashboard: Dashboard, notify: Notify
) -> None:
    process = start_agent(dashboard.url, NOTIFY_SOCKET=notify.path, WATCHDOG_USEC="6000000")
    eventually(lambda: notify.ready_at, LIMIT_S)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        process.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert notify.longest_silence_s() < 6
    assert process.stop() == 0
    assert process.lines("hangs") == []


@pytest.mark.parametrize(("number", "is_stop"), [
    (signal.SIGUSR1, False), (signal.SIGHUP, True), (signal.SIGTERM, True),
])
def test_a_signal_before_it_is_up(
    number: signal.Signals, is_stop: bool, tmp_path: Path, dashboard: Dashboard,
    start_agent: StartAgent,
) -> None:
    """It comes while the settings are read, here from a FIFO."""
    settings = tmp_path / "env"
    os.mkfifo(settings, 0o600)
    process = start_agent(dashboard.url, "--env-file", str(settings), CHECK_PORTS="1")
    with contextlib.suppress(BrokenPipeError), settings.open("w") as stream:  # when it reads
        process.process.send_signal(number)
        time.sleep(0.5)
        stream.write("LOG_LEVEL=info\n")
    if is_stop:
        assert process.process.wait(LIMIT_S) == 0
    else:
        eventually(lambda: len(dashboard.stored()) >= 2, LIMIT_S)
        assert process.stop() == 0


def test_sighup_stops_in_good_order(start_agent: StartAgent, dashboard: Dashboard) -> None:
    process = start_agent(dashboard.url, heartbeat_ms=200, CHECK_PORTS="1")
    eventually(lambda: len(dashboard.stored()) >= 2, LIMIT_S)
    process.process.send_signal(signal.SIGHUP)
    assert process.process.wait(LIMIT_S) == 0
    assert process.counters()["delivered"] == process.counters()["sampled"]


@pytest.mark.parametrize(("watchdog_s", "heartbeat_s"), [(5, 15), (11, 30)])
def test_an_idle_thread_is_no_hung_one(
    watchdog_s: int, heartbeat_s: int, start_agent: StartAgent, dashboard: Dashboard,
    notify: Notify,
) -> None:
    """The second sample comes one and a half heartbeats after the first at the latest."""
    process = start_agent(
        dashboard.url, NOTIFY_SOCKET=notify.path, WATCHDOG_USEC=f"{watchdog_s}000000",
        HEARTBEAT_INTERVAL=f"{heartbeat_s}000", NODE_ID=late_node_id(), CHECK_PORTS="1",
    )
    eventually(lambda: notify.ready_at, LIMIT_S)
    eventually(lambda: len(dashboard.stored()) >= 2, 2 * heartbeat_s + LIMIT_S, step_s=0.2)
    assert notify.longest_silence_s() < watchdog_s
    assert process.lines("hangs") == []
    assert process.stop() == 0


# --- in namespaces of their own


def in_namespaces(play: Callable[[Path], None], tmp_path: Path, *options: str) -> None:
    """Run a function of this file in new namespaces (unshare(1)), as root."""
    trial = subprocess.run(["unshare", *options, "true"], capture_output=True)
    if os.geteuid() or trial.returncode:
        pytest.skip(f"needs root: unshare {' '.join(options)}")
    done = subprocess.run(
        ["unshare", *options, sys.executable, __file__, play.__name__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, timeout=2 * LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@contextlib.contextmanager
def own_hosts(folder: Path) -> Iterator[Callable[..., None]]:
    """Put a file over /etc/hosts; yield what points dashboard.test to addresses."""
    hosts = folder / "hosts"

    def point_to(*addresses: str) -> None:
        hosts.write_text("127.0.0.1 localhost\n"
                         + "".join(f"{address} dashboard.test\n" for address in addresses))

    point_to("127.0.0.1")
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
    yield point_to


def shell(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


def the_address_moves(folder: Path) -> None:
    with (own_hosts(folder) as point_to, Dashboard(KEY) as old,
          Dashboard(KEY, old.server_address[1], host="127.0.0.2") as new,
          running_agents(folder) as start):
        process = start(f"http://dashboard.test:{old.server_address[1]}", heartbeat_ms=300,
                        ALLOW_HTTP="true", CHECK_PORTS="1")
        eventually(lambda: len(old.stored()) >= 3, LIMIT_S)
        point_to("127.0.0.2")
        old.fault = "503"
        eventually(lambda: len(new.stored()) >= 3, LIMIT_S)
        assert process.stop() == 0
        counters = process.counters()
        assert counters["delivered"] == counters["sampled"]
        assert len({*old.stored(), *new.stored()}) == counters["sampled"]


def the_address_goes_before_the_registration(folder: Path) -> None:
    shell("ip link set lo up", "ip addr add 10.8.0.1/32 dev lo", "ip addr add 10.9.0.1/32 dev lo")
    with (own_hosts(folder) as point_to, Dashboard(KEY, host="10.8.0.1") as old,
          Dashboard(KEY, old.server_address[1], host="10.9.0.1") as new,
          running_agents(folder) as start):
        point_to("10.8.0.1")
        old.fault = "503"
        process = start(f"http://dashboard.test:{old.server_address[1]}", heartbeat_ms=300,
                        ALLOW_HTTP="true", CHECK_PORTS="1")
        eventually(lambda: len(old.posts) >= 2, LIMIT_S)
        old.fault = "refuse"
        shell("ip addr del 10.8.0.1/32 dev lo")
        point_to("10.9.0.1")
        eventually(lambda: len(new.stored()) >= 3, LIMIT_S)
        assert process.stop() == 0
        assert new.query("SELECT ip FROM nodes") == [("10.9.0.1",)]


def ipv6_packets() -> int:
    """Return how many IPv6 packets but ICMP's this namespace has sent."""
    rows = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(rows["Ip6OutRequests"]) - int(rows["Icmp6OutMsgs"])


def ipv6_drops(folder: Path) -> None:
    shell("ip link set lo up", "ip link add v0 type veth peer name v1",
          "ip addr add 10.9.0.1/24 dev v0", "ip -6 addr add fd00::1/64 dev v0 nodad",
          "ip link set v0 up", "ip link set v1 up",
          "ip -6 neigh add fd00::9 lladdr 02:00:00:00:00:09 dev v0 nud permanent")
    with (own_hosts(folder) as point_to, Dashboard(KEY, host="10.9.0.1") as server,
          running_agents(folder) as start):
        point_to("fd00::9", "10.9.0.1")
        process = start(f"http://dashboard.test:{server.server_address[1]}", heartbeat_ms=1000,
                        ALLOW_HTTP="true", CHECK_PORTS="1")
        eventually(lambda: len(server.stored()) >= 2, LIMIT_S)
        assert ipv6_packets() > 0
        before = ipv6_packets()
        for _ in range(4):  # each new connection goes to the address that answered last
            server.drop_connections()
            count = len(server.stored())
            # the second one shows that the agent has the answer to the first
            eventually(lambda wanted=count: len(server.stored()) > wanted + 1, LIMIT_S)  # type: ignore[misc]
        assert process.stop() == 0
        assert server.query("SELECT ip FROM nodes") == [("10.9.0.1",)]
        assert len(process.lines("cannot deliver")) <= 1
        assert ipv6_packets() == before


def the_host_name_comes_later(folder: Path) -> None:
    socket.sethostname("localhost")
    with Dashboard(KEY) as server, running_agents(folder) as start:
        process = start(server.url, heartbeat_ms=300, NODE_ID="", CHECK_PORTS="1")
        eventually(lambda: process.lines("the host name is not set yet"), LIMIT_S)
        assert server.posts == []
        socket.sethostname("mta-07")
        eventually(lambda: len(server.stored()) >= 5, LIMIT_S)
        assert process.stop() == 0
        assert server.query("SELECT node_id, hostname FROM nodes") == [("mta-07", "mta-07")]
        assert process.counters()["delivered"] == process.counters()["sampled"]


NAMESPACES: dict[Callable[[Path], None], tuple[str, ...]] = {
    the_address_moves: ("-m",),
    the_address_goes_before_the_registration: ("-n", "-m"),
    ipv6_drops: ("-n", "-m"),
    the_host_name_comes_later: ("--uts",),
}


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("play", NAMESPACES, ids=lambda play: play.__name__)
def test_in_namespaces_of_its_own(play: Callable[[Path], None], tmp_path: Path) -> None:
    in_namespaces(play, tmp_path, *NAMESPACES[play])


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
