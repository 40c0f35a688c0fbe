"""The two dialects: what is posted, what answers mean, and a stand-in true to the facts."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import platform
import re
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trustme
from conftest import KEY, ROOT, FakeClock, eventually, make_config, running_agents
from dashboard import (
    APIS,
    BODY_LIMIT_BYTES,
    INT4,
    MONITOR_NODE,
    MONITOR_QUEUE,
    MONITOR_SAMPLE,
    MONITOR_SYSTEM,
    MONITOR_ZONEMTA,
    NODE,
    POSTS_PER_MINUTE,
    SAMPLE,
    ZONEMTA,
    Dashboard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import tinomail_agent as agent
from tinomail_agent import Answer, Outcome

MONITOR = "tinomail-monitor"
STAMP = "2026-01-01T00:00:00.000Z"
CHECKS = {"v1": SAMPLE, MONITOR: MONITOR_SAMPLE}


def row(status: str = "running", pid: int | None = 7) -> dict[str, Any]:
    return {"status": status, "pid": pid, "memory_mb": 81.5, "cpu_percent": 130.2}


GOOD: dict[str, Any] = {
    "timestamp": STAMP,
    "system": {
        "cpu_percent": 12.5, "cpu_cores": [{"core": 0, "percent": 12.5}],
        "ram_used_percent": 40.1, "ram_used_bytes": 4 * 2**30, "ram_total_bytes": 10 * 2**30,
        "disk_used_percent": 100, "disk_free_bytes": 0,
        "disks": [{"mount": "/", "used_percent": 100, "free_bytes": 0}],
        "disk_read_bytes_sec": 1, "disk_write_bytes_sec": 2, "net_rx_bytes_sec": 3,
        "net_tx_bytes_sec": 4, "net_rx_errors": 5, "net_tx_errors": 6,
        "load_avg": [0.5, 1, 1.5], "tcp_established": 7, "tcp_time_wait": 8, "tcp_close_wait": 9,
        "open_files": 10, "uptime_seconds": 11,
    },
    "processes": {
        "zonemta": row(), "redis": row("stopped"), "mongodb": {
            "status": "not_found", "pid": None, "memory_mb": 0, "cpu_percent": 0},
        "postfix": row(),
    },
    "services": {"port_25": True},
    "zonemta": {"queued": 3, "deferred": 7, "delivered_total": 100, "bounced_total": 5,
                "rejected_total": 9, "connections": 2},
    "role": "zonemta-outbound",
    "seen": ["zonemta", "redis"],
    "agent": {"version": agent.VERSION, "rss_bytes": 1, "clock_offset_sec": -3},
}


def on_disk(body: Any) -> bytes:
    """Return a file as it may be found in STATE_DIRECTORY: JSON of any shape, compressed."""
    return zlib.compress(json.dumps(body).encode())


def rendered(api: str, neutral: Any) -> Any:
    request = agent.DIALECTS[api].sample(agent.unpack(on_disk(neutral)), "mta-01", KEY)
    packed = request.headers.get("Content-Encoding") == "gzip"
    return json.loads(gzip.decompress(request.body) if packed else request.body)


def registration(api: str, ip: str = "10.0.0.1", **change: Any) -> Any:
    neutral = {**GOOD, **change}
    return json.loads(agent.DIALECTS[api].register(neutral, "mta-01", ip, KEY).body)


# --- what is posted


def test_a_sample_for_tinomail_monitor() -> None:
    request = agent.MONITOR.sample(GOOD, "mta-01", KEY)
    assert request.path == "/api/v1/metrics/system"
    assert request.headers == {"x-api-key": KEY, "Content-Type": "application/json"}
    assert json.loads(request.body) == {
        "nodeId": "mta-01", "nodeRole": "zonemta", "timestamp": STAMP,
        "cpuPercent": 12.5, "ramPercent": 40.1, "diskPercent": 100, "load1m": 0.5, "load5m": 1,
        "load15m": 1.5, "ramUsedBytes": 4 * 2**30, "diskFreeBytes": 0, "diskReadBytesSec": 1,
        "diskWriteBytesSec": 2, "netRxBytesSec": 3, "netTxBytesSec": 4, "netRxErrors": 5,
        "netTxErrors": 6, "tcpEstablished": 7, "tcpTimeWait": 8, "openFiles": 10,
        "processes": [
            {"name": "zone-mta", "running": True, "pid": 7, "memoryMB": 81.5, "cpuPercent": 130.2},
            {"name": "redis-server", "running": False, "pid": 7, "memoryMB": 81.5,
             "cpuPercent": 130.2},
            {"name": "mongod", "running": False, "pid": None, "memoryMB": 0, "cpuPercent": 0},
            {"name": "postfix", "running": True, "pid": 7, "memoryMB": 81.5, "cpuPercent": 130.2},
        ],
    }


def test_a_sample_for_v1_is_as_it_was_taken() -> None:
    body = rendered("v1", GOOD)
    parts = {name: part for name, part in GOOD.items() if name not in agent.NOT_IN_V1}
    assert body == {"node_id": "mta-01", **parts}
    assert SAMPLE(body) == ""


def test_the_mail_queue_for_tinomail_monitor() -> None:
    request = agent.MONITOR.zonemta(GOOD, "mta-01", KEY)
    assert request and request.path == "/api/v1/metrics/zonemta"
    assert request.headers == {"x-api-key": KEY, "Content-Type": "application/json"}
    body = json.loads(request.body)
    assert MONITOR_QUEUE(body) == ""
    assert body == {
        "nodeId": "mta-01", "timestamp": STAMP, "queueSize": 10, "deferredTotal": 7,
        "sentTotal": 112, "deliveredTotal": 100, "bouncedTotal": 5, "rejectedTotal": 9,
        "connectionsActive": 2,
    }
    assert set(body) - {"nodeId", "timestamp"} <= set(MONITOR_ZONEMTA)


def test_an_unknown_figure_of_the_queue_is_left_out_and_no_figure_is_no_post() -> None:
    figures = {"delivered_total": 1, "deferred": 7}
    request = agent.MONITOR.zonemta({**GOOD, "zonemta": figures}, "mta-01", KEY)
    assert request and json.loads(request.body) == {
        "nodeId": "mta-01", "timestamp": STAMP, "deferredTotal": 7, "deliveredTotal": 1}
    for without in ({**GOOD, "zonemta": {}}, {k: v for k, v in GOOD.items() if k != "zonemta"}):
        assert agent.MONITOR.zonemta(without, "mta-01", KEY) is None
    assert agent.V1.zonemta(GOOD, "mta-01", KEY) is None  # a part of the sample


def test_a_figure_of_a_process_that_is_not_known_is_0_for_tinomail_monitor() -> None:
    body = rendered(MONITOR, {**GOOD, "processes": {"redis": {"status": "running", "pid": 7}}})
    assert body["processes"] == [
        {"name": "redis-server", "running": True, "pid": 7, "cpuPercent": 0, "memoryMB": 0}]
    assert MONITOR_SAMPLE(body) == ""


@pytest.mark.parametrize(
    ("role", "sent"),
    [("zonemta-outbound", "zonemta"), ("zonemta-local", "zonemta"), ("zonemta", "zonemta"),
     ("haraka-inbound", "haraka-inbound"), ("Máy chủ thư 1", "Máy chủ thư 1"),
     ("unknown", "unknown")],
)
def test_roles(role: str, sent: str) -> None:
    assert rendered(MONITOR, {**GOOD, "role": role})["nodeRole"] == sent
    assert registration(MONITOR, role=role)["role"] == sent
    assert registration("v1", role=role)["role"] == role


def test_a_registration_at_tinomail_monitor() -> None:
    neutral = {**GOOD, "role": "haraka", "seen": ["haraka", "postfix", "redis"]}
    request = agent.MONITOR.register(neutral, "mta-01", "fe80::1%eth0", KEY)
    assert (request.path, request.headers["x-api-key"]) == ("/api/v1/nodes", KEY)
    assert "Content-Encoding" not in request.headers
    body = json.loads(request.body)
    metadata = body.pop("metadata")
    assert body == {
        "nodeId": "mta-01", "hostname": os.uname().nodename, "ipAddress": "fe80::1",
        "role": "haraka",
    }
    assert metadata["agentVersion"] == agent.VERSION
    assert metadata["detectedServices"] == ["haraka", "redis"]
    assert metadata["platform"] == "linux" and metadata["arch"] == os.uname().machine
    assert MONITOR_NODE({**body, "metadata": metadata}) == ""


def test_a_system_without_os_release(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(platform, "freedesktop_os_release", fail)
    metadata = registration(MONITOR)["metadata"]
    assert set(metadata) == {"agentVersion", "platform", "arch", "detectedServices"}


def test_a_dialect_for_each_choice_of_the_setting() -> None:
    assert tuple(agent.DIALECTS) == APIS
    for api in APIS:
        assert make_config(dashboard_api=api).dashboard_api == api


def test_the_stand_in_knows_all_that_is_posted() -> None:
    assert set(agent.MONITOR_SYSTEM.values()) == set(MONITOR_SYSTEM)
    assert set(agent.MONITOR_QUEUE) <= set(MONITOR_ZONEMTA)
    assert set(agent.ZONEMTA_FIGURES) == set(ZONEMTA)


@pytest.mark.parametrize("api", APIS)
def test_nothing_of_a_real_sample_is_left_out(api: str) -> None:
    collector = agent.Collector(make_config(), clock=FakeClock().monotonic)
    collector.prime()
    neutral = agent.unpack(collector.collect().packed)
    body = rendered(api, neutral)
    assert CHECKS[api](body) == ""
    if api == "v1":
        del neutral["role"], neutral["seen"]
        assert body == {"node_id": "mta-01", **neutral}
    else:
        held = [name for name in neutral["system"] if name in agent.MONITOR_SYSTEM]
        assert all(agent.MONITOR_SYSTEM[name] in body for name in held)
        assert len(body["processes"]) == len(agent.SERVICES)


@pytest.mark.parametrize("api", APIS)
def test_the_same_bytes_each_time(api: str) -> None:
    one, two = (agent.DIALECTS[api].sample(GOOD, "mta-01", KEY) for _ in range(2))
    assert one == two
    assert agent.DIALECTS[api].sample(GOOD, "mta-02", KEY).body != one.body


# --- what is left out


@pytest.mark.parametrize("api", APIS)
def test_without_processes_the_rest_is_posted(api: str) -> None:
    body = rendered(api, {k: v for k, v in GOOD.items() if k != "processes"})
    assert "processes" not in body
    assert CHECKS[api](body) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["status", "pid", "memory_mb", "core", "mount", "redis", "port_25", "x"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*GOOD["system"], "colour"]), JSON),
    st.dictionaries(st.sampled_from(["processes", "services", "agent", "zonemta", "role", "x"]),
                    JSON),
)
def test_a_sample_from_disk_is_damaged_or_can_be_posted_in_each_dialect(
    system: dict[str, Any], rest: dict[str, Any]
) -> None:
    """Whatever a file holds: what is loaded never makes the sender fail."""
    neutral = {**GOOD, "system": {**GOOD["system"], **system}, **rest}
    sample = agent.read_sample(1, zlib.compress(json.dumps(neutral).encode()))
    if sample is None:
        return
    for api in APIS:
        agent.DIALECTS[api].register(agent.unpack(sample.packed), "mta-01", "10.0.0.1", KEY)
        assert rendered(api, agent.unpack(sample.packed))["timestamp"] == STAMP
        agent.DIALECTS[api].zonemta(agent.unpack(sample.packed), "mta-01", KEY)


@pytest.mark.parametrize(
    "change",
    [{"role": []}, {"processes": []}, {"processes": {"redis": 1}},
     {"processes": {"redis": {}}}, {"zonemta": 7}, {"zonemta": {"connections": "7"}},
     {"system": {"load_avg": 7}}, {"system": []}],
    ids=str,
)
def test_a_sample_from_disk_with_a_part_of_the_wrong_type_is_damaged(change: Any) -> None:
    good = agent.read_sample(1, agent.pack(GOOD))
    assert good and agent.unpack(good.packed)["role"] == GOOD["role"]
    assert agent.read_sample(1, on_disk({**GOOD, **change})) is None


def test_a_number_on_disk_that_is_none_is_damaged() -> None:
    text = json.dumps(GOOD).replace("12.5", "1e999")
    assert agent.read_sample(1, zlib.compress(text.encode())) is None


def test_a_sample_of_version_1_0_0_is_posted_in_each_dialect() -> None:
    """Without what later versions added, and with a role of its choice."""
    older = {k: v for k, v in GOOD.items() if k != "zonemta"}
    sample = agent.read_sample(1, agent.pack(older))
    assert sample
    for api in APIS:
        assert CHECKS[api](rendered(api, agent.unpack(sample.packed))) == ""


# --- what answers mean


@pytest.mark.parametrize(
    ("api", "answer", "says"),
    [
        ("v1", Answer(401, body=b'{"message":"Missing x-api-key header"}'),
         f"DASHBOARD_API={MONITOR}"),
        (MONITOR, Answer(401, body=b'{"error":"unknown key"}'), "DASHBOARD_API=v1"),
        (MONITOR, Answer(403, body=b'{"success":false,"error":{"code":"BLOCKED"}}'),
         "the dashboard blocks this node"),
    ],
)
def test_signs(api: str, answer: Answer, says: str) -> None:
    verdict = agent.judge(answer, KEY, agent.DIALECTS[api].hints)
    assert verdict.outcome is Outcome.KEPT
    assert str(verdict).startswith(f"answered {answer.status}: ") and says in str(verdict)


@pytest.mark.parametrize(
    ("api", "answer"),
    [("v1", Answer(401, body=b"unknown key")), ("v1", Answer(400, body=b"bad")),
     ("v1", Answer(403, body=b'"BLOCKED"')), (MONITOR, Answer(403, body=b"forbidden")),
     (MONITOR, Answer(500, body=b'{"error":{"code":"22003"}}'))],
)
def test_other_answers_are_no_sign(api: str, answer: Answer) -> None:
    verdict = agent.judge(answer, KEY, agent.DIALECTS[api].hints)
    assert verdict == agent.judge(answer, KEY)
    assert "DASHBOARD_API" not in str(verdict)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"error": "no such field"}', "no such field"),
        ('{"error": ["x"], "message": "later"}', "later"),
        ('{"error": "", "message": "later"}', "later"),
        ('{"error": {"code": "22003"}}', "22003"),
        ('{"error": {"code": 5}}', ""),
    ],
)
def test_what_an_answer_says_of_itself(body: str, words: str) -> None:
    assert agent.judge(Answer(422, body=body.encode()), KEY).detail == words


def run_check(
    server: Dashboard, api: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tinomail_agent.py"), "--check", "--env-file", os.devnull],
        env={"PATH": os.environ["PATH"], "DASHBOARD_URL": server.url, "API_KEY": KEY,
             "NODE_ID": "mta-01", "CHECK_PORTS": "1", "DASHBOARD_API": api, **settings},
        capture_output=True, text=True, timeout=120, check=False,
    )


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(APIS, APIS)))
def test_check_names_the_dialect_and_the_setting_to_change(ours: str, theirs: str) -> None:
    with Dashboard(KEY, api=theirs) as server:
        done = run_check(server, ours)
    [*_, dialect, last] = done.stdout.splitlines()
    assert dialect == f"dialect: DASHBOARD_API={ours}"
    if ours == theirs:
        assert done.returncode == 0, done
        assert last.startswith("dashboard: ok, registered as mta-01 ")
        assert "it took the sample" in last
    else:
        assert done.returncode == 1, done
        assert last.startswith("dashboard: FAILED: answered 401 (Server: ")
        assert last.endswith(f"set DASHBOARD_API={theirs}")


@pytest.mark.parametrize("api", APIS)
def test_check_posts_its_sample_without_what_it_says_of_itself(api: str) -> None:
    with Dashboard(KEY, api=api) as server:
        done = run_check(server, api)
        assert done.returncode == 0, done
        assert len(server.stored()) == 1
        sample = server.posts[-1].body
    assert "agent" not in sample and CHECKS[api](sample) == ""


REGISTRATION, SAMPLES = "/nodes", "/metrics/system"


# What a dialect has a part in, and what is the same in all of them: fault, of what, exit code.
IN_EACH_DIALECT = (
    ("off", "", 0), ("401", REGISTRATION, 1), ("403", REGISTRATION, 1),
    ("unsuccessful", REGISTRATION, 1), ("401", SAMPLES, 1), ("404", SAMPLES, 1),
    ("unsuccessful", SAMPLES, 1), ("400", SAMPLES, 1), ("500", REGISTRATION, 75),
    ("500", SAMPLES, 75),
)
IN_ALL_DIALECTS = (
    ("409", SAMPLES, 0), ("html", REGISTRATION, 1), ("redirect", REGISTRATION, 1),
    ("422", SAMPLES, 1), ("html", SAMPLES, 1), ("redirect", SAMPLES, 1),
    ("429", REGISTRATION, 75), ("reset", REGISTRATION, 75), ("503", SAMPLES, 75),
    ("429-date", SAMPLES, 75), ("reset", SAMPLES, 75), ("half", SAMPLES, 75),
    ("refuse", "", 75), ("hang", SAMPLES, 75),
)


@pytest.mark.parametrize(
    ("api", "fault", "scope", "code"),
    [*((api, *row) for api in APIS for row in IN_EACH_DIALECT),
     *(("v1", *row) for row in IN_ALL_DIALECTS)],
)
def test_exit_codes_of_check(api: str, fault: str, scope: str, code: int) -> None:
    with Dashboard(KEY, api=api) as server:
        server.fault_scope, server.fault = scope, fault
        done = run_check(server, api)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == code, done
    assert last.startswith("dashboard: ok, " if code == 0 else "dashboard: FAILED: ")
    assert ("registered as mta-01" in last) is (scope == SAMPLES or code == 0)
    assert KEY not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_exit_codes_of_check_for_tls(tmp_path: Path) -> None:
    issuer = trustme.CA()
    issuer.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name, trusted, code in (("127.0.0.1", True, 0), ("127.0.0.1", False, 1),
                                ("mail.example.com", True, 1)):
        leaf = issuer.issue_cert(name)
        leaf.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "leaf.pem"))
        tls = (str(tmp_path / "leaf.pem"), str(tmp_path / "leaf.pem"))
        with Dashboard(KEY, tls=tls) as server:
            bundle = {"CA_BUNDLE": str(tmp_path / "ca.pem")} if trusted else {}
            assert run_check(server, "v1", **bundle).returncode == code, (name, trusted)
    with Dashboard(KEY) as plain:
        url = plain.url.replace("http:", "https:")
        assert run_check(plain, "v1", DASHBOARD_URL=url).returncode == 1


@pytest.mark.parametrize(
    ("number", "is_lasting"),
    [(socket.EAI_AGAIN, False), (socket.EAI_NONAME, True), (socket.EAI_FAIL, True)],
)
def test_a_name_that_does_not_exist_is_not_mended_by_waiting(
    number: int, is_lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = Mock(side_effect=socket.gaierror(number, "name"))
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    request = agent.V1.sample(GOOD, "mta-01", KEY)
    answer = agent.Transport("https://dashboard.example.com").post(request)
    assert "the name in DASHBOARD_URL cannot be resolved" in answer.reason
    assert answer.is_lasting is is_lasting


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(APIS)))
def test_the_log_names_the_setting_to_change(ours: str, theirs: str, tmp_path: Path) -> None:
    with Dashboard(KEY, api=theirs) as server, running_agents(tmp_path, ours) as start:
        process = start(server.url)
        [line] = eventually(lambda: process.lines("cannot deliver"))
        assert "registration: answered 401 (Server: " in line
        assert line.endswith(f"set DASHBOARD_API={theirs}")
        assert process.stop() == 0


def test_once_prints_the_dialect_that_is_set() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tinomail_agent.py"), "--once", "--env-file", os.devnull],
        env={"PATH": os.environ["PATH"], "DASHBOARD_API": MONITOR, "NODE_ID": "mta-01"},
        capture_output=True, text=True, timeout=30, check=True,
    )
    assert MONITOR_SAMPLE(json.loads(done.stdout)) == ""


# --- the stand-in takes and refuses what the deployed backend takes and refuses

SAMPLE_OF = {"nodeId": "mta-01", "nodeRole": "redis", "timestamp": STAMP, "openFiles": 1}
NODE_OF = {"nodeId": "mta-01", "hostname": "h", "ipAddress": "10.0.0.1", "role": "redis",
           "metadata": {"agentVersion": agent.VERSION}}
QUEUE_OF = {"nodeId": "mta-01", "timestamp": STAMP, "queueSize": 1}
PROCESS = {"name": "mongod", "running": False, "pid": None, "cpuPercent": 0, "memoryMB": 0}
NODES, METRICS, QUEUE = "/api/v1/nodes", "/api/v1/metrics/system", "/api/v1/metrics/zonemta"
BODIES: dict[str, dict[str, Any]] = {NODES: NODE_OF, METRICS: SAMPLE_OF, QUEUE: QUEUE_OF}
ABSENT = "absent"  # in a change: the name is left out


def processes(**change: Any) -> dict[str, Any]:
    row = {name: value for name, value in {**PROCESS, **change}.items() if value != ABSENT}
    return {"processes": [row]}


# A path, what is changed in its body, and the answer's status. 500: INTERNAL_SERVER_ERROR without
# a reason; 22003: a 500 with the database's own code.
FACTS: list[tuple[str, dict[str, Any], int]] = [
    (METRICS, {}, 201),
    (METRICS, {"timestamp": ABSENT}, 201),
    (METRICS, {"timestamp": "2026-01-01T00:00:00Z"}, 201),
    (METRICS, {"timestamp": "2026-01-01T00:00:00.123456Z"}, 201),
    (METRICS, {"timestamp": "2026-01-01T00:00:00+00:00"}, 500),
    (METRICS, {"timestamp": None}, 500),
    (METRICS, {"nodeId": ""}, 201),
    (METRICS, {"nodeId": ABSENT}, 500),
    (METRICS, {"nodeRole": "x" * 300}, 201),
    (METRICS, {"nodeRole": None}, 500),
    (METRICS, {"nodeRole": ABSENT}, 500),
    (METRICS, {"colour": 1}, 201),
    (METRICS, {"cpuPercent": 100}, 201),
    (METRICS, {"cpuPercent": 100.04}, 500),
    (METRICS, {"cpuPercent": "7"}, 500),
    (METRICS, {"load1m": 1e300}, 201),
    (METRICS, {"load1m": -1}, 500),
    (METRICS, {"openFiles": None}, 500),
    (METRICS, {"openFiles": 1.5}, 500),
    (METRICS, {"openFiles": -1}, 500),
    (METRICS, {"openFiles": INT4}, 201),
    (METRICS, {"openFiles": INT4 + 1}, 22003),
    (METRICS, {"tcpEstablished": INT4 + 1}, 22003),
    (METRICS, {"tcpTimeWait": INT4 + 1}, 22003),
    (METRICS, {"ramUsedBytes": 2**53 + 2}, 201),
    (METRICS, {"ramUsedBytes": 2**63}, 22003),
    (METRICS, {"processes": []}, 201),
    (METRICS, {"processes": None}, 500),
    (METRICS, {"processes": [PROCESS] * 300}, 201),
    (METRICS, processes(), 201),
    (METRICS, processes(name="postfix"), 201),
    (METRICS, processes(more=1), 201),
    (METRICS, processes(running=True, pid=7), 201),
    (METRICS, processes(pid=2**40), 201),
    (METRICS, processes(cpuPercent=900), 201),
    (METRICS, processes(pid=1.5), 500),
    (METRICS, processes(cpuPercent=None), 500),
    *((METRICS, processes(**{name: ABSENT}), 500) for name in PROCESS),
    (NODES, {}, 201),
    (NODES, {"metadata": ABSENT}, 201),
    (NODES, {"colour": 1}, 201),
    (NODES, {"nodeId": "x" * 100}, 201),
    (NODES, {"nodeId": "x" * 101}, 500),
    (NODES, {"nodeId": ""}, 500),
    (NODES, {"hostname": ""}, 201),
    (NODES, {"hostname": "x" * 256}, 500),
    (NODES, {"ipAddress": "fe80::1"}, 201),
    (NODES, {"ipAddress": "fe80::1%eth0"}, 201),
    (NODES, {"ipAddress": "host"}, 500),
    (NODES, {"role": "x" * 50}, 201),
    (NODES, {"role": "Haraka, inbound"}, 201),
    (NODES, {"role": "x" * 51}, 500),
    (NODES, {"role": ""}, 500),
    (NODES, {"metadata": []}, 500),
    (NODES, {"metadata": None}, 500),
    (QUEUE, {}, 201),
    (QUEUE, {"mtaRole": None, "timestamp": ABSENT, "colour": 1}, 201),
    (QUEUE, {"mtaRole": "zonemta", "throughputPerSec": 1.5, "deliveredTotal": 2**40}, 201),
    (QUEUE, {"nodeId": ABSENT}, 500),
    (QUEUE, {"queueSize": None}, 500),
    (QUEUE, {"queueSize": -1}, 500),
    (QUEUE, {"queueSize": 1.5}, 500),
    (QUEUE, {"throughputPerSec": -1}, 500),
    (QUEUE, {"queueSize": INT4 + 1}, 22003),
    (QUEUE, {"connectionsActive": INT4 + 1}, 22003),
    (QUEUE, {"deliveredTotal": 2**63}, 22003),
]


def post(server: Dashboard, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    given_headers = {"x-api-key": KEY, "Content-Type": "application/json"}
    given_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    request = agent.Request(path, {k: v for k, v in given_headers.items() if v}, raw)
    answer = agent.Transport(server.url).post(request, 5.0)
    return answer.status, json.loads(answer.body)


@pytest.fixture
def monitor() -> Any:
    with Dashboard(KEY, api=MONITOR) as server:
        yield server


@pytest.mark.parametrize(("path", "change", "expected"), FACTS, ids=str)
def test_facts(path: str, change: dict[str, Any], expected: int, monitor: Dashboard) -> None:
    body = {name: value for name, value in {**BODIES[path], **change}.items() if value != ABSENT}
    status, answer = post(monitor, path, body)
    rows = [len(monitor.query(f"SELECT * FROM {table}"))
            for table in ("nodes", "metrics_system", "metrics_zonemta")]
    if expected == 201:
        assert (status, answer["success"], sum(rows)) == (201, True, 1), answer
        return
    code = "22003" if expected == 22003 else "INTERNAL_SERVER_ERROR"
    assert (status, answer) == (500, {
        "success": False, "error": {"code": code, "message": "Internal server error"}})
    assert (len(monitor.complaints), sum(rows)) == (1, 0)


def test_nothing_is_de_duplicated_and_no_node_needs_to_be_known(monitor: Dashboard) -> None:
    for _ in range(2):
        answer = post(monitor, METRICS, SAMPLE_OF)
        assert answer == (201, {"success": True, "data": {"received": True}})
    assert monitor.query("SELECT * FROM nodes") == []
    assert monitor.stored() == [STAMP, STAMP]
    status, answer = post(monitor, NODES, NODE_OF)
    assert (status, answer["data"]["id"]) == (201, "mta-01")


def test_alive_through_processes_and_a_registration_overwrites_them(monitor: Dashboard) -> None:
    look = "SELECT last_seen, metadata FROM nodes"
    post(monitor, NODES, NODE_OF)
    registered = monitor.query(look)[0][0]
    for without in (SAMPLE_OF, {**SAMPLE_OF, "processes": []}):
        assert post(monitor, METRICS, without)[0] == 201
        assert monitor.query(look)[0][0] == registered
    eventually(lambda: post(monitor, METRICS, {**SAMPLE_OF, **processes()})[0] == 201
               and monitor.query(look)[0][0] > registered)
    assert json.loads(monitor.query(look)[0][1])["processes"] == [PROCESS]
    post(monitor, NODES, NODE_OF)
    assert "processes" not in json.loads(monitor.query(look)[0][1])


def test_a_blocked_node(monitor: Dashboard) -> None:
    monitor.blocked.add("mta-01")
    status, answer = post(monitor, NODES, NODE_OF)
    assert (status, answer["error"]["code"]) == (403, "BLOCKED")
    assert post(monitor, METRICS, SAMPLE_OF)[0] == 201  # would still be taken
    done = run_check(monitor, MONITOR)
    assert done.returncode == 1 and "the dashboard blocks this node: unblock it" in done.stdout


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "holds"),
    [
        (METRICS, SAMPLE_OF, {"x_api_key": ""}, 401, "Missing x-api-key header"),
        (NODES, NODE_OF, {"x_api_key": "", "authorization": f"Bearer {KEY}"}, 401, "Missing x-api"),
        (METRICS, SAMPLE_OF, {"x_api_key": "wrong"}, 401, "UNAUTHORIZED"),
        (QUEUE, QUEUE_OF, {"x_api_key": "wrong"}, 401, "UNAUTHORIZED"),
        (METRICS, gzip.compress(b"{}", mtime=0), {"content_encoding": "gzip"}, 400,
         "FST_ERR_CTP_INVALID_CONTENT_LENGTH"),
        (METRICS, b"{", {}, 400, "INTERNAL_SERVER_ERROR"),
        (METRICS, b"", {}, 400, "FST_ERR_CTP_EMPTY_JSON_BODY"),
        (METRICS, b'{"load1m":NaN}', {}, 401, "Unexpected token"),
        (METRICS + "/", SAMPLE_OF, {}, 404, "Not Found"),
        (METRICS, b" " * BODY_LIMIT_BYTES + b"{}", {}, 413, "FST_ERR_CTP_BODY_TOO_LARGE"),
        (METRICS, SAMPLE_OF, {"content_type": "text/plain"}, 500, "INTERNAL_SERVER_ERROR"),
        (METRICS, SAMPLE_OF, {"content_type": "text/xml"}, 415, "FST_ERR_CTP_INVALID_MEDIA_TYPE"),
    ],
)
def test_what_is_refused_before_it_is_looked_at(
    path: str, body: Any, headers: dict[str, str], status: int, holds: str, monitor: Dashboard
) -> None:
    found, answer = post(monitor, path, body, **headers)
    assert (found, holds in json.dumps(answer)) == (status, True), answer
    assert monitor.stored() == []


def test_a_name_that_stands_twice_and_a_slash_behind_nodes_are_taken(monitor: Dashboard) -> None:
    assert post(monitor, METRICS, b'{"nodeId":"a","nodeRole":"b","nodeRole":"c"}')[0] == 201
    assert post(monitor, NODES + "/", NODE_OF)[0] == 201


def test_more_than_1000_metrics_a_minute(monitor: Dashboard) -> None:
    """All metrics together; neither registrations nor what has a wrong key count."""
    assert POSTS_PER_MINUTE == 1000
    monitor.posts_per_minute = 3
    for key in ("wrong", ""):
        assert post(monitor, METRICS, SAMPLE_OF, x_api_key=key)[0] == 401
    assert [post(monitor, NODES, NODE_OF)[0] for _ in range(5)] == [201] * 5
    found = [post(monitor, path, BODIES[path])[0] for path in (METRICS, QUEUE, METRICS, QUEUE)]
    assert found == [201, 201, 201, 429]
    assert post(monitor, METRICS, b"{")[0] == 429  # before the body is read
    assert len(monitor.stored()) == 2
    transport = agent.Transport(monitor.url)
    answer = transport.post(agent.MONITOR.sample(GOOD, "mta-01", KEY), 5.0)
    assert 0 < agent.retry_after_s(answer, 0.0) <= 60
    limits = monitor.count_post("127.0.0.1", METRICS, {"x-api-key": KEY})
    assert limits["x-ratelimit-limit"] == "3" and limits["x-ratelimit-remaining"] == "0"
    other = monitor.count_post("10.0.0.1", METRICS, {"x-api-key": KEY})
    assert "retry-after" not in other  # an address of its own


def test_a_node_is_one_in_v1() -> None:
    assert NODE(registration("v1")) == ""
    assert re.fullmatch(r"Bearer \S+", agent.V1.headers(KEY)["Authorization"])
