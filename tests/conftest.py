"""What the tests share: a dashboard, settings, a clock that obeys, and a real agent process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard import APIS, Dashboard

import tinomail_agent as agent

ROOT = Path(__file__).resolve().parent.parent
KEY = "s3cret$with#odd'chars"


def make_config(url: str = "http://127.0.0.1:9", **settings: Any) -> agent.Config:
    """Return a Config as from these settings (upper or lower case).

    Else the defaults, but for ZONEMTA_URL: a ZoneMTA may run on this machine.
    """
    environ = {"DASHBOARD_URL": url, "API_KEY": KEY, "NODE_ID": "mta-01", "ZONEMTA_URL": "off"}
    environ |= {name.upper(): str(value) for name, value in settings.items()}
    return agent.load_config(environ, os.devnull)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: begun last, all others would wait for it."""
    slow = ("service", "long")
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in slow))


class FakeClock:
    """A monotonic clock and a wall clock that move only when told to."""

    def __init__(self) -> None:
        self.elapsed = 1000.0
        self.wall = 1_750_000_000.0

    def monotonic(self) -> float:
        return self.elapsed

    def time(self) -> float:
        return self.wall

    def advance(self, seconds: float) -> None:
        self.elapsed += seconds
        self.wall += seconds


LEAST_LIMIT_S = float(os.environ.get("LEAST_LIMIT_S", "120"))  # it may have a load of 20


def eventually(
    condition: Callable[[], Any], limit_s: float = 0.0, what: str = "", step_s: float = 0.02
) -> Any:
    """Return the condition's value as soon as it is true; fail when the time is over.

    The limit is no requirement on the agent, and never under LEAST_LIMIT_S.
    """
    limit_s = max(limit_s, LEAST_LIMIT_S)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(step_s)
    value = condition()
    assert value, f"not within {limit_s} s: {what or condition}"
    return value


class AgentProcess:
    """The agent as a process of its own, with what it logs."""

    def __init__(self, log_file: Path, environ: dict[str, str], args: list[str]) -> None:
        self._log_file = log_file
        with log_file.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *args], env=environ, stdout=stream, stderr=stream,
                cwd=log_file.parent,
            )

    @property
    def output(self) -> str:
        return self._log_file.read_text("utf-8", "replace")

    def lines(self, pattern: str) -> list[str]:
        return [line for line in self.output.splitlines() if re.search(pattern, line)]

    def stop(self, limit_s: float = 120.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def counters(self) -> dict[str, int]:
        """Return what the last line says, after the end: {"sampled": 12, ...}."""
        line = self.lines("stopped: ")[-1]
        return {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", line.split(": ")[1])}


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port whose accept queue is full: a connect gets no answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(address)
        time.sleep(0.2)
        yield address[1]
        for client in clients:
            client.close()


@pytest.fixture(autouse=True)
def transports_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close each Transport at the end of its test: the agent has one, for all its life."""
    made: list[agent.Transport] = []
    init = agent.Transport.__init__

    def init_and_note(self: agent.Transport, *args: Any, **named: Any) -> None:
        made.append(self)
        init(self, *args, **named)

    monkeypatch.setattr(agent.Transport, "__init__", init_and_note)
    yield
    for transport in made:
        transport.disconnect()


StartAgent = Callable[..., AgentProcess]

# An agent whose times are a fraction of the real ones, so that an outage lasts seconds.
FAST_AGENT = """
import dataclasses, os, sys
import tinomail_agent as a
a.BACKOFF_S = (0.1, 0.2, 0.4)
a.PRIME_S = 0.1
a.SAVE_AFTER_S = 0.1
if sys.argv[2:]:
    a.REQUEST_DEADLINE_S, a.SLOW_DEADLINE_S = map(float, sys.argv[2:])
config = a.load_config(os.environ, os.devnull)
a.set_up_logging(config.log_level, config.api_key, os.environ)
config = dataclasses.replace(config, heartbeat_interval=int(sys.argv[1]))
sys.exit(a.Agent(config, os.environ).run())
"""


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> str:
    """Each dialect in turn: what asks for it, or for what speaks it, runs in all of them."""
    return str(request.param)


v1_only = pytest.mark.parametrize("api", ["v1"], indirect=True)


@pytest.fixture
def dashboard(api: str) -> Iterator[Dashboard]:
    with Dashboard(KEY, api=api) as server:
        yield server


@pytest.fixture
def start_agent(tmp_path: Path, api: str) -> Iterator[StartAgent]:
    """Start agents; what still runs at the end is killed."""
    with running_agents(tmp_path, api) as start:
        yield start


@contextlib.contextmanager
def running_agents(folder: Path, api: str = "v1") -> Iterator[StartAgent]:
    started: list[AgentProcess] = []

    def start(
        url: str, *args: str, heartbeat_ms: int | None = None, deadlines: tuple[float, ...] = (),
        code: str = "", **settings: str
    ) -> AgentProcess:
        """With heartbeat_ms, a fast agent; with code, that; else one with a heartbeat of 1 s.

        deadlines of a fast agent's attempts: other than the real ones, where something hangs. On
        a busy machine good answers come too late then.
        """
        environ = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DASHBOARD_URL": url,
            "API_KEY": KEY, "NODE_ID": "mta-01", "HEARTBEAT_INTERVAL": "1000",
            "NODE_ROLE": "haraka",  # auto would follow the daemons of the machine
            "ZONEMTA_URL": "off",
            "DASHBOARD_API": api,
            **settings,
        }
        if heartbeat_ms:
            command = ["-c", FAST_AGENT, str(heartbeat_ms), *map(str, deadlines)]
        elif code:
            command = ["-c", code]
        else:
            command = [str(ROOT / "tinomail_agent.py"), *args]
        one = AgentProcess(folder / f"agent-{len(started)}.log", environ, command)
        started.append(one)
        return one

    try:
        yield start
    finally:
        for one in started:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait(10)
