"""The agent as a process of its own, against a real dashboard that misbehaves."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    FAST_AGENT,
    KEY,
    ROOT,
    AgentProcess,
    StartAgent,
    eventually,
    make_config,
    running_agents,
    v1_only,
)
from dashboard import ANSWERS, APIS, MODES, Dashboard

import tinomail_agent as agent

# --- a life without trouble


def test_from_start_to_stop(dashboard: Dashboard, start_agent: StartAgent) -> None:
    process = start_agent(dashboard.url)
    eventually(lambda: len(dashboard.stored()) >= 3)
    process.process.send_signal(signal.SIGUSR1)
    eventually(lambda: process.lines(r"INFO +\d+ sampled, 0 loaded, \d+ delivered"))
    assert process.stop() == 0
    lines = [line.split(" ", 2)[2] for line in process.output.splitlines()]
    assert lines[0].startswith(f"INFO     TinoMail agent {agent.VERSION} started: node mta-01, ")
    assert lines[1].startswith("INFO     registered as mta-01 (role ")
    assert lines[-1].startswith("INFO     stopped: ")
    # A steady state is silent. tinomail-monitor is told of mail daemons that run on this machine.
    assert len(lines) == 4 or (dashboard.api != "v1" and len(set(lines)) == 4)
    counters = process.counters()
    assert counters["delivered"] == counters["sampled"] == len(dashboard.stored())
    assert dashboard.connections == 1
    assert dashboard.complaints == []
    [row] = dashboard.query("SELECT node_id, ip, role FROM nodes")
    assert row == ("mta-01", "127.0.0.1", "haraka")


def test_a_restart_of_the_dashboard_that_forgets_the_node(
    dashboard: Dashboard, start_agent: StartAgent
) -> None:
    process = start_agent(dashboard.url)
    eventually(dashboard.stored)
    dashboard.forget_nodes()
    count = len(dashboard.stored())
    eventually(lambda: len(dashboard.stored()) >= count + 2)
    assert process.stop() == 0
    # tinomail-monitor takes samples of unknown nodes, and never asks for a registration
    found = dashboard.query("SELECT registrations FROM nodes")
    again = len(process.lines("registered as")) - 1  # of mail daemons that run on this machine
    assert found == [(1,)] if dashboard.api == "v1" else found in ([], [(again,)])
    assert process.counters()["delivered"] == len(dashboard.stored())
    assert process.lines("WARNING") == []


@v1_only
@pytest.mark.alone
def test_a_daemon_that_starts_after_the_agent(
    dashboard: Dashboard, start_agent: StartAgent, tmp_path: Path
) -> None:
    """The role is looked at with every sample; a change registers again and changes the ports."""
    here = agent.unpack(agent.take_sample(make_config(), ())[0].packed)["processes"]
    if any(row["status"] == "running" for row in here.values()):
        pytest.skip("a mail daemon runs on this machine")
    process = start_agent(dashboard.url, NODE_ROLE="auto")
    eventually(dashboard.stored)
    child = subprocess.Popen(["rspamd", "60"], executable=_renamed_sleep(tmp_path, "rspamd"))
    try:
        role = eventually(
            lambda: dashboard.query("SELECT role FROM nodes WHERE role = 'rspamd'"), 15
        )
        assert role == [("rspamd",)]
        eventually(
            lambda: dashboard.query(
                "SELECT 1 FROM metrics_system WHERE services = '{\"port_11334\": false}'"
            ), 15,
        )
    finally:
        child.kill()
        child.wait()
    assert process.stop() == 0
    assert "(role rspamd," in process.lines("registered as")[-1]


def _renamed_sleep(folder: Path, name: str) -> str:
    """Return a copy of sleep(1) under a daemon's name: its comm is what the agent goes by."""
    copy = folder / name
    copy.write_bytes(Path("/bin/sleep").read_bytes())
    copy.chmod(0o755)
    return str(copy)


def test_the_installed_command_starts_no_second_agent() -> None:
    """Without an option it would report the node twice, beside the service, and as root."""
    code = "import sys, tinomail_agent; sys.exit(tinomail_agent.main([], installed=True))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 2
    assert "tinomail-agent.service runs the agent; use --check or --once" in done.stderr


# --- outages


def waiting(process: AgentProcess) -> int:
    """Return how many samples waited when the agent last told its counters; have it tell anew."""
    process.process.send_signal(signal.SIGUSR1)
    told = process.lines(COUNTERS)
    return int(re.findall(r"(\d+) waiting", told[-1])[0]) if told else 0


SLOW_DISK = f"""
import time
import tinomail_agent
write = tinomail_agent.State.write
tinomail_agent.State.write = lambda self, sample: (time.sleep(0.5), write(self, sample))
{FAST_AGENT.replace("SAVE_AFTER_S = 0.1", "SAVE_AFTER_S = 60").replace("sys.argv[1]", "60_000")}
"""


@v1_only
def test_what_is_delivered_while_a_stop_saves_it_is_not_sent_again(
    start_agent: StartAgent, tmp_path: Path
) -> None:
    with Dashboard(KEY) as dashboard:
        dashboard.pause_s = 0.3
        process = start_agent(
            dashboard.url, code=SLOW_DISK, STATE_DIRECTORY=str(tmp_path / "state")
        )
        eventually(dashboard.stored)  # its answer is under way
        assert process.stop() == 0
    assert process.counters()["delivered"] == 1, process.output
    assert os.listdir(tmp_path / "state/buffer") == []


@v1_only
def test_down_at_the_start_for_five_heartbeats(start_agent: StartAgent) -> None:
    with Dashboard(KEY) as server:
        server.fault = "refuse"
        process = start_agent(server.url)
        eventually(lambda: process.lines("cannot deliver .* connection refused"))
        eventually(lambda: waiting(process) >= 5, step_s=0.5)
        server.fault, well_again = "off", agent.iso_utc(time.time())
        eventually(partial(caught_up, server, process, well_again))
        assert process.stop() == 0
        stored, counters = server.stored(), process.counters()
    assert counters["sampled"] == counters["delivered"] == len(stored)
    assert_newest_or_oldest_first(stored)
    assert stored[0] != min(stored)  # it was the heartbeat
    assert len(process.lines("WARNING")) == 1 and len(process.lines("delivering again")) == 1


def assert_newest_or_oldest_first(stored: list[str]) -> None:
    """Each sample was the newest so far, or the oldest of those that had not been delivered.

    When the newest ones came, and so how the two kinds mix, depends on the machine.
    """
    left = sorted(stored)
    for index, stamp in enumerate(stored):
        assert stamp == left[0] or stamp > max(stored[:index], default=""), stored
        left.remove(stamp)


@v1_only
def test_down_for_130_heartbeats(start_agent: StartAgent) -> None:
    """A fast agent: 130 heartbeats of 50 ms. The newest 100 are kept, the rest is counted."""
    with Dashboard(KEY) as server:
        process = start_agent(server.url, heartbeat_ms=50)
        eventually(lambda: len(server.stored()) >= 3)
        server.fault = "refuse"
        before = len(server.stored())

        def has_dropped_30() -> bool:
            process.process.send_signal(signal.SIGUSR1)
            told = process.lines("100 waiting")
            return bool(told) and int(re.findall(r"(\d+) dropped", told[-1])[0]) >= 30

        eventually(has_dropped_30, 60, step_s=0.5)
        server.fault = "off"
        eventually(lambda: len(server.stored()) >= before + 100)
        assert process.stop() == 0
        stored, counters = server.stored(), process.counters()
    assert counters["dropped"] >= 30
    # a busy machine may store a sample, and answer after the deadline of this fast agent
    assert counters["delivered"] <= len(set(stored)) and len(stored) - counters["delivered"] <= 3
    assert counters["sampled"] == counters["delivered"] + counters["dropped"] + counters["waiting"]
    assert len(process.lines("dropped: more than BUFFER_SIZE=100")) == 1
    assert len(process.lines("no more samples are dropped")) == 1


def epoch_s(stamp: str) -> float:
    return datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").timestamp()


def assert_on_time(stamps: list[str], interval_s: float) -> None:
    """Samples were taken at every tick: none missing, none late by half an interval.

    The second one comes after half to one and a half intervals: the ticks count from there.
    """
    times = [epoch_s(stamp) for stamp in stamps[1:]]
    for index, taken in enumerate(times):
        assert taken - times[0] == pytest.approx(index * interval_s, abs=interval_s / 2)


@v1_only
def test_what_hangs_or_drips_delays_no_sample(start_agent: StartAgent) -> None:
    """An attempt takes up to 10 s here, the agent's real deadline, and a heartbeat 1 s."""
    modes = ("hang", "drip", "drip-headers")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Dashboard(KEY)) for _ in modes]
        processes = [start_agent(server.url) for server in servers]
        for server, mode in zip(servers, modes):
            eventually(partial(has_stored, server, 3))
            server.fault = mode
        time.sleep(8)
        for server in servers:
            server.fault = "off"
        for server, process in zip(servers, processes):
            eventually(partial(has_stored, server, 12), 30)
            assert process.stop() == 0
            counters = process.counters()
            assert counters["delivered"] == counters["sampled"] == len(server.stored())
            assert_on_time(sorted(server.stored()), 1.0)


# --- every misbehaviour


@dataclass
class Outcome:
    api: str
    process: AgentProcess
    stored: list[str]
    posts: int
    registered_again: int  # registrations that said the same as the one before
    counters: dict[str, int]


BEAT_S = 0.5
FAULT_S = 6.0
WARNS = {
    "refuse": "connection refused",
    "hang": "no complete answer in time",
    "drip": "no complete answer in time",
    "drip-headers": "no complete answer in time",
    "reset": "closed before the answer was complete",
    "half": "closed before the answer was complete",
    "401": "the dashboard does not accept API_KEY",
    "400": "answered 400",
    "422": "answered 422",
    "403": "answered 403",
    "404": "answered 404",
    "429": "answered 429",
    "429-date": "answered 429",
    "500": "answered 500",
    "503": "answered 503",
    "html": "this is not the dashboard's answer",
    "huge": "this is not the dashboard's answer",
    "redirect": "a redirect: correct DASHBOARD_URL: https://elsewhere.invalid/login",
    "unsuccessful": "but reports a failure: not now",
}
HANGS = {mode for mode, words in WARNS.items() if words == "no complete answer in time"}
ELSEWHERE = {"off", "poison", "429-long"}  # below, and in test_faults.py
TAKES = ("409",)  # the stand-in does not store what it answers like this


def has_stored(server: Dashboard, count: int) -> bool:
    return len(server.stored()) >= count


COUNTERS = r"INFO +\d+ sampled, "


def caught_up(server: Dashboard, process: AgentProcess, since: str) -> bool:
    """Tell whether samples of now arrive, from an agent with which nothing waits."""
    if not server.query("SELECT 1 FROM metrics_system WHERE timestamp > ?", since):
        return False
    said = len(process.lines(COUNTERS))
    process.process.send_signal(signal.SIGUSR1)
    [*_, last] = eventually(lambda: process.lines(COUNTERS)[said:], 5, "the counters")
    return ", 0 waiting," in last


@pytest.fixture(scope="module", params=APIS)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Run a fast agent through each misbehaviour, all at once: well, ill, and well again."""
    modes = [mode for mode in MODES if mode not in ELSEWHERE]
    api = str(request.param)
    servers = {mode: Dashboard(KEY, api=api) for mode in modes}
    found = {}
    with running_agents(tmp_path_factory.mktemp("outcomes"), api) as start:
        for server in servers.values():
            server.fault_scope = "/metrics/system"
            server.__enter__()
        try:
            processes = {
                mode: start(server.url, heartbeat_ms=int(BEAT_S * 1000), CHECK_PORTS="1",
                            deadlines=(1.5, 2.5) if mode in HANGS else ())
                for mode, server in servers.items()
            }
            for server in servers.values():
                eventually(partial(has_stored, server, 3), 60)
            at_start = {mode: len(server.posts) for mode, server in servers.items()}
            for mode, server in servers.items():
                server.fault = mode
            time.sleep(FAULT_S)
            seen = {mode: len(server.posts) - at_start[mode] for mode, server in servers.items()}
            for mode in HANGS:
                eventually(lambda mode=mode: processes[mode].lines("cannot deliver"), 60)  # type: ignore[misc]
            for server in servers.values():
                server.fault = "off"
            well_again = agent.iso_utc(time.time())
            for mode in modes:
                eventually(
                    partial(caught_up, servers[mode], processes[mode], well_again), 40, mode, 0.2
                )
            for mode, server in servers.items():
                assert processes[mode].stop() == 0, mode
                nodes = [post.raw for post in server.posts if post.path == "/api/v1/nodes"]
                found[mode] = Outcome(
                    api, processes[mode], server.stored(), seen[mode],
                    sum(one == other for one, other in itertools.pairwise(nodes)),
                    processes[mode].counters(),
                )
        finally:
            for server in servers.values():
                server.__exit__()
    return found


@pytest.mark.parametrize("mode", WARNS)
def test_nothing_is_lost(mode: str, outcomes: dict[str, Outcome]) -> None:
    one = outcomes[mode]
    assert one.counters["sampled"] == one.counters["delivered"]
    assert len(one.stored) == len(set(one.stored)) == one.counters["sampled"]


@pytest.mark.parametrize("mode", WARNS)
def test_one_line_per_change_of_state(mode: str, outcomes: dict[str, Outcome]) -> None:
    process = outcomes[mode].process
    [line] = process.lines("WARNING")
    assert "cannot deliver samples (keeping up to 100): " in line and WARNS[mode] in line
    assert len(process.lines("delivering again after")) == 1
    assert process.lines("Traceback|ERROR|CRITICAL") == []


@pytest.mark.parametrize("mode", TAKES)
def test_what_counts_as_delivered(mode: str, outcomes: dict[str, Outcome]) -> None:
    one = outcomes[mode]
    assert one.counters["sampled"] == one.counters["delivered"] > len(one.stored)
    assert one.process.lines("WARNING") == []


def test_registration_is_tried_again_only_for_an_unknown_node(
    outcomes: dict[str, Outcome],
) -> None:
    asks = outcomes["404"].api == "v1"
    again = {mode for mode, outcome in outcomes.items() if outcome.registered_again}
    assert again == ({"404"} if asks else set())


def test_retry_after_is_kept_to(outcomes: dict[str, Outcome]) -> None:
    for mode in ("429", "429-date"):  # 3 s: at 0, 3 and 6 s
        assert outcomes[mode].posts <= 3
    assert outcomes["500"].posts > 6


def test_every_mode_is_covered() -> None:
    assert {*WARNS, *TAKES} == set(MODES) - ELSEWHERE
    assert set(ANSWERS) <= set(MODES)


def test_a_poison_sample_does_not_block_the_others(
    dashboard: Dashboard, start_agent: StartAgent
) -> None:
    process = start_agent(dashboard.url, heartbeat_ms=200, CHECK_PORTS="1")
    eventually(lambda: len(dashboard.stored()) >= 2)
    dashboard.fault = "500"
    failed = eventually(lambda: [
        post.body["timestamp"] for post in dashboard.posts
        if post.status == 500 and "timestamp" in post.body
    ])
    dashboard.poison, dashboard.fault = failed[0], "poison"
    eventually(lambda: process.lines("refused 1 samples for good .*: answered 500"))
    assert process.stop() == 0
    counters = process.counters()
    assert (counters["refused"], counters["waiting"], counters["dropped"]) == (1, 0, 0)
    assert dashboard.poison not in dashboard.stored()
    assert len(dashboard.stored()) == counters["sampled"] - 1


# --- the end


@v1_only
@pytest.mark.parametrize(
    "state",
    ["idle", pytest.param("hanging", marks=pytest.mark.alone), "backing off", "starting"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop(
    state: str, number: signal.Signals, dashboard: Dashboard, start_agent: StartAgent
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = before.ru_utime + before.ru_stime
    process = start_agent(dashboard.url)
    if state == "starting":
        eventually(lambda: process.lines("started: "))
    else:
        eventually(dashboard.stored)
    if state == "hanging":
        dashboard.fault = "hang"
        count = len(dashboard.posts)
        eventually(lambda: len(dashboard.posts) > count)
    elif state == "backing off":
        dashboard.fault = "500"
        eventually(lambda: sum(post.status == 500 for post in dashboard.posts) >= 2)
    started = time.monotonic()
    process.process.send_signal(number)
    assert process.process.wait(10) == 0
    assert time.monotonic() - started < 6
    assert process.lines("stopped: ")
    assert process.lines("Traceback|Fatal|Exception") == []
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - cpu_s < 3  # no wait of a stop is a busy one
    if state == "idle":  # the sample under way, if there was one, is delivered as well
        assert process.counters()["delivered"] == process.counters()["sampled"]


@v1_only
def test_what_waits_is_flushed_at_the_stop(
    dashboard: Dashboard, start_agent: StartAgent
) -> None:
    process = start_agent(dashboard.url)
    eventually(dashboard.stored)
    dashboard.fault = "500"
    eventually(lambda: sum(post.status == 500 for post in dashboard.posts) >= 2)
    dashboard.fault = "off"
    assert process.stop() == 0
    counters = process.counters()
    assert counters["delivered"] == counters["sampled"] == len(dashboard.stored())


# A real agent that saves late, and stops slowly: what is on disk was saved as the stop began.
SAVES_LATE = """
import os, sys
import tinomail_agent as a
a.SAVE_AFTER_S = a.REQUEST_DEADLINE_S = a.SLOW_DEADLINE_S = a.STOP_LIMIT_S = 600.0
config = a.load_config(os.environ, os.devnull)
a.set_up_logging(config.log_level, config.api_key, os.environ)
sys.exit(a.Agent(config, os.environ).run())
"""


@v1_only
def test_a_stop_that_is_cut_short_loses_nothing(start_agent: StartAgent, tmp_path: Path) -> None:
    """What waits is saved when the stop begins: a kill may come before its five seconds end."""
    saved = tmp_path / "state/buffer"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        process = start_agent(
            f"http://127.0.0.1:{silent.getsockname()[1]}", code=SAVES_LATE, CHECK_PORTS="1",
            HEARTBEAT_INTERVAL="300000", STATE_DIRECTORY=str(saved.parent),
        ).process
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)  # a sample is taken, and is on its way
            assert not saved.exists()
            process.send_signal(signal.SIGTERM)
            eventually(lambda: list(saved.glob("*.sample")))
            process.kill()
            assert process.wait(10) == -signal.SIGKILL
    assert len(list(saved.glob("*.sample"))) == 1


@v1_only
def test_a_port_check_under_way_does_not_hold_up_the_stop(
    dashboard: Dashboard, start_agent: StartAgent, deaf_port: int
) -> None:
    process = start_agent(dashboard.url, CHECK_PORTS=str(deaf_port))
    eventually(dashboard.stored)
    started = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - started < 6
    [(services,)] = dashboard.query("SELECT services FROM metrics_system LIMIT 1")
    assert "false" in services


# --- systemd's notify socket, without systemd


@v1_only
def test_what_systemd_is_told(
    dashboard: Dashboard, start_agent: StartAgent, tmp_path: Path
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        notify.settimeout(10)
        process = start_agent(dashboard.url, NOTIFY_SOCKET=path, WATCHDOG_USEC="3000000")
        messages = [notify.recv(4096).decode()]
        while not re.fullmatch(
            r"WATCHDOG=1\nSTATUS=ok: [1-9]\d* sent, 0 waiting, last 201 in \d+ ms", messages[-1]
        ):
            messages.append(notify.recv(4096).decode())
        assert process.stop() == 0
        while "STOPPING=1" not in messages[-1]:
            messages.append(notify.recv(4096).decode())
    assert messages[0] == "READY=1"


def test_priorities_for_the_journal() -> None:
    code = (
        "import os, sys\nimport tinomail_agent as a\n"
        "found = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino}'\n"
        "a.set_up_logging('debug', 'k', os.environ)\n"
        "a.log.warning('two\\nlines')\na.log.error('one')\na.log.debug('less')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(agent.__file__).parent)},
                          check=True, timeout=20)
    assert done.stderr == "<4>two\n<4>lines\n<3>one\n<7>less\n"
