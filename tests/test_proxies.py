"""Real proxies between a real agent and the stand-in dashboard: only the dashboard's word counts.

nginx, HAProxy and Caddy as they are packaged, on loopback. Each run is one agent behind one
proxy, which is given one bad configuration after the other, and a good one in between.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, AgentProcess, eventually, running_agents
from dashboard import Dashboard

pytestmark = pytest.mark.long

BEAT_MS = 200
LIMIT_S = 60.0
PAGE = "<html><body><h1>Maintenance</h1></body></html>"
NGINX, HAPROXY, CADDY = "nginx", "haproxy", "caddy"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Proxy:
    """A proxy of one kind as a process. `rule` is what one condition puts into its settings."""

    def __init__(self, kind: str, folder: Path, backends: list[int], **options: str) -> None:
        self._kind, self._folder, self._backends = kind, folder, backends
        self._options = {"idle": "60s", "balance": "", **options}
        self.port, self._admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._file = folder / f"{kind}.conf"
        self._write("")
        self.start()

    def start(self) -> None:
        command = {
            NGINX: ["nginx", "-p", str(self._folder), "-e", "stderr", "-c", str(self._file)],
            HAPROXY: ["haproxy", "-W", "-db", "-f", str(self._file)],
            CADDY: ["caddy", "run", "--adapter", "caddyfile", "--config", str(self._file)],
        }[self._kind]
        home = {"HOME": str(self._folder), "PATH": os.environ["PATH"] + ":/usr/sbin"}
        with (self._folder / "proxy.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=home, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self._is_listening, LIMIT_S, f"{self._kind} listens")

    def kill(self) -> None:
        """End it with all its workers, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def use(self, rule: str) -> None:
        """Reload it with a rule, as an administrator does."""
        self._write(rule)
        if self._kind == CADDY:
            request = urllib.request.Request(
                f"http://127.0.0.1:{self._admin}/load", self._file.read_bytes(),
                {"Content-Type": "text/caddyfile", "Cache-Control": "must-revalidate"},
            )
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
        else:
            number = {NGINX: signal.SIGHUP, HAPROXY: signal.SIGUSR2}[self._kind]
            self._process.send_signal(number)

    def _is_listening(self) -> bool:
        assert self._process.poll() is None, (self._folder / "proxy.log").read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def _write(self, rule: str) -> None:
        self._file.write_text({NGINX: self._nginx, HAPROXY: self._haproxy, CADDY: self._caddy}[
            self._kind](rule))

    def _nginx(self, rule: str) -> str:
        servers = "".join(f"server 127.0.0.1:{port} max_fails=0; " for port in self._backends)
        temp = "".join(f"{kind}_temp_path {self._folder}/{kind}; " for kind in
                       ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        return f"""daemon off; pid {self._folder}/pid; worker_processes 1;
            worker_shutdown_timeout 1s; {"user root;" if os.geteuid() == 0 else ""}
            events {{ worker_connections 64; }}
            http {{ {temp} access_log off; default_type text/html;
                keepalive_timeout {self._options["idle"]};
                upstream dashboard {{ {self._options["balance"]} {servers} }}
                server {{ listen 127.0.0.1:{self.port}; {rule if "return" in rule else ""}
                    location / {{ proxy_pass http://dashboard; proxy_read_timeout 1s;
                        {"" if "return" in rule else rule} }} }} }}"""

    def _haproxy(self, rule: str) -> str:
        servers = "".join(f"\n  server s{port} 127.0.0.1:{port}" for port in self._backends)
        return f"""
global
  hard-stop-after 1s
defaults
  mode http
  retries 0
  timeout connect 1s
  timeout client 5s
  timeout server 1s
  timeout http-keep-alive {self._options["idle"]}
frontend front
  bind 127.0.0.1:{self.port}
  {rule}
  default_backend dashboard
backend dashboard
  {self._options["balance"] or "balance roundrobin"}{servers}
"""

    def _caddy(self, rule: str) -> str:
        site = "http://right.example.org" if rule == OTHER_HOST else "http://"
        servers = " ".join(f"127.0.0.1:{port}" for port in self._backends)
        return f"""{{
  admin 127.0.0.1:{self._admin}
  auto_https off
  servers {{
    timeouts {{
      idle {self._options["idle"]}
    }}
  }}
}}
{site}:{self.port} {{
  bind 127.0.0.1
  {"" if rule == OTHER_HOST else rule}
  reverse_proxy {servers} {{
    transport http {{
      response_header_timeout 1s
    }}
  }}
}}
"""


OTHER_HOST = "another host's site alone"


@dataclass(frozen=True)
class Condition:
    """What goes wrong, and the words of the log that name it."""

    words: str  # a pattern of the one line
    rule: str = ""  # of the proxy
    fault: str = "off"  # of the dashboard behind it


def pages(kind: str) -> dict[str, Condition]:
    """Return the maintenance page with each status, as this kind of proxy is told to show it."""
    found = {}
    for status in (200, 400, 403, 404, 409, 413, 503):
        rule = {
            NGINX: f"return {status};" if status != 200 else f"return 200 '{PAGE}';",
            HAPROXY: f"http-request return status {status} content-type text/html "
                     f"string '{PAGE}'",
            CADDY: f"respond `{PAGE}` {status}",
        }[kind]
        advice = {403: "forbids", 503: ""}.get(status, "is DASHBOARD_URL right")
        found[f"maintenance {status}"] = Condition(f"answered {status}.*{advice}", rule)
    return found


# HAProxy names itself in no header.
CONDITIONS: dict[str, dict[str, Condition]] = {
    NGINX: {
        "backend gone": Condition(r"answered 502 \(Server: nginx/", fault="refuse"),
        "backend hangs": Condition(r"answered 504 \(Server: nginx/", fault="hang"),
        "body too large": Condition(r"answered 413 \(Server: nginx/.*not the dashboard's",
                                    "client_max_body_size 50;"),
        "wrong host": Condition("closed before the answer was complete", "return 444;"),
        "redirect": Condition(r"answered 301 \(Server: nginx/.*a redirect.*https://127.0.0.1/api",
                              "return 301 https://$host$request_uri;"),
        **pages(NGINX),
    },
    HAPROXY: {
        "backend gone": Condition("answered 503", fault="refuse"),
        "backend hangs": Condition("answered 504", fault="hang"),
        "body too large": Condition(
            "answered 413.*not the dashboard's",
            "http-request deny deny_status 413 if { req.hdr(content-length) -m int gt 50 }"),
        "wrong host": Condition(
            "answered 404.*not the dashboard's",
            "http-request deny deny_status 404 unless { hdr(host) right.example.org }"),
        "redirect": Condition("answered 302.*a redirect.*https://127.0.0.1",
                              "http-request redirect scheme https"),
        **pages(HAPROXY),
    },
    CADDY: {
        "backend gone": Condition(r"answered 502 \(Server: Caddy", fault="refuse"),
        "backend hangs": Condition(r"answered 504 \(Server: Caddy", fault="hang"),
        # Caddy 2.6 says 502: it was reading the body for the dashboard when it grew too large.
        "body too large": Condition(r"answered (413|502) \(Server: Caddy",
                                    "request_body {\n max_size 50\n}"),
        "wrong host": Condition(r"answered 200 \(Server: Caddy.*not the dashboard's", OTHER_HOST),
        "redirect": Condition(r"answered 301 \(Server: Caddy.*a redirect.*https://127.0.0.1",
                              "redir https://{host}{uri} 301"),
        **pages(CADDY),
    },
}
RESTART = "restart in mid-flight"
# Which agents stand behind which proxy, and in what of it the second dialect may differ.
RUNS = {(kind, "v1"): tuple(conditions) for kind, conditions in CONDITIONS.items()}
RUNS[CADDY, "tinomail-monitor"] = (
    "backend gone", "body too large", "wrong host", "redirect", "maintenance 200",
    "maintenance 400", "maintenance 403", "maintenance 404", "maintenance 409",
)


@dataclass
class Run:
    """An agent that stood behind a proxy, and what came of it."""

    log: dict[str, list[str]] = field(default_factory=dict)  # condition -> the lines meanwhile
    counters: dict[str, int] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)
    output: str = ""


class Slow(Dashboard):
    """A dashboard that takes its time, if told to."""

    delay_s = 0.0

    def __init__(self, key: str, api: str) -> None:
        super().__init__(key, api=api)
        self.under_way = threading.Event()

    def take(self, path: str, headers: Any, body: Any, problem: str) -> tuple[int, Any]:
        answer = super().take(path, headers, body, problem)
        if self.delay_s:
            self.under_way.set()
            time.sleep(self.delay_s)
        return answer


def has_delivered(agent: AgentProcess, server: Dashboard) -> Callable[[], bool]:
    """Return a question: did three more samples come since now, and does nothing wait?"""
    before = len(server.stored())

    def question() -> bool:
        if len(server.stored()) < before + 3:
            return False
        asked = len(agent.lines(" sampled, "))
        agent.process.send_signal(signal.SIGUSR1)
        eventually(lambda: len(agent.lines(" sampled, ")) > asked, LIMIT_S)
        waiting = re.search(r"(\d+) waiting", agent.lines(" sampled, ")[-1])
        return waiting is not None and int(waiting[1]) <= 1

    return question


def through(run: Run, agent: AgentProcess, server: Slow, name: str,
            begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Let one condition come and go; note what the agent logs from its begin to its end."""
    eventually(has_delivered(agent, server), LIMIT_S, f"all delivered before {name}", 0.3)
    begun = len(agent.output.splitlines())
    begin()
    eventually(
        lambda: any("cannot deliver" in line for line in agent.output.splitlines()[begun:]),
        LIMIT_S, f"{name} is logged", 0.1,
    )
    time.sleep(4 * BEAT_MS / 1000)  # more samples fail; no more lines are to come
    end()
    eventually(has_delivered(agent, server), LIMIT_S, f"all delivered after {name}", 0.3)
    run.log[name] = [line for line in agent.output.splitlines()[begun:] if " sampled, " not in line]


def play(kind: str, api: str, folder: Path) -> Run:
    run = Run()
    server = Slow(KEY, api=api)
    with server, running_agents(folder, api) as start:
        proxy = Proxy(kind, folder, [server.server_address[1]])
        try:
            agent = start(proxy.url, heartbeat_ms=BEAT_MS, CHECK_PORTS="1", BUFFER_SIZE="1000")
            for name in RUNS[kind, api]:
                condition = CONDITIONS[kind][name]

                def use(rule: str, fault: str) -> None:
                    server.fault = fault
                    if condition.rule:  # noqa: B023
                        proxy.use(rule)

                through(run, agent, server, name,
                        lambda: use(condition.rule, condition.fault),  # noqa: B023
                        lambda: use("", "off"))

            def kill_in_mid_flight() -> None:
                server.under_way.clear()
                server.delay_s = 0.4
                assert server.under_way.wait(LIMIT_S)
                proxy.kill()
                server.delay_s = 0.0

            through(run, agent, server, RESTART, kill_in_mid_flight, proxy.start)
            eventually(has_delivered(agent, server), LIMIT_S)
            assert agent.stop() == 0
            run.counters, run.stored, run.output = agent.counters(), server.stored(), agent.output
        finally:
            proxy.kill()
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[Run]]]:
    """Play all runs at once, of the proxies that are there; they mostly wait."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        yield {
            (kind, api): pool.submit(play, kind, api, tmp_path_factory.mktemp(f"{kind}-{api}"))
            for kind, api in RUNS if is_there(kind)
        }


def is_there(kind: str) -> bool:
    return shutil.which(kind, path=os.environ["PATH"] + ":/usr/sbin") is not None


def needs(kind: str) -> None:
    if not is_there(kind):
        pytest.skip(f"needs {kind}: apt-get install {'nginx-light' if kind == NGINX else kind}")


every_run = pytest.mark.parametrize(("kind", "api"), RUNS, ids=[f"{k}-{a}" for k, a in RUNS])


@pytest.mark.parametrize(
    ("kind", "api", "name"),
    [(kind, api, name) for (kind, api), names in RUNS.items() for name in names],
)
def test_each_change_is_logged_once_with_words_that_name_what_answered(
    kind: str, api: str, name: str, runs: dict[tuple[str, str], Future[Run]]
) -> None:
    needs(kind)
    lines = runs[kind, api].result(400).log[name]
    began = [line for line in lines if "cannot deliver" in line]
    ended = [line for line in lines if "delivering again" in line]
    assert len(began) == 1 and re.search(CONDITIONS[kind][name].words, began[0]), lines
    assert len(ended) == 1, lines
    # tinomail-monitor is told of mail daemons, also of those that other tests start
    told = len([line for line in lines if "registered as" in line]) if api != "v1" else 0
    assert len(lines) == 2 + told, lines


@every_run
def test_a_restart_in_mid_flight_is_an_outage_like_any_other(
    kind: str, api: str, runs: dict[tuple[str, str], Future[Run]]
) -> None:
    needs(kind)
    lines = runs[kind, api].result(400).log[RESTART]
    assert 1 <= len([line for line in lines if "cannot deliver" in line]) <= 2, lines
    assert len([line for line in lines if "delivering again" in line]) == 1, lines


@every_run
def test_every_sample_is_delivered_and_none_is_refused(
    kind: str, api: str, runs: dict[tuple[str, str], Future[Run]]
) -> None:
    needs(kind)
    run = runs[kind, api].result(400)
    counters = run.counters
    assert counters["refused"] == counters["dropped"] == counters["waiting"] == 0, run.output
    assert counters["delivered"] == counters["sampled"] == len(set(run.stored))
    # what was under way when the proxy was killed was stored, but its answer was lost
    assert len(run.stored) - len(set(run.stored)) <= (0 if api == "v1" else 2)
    assert "Traceback" not in run.output and KEY not in run.output
    # again, in tinomail-monitor, when the daemons of this machine count as seen
    assert len(set(re.findall("registered as .*", run.output))) == 1


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_proxy_that_closes_idle_connections_costs_nothing(kind: str, tmp_path: Path) -> None:
    """Its time-out is the heartbeat: the connection is closed just when the next post comes."""
    needs(kind)
    with Dashboard(KEY) as server, running_agents(tmp_path) as start:
        proxy = Proxy(kind, tmp_path, [server.server_address[1]], idle="1s")
        try:
            agent = start(proxy.url, heartbeat_ms=1000, CHECK_PORTS="1")
            eventually(lambda: len(server.stored()) >= 8, LIMIT_S)
            assert agent.stop() == 0
        finally:
            proxy.kill()
        assert agent.lines("WARNING") == []
        assert agent.counters()["delivered"] == agent.counters()["sampled"]
        assert {post.status for post in server.posts} == {201}


BALANCING = {
    "nginx, round robin": (NGINX, ""),
    "nginx, random": (NGINX, "random;"),
    "HAProxy, round robin": (HAPROXY, "balance roundrobin"),
    "HAProxy, random": (HAPROXY, "balance random"),
}
SAMPLES = 200


def behind_two_backends(kind: str, balance: str, folder: Path) -> tuple[AgentProcess, int, int]:
    """Return an agent, how many samples were stored (200 or more), how often 422 was answered."""
    with Dashboard(KEY) as good, Dashboard(KEY) as bad, running_agents(folder) as start:
        bad.fault = "422"
        ports = [good.server_address[1], bad.server_address[1]]
        proxy = Proxy(kind, folder, ports, balance=balance)
        try:
            agent = start(proxy.url, heartbeat_ms=100, CHECK_PORTS="1", BUFFER_SIZE="1000")
            eventually(lambda: len(good.stored()) >= SAMPLES, 2 * LIMIT_S, step_s=0.2)
            assert agent.stop() == 0
        finally:
            proxy.kill()
        return agent, len(good.stored()), len(bad.posts)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    with ThreadPoolExecutor(len(BALANCING)) as pool:
        yield {
            name: pool.submit(behind_two_backends, kind, balance, tmp_path_factory.mktemp("two"))
            for name, (kind, balance) in BALANCING.items() if is_there(kind)
        }


@pytest.mark.parametrize("name", BALANCING)
def test_one_of_two_backends_refuses_everything(
    name: str, balanced: dict[str, Future[Any]]
) -> None:
    needs(BALANCING[name][0])
    agent, stored, refusals = balanced[name].result(400)
    counters = agent.counters()
    print(f"{name}: {counters}, 422 answered {refusals} times")
    assert refusals > SAMPLES / 4
    assert counters["refused"] <= 0.01 * counters["sampled"]
    assert counters["dropped"] == 0
    # a busy machine may store a sample, and answer after the deadline
    assert 0 <= stored - counters["delivered"] <= 2
    assert counters["waiting"] <= 0.05 * counters["sampled"]
