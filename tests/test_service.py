"""The service as an administrator gets it: a real systemd, the real installer, the real unit.

Each box (tests/systemd_box.sh) boots a systemd of its own in about a second. Waits of minutes
are shortened by drop-ins that shorten WatchdogSec in proportion; each test says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import ROOT, eventually
from dashboard import Dashboard

import tinomail_agent as agent

sys.path.insert(0, str(ROOT / "packaging"))
from bundle import FILES

pytestmark = pytest.mark.service

UNIT = "tinomail-agent.service"
DEST = "/usr/local/lib/tinomail-agent"
ENV_FILE = "/etc/tinomail-agent/agent.env"
KEY = "b0x'key\"with$odd#signs\\"
DROP_IN = f"/etc/systemd/system/{UNIT}.d/test.conf"
FAST = "Environment=HEARTBEAT_INTERVAL=1000\nRestartSec=100ms\n"

# Runs tests/dashboard.py with a key that is in no argument, so that a search for it means
# something.
RUN_DASHBOARD = """
import sys
sys.argv += ["--port", "8080", "--db", "/root/dashboard.db", "--key", open("/root/key").read()]
sys.path.insert(0, "/opt")
import dashboard
sys.exit(dashboard.main())
"""

# A sitecustomize that breaks the agent from the inside, in the way that /opt/fault/mode names.
FAULTS = """
import os, sys, threading, time
with open("/opt/fault/mode") as stream:
    mode = stream.read().strip()

def sticks_after_3_s(real):
    first = []  # when it was called: the agent has come as far as its first sample

    def stuck_for_good(*args, **named):
        first.append(time.monotonic())
        while time.monotonic() - first[0] > 3:
            time.sleep(1)
        return real(*args, **named)
    return stuck_for_good

def grow(step, count):
    while open("/opt/fault/mode").read().strip() == mode:  # until the service is up
        time.sleep(0.1)
    kept = []
    for _ in range(count):
        kept.append(b"x" * step)
        time.sleep(0.02)
    time.sleep(1000)

def stick(kind, method):
    while not hasattr(sys.modules.get("tinomail_agent"), "run"):  # the last definition
        time.sleep(0.01)
    kind = getattr(sys.modules["tinomail_agent"], kind)
    setattr(kind, method, sticks_after_3_s(getattr(kind, method)))

THREADS = {"collector": ("Collector", "collect"), "sender": ("Sender", "step")}
if mode in THREADS:
    threading.Thread(target=stick, args=THREADS[mode], daemon=True).start()
elif mode == "grow":  # to about 70 MiB, over the agent's own limit of 64
    threading.Thread(target=grow, args=(1 << 20, 44), daemon=True).start()
elif mode == "burst":  # past MemoryMax before the agent can look
    threading.Thread(target=grow, args=(200 << 20, 1), daemon=True).start()
"""

# A sitecustomize that notes each sample once the buffer has it, and takes more memory than the
# unit allows when /opt/note/burst has been touched.
NOTES = """
import os, sys, threading, time
started = time.time()

def watch():
    while not hasattr(sys.modules.get("tinomail_agent"), "run"):  # the last definition
        time.sleep(0.01)
    agent = sys.modules["tinomail_agent"]
    folder = os.environ.get("STATE_DIRECTORY")
    if not folder:
        return
    notes = os.open(folder + "/taken", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    put = agent.Buffer.put

    def put_and_note(self, sample):
        put(self, sample)
        os.write(notes, (agent.unpack(sample.packed)["timestamp"] + chr(10)).encode())

    agent.Buffer.put = put_and_note
    while not (os.path.exists("/opt/note/burst") and os.stat("/opt/note/burst").st_mtime > started):
        time.sleep(0.1)
    b"x" * (200 << 20)

threading.Thread(target=watch, daemon=True).start()
"""

SLOW_DNS = """
import socket, threading, time
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))

def answer(query, client):
    time.sleep(40)
    end = query.index(b"\\0", 12) + 5
    head, question = query[:2] + b"\\x81\\x80\\0\\1", query[12:end]
    if question.endswith(b"\\0\\1\\0\\1"):  # A, IN
        record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\0\\0\\4" + socket.inet_aton("127.0.0.1")
        server.sendto(head + b"\\0\\1\\0\\0\\0\\0" + question + record, client)
    else:
        server.sendto(head + b"\\0\\0\\0\\0\\0\\0" + question, client)

while True:
    threading.Thread(target=answer, args=server.recvfrom(512), daemon=True).start()
"""


class Box:
    """A machine of its own; see tests/systemd_box.sh."""

    def __init__(self, name: str, **settings: str) -> None:
        self._env = {
            **os.environ, "BOX_NAME": f"tm-{os.getpid()}-{name}", "BOX_NET": "none",
            **{f"BOX_{key.upper()}": value for key, value in settings.items()},
        }

    def _do(self, *words: str, stdin: bytes = b"", limit_s: float = 120) -> bytes:
        done = subprocess.run(
            [str(ROOT / "tests/systemd_box.sh"), *words], env=self._env, input=stdin,
            capture_output=True, timeout=limit_s,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{words}: {done.returncode}\n{output.decode()}"
        return done.stdout

    def build(self) -> None:
        self._do("build", limit_s=600)

    def up(self) -> None:
        self._do("up")

    def down(self) -> None:
        self._do("down")

    def reboot(self) -> None:
        self._do("reboot")

    def push(self, source: Path, place: str) -> None:
        self._do("push", str(source), place)

    def write(self, place: str, text: str, mode: str = "644") -> None:
        self.sh(f"mkdir -p {Path(place).parent}; cat >{place}; chmod {mode} {place}", text)

    def sh(self, script: str, stdin: str = "", limit_s: float = 120) -> str:
        """Run a bash script in the box as root; return its output. It must succeed."""
        code, output = self.try_sh(script, stdin, limit_s)
        assert code == 0, f"{script}: exit {code}\n{output}"
        return output

    def try_sh(self, script: str, stdin: str = "", limit_s: float = 120) -> tuple[int, str]:
        """Run a bash script in the box; return (exit code, stdout and stderr)."""
        wrapped = f"{{ {script}\n}} 2>&1; echo \"exit=$?\""
        output = self._do("exec", "bash", "-c", wrapped, stdin=stdin.encode(), limit_s=limit_s)
        text, _, code = output.decode("utf-8", "replace").rpartition("exit=")
        return int(code), text

    # - what systemd says

    def show(self, name: str) -> str:
        return self.sh(f"systemctl show -p {name} --value {UNIT}").strip()

    def is_active(self) -> bool:
        return self.show("ActiveState") == "active"

    def pid(self) -> int:
        return int(self.show("MainPID"))

    def restarts(self) -> int:
        return int(self.show("NRestarts"))

    def journal(self, *options: str) -> str:
        self.sh("journalctl --sync")
        return self.sh(f"journalctl -q --no-pager -o cat -u {UNIT} {shlex.join(options)}")

    def cursor(self) -> str:
        """Return a place in the journal, for journal("--after-cursor", ...)."""
        self.sh("journalctl --sync")
        return self.sh("journalctl -q -n 1 --show-cursor").rpartition("-- cursor: ")[2].strip()

    # - the stand-in dashboard, inside the box

    def start_dashboard(self, options: str = "") -> None:
        self.push(ROOT / "tests/dashboard.py", "/opt/dashboard.py")
        self.write("/opt/run_dashboard.py", RUN_DASHBOARD)
        self.write("/root/key", KEY, "600")
        self.sh(f"systemd-run -q --unit=dashboard python3 /opt/run_dashboard.py {options}")
        self.sh("until [ -s /root/dashboard.db ]; do sleep 0.1; done")
        eventually(
            lambda: self.try_sh("exec 3<>/dev/tcp/127.0.0.1/8080")[0] == 0, what="the dashboard"
        )

    def query(self, sql: str) -> list[list[Any]]:
        program = (
            "import json, sqlite3, sys; db = sqlite3.connect('/root/dashboard.db', timeout=20);"
            " print(json.dumps(db.execute(sys.argv[1]).fetchall()))"
        )
        rows: list[list[Any]] = json.loads(
            self.sh(f"python3 -c {shlex.quote(program)} {shlex.quote(sql)}")
        )
        return rows

    def samples(self) -> int:
        return int(self.query("SELECT count(*) FROM metrics_system")[0][0])

    def expect_samples(self, limit_s: float = 20) -> None:
        """Wait until a sample arrives that was not there before."""
        before = self.samples()
        eventually(lambda: self.samples() > before, limit_s, "a new sample", 0.3)

    # - the agent

    def unpack(self, bundle: Path) -> None:
        self.push(bundle, "/root/bundle.tar.gz")
        self.sh("cd /root; tar -xzf bundle.tar.gz; mv tinomail-agent-* bundle")

    def install(self, options: str = "", folder: str = "/root/bundle") -> str:
        return self.sh(f"{folder}/install.sh {options}", limit_s=300)

    @contextlib.contextmanager
    def drop_in(self, service: str) -> Iterator[None]:
        """Run the agent with more settings in [Service]; at the end, as before and active."""
        self.write(DROP_IN, f"[Service]\n{service}")
        self.sh(f"systemctl daemon-reload; systemctl restart {UNIT}")
        try:
            yield
        finally:
            self.sh(
                f"rm -r {Path(DROP_IN).parent}; systemctl daemon-reload;"
                f" systemctl reset-failed {UNIT}; systemctl restart {UNIT}"
            )

    @contextlib.contextmanager
    def fault(self, mode: str, service: str = "") -> Iterator[None]:
        """Break the agent from the inside, until it is started the next time."""
        self.write("/opt/fault/sitecustomize.py", FAULTS)
        self.write("/opt/fault/mode", mode)
        with self.drop_in(f"{FAST}Environment=PYTHONPATH=/opt/fault\n{service}"):
            self.write("/opt/fault/mode", "off")
            yield

    def expect_restart(self, before: int, limit_s: float = 60) -> None:
        eventually(
            lambda: self.restarts() > before and self.is_active(), limit_s, "a restart", 0.2
        )


def unable() -> str:
    """Say why no box can be booted here, or ""."""
    if os.geteuid() != 0:
        return "the service tests need root: sudo make test"
    if not shutil.which("mmdebstrap"):
        return "the service tests need mmdebstrap: apt-get install mmdebstrap"
    return ""


@pytest.fixture(scope="session")
def boxes() -> Iterator[Callable[..., Box]]:
    """Boot boxes; all are gone at the end."""
    if reason := unable():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    booted: list[Box] = []
    for suite in ("bookworm", "trixie"):
        Box("build", suite=suite).build()

    def boot(name: str, **settings: str) -> Box:
        box = Box(name, **settings)
        booted.append(box)
        box.up()
        return box

    yield boot
    for box in booted:
        box.down()


@pytest.fixture(scope="session")
def bundle(boxes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, as `make dist` makes it."""
    return make_bundle(tmp_path_factory.mktemp("dist"))


def make_bundle(folder: Path, umask: int = 0o022) -> Path:
    subprocess.run(
        [sys.executable, str(ROOT / "packaging/bundle.py"), "--into", str(folder)],
        check=True, umask=umask, stdout=subprocess.DEVNULL,
    )
    return next(folder.glob("*.tar.gz"))


LOCAL = "--url http://127.0.0.1:8080"
AWAY = f"WARNING: the agent is active ({agent.VERSION}), but cannot reach the dashboard now"


@pytest.fixture(scope="session")
def slow(boxes: Callable[..., Box], bundle: Path) -> Iterator[dict[str, Future[Box]]]:
    """What takes a minute or more of real time, under way beside the other tests."""

    def boot(name: str) -> Box:
        box = boxes(name)
        box.start_dashboard()
        box.unpack(bundle)
        box.install(f"{LOCAL} --key-file /root/key")
        return box

    def name_server() -> Box:
        box = boot("dns")
        box.write("/opt/dns.py", SLOW_DNS)
        box.sh("systemd-run -q --unit=dns python3 /opt/dns.py")
        # glibc would give up before the answer comes: 30 s, then once more
        box.write("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:30 attempts:2\n")
        more = "DASHBOARD_URL=http://dashboard.example:8080 ALLOW_HTTP=true"
        box.write(DROP_IN, f"[Service]\n{FAST}WatchdogSec=60\nEnvironment={more}\n")
        box.sh(f"systemctl daemon-reload; systemctl restart {UNIT}")
        before = box.samples()
        eventually(lambda: box.samples() > before, 150, "a sample", 1)
        return box

    def outage() -> Box:
        box = boot("outage")
        box.write(DROP_IN, f"[Service]\n{FAST}WatchdogSec=15\n")
        box.sh(f"systemctl daemon-reload; systemctl restart {UNIT}")
        box.expect_samples()
        box.sh("systemctl kill -s STOP dashboard; sleep 60; systemctl kill -s CONT dashboard")
        box.expect_samples(40)
        return box

    def hard_times() -> Box:
        box = boot("hard")
        box.write("/opt/note/sitecustomize.py", NOTES)
        box.write(DROP_IN, f"[Service]\n{FAST}WatchdogSec=5\nMemoryHigh=infinity\n"
                           "Environment=PYTHONPATH=/opt/note BUFFER_SIZE=1000\n")
        box.sh(f"systemctl daemon-reload; systemctl restart {UNIT}")
        box.expect_samples()
        box.sh("systemctl stop dashboard")
        time.sleep(4)
        box.sh(f"systemctl stop {UNIT}; systemctl start {UNIT}")
        for blow in (
            "kill -KILL $(systemctl show -p MainPID --value tinomail-agent)",
            "kill -STOP $(systemctl show -p MainPID --value tinomail-agent)",  # for the watchdog
            "touch /opt/note/burst",  # for the kernel
        ):
            time.sleep(4)
            before = box.restarts()
            box.sh(blow)
            box.expect_restart(before)
        time.sleep(4)
        box.sh("echo '# newer' >>/root/bundle/tinomail_agent.py")
        assert AWAY in box.install()
        time.sleep(4)
        box.reboot()
        eventually(box.is_active, 30, "active after the reboot")
        time.sleep(4)
        box.start_dashboard()
        box.expect_samples(40)
        return box

    with ThreadPoolExecutor(3) as pool:
        yield {
            "dns": pool.submit(name_server), "outage": pool.submit(outage),
            "hard": pool.submit(hard_times),
        }


@pytest.fixture(scope="session")
def node(boxes: Callable[..., Box], bundle: Path, slow: object) -> Box:
    """A bookworm without network, installed from the bundle; shared by most tests."""
    box = boxes("node")
    box.sh("ip link add tm0 type veth peer name tm1; ip link set tm0 up; ip link set tm1 up")
    box.sh("cp /bin/sleep /usr/local/bin/rspamd; systemd-run -q -p User=daemon rspamd 1000000")
    box.start_dashboard()
    box.unpack(bundle)
    box.install(f"{LOCAL} --key-file - --node-id mta-01 </root/key")
    return box


# - 1: installing


def test_the_bundle_has_the_same_bytes_twice(bundle: Path, tmp_path: Path) -> None:
    again = make_bundle(tmp_path, umask=0o077)
    assert again.read_bytes() == bundle.read_bytes()
    with tarfile.open(again) as archive:
        machines = {
            Path(member.name).parts[2]: stream.read(20)[18:]
            for member in archive
            if member.name.endswith(".so") and (stream := archive.extractfile(member))
        }
    assert machines == {"x86_64": b"\x3e\0", "aarch64": b"\xb7\0"}  # e_machine of elf(5)


def test_a_venv_gets_the_dependencies_of_the_project() -> None:
    command = re.search(r"< <\((sed .*pyproject.toml\")\)", (ROOT / "install.sh").read_text())
    project = re.search(
        r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert command and project
    found = subprocess.run(
        ["bash", "-c", command[1]], env={**os.environ, "here": str(ROOT)},
        capture_output=True, text=True, check=True,
    )
    assert found.stdout.split() == re.findall('"(.+?)"', project[1])


def test_the_documents_are_installed_where_the_unit_says(node: Box) -> None:
    documents = {Path(name).name for name in FILES if name.endswith(".md")}
    assert {Path(file).name for file in node.sh(f"find {DEST} -name '*.md' ! -path '{DEST}/lib/*'")
            .split()} == documents
    for page in node.show("Documentation").split():
        assert Path(page).name in documents, page
        node.sh(f"setpriv --reuid daemon --clear-groups test -r {page.removeprefix('file://')}")


def test_offline_install_ends_with_samples_at_the_dashboard(node: Box) -> None:
    assert node.is_active()
    eventually(node.samples, 10, "the first sample")
    rows = node.query("SELECT * FROM metrics_system LIMIT 1")
    columns = [row[1] for row in node.query("PRAGMA table_info(metrics_system)")]
    absent = {name for name, value in zip(columns, rows[0]) if value is None}
    # the first sample is that of --check; nothing listens, and ZoneMTA does not run here
    assert absent <= {"accept_queue", "agent", "zonemta"}, rows
    assert node.query("SELECT node_id FROM nodes") == [["mta-01"]]
    assert node.sh(f"stat -c '%a %U %G' {ENV_FILE}").split() == ["600", "root", "root"]


def test_it_runs_as_nobody_and_sees_every_process(node: Box) -> None:
    pid = node.pid()
    uid = int(node.sh(f"stat -c %u /proc/{pid}"))
    assert 61184 <= uid <= 65519  # systemd's range for dynamic users
    assert re.search(r"CapEff:\s+0{16}\n", node.sh(f"cat /proc/{pid}/status"))
    inside = f"nsenter -t {pid} -m setpriv --reuid {uid} --regid {uid} --clear-groups"
    seen = set(node.sh(f"{inside} ls /proc").split())
    lasting = set(node.sh("systemctl show -p MainPID --value dashboard dbus").split()) | {"1"}
    assert lasting <= seen
    assert len([name for name in seen if name.isdigit()]) > 5
    sample = node.query("SELECT processes FROM metrics_system ORDER BY rowid DESC LIMIT 1")
    assert json.loads(sample[0][0])["rspamd"]["status"] == "running"


def test_with_python_3_10(boxes: Callable[..., Box], bundle: Path) -> None:
    places = [Path("/usr/bin/python3.10"), *Path.home().glob(".pyenv/versions/3.10.*")]
    prefix = next((place for place in places if place.is_dir()), None)
    if prefix is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no Python 3.10 here")
    box = boxes("py310", python=str(prefix))
    box.start_dashboard()
    box.unpack(bundle)
    box.install(f"{LOCAL} --key-file /root/key --python /opt/python/bin/python3.10")
    assert "python3.10" in box.sh(f"readlink /proc/{box.pid()}/exe")
    eventually(box.samples, 10, "the first sample")
    box.install()  # an upgrade stays with it
    assert "python3.10" in box.sh(f"readlink /proc/{box.pid()}/exe")
    box.down()


@pytest.fixture(scope="session")
def by_apt(boxes: Callable[..., Box]) -> Box:
    """A bookworm with network, for a checkout (no lib/)."""
    box = boxes("apt", net="host")
    box.sh("mkdir -p /root/checkout/packaging")
    for name in (*FILES, "pyproject.toml"):
        box.push(ROOT / name, f"/root/checkout/{name}")
    box.sh("apt-get -qq update", limit_s=300)
    return box


def test_from_a_checkout_by_apt_and_away_again(by_apt: Box) -> None:
    box = by_apt
    box.write("/root/key", KEY)
    listing = (
        "find / -xdev ! -path '/proc/*' ! -path '/var/log/*' ! -path '/var/lib/dpkg*'"
        " ! -path '/var/lib/apt*' ! -path '/var/cache/*' ! -path '/tmp*' ! -path '/var/tmp*'"
        " ! -path '/run*' ! -name __pycache__ | sort"
    )
    before = box.sh(listing)
    # Port 9 of loopback: nobody listens, which is a warning.
    output = box.install("--url http://127.0.0.1:9 --key-file /root/key", "/root/checkout")
    assert AWAY in output
    assert box.is_active()
    assert box.sh("dpkg-query -W -f '${db:Status-Abbrev}' python3-psutil").startswith("ii")
    # What apt brought leaves with --purge, even if the agent had left before.
    box.install("--uninstall", "/root/checkout")
    assert box.sh("dpkg-query -W -f '${db:Status-Abbrev}' python3-psutil").startswith("ii")
    box.install("--uninstall --purge", "/root/checkout")
    assert box.sh(listing) == before


# - 2: hangs


def test_a_stopped_process_is_killed_and_back(node: Box) -> None:
    with node.drop_in(f"{FAST}WatchdogSec=12\n"):
        before, cursor = node.restarts(), node.cursor()
        node.sh(f"kill -STOP {node.pid()}")
        node.expect_restart(before, 120)
        words = "Fatal Python error: Aborted"  # nobody but the watchdog sends a SIGABRT
        eventually(lambda: words in node.journal("--after-cursor", cursor), 60, words)
        node.expect_samples()


@pytest.mark.parametrize("thread", ["collector", "sender"])
def test_a_stuck_thread_leaves_all_stacks_in_the_journal(node: Box, thread: str) -> None:
    cursor = node.cursor()
    with node.fault(thread, "WatchdogSec=6\n"):
        node.expect_restart(node.restarts())
        for words in (
            f"the {thread} hangs", "Watchdog timeout", "in stuck_for_good",  # where it is stuck
            "in _receive_signals",  # the main thread
            "in _collect",  # the collector, in a wait or in what is stuck
        ):
            eventually(lambda: words in node.journal("--after-cursor", cursor), 60, words)  # noqa: B023
        node.expect_samples()


# - 3: memory


def test_over_its_own_limit_it_asks_for_a_restart(node: Box) -> None:
    cursor = node.cursor()
    with node.fault("grow"):
        node.expect_restart(0)
        log = node.journal("--after-cursor", cursor)
        assert "than MEMORY_LIMIT_MB=64 allows, asking systemd for a restart: " in log
        assert "Failed with result 'watchdog'" in log
        node.expect_samples()


def test_past_memory_max_it_is_killed_and_back(node: Box) -> None:
    cursor = node.cursor()
    with node.fault("burst", "MemoryHigh=infinity\n"):
        node.expect_restart(0)
        log = node.journal("--after-cursor", cursor)
        # oom-kill on a real node; a box without cgroup v2 shows the signal
        assert re.search("Failed with result '(oom-kill|signal)'", log)
        assert "asking systemd for a restart" not in log
        node.expect_samples()


# - 4: always back, unless that cannot help


def test_back_after_20_kills_in_a_row(node: Box) -> None:
    with node.drop_in("RestartSec=100ms\n"):  # faster than the unit's 10 s: harder on limits
        for count in range(20):
            node.sh(f"kill -KILL {node.pid()}")
            node.expect_restart(count, 20)
        node.expect_samples(40)


def test_wrong_settings_are_said_once(node: Box) -> None:
    node.sh(f"cp -p {ENV_FILE} /root/good.env")
    node.sh(f"echo 'NODE_ROLL=redis' >>{ENV_FILE}; echo 'CHECK_HOST=localhost' >>{ENV_FILE}")
    try:
        code, _ = node.try_sh(f"systemctl restart {UNIT}")
        assert code != 0
        assert (node.show("ActiveState"), node.show("ExecMainStatus")) == ("failed", "78")
        status = node.try_sh(f"systemctl status {UNIT}")[1]
        assert "there is no setting NODE_ROLL; did you mean NODE_ROLE?" in status
        assert "CHECK_HOST: must be an IPv4 or IPv6 address" in status
        time.sleep(12)  # RestartSec is 10
        assert (node.show("ActiveState"), node.restarts()) == ("failed", 0)
    finally:
        node.sh(f"cp -p /root/good.env {ENV_FILE}; systemctl restart {UNIT}")


def test_settings_that_are_missing_for_a_while(node: Box) -> None:
    """Configuration management replaces the file while the service is restarted."""
    node.sh(f"mv {ENV_FILE} /root/good.env")
    try:
        assert node.try_sh(f"systemctl restart {UNIT}")[0] != 0
        assert node.show("ExecMainStatus") == "243"
    finally:
        node.sh(f"mv /root/good.env {ENV_FILE}")
    eventually(node.is_active, what="active again, without a hand")


# - 5: upgrades


def test_installing_twice_changes_nothing(node: Box) -> None:
    listing = f"find {DEST} /etc/tinomail-agent /etc/systemd /usr/local -type f | sort | "
    look = listing + "xargs -d '\\n' sha256sum"
    before, pid = node.sh(look), node.pid()
    output = node.install(f"{LOCAL} --key-file - </root/key")
    assert "nothing to change" in output
    assert node.sh(look) == before
    assert node.pid() == pid


def test_a_journal_that_hangs_does_not_matter(node: Box) -> None:
    node.write("/usr/local/sbin/journalctl", "#!/bin/sh\nexec sleep 300\n", "755")
    try:
        output = node.install()
    finally:
        node.sh("rm /usr/local/sbin/journalctl")
    assert output.splitlines()[-1].startswith("done: the agent is active")


def test_an_upgrade_that_cannot_start_is_rolled_back(node: Box) -> None:
    node.sh("rm -rf /root/broken; cp -R /root/bundle /root/broken")
    look = f"find {DEST} {ENV_FILE} /etc/systemd/system/{UNIT} -type f | sort | xargs sha256sum"
    before = node.sh(look)
    # It fails in the service alone: the installer's own look at it finds nothing.
    node.sh("sed -i 's/^    def run(self) -> int:/&\\n        raise OSError/' "
            "/root/broken/tinomail_agent.py")
    code, output = node.try_sh("/root/broken/install.sh --role redis")
    assert code == 1
    assert "OSError" in output
    assert f"{agent.VERSION} and its settings are back and active" in output
    assert node.is_active()
    assert node.sh(look) == before
    assert node.sh(f"ls -d {DEST}.* /etc/systemd/system/{UNIT}?* 2>/dev/null || :") == ""


def test_an_upgrade_that_does_not_compile_changes_nothing(node: Box) -> None:
    node.sh("rm -rf /root/broken; cp -R /root/bundle /root/broken")
    node.sh("echo 'def' >>/root/broken/tinomail_agent.py")
    pid = node.pid()
    code, output = node.try_sh("/root/broken/install.sh")
    assert (code, node.pid()) == (1, pid)
    last = "install.sh: FAILED: this copy of the agent cannot be compiled. Nothing was changed."
    assert output.splitlines()[-1] == last


def test_wrong_settings_are_refused_before_anything_changes(node: Box) -> None:
    pid, settings = node.pid(), node.sh(f"cat {ENV_FILE}")
    code, output = node.try_sh("/root/bundle/install.sh --set CHECK_MODE=no --url http://example.com")
    assert code == 78
    assert "CHECK_MODE: must be one of" in output
    assert "DASHBOARD_URL: http:// would send the key in clear text" in output
    code, output = node.try_sh("/root/bundle/install.sh --ca-file /root/key")
    assert (code, "cannot read a certificate in PEM form from /root/key" in output) == (78, True)
    assert (node.pid(), node.sh(f"cat {ENV_FILE}")) == (pid, settings)


def test_an_upgrade_that_ends_soon_after_its_start_is_rolled_back(node: Box) -> None:
    node.sh("rm -rf /root/broken; cp -R /root/bundle /root/broken")
    node.sh("sed -i 's/^VERSION = .*/VERSION = \"9.9.9\"/; s/^    def run(self) -> int:/&\\n"
            "        threading.Timer(8, os._exit, [3]).start()/' /root/broken/tinomail_agent.py")
    code, output = node.try_sh("/root/broken/install.sh", limit_s=300)
    last = output.splitlines()[-1]
    assert (code, f"starting {agent.VERSION} -> 9.9.9" in output) == (1, True), output
    assert "the agent ended after its start: " in last and "status 3" in last
    assert last.endswith(f"{agent.VERSION} and its settings are back and active.")
    node.expect_samples(60)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--url http://127.0.0.1:8080/api/v1", "answered 404"),
        ("--url http://127.0.0.1:9", "connection refused"),
        ("--url https://127.0.0.1:8080", "TLS failed"),
        ("--api tinomail-monitor", "the dashboard speaks another dialect: set DASHBOARD_API=v1"),
        ("--set CA_BUNDLE=/root/ca.pem --url https://127.0.0.1:8080", "cannot use CA_BUNDLE"),
    ],
)
def test_a_change_that_would_blind_the_node_is_not_made(
    node: Box, change: str, says: str
) -> None:
    before, pid = node.sh(f"cat {ENV_FILE}"), node.pid()
    node.write("/root/ca.pem", "", "600")
    code, output = node.try_sh(f"{DEST}/install.sh {change}")
    last = output.splitlines()[-1]
    assert (code, last.startswith("install.sh: FAILED: ")) == (1, True), output
    assert says in last and last.endswith("Nothing was changed."), last
    assert (node.sh(f"cat {ENV_FILE}"), node.pid()) == (before, pid)


def test_the_installed_copy_changes_settings(node: Box) -> None:
    before = node.sh(f"cat {ENV_FILE}")
    output = node.install("--set LOG_LEVEL=debug --set DISK_PATHS=/,/var", DEST)
    assert output.splitlines()[-1].startswith("done: the agent is active"), output
    settings, _ = agent.parse_env(node.sh(f"cat {ENV_FILE}").encode())
    assert (settings["LOG_LEVEL"], settings["DISK_PATHS"]) == ("debug", "/,/var")
    node.install("--set LOG_LEVEL= --set DISK_PATHS=", DEST)
    assert node.sh(f"cat {ENV_FILE}") == before
    for words in ("--set API_KEY=k3y", "--set NODE_ROLL=redis", "--set redis"):
        assert node.try_sh(f"{DEST}/install.sh {words}")[0] == 78


def test_a_first_install_with_a_wrong_key_says_what_to_do(
    boxes: Callable[..., Box], bundle: Path
) -> None:
    box = boxes("first")
    box.start_dashboard()
    box.unpack(bundle)
    box.write("/root/wrong", "wrong", "600")
    code, output = box.try_sh(f"sh /root/bundle/install.sh {LOCAL} --key-file /root/wrong")
    last = output.splitlines()[-1]
    assert (code, f"is active ({agent.VERSION}), but answered 401" in last) == (1, True), output
    assert "--key-file" in last and box.is_active()
    box.sh(f"{DEST}/install.sh --key-file /root/key")
    eventually(box.samples, what="the first sample")
    # two at once: the second waits
    output = box.sh(f"{DEST}/install.sh --role redis & {DEST}/install.sh --role haraka; wait")
    assert output.count("done: ") == 2
    assert "These stay" in box.install("--uninstall", DEST)
    box.down()


def test_check_of_the_installed_command_sees_what_the_service_sees(node: Box) -> None:
    node.write("/root/here/.agent.env", "NODE_ID=not-this\n")
    node.write(DROP_IN, '[Service]\nEnvironment="NODE_ID=from-the-unit" LOG_LEVEL=debug\n')
    try:
        node.sh("systemctl daemon-reload")
        look = "cd /root/here; NODE_ID=nor-this tinomail-agent --check"
        node.sh("cp /var/lib/private/tinomail-agent/services /root;"
                ' echo \'{"zonemta": 60}\' > /var/lib/private/tinomail-agent/services')
        said = node.sh(look)  # ZoneMTA is down, but the service has seen it
        node.sh("cp /root/services /var/lib/private/tinomail-agent")
        assert "registered as from-the-unit (role zonemta-outbound" in said
        node.write("/root/ca.pem", "", "600")
        node.write(DROP_IN, "[Service]\nEnvironment=CA_BUNDLE=/root/ca.pem"
                            " DASHBOARD_URL=https://127.0.0.1:8080\n")
        node.sh("systemctl daemon-reload")
        code, output = node.try_sh(look)
        assert (code, "cannot use CA_BUNDLE=/root/ca.pem: Permission denied" in output) == (1, True)
    finally:
        node.sh(f"rm -r {Path(DROP_IN).parent}; systemctl daemon-reload")


def test_another_unit_of_this_name_is_left_alone(node: Box) -> None:
    unit = f"/etc/systemd/system/{UNIT}"
    node.sh(f"cp {unit} /root/unit; sed -i s,^ExecStart=.*,ExecStart=/opt/other, {unit};"
            " systemctl daemon-reload")
    try:
        code, output = node.try_sh("/root/bundle/install.sh")
        assert code == 1
        assert "belongs to another agent" in output
        assert "ExecStart=/opt/other" in node.sh(f"cat {unit}")
    finally:
        node.sh(f"cp /root/unit {unit}; systemctl daemon-reload")


def test_not_root_is_refused(node: Box) -> None:
    node.sh("cp /root/bundle/install.sh /opt/install.sh; chmod 755 /opt/install.sh")
    code, output = node.try_sh("setpriv --reuid daemon /opt/install.sh")
    assert (code, "must be run as root" in output) == (1, True)


def test_no_systemd_is_refused(node: Box) -> None:
    hide = "mount -t tmpfs none /run/systemd && /root/bundle/install.sh"
    code, output = node.try_sh(f"unshare -m sh -c {shlex.quote(hide)}")
    assert (code, "does not run systemd" in output) == (1, True)


def test_an_old_python_is_refused(node: Box) -> None:
    script = "#!/bin/sh\n[ $1 = -V ] && echo Python 3.9.2\nexit 1\n"
    node.write("/opt/old-python", script, "755")
    code, output = node.try_sh("/root/bundle/install.sh --python /opt/old-python")
    assert (code, "Python 3.9.2 is too old" in output) == (1, True)


# - the key


def test_the_key_is_nowhere_to_be_seen(node: Box) -> None:
    watch = (
        "while :; do for f in /proc/[0-9]*/cmdline /proc/[0-9]*/environ; do"
        " grep -aqF -f /root/key $f 2>/dev/null && echo $f; done; done >/root/seen"
    )
    node.write("/root/watch", watch)
    node.sh("systemd-run -q --unit=watch bash /root/watch")
    node.install("--key-file - --role redis </root/key")
    node.install("--key-file /root/key --role auto")
    node.sh("systemctl stop watch")
    assert node.sh("cat /root/seen") == ""
    assert node.try_sh("journalctl -o export | grep -aF -f /root/key")[0] == 1
    found = node.sh("grep -rlaF -f /root/key /etc /usr/local /var /run --exclude-dir=credentials"
                    " 2>/dev/null || :").split()
    assert found == [ENV_FILE]


ALL_SIGNS = "".join(map(chr, range(33, 127)))


def test_any_key_is_read_back_equal(node: Box) -> None:
    """The dashboard is away, so that no key is refused: each is kept, with a warning."""
    assert set(ALL_SIGNS) == set(string.printable) - set(string.whitespace)
    node.sh(f"cp -p {ENV_FILE} /root/good.env")
    try:
        for key in (ALL_SIGNS, "'" + ALL_SIGNS, "\"'`$(id)\\", "a#b\\'c\\\\"):
            node.write("/root/other-key", key + "\n", "600")
            output = node.install(
                "--force --url http://127.0.0.1:9 --key-file - </root/other-key"
            )
            assert AWAY in output
            settings, problems = agent.parse_env(node.sh(f"cat {ENV_FILE}").encode())
            assert (settings["API_KEY"], problems) == (key, [])
    finally:
        node.sh(f"cp -p /root/good.env {ENV_FILE}; systemctl restart {UNIT}")


def test_a_key_that_is_refused_is_an_error_and_the_old_one_stays(node: Box) -> None:
    before = node.sh(f"cat {ENV_FILE}")
    node.write("/root/other-key", "wrong-key", "600")
    code, output = node.try_sh("/root/bundle/install.sh --key-file /root/other-key")
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("install.sh: FAILED: answered 401"), output
    assert "does not accept API_KEY" in last and last.endswith("Nothing was changed.")
    assert node.sh(f"cat {ENV_FILE}") == before
    node.expect_samples(40)


def test_settings_that_were_edited_by_hand_are_taken(node: Box) -> None:
    """The agent runs on a copy of the settings: they count from the next start."""
    node.sh(f"cp -p {ENV_FILE} /root/good.env; echo 'NODE_ID=mta-77' >>{ENV_FILE}")
    try:
        assert "nothing to change" not in node.install()
        eventually(lambda: ["mta-77"] in node.query("SELECT node_id FROM nodes"), 20, "mta-77")
    finally:
        node.sh(f"cp -p /root/good.env {ENV_FILE}; systemctl restart {UNIT}")


# Stand-ins for commands that install.sh calls; its PATH begins with /usr/local/sbin.
FULL_DISK = """#!/bin/sh
case "$*" in *agent.env.old) echo "cp: no space left on device" >&2; exit 1 ;; esac
exec /bin/cp "$@"
"""
CUT_OFF = "#!/bin/sh\nrm -f /usr/local/sbin/timeout; kill -9 $PPID\n"


def test_a_failure_half_way_leaves_the_agent_as_it_was(node: Box) -> None:
    before, pid = node.sh(f"cat {ENV_FILE}"), node.pid()
    node.write("/usr/local/sbin/cp", FULL_DISK, "755")
    try:
        code, output = node.try_sh("/root/bundle/install.sh --role redis")
    finally:
        node.sh("rm /usr/local/sbin/cp")
    assert code != 0, output
    assert (node.sh(f"cat {ENV_FILE}"), node.pid(), node.is_active()) == (before, pid, True)
    assert node.sh(f"ls -d {DEST}.* {ENV_FILE}.* 2>/dev/null || :") == ""


def test_a_run_that_is_cut_off_is_not_taken_for_a_success(node: Box) -> None:
    """Killed when the new files lie there and nothing has been started yet."""
    node.sh("rm -rf /root/broken; cp -R /root/bundle /root/broken")
    node.sh("sed -i 's/^    def run(self) -> int:/&\\n        raise OSError  # broken/' "
            "/root/broken/tinomail_agent.py")
    node.write("/usr/local/sbin/timeout", CUT_OFF, "755")
    code, _ = node.try_sh("/root/broken/install.sh")
    assert code == 137
    assert "# broken" in node.sh(f"cat {DEST}/tinomail_agent.py")
    code, output = node.try_sh("/root/broken/install.sh")
    assert (code, "nothing to change" in output) == (1, False)
    assert "# broken" not in node.sh(f"cat {DEST}/tinomail_agent.py")
    assert node.is_active()
    node.install()
    assert node.sh(f"ls -d {DEST}.* {ENV_FILE}.* 2>/dev/null || :") == ""


def test_the_installer_runs_nothing_from_the_folder_it_is_called_in(node: Box) -> None:
    """In /tmp anybody may leave a psutil.py: it would run as root."""
    trap = "open('/root/trapped', 'w')\n"
    for module in ("psutil", "requests", "sdnotify", "compileall", "venv", "queue", "dotenv"):
        node.write(f"/tmp/trap/{module}.py", trap)
    node.sh("cp /root/key /tmp/trap/key; cd /tmp/trap; /root/bundle/install.sh --key-file key")
    assert node.try_sh("ls /root/trapped")[0] != 0
    node.sh("rm -r /tmp/trap")


def test_anybody_may_not_block_the_installer(node: Box) -> None:
    node.sh("systemd-run -q -p User=daemon --unit=rude flock /usr/local/lib sleep 60")
    node.install()
    node.sh("systemctl stop rude")


# - 6: what systemd thinks of the unit


def test_security_score(node: Box) -> None:
    lines = node.sh(f"systemd-analyze security --no-pager {UNIT}")
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", lines)
    assert score
    assert float(score[1]) <= 1.5, lines
    assert node.sh(f"systemd-analyze verify {UNIT}").strip() == ""
    said = node.sh("journalctl -q --no-pager -o cat _PID=1")
    assert not re.search(rf"{UNIT}:\d+:", said), said  # what systemd says of a line of the unit


LEFT_TO_CODE_INSIDE = {"run a program": "yes", "connect to a port": "yes"}
BINDS = ("bind a TCP port", "bind a UDP port")  # denied where systemd has BPF


def probe(box: Box) -> dict[str, Any]:
    """Run tests/sandbox_probe.py in a copy of the unit; return what it could do."""
    box.push(ROOT / "tests/sandbox_probe.py", "/opt/sandbox_probe.py")
    change = (
        "s,^ExecStart=.*,ExecStart=/usr/bin/python3 /opt/sandbox_probe.py 8080,;"
        " s/^Type=.*/Type=exec/; /^Restart=/d; /^WatchdogSec=/d;"
        " s,^StateDirectory=.*,StateDirectory=tinomail-probe,;"
        " s,private/tinomail-agent,private/tinomail-probe,"
    )
    box.sh(f"sed '{change}' /etc/systemd/system/{UNIT} >/run/systemd/system/probe.service;"
           " systemctl daemon-reload; systemctl start probe")
    eventually(lambda: box.sh("systemctl show -p SubState --value probe").strip() == "dead",
               what="the end of the probe")
    box.sh("journalctl --sync")
    output = box.sh("journalctl -q -o cat --no-pager _SYSTEMD_UNIT=probe.service")
    found: dict[str, Any] = json.loads(output)
    return found


def test_what_code_inside_the_sandbox_can_do(node: Box) -> None:
    found = probe(node)
    assert found.pop("write") == ["/var/lib/private/tinomail-probe"]
    assert list(found.pop("run what it wrote").values()) != ["yes"]
    for name in BINDS:
        found.pop(name)
    assert {name: answer for name, answer in found.items() if answer == "yes"} == (
        LEFT_TO_CODE_INSIDE
    ), found


def test_trixie_runs_it_without_a_warning(boxes: Callable[..., Box], bundle: Path) -> None:
    box = boxes("trixie", suite="trixie")
    box.start_dashboard()
    box.unpack(bundle)
    box.install(f"{LOCAL} --key-file /root/key")
    eventually(box.samples, 10, "the first sample")
    assert box.sh(f"systemd-analyze verify {UNIT}").strip() == ""
    assert "tinomail" not in box.sh("journalctl -q -p warning _PID=1")
    found = probe(box)
    assert found["write"] == ["/var/lib/private/tinomail-probe"]
    assert "yes" not in [found[name] for name in BINDS]
    box.down()


# - 7: what it logs


def test_a_steady_state_is_silent(node: Box) -> None:
    with node.drop_in(FAST):
        node.expect_samples()
        cursor = node.cursor()
        before = node.samples()
        eventually(lambda: node.samples() >= before + 10, 30, "10 samples", 0.5)
        assert node.journal("--after-cursor", cursor) == ""


def test_the_journal_knows_what_is_a_warning(node: Box) -> None:
    cursor = node.cursor()
    with node.drop_in(FAST):
        node.sh("systemctl kill -s STOP dashboard; systemctl stop dashboard")
        eventually(lambda: "cannot deliver" in node.journal("--after-cursor", cursor))
        node.start_dashboard()
        eventually(lambda: "delivering again" in node.journal("--after-cursor", cursor), 30)
    everything = node.journal("--after-cursor", cursor)
    warnings = node.journal("--after-cursor", cursor, "-p", "warning")
    assert "delivering again" in everything
    assert [line for line in warnings.splitlines() if "cannot deliver" not in line] == []


# - 8: behind the mail server


def test_priorities_are_in_force(node: Box) -> None:
    pid = node.pid()
    assert node.sh(f"ps -o ni= -p {pid}").strip() == "5"
    assert node.sh(f"ionice -p {pid}").strip() == "best-effort: prio 7"
    assert node.sh(f"cat /proc/{pid}/oom_score_adj").strip() == "200"
    assert re.search(r"Max core file size\s+0\s+0", node.sh(f"cat /proc/{pid}/limits"))
    group = node.show("ControlGroup")
    # CPUWeight=50 is half of the default: 512 of 1024 cpu.shares in a box's cgroup v1
    assert node.sh(f"cat /sys/fs/cgroup/cpu*/{group}/cpu.shares").split()[0] == "512"
    limit = node.sh(f"cat /sys/fs/cgroup/memory/{group}/memory.limit_in_bytes")
    assert int(limit) == 100 << 20


# - make deploy


@pytest.fixture
def sshd(by_apt: Box, tmp_path: Path) -> Path:
    """An sshd in a box, on loopback; returns an ssh configuration with `good` and `gone`."""
    box = by_apt
    box.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", "755")  # port 22 is the host's
    box.sh("apt-get -qq -y --no-install-recommends install openssh-server </dev/null",
           limit_s=300)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "id")], check=True
    )
    box.write("/root/.ssh/authorized_keys", (tmp_path / "id.pub").read_text(), "600")
    box.sh("chmod 700 /root/.ssh; mkdir -p /run/sshd")
    port = int(box.sh("python3 -c 'import socket; s = socket.socket();"
                      ' s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])\''))
    box.sh("systemd-run -q --unit=sshd-test /usr/sbin/sshd -D -e -o ListenAddress=127.0.0.1 "
           f"-p {port} -o UsePAM=no")
    eventually(lambda: box.try_sh(f"exec 3<>/dev/tcp/127.0.0.1/{port}")[0] == 0, what="sshd")
    common = (
        f"HostName 127.0.0.1\nUser root\nIdentityFile {tmp_path}/id\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    settings = tmp_path / "ssh_config"
    settings.write_text(f"Host good\nPort {port}\n{common}Host gone\nPort 1\n{common}")
    return settings


@pytest.fixture
def fleet(sshd: Path, bundle: Path, tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Run packaging/fleet.sh; returns its exit code and the lines of its output."""

    def run(job: str, *hosts: str, **settings: str) -> tuple[int, list[str]]:
        words = [str(ROOT / "packaging/fleet.sh"), job]
        done = subprocess.run(
            words + ([str(bundle)] if job == "deploy" else []) + list(hosts),
            env={**os.environ, "SSH_OPTIONS": f"-F {sshd}", "LOGS": str(tmp_path / "logs"),
                 **settings},
            capture_output=True, text=True, timeout=600,
        )
        return done.returncode, done.stdout.splitlines()

    return run


def test_a_fleet(
    by_apt: Box, fleet: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """One node over ssh, with a private CA and settings of its own; another is away."""
    issuer = trustme.CA()
    issuer.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "foreign.pem")
    issued = issuer.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "cert.key")
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "new-key").write_text("another-key")
    (tmp_path / "hosts").write_text("# ours\n\ngood NODE_ID=mta-77 NODE_ROLE=redis # the first\n")
    tls = (str(tmp_path / "cert.pem"), str(tmp_path / "cert.key"))
    hosts, key = str(tmp_path / "hosts"), str(tmp_path / "key")

    with Dashboard(KEY, tls=tls) as dashboard:
        assert fleet("status", "good")[0] == 1
        url = f"--url {dashboard.url.replace('localhost', '127.0.0.1')}"
        code, lines = fleet("deploy", "gone", "good", KEY_FILE=key, INSTALL_ARGS=url)
        assert (code, len(lines)) == (1, 3), lines
        assert re.match("gone: FAILED: .*(refused|closed)", lines[0])
        assert lines[1].startswith("stopped: gone is not ok; the other nodes were not tried")
        assert lines[2] == "2 nodes: 0 ok, 0 WARN, 1 FAILED, 1 not tried"
        # without the CA: active, but FAILED
        code, lines = fleet("deploy", hosts, KEY_FILE=key, INSTALL_ARGS=url)
        assert code == 1 and "a CA that this node does not trust" in lines[0]
        code, lines = fleet("deploy", hosts, CA_FILE=str(tmp_path / "ca.pem"))
        assert (code, lines[-1]) == (0, "1 nodes: 1 ok, 0 WARN, 0 FAILED, 0 not tried"), lines
        assert dashboard.query("SELECT node_id, role FROM nodes") == [("mta-77", "redis")]
        # what would blind it is not done
        for change in (
            {"CA_FILE": str(tmp_path / "foreign.pem")}, {"INSTALL_ARGS": f"{url}/api/v1"},
            {"INSTALL_ARGS": "--url https://127.0.0.1:9"}, {"KEY_FILE": str(tmp_path / "new-key")},
            {"INSTALL_ARGS": "--api tinomail-monitor"},
        ):
            before = by_apt.sh(f"sha256sum /etc/tinomail-agent/*; echo {by_apt.pid()}")
            code, lines = fleet("deploy", "good", **change)
            assert (code, lines[0].endswith("Nothing was changed.")) == (1, True), (change, lines)
            assert by_apt.sh(f"sha256sum /etc/tinomail-agent/*; echo {by_apt.pid()}") == before
        code, lines = fleet("status", "good")
        assert code == 0
        assert re.match(rf"good: ok: {agent.VERSION}, active since .*, ok: \d+ sent, ", lines[0])
    # a new key; and with KEEP_GOING the others get it although the first is away
    with Dashboard("another-key", int(dashboard.url.rpartition(":")[2]), tls=tls):
        code, lines = fleet("deploy", "gone", "good", KEY_FILE=str(tmp_path / "new-key"),
                            KEEP_GOING="1")
        assert code == 1
        assert lines[-1] == "2 nodes: 1 ok, 0 WARN, 1 FAILED, 0 not tried"
        assert fleet("deploy", "good")[0] == 0  # an upgrade to the same: nothing to do
    assert by_apt.sh("ls -d /tmp/tmp.* 2>/dev/null || :") == ""
    assert by_apt.sh("stat -c '%a %U' /etc/tinomail-agent/ca.pem").split() == ["644", "root"]
    by_apt.install("--uninstall --purge", DEST)


@pytest.mark.parametrize(
    ("hosts", "says"),
    [("mta-01 API_KEY=k3y", "use KEY_FILE"), ("mta-01 redis", "NAME=VALUE"),
     ("-oProxyCommand=x", "not the name of a host"), ("# nobody", "there is no host")],
)
def test_a_hosts_file_that_is_wrong(hosts: str, says: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(hosts)
    done = subprocess.run(
        [str(ROOT / "packaging/fleet.sh"), "deploy", str(bundle), str(tmp_path / "hosts")],
        env={**os.environ, "LOGS": str(tmp_path)}, capture_output=True, text=True,
    )
    assert (done.returncode, says in done.stderr, "k3y" in done.stderr) == (2, True, False)


SSH = """#!/bin/sh
while [ "$1" != node ]; do shift; done
shift
echo "*** node ***"
cd "$HOME" && exec sh -c "$*"
"""


@pytest.mark.parametrize(
    ("ssh", "says"),
    [(SSH, "No space left"), ("#!/bin/sh\nexit 124\n", "it printed nothing")],
    ids=["a shell that says something first", "nothing at all"],
)
def test_a_node_that_is_odd(ssh: str, says: str, bundle: Path, tmp_path: Path) -> None:
    """Its home folder stays as it is, and it has its line."""
    home, stubs = tmp_path / "home", tmp_path / "bin"
    for folder in (home, stubs):
        folder.mkdir()
    (home / "mail").touch()
    for name, text in (("ssh", ssh), ("scp", "#!/bin/sh\necho No space left\nexit 1\n")):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "packaging/fleet.sh"), "deploy", str(bundle), "node"],
        env={**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(home),
             "TMPDIR": str(tmp_path), "LOGS": str(tmp_path / "logs")},
        capture_output=True, text=True,
    )
    assert done.stdout.splitlines() == [
        f"node: FAILED: {says}", "1 nodes: 0 ok, 0 WARN, 1 FAILED, 0 not tried"
    ]
    assert done.returncode == 1
    assert [file.name for file in home.iterdir()] == ["mail"]
    assert list(tmp_path.glob("tmp.*")) == []


def test_a_damaged_bundle_goes_nowhere(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / bundle.name
    copy.write_bytes(bundle.read_bytes()[:-1])
    shutil.copy(f"{bundle}.sha256", tmp_path)
    done = subprocess.run(
        [str(ROOT / "packaging/fleet.sh"), "deploy", str(copy), "mta-01"],
        env={**os.environ, "LOGS": str(tmp_path)}, capture_output=True, text=True,
    )
    assert (done.returncode, "is damaged: its hash" in done.stderr) == (2, True)


# - last: what was under way meanwhile, and what ends the node


def test_a_name_server_that_takes_40_s_is_no_hang(slow: dict[str, Future[Box]]) -> None:
    """Two look-ups of 40 s in a row, with WatchdogSec=60 instead of 90."""
    box = slow["dns"].result(200)
    assert box.restarts() == 0
    assert "hangs: leaving it" not in box.journal()


def test_a_dashboard_that_is_down_is_no_hang(slow: dict[str, Future[Box]]) -> None:
    """It takes connections and never answers, for 60 s with WatchdogSec=15: 5 minutes at 90."""
    box = slow["outage"].result(200)
    assert box.restarts() == 0
    assert "hangs: leaving it" not in box.journal()
    assert box.query("SELECT max(json_extract(agent, '$.dropped_total')) FROM metrics_system") == [
        [0]
    ]


def test_an_outage_in_hard_times_loses_no_sample(slow: dict[str, Future[Box]]) -> None:
    """In its midst a stop and start, a kill -9, a watchdog kill, one for memory, an upgrade and
    a reboot."""
    box = slow["hard"].result(300)

    def stored() -> list[str]:
        return [row[0] for row in box.query("SELECT timestamp FROM metrics_system")]

    taken = set(box.sh("cat /var/lib/private/tinomail-agent/taken").split())
    assert len(taken) >= 20
    eventually(lambda: taken <= set(stored()), 60, "all that was taken", 1)
    log = box.journal()
    for killer in ("Watchdog timeout", "status=9/KILL", "undelivered samples from the last run"):
        assert killer in log
    assert box.sh("ls /var/lib/private/tinomail-agent/buffer") == ""
    assert "Traceback" not in log
    box.down()


def test_active_again_after_a_reboot(node: Box) -> None:
    node.reboot()
    eventually(node.is_active, 20, "active")
    node.start_dashboard()
    node.expect_samples(30)


def test_uninstall_leaves_nothing_behind(boxes: Callable[..., Box], bundle: Path) -> None:
    box = boxes("away")
    box.start_dashboard()
    box.unpack(bundle)
    listing = (
        "find / -xdev ! -path '/proc/*' ! -path '/var/log/journal/*' ! -path '/root/*'"
        " -printf '%p %y %m %u\\n' | sort"
    )
    before = box.sh(listing)
    box.install(f"{LOCAL} --key-file /root/key")
    assert box.sh("ls -d /var/lib/private/tinomail-agent").strip()
    box.sh(f"{DEST}/install.sh --uninstall")
    assert box.sh(f"ls {ENV_FILE}").strip() == ENV_FILE  # settings are kept
    assert box.try_sh(f"systemctl status {UNIT}")[0] == 4  # no such unit
    box.install()  # and serve again
    box.install("--uninstall --purge")
    assert box.sh(listing) == before
    box.down()
