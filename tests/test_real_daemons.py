"""Real daemons as units of a real systemd: the agent's numbers beside what root reads.

The agent runs as nobody, root sees all: main processes from systemd, memory as the sum of PSS
(smaps_rollup), CPU from the account of a cgroup. redis and rspamd come from Debian's packages.
Haraka and ZoneMTA come from npm, with this machine's Node; where npm cannot deliver them their
tests are skipped. ZoneMTA's MongoDB is a stand-in: Debian 12 has no mongod.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from test_service import DROP_IN, LOCAL, UNIT, Box, make_bundle, unable

import tinomail_agent as agent

pytestmark = pytest.mark.service

PACKAGES = "redis-server,redis-tools,rspamd"
UNITS = {"redis": "redis-server", "rspamd": "rspamd", "haraka": "haraka", "zonemta": "zone-mta"}
NATIVE = ("redis", "rspamd")
NO_MONGOD = pytest.mark.skip(reason="Debian 12 has no mongod")
every_service = pytest.mark.parametrize(
    "service", [*UNITS, pytest.param("mongodb", marks=NO_MONGOD)]
)

# The newest that runs on Node 20; undici 8 wants Node 22.
NPM = {
    "private": True,
    "dependencies": {"Haraka": "3.3.4", "@zone-eu/zone-mta": "3.11.0"},
    "overrides": {"undici": "6.29.1"},
}
MODULES = "/opt/npm/node_modules"

# A cluster of two workers, listening where no privileges are needed.
HARAKA = f"""
node {MODULES}/Haraka/bin/haraka -i /etc/haraka >/dev/null
printf 'listen=127.0.0.1:2625\\nnodes=2\\n' >/etc/haraka/config/smtp.ini
: >/etc/haraka/config/plugins
"""
NODE_UNIT = "[Service]\nRestart=always\nTimeoutStopSec=3\nWorkingDirectory={}\nExecStart={}\n"
NODE_UNITS = {
    "haraka": ("/etc/haraka", f"node {MODULES}/Haraka/bin/haraka -c /etc/haraka"),
    "zone-mta": (
        f"{MODULES}/@zone-eu/zone-mta", f"node {MODULES}/@zone-eu/zone-mta/app.js"
    ),
}

# A MongoDB that is always empty: the same answer to each OP_QUERY and OP_MSG, whatever it asks.
MONGODB = """
import socketserver, struct

def pair(kind, name, value):
    return kind + name.encode() + b"\\0" + value

def number(name, value):
    return pair(b"\\x10", name, struct.pack("<i", value))

def document(*pairs):
    body = b"".join(pairs) + b"\\0"
    return struct.pack("<i", len(body) + 4) + body

CURSOR = document(
    pair(b"\\x12", "id", bytes(8)),
    pair(b"\\x02", "ns", b"\\4\\0\\0\\0a.b\\0"),
    pair(b"\\x04", "firstBatch", document()),
)
ANSWER = document(
    number("ok", 1), number("n", 0), pair(b"\\x08", "ismaster", b"\\1"),
    number("minWireVersion", 0), number("maxWireVersion", 13),
    number("maxBsonObjectSize", 1 << 24), number("maxMessageSizeBytes", 48_000_000),
    number("maxWriteBatchSize", 100_000), pair(b"\\x03", "cursor", CURSOR),
)

class Connection(socketserver.StreamRequestHandler):
    def handle(self):
        while head := self.rfile.read(16):
            length, request, _, opcode = struct.unpack("<4i", head)
            self.rfile.read(length - 16)
            if opcode == 2013:  # OP_MSG
                body = bytes(5) + ANSWER
            else:  # OP_QUERY, answered with OP_REPLY
                opcode, body = 1, struct.pack("<iqii", 8, 0, 0, 1) + ANSWER
            self.wfile.write(struct.pack("<4i", len(body) + 16, 1, request, opcode) + body)

socketserver.ThreadingTCPServer.daemon_threads = True
socketserver.ThreadingTCPServer(("127.0.0.1", 27017), Connection).serve_forever()
"""

# What root knows of a unit.
TRUTH = """
import json, subprocess, sys

def memory_cgroup(pid):
    for line in open(f"/proc/{pid}/cgroup"):
        _, names, path = line.strip().split(":", 2)
        if "memory" in names.split(","):
            return f"/sys/fs/cgroup/{names}{path}"
    return "/sys/fs/cgroup" + path

def pss_kib(pid):
    try:
        lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()
    except OSError:
        return 0  # it ended
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

show = ["systemctl", "show", "-p", "MainPID", "--value", sys.argv[1]]
main = int(subprocess.check_output(show))
truth = {"main": main, "pids": []}
if main:
    folder = memory_cgroup(main)
    stat = dict(line.split() for line in open(folder + "/memory.stat"))
    pids = [int(pid) for pid in open(folder + "/cgroup.procs")]
    pss = sum(map(pss_kib, pids)) / 1024
    cache = int(stat.get("total_cache") or stat["file"]) / 2 ** 20
    truth.update(pids=pids, pss_mib=pss, cache_mib=cache, folder=folder)
print(json.dumps(truth))
"""

# Logs what cgroups account for: [time, {service: CPU seconds}] every 20 ms, for some seconds.
# systemd 252 gives units no cpuacct cgroup where that controller is mounted on its own.
ACCOUNT = """
import json, os, sys, time
seconds, services = float(sys.argv[1]), json.loads(sys.argv[2])
places = {}
for service, pids in services.items():
    places[service] = folder = f"/sys/fs/cgroup/cpuacct/test-{service}"
    os.makedirs(folder, exist_ok=True)
    for pid in pids:
        with open(folder + "/cgroup.procs", "w") as stream:
            stream.write(str(pid))
end = time.monotonic() + seconds
while time.monotonic() < end:
    used = {s: int(open(f + "/cpuacct.usage").read()) / 1e9 for s, f in places.items()}
    print(json.dumps([time.time(), used]))
    time.sleep(0.02)
"""

# Connects, sends a line and reads to the end, again and again.
LOAD = """
import socket, sys
port, banner, line = int(sys.argv[1]), sys.argv[2] == "banner", sys.argv[3].encode()
while True:
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        if banner:
            sock.recv(512)
        sock.sendall(line + b"\\r\\n\\r\\n")
        while sock.recv(4096):
            pass
"""
LOADS = {
    "redis": "6379 no QUIT",
    "rspamd": "11333 no 'GET /ping HTTP/1.0'",
    "haraka": "2625 banner QUIT",
    "zonemta": "12080 no 'GET /metrics HTTP/1.0'",
}

# Some 100 MB; then a BGSAVE that takes about 20 s, while a third of the values is written anew.
FILL = """
redis-cli config set save '' && redis-cli config set rdb-key-save-delay 50
redis-cli eval "for i = 1, 400000 do redis.call('set', i, string.rep('x', 200)) end" 0
"""
SAVE = """
redis-cli bgsave
redis-cli eval "for i = 1, 130000 do redis.call('set', i, string.rep('y', 200)) end" 0
"""


def fetch_npm() -> Path | str:
    """Return a folder with Haraka and ZoneMTA, kept for the next run; or why there is none."""
    if not shutil.which("node") or not shutil.which("npm"):
        return "Haraka and ZoneMTA need node and npm on this machine"
    wanted = json.dumps(NPM, indent=1)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = caches / "tinomail-agent-tests" / f"npm-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = ["--no-audit", "--no-fund", "--omit=dev", "--omit=optional", "--ignore-scripts"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        new = Path(place) / "new"
        new.mkdir()
        (new / "package.json").write_text(wanted)
        try:
            subprocess.run(
                ["npm", "install", *options], cwd=new, check=True, capture_output=True, timeout=300
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"npm did not deliver Haraka and ZoneMTA: {error}"
        new.rename(folder)
    return folder


class Node:
    """A mail node: the daemons' units beside the agent's."""

    def __init__(self, box: Box, lacking: str) -> None:
        self.box = box
        self.lacking = lacking  # why there are no Node services, or ""
        self.services = [s for s in UNITS if s in NATIVE or not lacking]

    def need(self, service: str) -> None:
        if service not in self.services:
            pytest.skip(self.lacking)

    def truth(self, service: str) -> dict[str, Any]:
        truth: dict[str, Any] = json.loads(self.box.sh(f"python3 /opt/truth.py {UNITS[service]}"))
        return truth

    def samples(self, after: float, before: float = 1e11) -> list[tuple[float, dict[str, Any]]]:
        """Return (time, processes) of the samples taken between two times."""
        rows = self.box.query(
            "SELECT unixepoch(timestamp) + substr(timestamp, 20, 4), processes"
            " FROM metrics_system ORDER BY rowid DESC LIMIT 30"
        )
        pairs = [(float(when), json.loads(text)) for when, text in reversed(rows)]
        return [pair for pair in pairs if after < pair[0] < before]

    def report(self) -> dict[str, Any]:
        """Return what the agent says of the processes from now on: its next sample."""
        now = time.time()
        samples = eventually(lambda: self.samples(now), 10, "a sample", 0.2)
        processes: dict[str, Any] = samples[0][1]
        return processes

    def wait_for(
        self, service: str, what: str, is_so: Callable[[dict[str, Any], str], bool]
    ) -> None:
        """Wait until something is true of a service, whatever the agent says."""
        eventually(lambda: is_so(self.truth(service), service), 90, f"{service}: {what}", 0.2)

    def expect(self, what: str, is_so: Callable[[str, dict[str, Any]], bool]) -> None:
        """Wait until the agent reports something of each service."""

        def wrong() -> dict[str, Any]:
            found = self.report()
            return {s: found[s] for s in self.services if not is_so(s, found[s])}

        deadline = time.monotonic() + 25
        while missing := wrong():
            assert time.monotonic() < deadline, f"not reported as {what}: {missing}"

    def expect_memory(self, service: str) -> None:
        """Compare with the sum of PSS, which may move while the sample is taken."""
        before, found, after = self.truth(service), self.report()[service], self.truth(service)
        low, high = sorted((before["pss_mib"], after["pss_mib"]))
        print(f"{service}: {found['memory_mb']} MiB, PSS {low:.1f} to {high:.1f}")
        assert 0.75 * low <= found["memory_mb"] <= 1.25 * high, (before, found, after)

    def systemctl(self, *words: str) -> None:
        units = " ".join(UNITS[service] for service in self.services)
        self.box.sh(f"systemctl {shlex.join(words)} {units}")

    def expect_running(self) -> None:
        """Wait until all processes are there and the agent reports the main ones."""
        sizes = {"redis": 1, "rspamd": 5, "haraka": 3, "zonemta": 5}
        for service in self.services:
            self.wait_for(service, "all processes", lambda t, s: len(t["pids"]) >= sizes[s])
        mains = {service: self.truth(service)["main"] for service in self.services}
        self.expect(
            f"running as {mains}",
            lambda s, found: (found["status"], found["pid"]) == ("running", mains[s]),
        )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    if reason := unable():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    npm = fetch_npm()
    binds = f"{shutil.which('node')}:/usr/local/bin/node {npm}:/opt/npm"
    box = Box("daemons", packages=PACKAGES, bind="" if isinstance(npm, str) else binds)
    box.build()
    box.up()
    try:
        for name, text in (
            ("truth", TRUTH), ("account", ACCOUNT), ("load", LOAD), ("mongodb", MONGODB),
        ):
            box.write(f"/opt/{name}.py", text)
        lacking = npm if isinstance(npm, str) else start_node_services(box)
        start_agent(box, make_bundle(tmp_path_factory.mktemp("dist")))
        one = Node(box, lacking)
        one.expect_running()
        yield one
    finally:
        box.down()


def start_node_services(box: Box) -> str:
    """Start Haraka and ZoneMTA; return "", or why this machine's Node does not run in the box."""
    code, output = box.try_sh("node --version")
    if code:
        return f"this machine's Node does not run in the box: {output}"
    box.sh(HARAKA)
    for name, (folder, command) in NODE_UNITS.items():
        unit = NODE_UNIT.format(folder, f"/usr/local/bin/{command}")
        box.write(f"/etc/systemd/system/{name}.service", unit)
    box.sh("systemd-run -q --unit=mongodb-stand-in python3 /opt/mongodb.py")
    box.sh("until (exec 3<>/dev/tcp/127.0.0.1/27017) 2>/dev/null; do sleep 0.1; done", limit_s=20)
    box.sh("systemctl daemon-reload; systemctl start haraka zone-mta")
    return ""


def start_agent(box: Box, bundle: Path) -> None:
    box.start_dashboard()
    box.unpack(bundle)
    settings = "HEARTBEAT_INTERVAL=1000 WATCH_PROCESSES=dbus=dbus-daemon,log=systemd-journald"
    box.write(DROP_IN, f"[Service]\nEnvironment={settings}\n")
    box.install(f"{LOCAL} --key-file /root/key")


@every_service
def test_pid_is_the_main_process(node: Node, service: str) -> None:
    """systemd knows it; the workers are its children."""
    node.need(service)
    truth, found = node.truth(service), node.report()[service]
    assert (found["status"], found["pid"]) == ("running", truth["main"])
    assert len(truth["pids"]) > 1 or service == "redis"


def test_watched_processes(node: Node) -> None:
    """WATCH_PROCESSES takes any daemon, by the name that ps -o comm shows."""
    found = node.report()
    for name, unit in (("dbus", "dbus"), ("log", "systemd-journald")):
        main = node.box.sh(f"systemctl show -p MainPID --value {unit}")
        assert (found[name]["status"], found[name]["pid"]) == ("running", int(main))
        assert found[name]["memory_mb"] > 0


def test_zonemtas_own_figures(node: Node) -> None:
    """All six, as its API has them; a MongoDB that is always empty keeps no mail."""
    node.need("zonemta")

    def last() -> Any:
        [[text]] = node.box.query(
            "SELECT zonemta FROM metrics_system ORDER BY rowid DESC LIMIT 1"
        )
        return json.loads(text or "{}")

    empty = dict.fromkeys(agent.ZONEMTA_FIGURES, 0)
    eventually(lambda: last() == empty, 60, "ZoneMTA's figures", 0.5)  # it counts every 10 s
    node.box.sh("systemctl stop zone-mta")
    try:
        eventually(lambda: last() == {}, 60, "no figures without ZoneMTA", 0.5)
    finally:
        node.box.sh("systemctl start zone-mta")
    node.expect_running()
    eventually(lambda: last() == empty, 60, "ZoneMTA's figures again", 0.5)


@every_service
def test_memory_is_near_the_sum_of_pss(node: Node, service: str) -> None:
    """A forked worker shares most of its pages, all Node processes share one program."""
    node.need(service)
    node.expect_memory(service)


@every_service
def test_a_hot_page_cache_is_not_memory(node: Node, service: str) -> None:
    """A service that has just read a large file: the cache is charged to its cgroup."""
    node.need(service)
    folder = node.truth(service)["folder"]
    file = f"/var/tmp/large-{service}"
    node.box.sh(
        f"echo $BASHPID >{folder}/cgroup.procs;"
        f" head -c 200M /dev/zero >{file}; cat {file} >/dev/null"
    )
    try:
        assert node.truth(service)["cache_mib"] > 150
        node.expect_memory(service)
        assert node.truth(service)["cache_mib"] > 150
    finally:
        node.box.sh(f"rm {file}")


def test_redis_during_bgsave(node: Node) -> None:
    """The child that saves holds the same pages, but for those written since the fork."""
    node.box.sh(FILL)
    node.expect_memory("redis")
    node.box.sh(SAVE)
    children = node.truth("redis")["pids"]
    assert len(children) == 2
    node.expect_memory("redis")
    truth = node.truth("redis")
    assert truth["pids"] == children, "the child ended too early to be measured"
    assert truth["pss_mib"] > 100
    assert node.report()["redis"]["pid"] == truth["main"]
    child = max(children)
    node.box.sh(f"kill -USR1 {child}; while [ -e /proc/{child} ]; do sleep 0.1; done", limit_s=20)


def test_a_node_service_that_has_its_program_for_itself(node: Node) -> None:
    """Node's program is charged to whoever read it first: not to Haraka, started again."""
    node.need("haraka")
    node.box.sh("systemctl stop zone-mta")
    try:
        node.expect_memory("haraka")
    finally:
        node.box.sh("systemctl start zone-mta")
    node.expect_running()


def nearest(account: list[Any], when: float) -> Any:
    return min(account, key=lambda row: abs(row[0] - when))


def test_cpu_is_what_the_cgroup_accounts_for(node: Node) -> None:
    """Under load, over the same interval: within 5 points of one core."""
    pids = {service: node.truth(service)["pids"] for service in node.services}
    try:
        for service in node.services:
            command = f"python3 /opt/load.py {LOADS[service]}"
            node.box.sh(f"systemd-run -q --unit=load-{service} {command}")
        output = node.box.sh(f"python3 /opt/account.py 6.5 {shlex.quote(json.dumps(pids))}")
    finally:
        node.box.sh("systemctl stop 'load-*'")
    account = [json.loads(line) for line in output.splitlines()]
    node.report()  # then those before it have arrived, too
    samples = node.samples(account[0][0], account[-1][0])
    assert len(samples) >= 4
    first, last = samples[0][0], samples[-1][0]
    for service in node.services:
        start, end = nearest(account, first), nearest(account, last)
        truth = 100 * (end[1][service] - start[1][service]) / (end[0] - start[0])
        spent = sum(
            found[service]["cpu_percent"] * (when - before)
            for (before, _), (when, found) in itertools.pairwise(samples)
        )
        reported = spent / (last - first)
        print(f"{service}: {reported:.1f} % CPU, cgroup {truth:.1f}")
        assert truth > 2, f"{service} was not under load"
        assert abs(reported - truth) <= 5, (service, reported, truth)


def test_status_through_a_daemons_life(node: Node) -> None:
    """All daemons at once: stopped, continued, killed, started by systemd, ended, started."""
    before = {service: node.truth(service)["main"] for service in node.services}
    node.systemctl("kill", "-s", "STOP", "--kill-who=main")
    node.expect("stopped", lambda s, found: (found["status"], found["pid"])
                == ("stopped", before[s]))
    node.systemctl("kill", "-s", "CONT", "--kill-who=main")
    node.expect_running()
    node.systemctl("kill", "-s", "KILL", "--kill-who=main")
    for service in node.services:
        node.wait_for(service, "a restart", lambda t, s: t["main"] not in (0, before[s]))
    node.expect_running()
    for service in node.services:  # the program's pages are still charged to the run before
        node.expect_memory(service)
    node.systemctl("stop")
    gone = {"status": "not_found", "pid": None, "memory_mb": 0, "cpu_percent": 0}
    node.expect("not found", lambda _, found: found == gone)
    node.systemctl("start")
    node.expect_running()
    assert "Traceback" not in node.box.journal("-p", "err"), UNIT
