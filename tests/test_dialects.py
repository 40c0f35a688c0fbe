"""The two dialects: what is posted, what is left out, what answers mean, and a strict stand-in."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, FakeClock, eventually, make_config, running_agents
from dashboard import (
    AGENT,
    APIS,
    BODY_LIMIT_BYTES,
    INT4,
    MONITOR_NODE,
    MONITOR_SAMPLE,
    MONITOR_SYSTEM,
    NODE,
    POSTS_PER_MINUTE,
    SAMPLE,
    SYSTEM,
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
    "role": "zonemta-outbound",
    "agent": {"version": agent.VERSION, "rss_bytes": 1, "clock_offset_sec": -3},
}


def pack(neutral: Any) -> bytes:
    """As agent.pack(), but with NaN and infinity too, as a file from elsewhere may hold them."""
    return zlib.compress(json.dumps(neutral).encode())


def rendered(api: str, neutral: Any) -> Any:
    request = agent.DIALECTS[api].sample(pack(neutral), "mta-01", KEY)
    packed = request.headers.get("Content-Encoding") == "gzip"
    return json.loads(gzip.decompress(request.body) if packed else request.body)


# --- what is posted


def test_a_sample_for_tinomail_monitor() -> None:
    request = agent.MONITOR.sample(agent.pack(GOOD), "mta-01", KEY)
    assert request.path == "/api/v1/metrics/system"
    assert request.headers == {"x-api-key": KEY, "Content-Type": "application/json"}
    assert json.loads(request.body) == {
        "nodeId": "mta-01", "nodeRole": "zonemta-outbound", "timestamp": STAMP,
        "cpuPercent": 12.5, "ramPercent": 40.1, "diskPercent": 100, "load1m": 0.5, "load5m": 1,
        "load15m": 1.5, "ramUsedBytes": 4 * 2**30, "diskFreeBytes": 0, "diskReadBytesSec": 1,
        "diskWriteBytesSec": 2, "netRxBytesSec": 3, "netTxBytesSec": 4, "netRxErrors": 5,
        "netTxErrors": 6, "tcpEstablished": 7, "tcpTimeWait": 8, "openFiles": 10,
        "processes": [
            {"name": "zone-mta", "running": True, "pid": 7, "memoryMB": 81.5, "cpuPercent": 130.2},
            {"name": "redis-server", "running": False, "pid": 7, "memoryMB": 81.5,
             "cpuPercent": 130.2},
            {"name": "mongod", "running": False, "memoryMB": 0, "cpuPercent": 0},
        ],
    }


def test_a_registration_at_tinomail_monitor() -> None:
    node = agent.Node("mta-01", "host", "fe80::1%eth0", "haraka", ("haraka", "postfix", "redis"))
    request = agent.MONITOR.register(node, KEY)
    assert (request.path, request.headers["x-api-key"]) == ("/api/v1/nodes", KEY)
    assert "Content-Encoding" not in request.headers
    body = json.loads(request.body)
    metadata = body.pop("metadata")
    assert body == {
        "nodeId": "mta-01", "hostname": "host", "ipAddress": "fe80::1", "role": "haraka",
    }
    assert metadata["agentVersion"] == agent.VERSION
    assert metadata["detectedServices"] == ["haraka", "redis"]
    assert metadata["platform"] == "linux" and metadata["arch"] == os.uname().machine
    assert MONITOR_NODE({**body, "metadata": metadata}) == ""


def test_a_system_without_os_release(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(platform, "freedesktop_os_release", fail)
    body = json.loads(agent.MONITOR.register(agent.Node("a", "h", "::1", "redis"), KEY).body)
    assert set(body["metadata"]) == {"agentVersion", "platform", "arch", "detectedServices"}


def test_what_a_node_registers_with_comes_from_the_sample() -> None:
    sample = agent.Sample(1, "haraka", agent.pack(GOOD))
    node = agent.node_of("mta-01", sample, "10.0.0.1")
    assert node == agent.Node(
        "mta-01", os.uname().nodename, "10.0.0.1", "haraka", ("zonemta", "redis", "postfix")
    )


def test_a_dialect_for_each_choice_of_the_setting() -> None:
    assert tuple(agent.DIALECTS) == APIS
    for api in APIS:
        assert make_config(dashboard_api=api).dashboard_api == api


def test_v1_holds_all_that_the_stand_in_knows() -> None:
    """Whoever adds a figure to the sample adds a row to V1's tables, or it is never posted."""
    assert set(agent.V1_SYSTEM) == set(SYSTEM)
    assert set(agent.V1_AGENT) == set(AGENT)
    assert {theirs for theirs, _ in agent.MONITOR_SYSTEM.values()} == set(MONITOR_SYSTEM)


@pytest.mark.parametrize("api", APIS)
def test_nothing_of_a_real_sample_is_left_out(api: str) -> None:
    collector = agent.Collector(make_config(), clock=FakeClock().monotonic)
    collector.prime()
    neutral = agent.unpack(collector.collect().packed)
    body = rendered(api, neutral)
    assert CHECKS[api](body) == ""
    if api == "v1":
        del neutral["role"]
        assert body == {"node_id": "mta-01", **neutral}
    else:
        held = [name for name in neutral["system"] if name in agent.MONITOR_SYSTEM]
        assert all(agent.MONITOR_SYSTEM[name][0] in body for name in held)
        assert len(body["processes"]) == len(agent.SERVICES)


@pytest.mark.parametrize("api", APIS)
def test_the_same_bytes_each_time(api: str) -> None:
    one, two = (agent.DIALECTS[api].sample(agent.pack(GOOD), "mta-01", KEY) for _ in range(2))
    assert one == two
    assert agent.DIALECTS[api].sample(agent.pack(GOOD), "mta-02", KEY).body != one.body


# --- what is left out


NOWHERE: list[Any] = [math.nan, math.inf, -math.inf, None, "7", True, [], {}, -1]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("value", NOWHERE, ids=repr)
@pytest.mark.parametrize("name", GOOD["system"])
def test_a_value_that_no_dialect_holds(name: str, value: Any, api: str) -> None:
    if name == "disks" and value == []:
        return  # no disk, in v1; the other one has no such field
    body = rendered(api, {**GOOD, "system": {**GOOD["system"], name: value}})
    whole = rendered(api, GOOD)
    if api == "v1":
        assert body.pop("system") == {k: v for k, v in GOOD["system"].items() if k != name}
        assert whole.pop("system") == GOOD["system"]
        assert body == whole
    else:
        theirs = {agent.MONITOR_SYSTEM[name][0]} if name in agent.MONITOR_SYSTEM else set()
        theirs |= {"load1m", "load5m", "load15m"} if name == "load_avg" else set()
        assert body == {k: v for k, v in whole.items() if k not in theirs}


@pytest.mark.parametrize(
    ("name", "value", "holders"),
    [
        ("tcp_established", INT4, APIS), ("tcp_established", INT4 + 1, ("v1",)),
        ("tcp_time_wait", INT4 + 1, ("v1",)), ("open_files", INT4 + 1, ("v1",)),
        ("cpu_percent", 100.04, ()), ("disk_used_percent", 100.0, APIS), ("cpu_percent", -0.1, ()),
        ("ram_used_bytes", 2**53 - 1, APIS), ("ram_used_bytes", 2**53, ()),
        ("net_rx_errors", 2**64, ()), ("ram_used_bytes", 1.5, ()), ("load_avg", [1, 2], ()),
        ("load_avg", [1, math.nan, 2], ()), ("load_avg", [0, 0.0, 1e3], APIS),
    ],
)
def test_bounds(name: str, value: Any, holders: tuple[str, ...]) -> None:
    for api in APIS:
        body = rendered(api, {**GOOD, "system": {name: value}})
        assert CHECKS[api](body) == ""
        if api == "v1":
            found = name in body["system"]
        else:
            found = ("load1m" if name == "load_avg" else agent.MONITOR_SYSTEM[name][0]) in body
        assert found is (api in holders), api


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "bad",
    [None, [], {"status": "running"}, {**row(), "memory_mb": math.nan}, {**row(), "pid": None},
     {**row(), "pid": 0}, {**row(), "pid": 2**40}, {**row(), "status": "asleep"},
     {**row(), "cpu_percent": -1}, {**row(), "more": 1}, row("not_found")],
    ids=repr,
)
def test_a_process_that_does_not_fit_takes_none_along(bad: Any, api: str) -> None:
    body = rendered(api, {**GOOD, "processes": {"haraka": bad, "redis": row()}})
    assert CHECKS[api](body) == ""
    names = body["processes"] if api == "v1" else [p["name"] for p in body["processes"]]
    assert list(names) == ["redis" if api == "v1" else "redis-server"]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("processes", [None, {}, [], {"redis": None}], ids=repr)
def test_without_processes_the_rest_is_posted(processes: Any, api: str) -> None:
    body = rendered(api, {**GOOD, "processes": processes})
    assert "processes" not in body
    assert CHECKS[api](body) == ""


@pytest.mark.parametrize("role", [None, "", "mailer", [], {}, 7, "x" * 60], ids=repr)
def test_a_role_that_is_none(role: Any) -> None:
    assert rendered(MONITOR, {**GOOD, "role": role})["nodeRole"] == "unknown"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["status", "pid", "memory_mb", "core", "mount", "redis", "port_25", "x"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.sampled_from([*GOOD["system"], "colour"]), JSON),
    st.dictionaries(st.sampled_from(["processes", "services", "agent", "role", "x"]), JSON),
)
def test_whatever_a_sample_holds_the_dashboard_takes_what_is_posted(
    system: dict[str, Any], rest: dict[str, Any]
) -> None:
    for api in APIS:
        body = rendered(api, {"timestamp": STAMP, "system": {**GOOD["system"], **system}, **rest})
        assert CHECKS[api](body) == ""


@pytest.mark.parametrize("neutral", [None, [], 7, {}, {"system": []}, {"timestamp": None}])
@pytest.mark.parametrize("api", APIS)
def test_what_is_no_sample_breaks_nothing(neutral: Any, api: str) -> None:
    assert "timestamp" not in rendered(api, neutral)


# --- what answers mean


@pytest.mark.parametrize(
    ("api", "answer", "says"),
    [
        ("v1", Answer(401, body=b'{"message":"Missing x-api-key header"}'),
         f"DASHBOARD_API={MONITOR}"),
        ("v1", Answer(400, body=b'{"code":"FST_ERR_CTP_INVALID_CONTENT_LENGTH"}'),
         f"DASHBOARD_API={MONITOR}"),
        ("v1", Answer(415, body=b'{"code":"FST_ERR_CTP_INVALID_MEDIA_TYPE"}'),
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


def run_check(server: Dashboard, api: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tinomail_agent.py"), "--check", "--env-file", os.devnull],
        env={"PATH": os.environ["PATH"], "DASHBOARD_URL": server.url, "API_KEY": KEY,
             "NODE_ID": "mta-01", "CHECK_PORTS": "1", "DASHBOARD_API": api},
        capture_output=True, text=True, timeout=30, check=False,
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
    else:
        assert done.returncode == 1, done
        assert last.startswith("dashboard: FAILED: answered 401 (Server: ")
        assert last.endswith(f"set DASHBOARD_API={theirs}")


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


# --- the stand-in is as strict, and as mute, as the real one

SAMPLE_OF = {"nodeId": "mta-01", "nodeRole": "redis", "timestamp": STAMP, "openFiles": 1}
NODE_OF = {"nodeId": "mta-01", "hostname": "h", "ipAddress": "10.0.0.1", "role": "redis",
           "metadata": {"agentVersion": agent.VERSION}}
NODES, METRICS = "/api/v1/nodes", "/api/v1/metrics/system"


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


def test_what_the_stand_in_takes(monitor: Dashboard) -> None:
    assert post(monitor, METRICS, SAMPLE_OF) == (201, {"success": True, "data": {"received": True}})
    assert monitor.query("SELECT * FROM nodes") == []  # unknown: taken, without a node
    assert post(monitor, METRICS, SAMPLE_OF)[0] == 201
    assert monitor.stored() == [STAMP, STAMP]  # a duplicate is stored twice
    status, answer = post(monitor, NODES, NODE_OF)
    assert (status, answer["data"]["id"]) == (201, "mta-01")


def test_alive_only_through_processes_and_a_registration_overwrites_them(
    monitor: Dashboard,
) -> None:
    look = "SELECT last_seen, metadata FROM nodes"
    post(monitor, NODES, NODE_OF)
    for without in (SAMPLE_OF, {**SAMPLE_OF, "processes": []}):
        assert post(monitor, METRICS, without)[0] == 201
        assert monitor.query(look)[0][0] is None
    processes = [{"name": "mongod", "running": False}]
    post(monitor, METRICS, {**SAMPLE_OF, "processes": processes})
    [(seen, metadata)] = monitor.query(look)
    assert (seen, json.loads(metadata)["processes"]) == (STAMP, processes)
    post(monitor, NODES, NODE_OF)
    assert "processes" not in json.loads(monitor.query(look)[0][1])


def test_a_blocked_node(monitor: Dashboard) -> None:
    monitor.blocked.add("mta-01")
    status, answer = post(monitor, NODES, NODE_OF)
    assert (status, answer["error"]["code"]) == (403, "BLOCKED")
    assert post(monitor, METRICS, SAMPLE_OF)[0] == 201  # would still be taken
    done = run_check(monitor, MONITOR)
    assert "): the dashboard blocks this node" in done.stdout


@pytest.mark.parametrize(
    ("path", "change", "code"),
    [
        (METRICS, {"openFiles": None}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"openFiles": 1.5}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"openFiles": -1}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"openFiles": INT4 + 1}, "22003"),
        (METRICS, {"tcpEstablished": INT4 + 1}, "22003"),
        (METRICS, {"ramUsedBytes": 2**63}, "22003"),
        (METRICS, {"cpuPercent": 100.04}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"cpuPercent": "7"}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"timestamp": "2026-01-01T00:00:00+00:00"}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"nodeRole": None}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"colour": 1}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"processes": [{"name": "postfix", "running": True}]}, "INTERNAL_SERVER_ERROR"),
        (METRICS, {"processes": [{"name": "mongod", "running": True, "pid": None}]},
         "INTERNAL_SERVER_ERROR"),
        (NODES, {"nodeId": ""}, "INTERNAL_SERVER_ERROR"),
        (NODES, {"nodeId": "x" * 101}, "INTERNAL_SERVER_ERROR"),
        (NODES, {"hostname": "x" * 256}, "INTERNAL_SERVER_ERROR"),
        (NODES, {"ipAddress": "fe80::1%eth0"}, "INTERNAL_SERVER_ERROR"),
        (NODES, {"role": "x" * 51}, "INTERNAL_SERVER_ERROR"),
        (NODES, {"metadata": []}, "INTERNAL_SERVER_ERROR"),
    ],
)
def test_what_the_stand_in_answers_500_without_a_word(
    path: str, change: dict[str, Any], code: str, monitor: Dashboard
) -> None:
    status, answer = post(monitor, path, {**(NODE_OF if path == NODES else SAMPLE_OF), **change})
    assert (status, answer) == (500, {
        "success": False, "error": {"code": code, "message": "Internal server error"}})
    assert len(monitor.complaints) == 1
    assert (monitor.stored(), monitor.query("SELECT * FROM nodes")) == ([], [])


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "holds"),
    [
        (METRICS, SAMPLE_OF, {"x_api_key": ""}, 401, "Missing x-api-key header"),
        (NODES, NODE_OF, {"x_api_key": "", "authorization": f"Bearer {KEY}"}, 401, "Missing x-api"),
        (METRICS, SAMPLE_OF, {"x_api_key": "wrong"}, 401, "UNAUTHORIZED"),
        (METRICS, gzip.compress(b"{}"), {"content_encoding": "gzip"}, 400,
         "FST_ERR_CTP_INVALID_CONTENT_LENGTH"),
        (METRICS, b"{", {}, 400, "malformed"),
        (METRICS + "/", SAMPLE_OF, {}, 404, "NOT_FOUND"),
        (NODES + "/", NODE_OF, {}, 404, "NOT_FOUND"),
        (METRICS, b" " * BODY_LIMIT_BYTES + b"{}", {}, 413, "FST_ERR_CTP_BODY_TOO_LARGE"),
        (METRICS, SAMPLE_OF, {"content_type": "text/plain"}, 415, "FST_ERR_CTP"),
    ],
)
def test_what_the_stand_in_refuses(
    path: str, body: Any, headers: dict[str, str], status: int, holds: str, monitor: Dashboard
) -> None:
    found, answer = post(monitor, path, body, **headers)
    assert (found, holds in json.dumps(answer)) == (status, True), answer
    assert monitor.stored() == []


def test_more_than_1000_posts_a_minute(monitor: Dashboard) -> None:
    assert POSTS_PER_MINUTE == 1000
    monitor.posts_per_minute = 3
    assert [post(monitor, METRICS, SAMPLE_OF)[0] for _ in range(5)] == [201, 201, 201, 429, 429]
    assert len(monitor.stored()) == 3
    limits = monitor.count_post("127.0.0.1")
    assert 0 < int(limits["retry-after"]) <= 60
    assert limits["x-ratelimit-limit"] == "3" and limits["x-ratelimit-remaining"] == "0"
    transport = agent.Transport(monitor.url)
    answer = transport.post(agent.MONITOR.sample(agent.pack(GOOD), "mta-01", KEY), 5.0)
    assert 0 < agent.retry_after_s(answer, 0.0) <= 60
    assert "retry-after" not in monitor.count_post("10.0.0.1")  # an address of its own


def test_a_node_is_one_in_v1() -> None:
    node = agent.Node("mta-01", "host", "10.0.0.1", "haraka", ("haraka",))
    assert NODE(json.loads(agent.V1.register(node, KEY).body)) == ""
    assert re.fullmatch(r"Bearer \S+", agent.V1.headers(KEY)["Authorization"])
