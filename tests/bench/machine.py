"""The agent as install.sh sets it up, the dashboard's stand-in, and the load around them.

All is on loopback, bounded, and ends with the Machine, or with the bench itself.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from . import procfs

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
NOBODY = 65534
LOAD_LIMIT_S = 1800  # a sleeper that nobody ends does so by itself
ENDS_PER_PROCESS = 12_000
# Program -> processes. Not the mail daemons' own names: other agents on this machine, and tests,
# would take them for the real ones.
WATCHED = {"bench-workers": 20, "bench-store": 1, "bench-cache": 1}
LAUNCHER = """#!{python}
import sys

sys.path.insert(1, "{folder}/lib")

import tinomail_agent
{faster}
sys.exit(tinomail_agent.main())
"""
# Settings do not go below 1 s: this takes 1,000 samples in less than 1,000 s.
FASTER = """
import dataclasses, os
load_config = tinomail_agent.load_config
tinomail_agent.load_config = lambda *args, **options: dataclasses.replace(
    load_config(*args, **options), heartbeat_interval=int(os.environ["BENCH_HEARTBEAT_MS"])
)
"""


def install(folder: Path) -> None:
    """Lay the agent out in `folder` as install.sh does: bundle, launcher, byte code."""
    bundler = [sys.executable, str(ROOT / "packaging/bundle.py"), "--into", str(folder)]
    said = subprocess.run(bundler, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    archive = Path(said.stdout.decode().strip())
    with tarfile.open(archive) as bundle:
        bundle.extractall(folder)
    top = folder / archive.name.removesuffix(".tar.gz")
    shutil.copy(top / "tinomail_agent.py", folder)
    for part in ("any", platform.machine()):
        shutil.copytree(top / "lib" / part, folder / "lib", dirs_exist_ok=True)
    shutil.rmtree(top)
    for name, faster in (("tinomail-agent", ""), ("tinomail-agent-fast", FASTER)):
        text = LAUNCHER.format(python=PYTHON, folder=folder, faster=faster)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    compiler = [PYTHON, "-m", "compileall", "-qf", "--invalidation-mode", "checked-hash"]
    subprocess.run([*compiler, str(folder)], check=True)


def unit_environ() -> dict[str, str]:
    """Return what the unit sets by Environment=."""
    lines = (ROOT / "tinomail-agent.service").read_text().splitlines()
    pairs = [line.split("=", 2)[1:] for line in lines if line.startswith("Environment=")]
    return dict(pairs)


@dataclass(frozen=True)
class Post:
    """One POST as the sink noted it."""

    at: float  # time.monotonic()
    path: str
    connection: int
    body: bytes

    @property
    def is_sample(self) -> bool:
        return self.path.endswith("/metrics/system")

    @property
    def sample(self) -> dict[str, Any]:
        sample: dict[str, Any] = json.loads(gzip.decompress(self.body))
        return sample


class Sink:
    """The dashboard's stand-in, in a process of its own."""

    def __init__(self, machine: Machine, *, tls: bool) -> None:
        self._log = machine.folder / f"sink-{machine.number()}.log"
        command = [sys.executable, str(HERE / "sink.py"), str(self._log)]
        process = machine.start(command + ([str(machine.certificate)] if tls else []))
        assert process.stdout
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{int(process.stdout.readline())}"
        self._posts: list[Post] = []
        self._stream = self._log.open("rb")

    def posts(self) -> list[Post]:
        while (line := self._stream.readline()).endswith(b"\n"):
            row = json.loads(line)
            row["body"] = base64.b64decode(row["body"])
            self._posts.append(Post(**row))
        self._stream.seek(-len(line), os.SEEK_CUR)  # the rest of it is still to come
        return self._posts

    def samples(self) -> list[Post]:
        return [post for post in self.posts() if post.is_sample]

    def wait_for(self, count: int, limit_s: float) -> list[Post]:
        """Return the samples as soon as there are `count`; RuntimeError if they do not come."""
        deadline = time.monotonic() + limit_s
        while len(samples := self.samples()) < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(samples)} of {count} samples within {limit_s} s")
            time.sleep(0.05)
        return samples


class Agent:
    """A real agent with a sink of its own; the bench is its systemd."""

    def __init__(self, machine: Machine, heartbeat_ms: int, *, tls: bool = False) -> None:
        self.sink = Sink(machine, tls=tls)
        folder = machine.folder / f"agent-{machine.number()}"
        folder.mkdir()
        state, notify = folder / "state", folder / "notify"
        state.mkdir()
        settings = {
            "DASHBOARD_URL": self.sink.url, "API_KEY": "k3yOfTheBench", "NODE_ID": "mta-01",
            "HEARTBEAT_INTERVAL": max(1000, heartbeat_ms), "CA_BUNDLE": machine.ca,
            "WATCH_PROCESSES": ",".join(f"{name}={name}" for name in WATCHED),
        }
        lines = [f"{name}={value}\n" for name, value in settings.items()]
        (folder / "agent.env").write_text("".join(lines))
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(notify))
        notify.chmod(0o666)
        if machine.is_root:
            os.chown(state, NOBODY, NOBODY)
        self.ready_at = 0.0
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        environ = {
            "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONNOUSERSITE": "1",
            "CREDENTIALS_DIRECTORY": str(folder), "STATE_DIRECTORY": str(state),
            "NOTIFY_SOCKET": str(notify), "BENCH_HEARTBEAT_MS": str(heartbeat_ms),
            **unit_environ(),
        }
        name = "tinomail-agent" if heartbeat_ms >= 1000 else "tinomail-agent-fast"
        self.started_at = time.monotonic()
        self.process = machine.start(
            [str(machine.folder / name)], as_nobody=True, environ=environ, log=folder / "log"
        )

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while data := self._notify.recv(4096):
                if b"READY=1" in data.split(b"\n"):
                    self.ready_at = time.monotonic()
                    self._ready.set()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> float:
        """Return the seconds from the start to READY."""
        if not self._ready.wait(30):
            raise RuntimeError("the agent does not become ready")
        return self.ready_at - self.started_at

    def stop(self) -> float:
        """Stop it as systemd does; return the seconds that it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        took = time.monotonic() - started
        self._notify.close()
        if code:
            raise RuntimeError(f"the agent ended with {code}")
        return took


class Machine:
    """Starts what the bench needs, and ends all of it. One temporary folder holds the files."""

    def __init__(self, folder: Path, exporter: str | None) -> None:
        self.folder = folder
        self.exporter = exporter
        self.is_root = os.geteuid() == 0
        self._number = 0
        self._started: list[subprocess.Popen[str]] = []
        authority = trustme.CA()
        self.ca, self.certificate = folder / "ca.pem", folder / "server.pem"
        with contextlib.suppress(FileNotFoundError):  # on a real node all its CAs are loaded
            shutil.copy("/etc/ssl/certs/ca-certificates.crt", self.ca)
        authority.cert_pem.write_to_path(str(self.ca), append=True)
        issued = authority.issue_cert("127.0.0.1", "localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.certificate))

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            self.end(process)

    def number(self) -> int:
        self._number += 1
        return self._number

    def start(
        self, command: list[str], *, as_nobody: bool = False,
        environ: dict[str, str] | None = None, log: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process in a group of its own, which end() ends; its stdin ends with us."""
        user: Any = NOBODY if as_nobody and self.is_root else None
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(log.open("wb")) if log else subprocess.PIPE
            process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=out, text=True,
                stderr=subprocess.STDOUT if log else None, start_new_session=True,
                user=user, group=user, extra_groups=[] if user else None, cwd=self.folder,
            )
        self._started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> None:
        """Kill a process and what it started; only of those that start() returned."""
        if process not in self._started:
            return
        self._started.remove(process)
        # Its group is there as long as it has not been waited for, and its number is its own.
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()
        process.wait(60)

    def free_port(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return int(listener.getsockname()[1])

    # - load

    def add_processes(self, total: int) -> None:
        """Fill the machine up to `total` processes: sleepers, 22 of them of watched services."""
        for name, count in WATCHED.items():
            link = self.folder / name
            if not link.exists():
                link.symlink_to(shutil.which("sleep") or "/bin/sleep")
                self._sleepers(str(link), count)
        self._sleepers("sleep", max(0, total - procfs.processes() - 1))

    def _sleepers(self, program: str, count: int) -> None:
        script = (
            f"i=0; while [ $i -lt {count} ]; do {program} {LOAD_LIMIT_S} & i=$((i+1)); done;"
            " echo; read end; kill 0"
        )
        process = self.start(["/bin/sh", "-c", script])
        assert process.stdout
        process.stdout.readline()

    def add_connections(self, sockets: int) -> list[subprocess.Popen[str]]:
        """Open loopback connections, both ends here, spread over processes and addresses."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = min(ENDS_PER_PROCESS, limit - 100) // 2
        started: list[subprocess.Popen[str]] = []
        left = sockets // 2
        while left > 0:
            address = f"127.0.1.{len(started) + 1}"  # local ports are counted by address
            script = str(HERE / "load.py")
            started.append(self.start([sys.executable, script, str(min(most, left)), address]))
            left -= most
        for process in started:
            assert process.stdout
            if not process.stdout.readline():
                raise RuntimeError("the connections cannot be opened")
        return started

    def baseline(self, name: str, runs: int, *args: str) -> dict[str, Any]:
        """Run one of baseline.py's, with the agent's own Python and libraries."""
        environ = {
            "PATH": os.defpath, "PYTHONPATH": f"{self.folder / 'lib'}:{HERE.parent}",
            "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [PYTHON, "-m", "bench.baseline", name, str(runs), *args]
        process = self.start(command, environ=environ)
        result: dict[str, Any] = json.loads(process.communicate(timeout=300)[0])
        self.end(process)
        return result
