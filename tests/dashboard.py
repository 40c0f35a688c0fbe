#!/usr/bin/env python3
"""A stand-in dashboard: takes what the agent posts, checks it strictly, keeps it in SQLite.

    python3 tests/dashboard.py --port 8080 --key demo-key        # prints one line per sample
    python3 tests/dashboard.py --api tinomail-monitor            # speaks the other dialect

A person and the tests use the same server. It needs nothing but Python, listens on loopback,
and holds the agent to the wire contract (docs/metrics.md), every field's type and range
included. v1 answers a violation 422 with the reason. tinomail-monitor takes and refuses what
the deployed backend takes and refuses, mostly with a 500 that gives no reason (it is printed
here). A metric that is absent is stored as NULL.

It can be told to misbehave: --misbehave MODE, `Dashboard.fault = MODE`, or while it runs

    curl -X POST http://127.0.0.1:8080/misbehave/MODE           # "off" ends it; MODES lists all
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import gzip
import ipaddress
import json
import math
import re
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# --- the contract, field by field: a check returns what is wrong, or "" ----------------------

Check = Callable[[Any], str]
APIS = ("v1", "tinomail-monitor")
GIVEN_UP_S = 120.0  # a fault that hangs does so for this long at most


def number(low: float, high: float = math.inf) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "is not a number"
        if not math.isfinite(value) or not low <= value <= high:
            return f"is not within {low}..{high}"
        return ""

    return check


def whole(low: int, high: int = 2**63 - 1) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int):
            return "is not an integer"
        return "" if low <= value <= high else f"is not within {low}..{high}"

    return check


def text(pattern: str) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, str) and re.fullmatch(pattern, value)
        return "" if fits else f"is not a string like {pattern}"

    return check


def string(low: int = 0, high: int = 10**6) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, str) and low <= len(value) <= high
        return "" if fits else f"is not a string of {low} to {high} characters"

    return check


def list_of(item: Check, low: int = 0, high: int = 10_000) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, list) or not low <= len(value) <= high:
            return f"is not a list of {low} to {high}"
        return next((f"[{i}] {bad}" for i, v in enumerate(value) if (bad := item(v))), "")

    return check


def record(
    required: dict[str, Check], optional: dict[str, Check] | None = None, *, is_open: bool = False
) -> Check:
    """is_open: names that are not known are dropped, not refused."""
    known = {**required, **(optional or {})}

    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return "is not an object"
        for name in required:
            if name not in value:
                return f".{name} is missing"
        for name, item in value.items():
            if name not in known and not is_open:
                return f".{name} is unknown"
            if name in known and (bad := known[name](item)):
                return f".{name} {bad}"
        return ""

    return check


def mapping(name: str, item: Check) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return "is not an object"
        for key, entry in value.items():
            if not re.fullmatch(name, key):
                return f".{key} is unknown"
            if bad := item(entry):
                return f".{key} {bad}"
        return ""

    return check


def boolean(value: Any) -> str:
    return "" if isinstance(value, bool) else "is not true or false"


def timestamp(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value
    ):
        return "is not ISO 8601 in UTC with milliseconds and Z"
    try:
        datetime.strptime(value, "%Y-%m-%dT%H:%M:%S.%fZ")
    except ValueError:
        return "is no date"
    return ""


UPTIME_MAX_S = 30 * 365 * 86400  # more is a mistake in the unit, or in the base


def process(value: Any) -> str:
    bad = record({
        "status": text("running|stopped|not_found"),
        "pid": lambda v: "" if v is None else whole(1)(v),
        "memory_mb": number(0),
        "cpu_percent": number(0),
    }, {"uptime_seconds": whole(0, UPTIME_MAX_S)})(value)
    if bad:
        return bad
    if (value["status"] == "not_found") != (value["pid"] is None):
        return "has a status that does not go with its pid"
    if value["pid"] is None and "uptime_seconds" in value:
        return "has the uptime of no process"
    return ""


PERCENT = number(0, 100)
COUNT = whole(0)
# One column of metrics_system each.
SYSTEM: dict[str, Check] = {
    "cpu_percent": PERCENT,
    "cpu_cores": list_of(record({"core": COUNT, "percent": PERCENT}), 1),
    "ram_used_percent": PERCENT,
    "ram_used_bytes": COUNT,
    "ram_total_bytes": COUNT,
    "disk_used_percent": PERCENT,
    "disk_free_bytes": COUNT,
    "disk_read_bytes_sec": COUNT,
    "disk_write_bytes_sec": COUNT,
    "net_rx_bytes_sec": COUNT,
    "net_tx_bytes_sec": COUNT,
    "net_rx_errors": COUNT,
    "net_tx_errors": COUNT,
    "load_avg": list_of(number(0), 3, 3),
    "tcp_established": COUNT,
    "tcp_time_wait": COUNT,
    "tcp_close_wait": COUNT,
    "open_files": COUNT,
    "uptime_seconds": COUNT,
    "disks": list_of(record(
        {"mount": text("/.*"), "used_percent": PERCENT, "free_bytes": COUNT},
        {"inodes_used_percent": PERCENT, "read_only": boolean},
    )),
    "cpu_steal_percent": PERCENT,
    "cpu_iowait_percent": PERCENT,
    "swap_used_bytes": COUNT,
    "swap_total_bytes": COUNT,
    "pressure": record({}, {"cpu": PERCENT, "memory": PERCENT, "io": PERCENT}),
    "oom_kills": COUNT,
    "listen_overflows": COUNT,
}
AGENT: dict[str, Check] = {
    "version": text(r"\d+\.\d+\.\d+.*"),
    "rss_bytes": whole(1),
    "cpu_seconds": number(0),
    "collect_ms": number(0),
    "buffered": COUNT,
    "sent_total": COUNT,
    "dropped_total": COUNT,
    "refused_total": COUNT,
    "collect_errors": COUNT,
    "clock_offset_sec": whole(-(2**62)),
}
ZONEMTA: dict[str, Check] = dict.fromkeys(
    ("queued", "deferred", "delivered_total", "bounced_total", "rejected_total", "connections"),
    COUNT,
)
SAMPLE = record(
    {
        "node_id": text(r".{1,255}"),
        "timestamp": timestamp,
        "system": record({}, SYSTEM),
    },
    {
        "processes": mapping(r"[a-z0-9][a-z0-9_.-]*", process),
        "services": mapping(r"port_\d{1,5}", boolean),
        "accept_queue": mapping(r"port_\d{1,5}", COUNT),
        "zonemta": record({}, ZONEMTA),
        "agent": record({}, AGENT),
    },
)
NODE = record({
    "node_id": text(r"\S{1,255}"),
    "hostname": text(r"\S{1,255}"),
    "ip": text(r"[0-9.]{7,15}|[0-9a-f:.]{2,45}"),
    "role": string(1, 50),
    "version": text(r"\d+\.\d+\.\d+.*"),
})

# The other dialect: what is wrong with a value is for our own eyes, it is answered 500.
INT4, INT8 = 2**31 - 1, 2**63 - 1
UNSIGNED = whole(0, 10**30)  # it leaves the rest to its database
SQL_OUT_OF_RANGE = "22003"
# Its name -> (the column of metrics_system, the check, the largest value of its column there).
MONITOR_SYSTEM: dict[str, tuple[str, Check, int]] = {
    "cpuPercent": ("cpu_percent", PERCENT, 100),
    "ramPercent": ("ram_used_percent", PERCENT, 100),
    "ramUsedBytes": ("ram_used_bytes", UNSIGNED, INT8),
    "diskPercent": ("disk_used_percent", PERCENT, 100),
    "diskFreeBytes": ("disk_free_bytes", UNSIGNED, INT8),
    "diskReadBytesSec": ("disk_read_bytes_sec", UNSIGNED, INT8),
    "diskWriteBytesSec": ("disk_write_bytes_sec", UNSIGNED, INT8),
    "netRxBytesSec": ("net_rx_bytes_sec", UNSIGNED, INT8),
    "netTxBytesSec": ("net_tx_bytes_sec", UNSIGNED, INT8),
    "netRxErrors": ("net_rx_errors", UNSIGNED, INT8),
    "netTxErrors": ("net_tx_errors", UNSIGNED, INT8),
    "tcpEstablished": ("tcp_established", UNSIGNED, INT4),
    "tcpTimeWait": ("tcp_time_wait", UNSIGNED, INT4),
    "openFiles": ("open_files", UNSIGNED, INT4),
}
MONITOR_PROCESS = record(
    {
        "name": string(), "running": boolean,
        "pid": lambda value: "" if value is None else whole(-(2**53))(value),
        "cpuPercent": number(0), "memoryMB": number(0),
    },
    is_open=True,
)
UTC = text(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
MONITOR_SAMPLE = record(
    {"nodeId": string(), "nodeRole": string()},
    {
        **{name: check for name, (_, check, _) in MONITOR_SYSTEM.items()},
        **dict.fromkeys(("load1m", "load5m", "load15m"), number(0)),
        "timestamp": UTC, "processes": list_of(MONITOR_PROCESS),
    },
    is_open=True,
)
# Its name -> the largest value of its column in metrics_zonemta.
MONITOR_ZONEMTA: dict[str, int] = {
    **dict.fromkeys(("queueSize", "activeDeliveries", "connectionsActive"), INT4),
    **dict.fromkeys(
        ("sentTotal", "deliveredTotal", "bouncedTotal", "deferredTotal", "rejectedTotal"), INT8
    ),
}
MONITOR_QUEUE = record(
    {"nodeId": string()},
    {
        **dict.fromkeys(MONITOR_ZONEMTA, UNSIGNED), "timestamp": UTC,
        "mtaRole": lambda value: "" if value is None else string()(value),
        "throughputPerSec": number(0),
    },
    is_open=True,
)


def ip_address(value: Any) -> str:
    try:
        ipaddress.ip_address(value if isinstance(value, str) else "")  # fe80::1%eth0 is one
    except ValueError:
        return "is no IP address"
    return ""


MONITOR_NODE = record(
    {
        "nodeId": string(1, 100), "hostname": string(0, 255), "ipAddress": ip_address,
        "role": string(1, 50),
    },
    {"metadata": lambda value: "" if isinstance(value, dict) else "is not an object"},
    is_open=True,
)
BODY_LIMIT_BYTES = 1024 * 1024
POSTS_PER_MINUTE = 1000  # for each address


# --- faults ----------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html><body>Welcome to nginx!</body></html>"
Headers = dict[str, str]


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _later(seconds: int) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


# What is simply answered: mode -> (status, headers, body).
ANSWERS: dict[str, Callable[[], tuple[int, Headers, bytes]]] = {
    "400": lambda: (400, {}, b'{"error":"bad request"}'),
    "401": lambda: (401, {}, b'{"error":"unknown key"}'),
    "403": lambda: (403, {}, b'{"error":"forbidden"}'),
    "404": lambda: (404, {}, b'{"error":"unknown node"}'),
    "409": lambda: (409, {}, b'{"error":"duplicate"}'),
    "422": lambda: (422, {}, b'{"error":"no"}'),
    "429": lambda: (429, {"Retry-After": "3"}, b""),
    "429-date": lambda: (429, {"Retry-After": _later(3)}, b""),
    "429-long": lambda: (429, {"Retry-After": "30"}, b""),
    "500": lambda: (500, {}, b'{"error":"internal"}'),
    "503": lambda: (503, {}, b""),
    "html": lambda: (200, {"Content-Type": "text/html"}, HTML),
    "redirect": lambda: (301, {"Location": "https://elsewhere.invalid/login"}, b""),
    "unsuccessful": lambda: (200, {}, b'{"success": false, "error": "not now"}'),
}


def _hang(handler: Handler) -> None:
    handler.server.release.wait(GIVEN_UP_S)


def _drip(data: bytes, handler: Handler, step: int = 1) -> None:
    for i in range(0, len(data), step):
        if handler.server.release.wait(1.0 if i else 0):
            return
        handler.wfile.write(data[i : i + step])


def _drip_body(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    _drip(b" " * 500, handler)


def _drip_headers(handler: Handler) -> None:
    _drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 500, handler)


def _reset(handler: Handler) -> None:
    """Abort the connection in the middle of the answer: RST instead of FIN."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    handler.connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )


def _half(handler: Handler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{"success"')


def _huge(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n")
    for _ in range(1600):
        handler.wfile.write(b"x" * 65536)


# What needs the raw connection, which is closed afterwards.
RAW: dict[str, Callable[[Handler], None]] = {
    "hang": _hang,
    "drip": _drip_body,
    "drip-headers": _drip_headers,
    "reset": _reset,
    "half": _half,
    "huge": _huge,
}
MODES = ("off", "refuse", "poison", *ANSWERS, *RAW)


# --- the server ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Post:
    """One request as it came in, for the tests to look at."""

    at: float  # time.monotonic()
    path: str
    headers: dict[str, str]
    raw: bytes
    body: Any
    status: int  # 0: no answer was given


def refusal(code: str, message: str) -> dict[str, Any]:
    return {"success": False, "error": {"code": code, "message": message}}


NODES, METRICS = "/api/v1/nodes", "/api/v1/metrics/"
TOO_MANY = refusal("RATE_LIMIT_EXCEEDED", "Too many requests, please try again later")


class Handler(BaseHTTPRequestHandler):
    server: Dashboard
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = GIVEN_UP_S

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        raw = self.rfile.read(length)
        if self.path.startswith("/misbehave/"):
            mode = self.path.rpartition("/")[2]
            self.answer(200 if mode in MODES else 404, {"modes": MODES})
            if mode in MODES:
                self.server.fault = mode
            return
        body, problem = self.server.decode(self.headers, raw)
        limits = self.server.count_post(self.client_address[0], self.path, self.headers)
        mode = self.server.fault_for(self.path)
        if mode in RAW:
            self.note(raw, body, 0)
            self.close_connection = True
            with contextlib.suppress(OSError):
                RAW[mode](self)
            return
        if mode == "poison":
            poisoned = isinstance(body, dict) and body.get("timestamp") == self.server.poison
            mode = "500" if poisoned else "off"
        if mode in ANSWERS:
            status, headers, content = ANSWERS[mode]()
        elif "retry-after" in limits:
            status, headers, content = 429, limits, json.dumps(TOO_MANY).encode()
        else:
            status, reply = self.server.take(self.path, self.headers, body, problem)
            headers, content = {}, json.dumps(reply).encode()
        headers = {**headers, **{k: v for k, v in limits.items() if k != "retry-after"}}
        self.note(raw, body, status)
        self.answer(status, content, headers)

    def note(self, raw: bytes, body: Any, status: int) -> None:
        post = Post(time.monotonic(), self.path, dict(self.headers), raw, body, status)
        self.server.posts.append(post)

    def answer(self, status: int, content: Any, headers: Headers | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.release.wait(self.server.pause_s)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(
            (time.time() if timestamp is None else timestamp) + self.server.clock_ahead_s
        )

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Dashboard(ThreadingHTTPServer):
    """The server. `fault` makes it misbehave; `posts` is all that it was sent."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    handler_class: type[Handler] = Handler

    def __init__(
        self,
        key: str = "demo-key",
        port: int = 0,
        *,
        db: str = ":memory:",
        tls: tuple[str, str] | None = None,
        host: str = "127.0.0.1",
        echo: bool = False,
        keep_alive: bool = True,
        api: str = "v1",
    ) -> None:
        self.key = key
        self.api = api
        # What tinomail-monitor takes; a slash at the end of the first is as good as none.
        self._takers = {
            NODES: self._take_monitor_node, f"{NODES}/": self._take_monitor_node,
            f"{METRICS}system": self._take_monitor_sample,
            f"{METRICS}zonemta": self._take_monitor_queue,
        }
        self.blocked: set[str] = set()  # node ids, in tinomail-monitor
        self.complaints: list[str] = []  # why it answered 500
        self.posts_per_minute = POSTS_PER_MINUTE
        self._windows: dict[str, tuple[float, int]] = {}  # address -> (its start, posts in it)
        self.echo = echo
        self.keep_alive = keep_alive
        self.tls: ssl.SSLContext | None = None
        if tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(*tls)
        self.posts: list[Post] = []
        self.connections = 0
        self.fault_scope = ""  # "": everything; else the end of the path that it is for
        self.poison = ""  # the timestamp that mode `poison` answers 500 for ever
        self.clock_ahead_s = 0.0
        self.pause_s = 0.0  # it stores at once, and answers so much later
        self.release = threading.Event()  # ends what hangs
        self._fault = "off"
        self._live: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._db = sqlite3.connect(db, check_same_thread=False)
        columns = ", ".join(SYSTEM)
        self._db.executescript(
            "CREATE TABLE IF NOT EXISTS nodes (node_id TEXT PRIMARY KEY, hostname TEXT, ip TEXT,"
            " role TEXT, version TEXT, registrations INTEGER, metadata TEXT, last_seen TEXT);"
            f"CREATE TABLE IF NOT EXISTS metrics_system (node_id TEXT, timestamp TEXT, {columns},"
            " processes, services, accept_queue, zonemta, agent, role TEXT"
            + (", PRIMARY KEY (node_id, timestamp));" if api == "v1" else ");")
            + "CREATE TABLE IF NOT EXISTS metrics_zonemta (node_id TEXT, timestamp TEXT,"
            f" {', '.join(MONITOR_ZONEMTA)});"
        )
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self._address = self.server_address
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_address[1]}"

    # - life

    def __enter__(self) -> Dashboard:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.shutdown()
        self.drop_connections()
        self.server_close()
        with self._lock:
            self._db.close()

    @property
    def fault(self) -> str:
        return self._fault

    @fault.setter
    def fault(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"no such mode: {mode}")
        was, self._fault = self._fault, mode
        if mode == "refuse" and was != "refuse":
            self.socket.shutdown(socket.SHUT_RDWR)  # even if accept() is under way
            self.socket.close()
            self.drop_connections()
        elif was == "refuse" and mode != "refuse":
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self._address)
            self.server_activate()

    def fileno(self) -> int:
        return self.socket.fileno()

    def serve_forever(self, poll_interval: float = 0.05) -> None:
        """Accept until shutdown(); the listening socket may be closed and come back."""
        self._ended = threading.Event()
        self._stopping = False
        while not self._stopping:
            listener = self.socket
            try:
                listener.settimeout(poll_interval)
                connection, address = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed: mode `refuse`
                time.sleep(poll_interval)
                continue
            connection.settimeout(None)
            self.process_request(connection, address)
        self._ended.set()

    def shutdown(self) -> None:
        self._stopping = True
        self._ended.wait(5)

    def drop_connections(self) -> None:
        with self._lock:
            live = list(self._live)
        for connection in live:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self.connections += 1
            self._live.add(request)
        wrapped = request
        try:
            if self.tls:
                request.settimeout(10)
                wrapped = self.tls.wrap_socket(request, server_side=True)
                with self._lock:  # the plain one is empty now
                    self._live = self._live - {request} | {wrapped}
            self.handler_class(wrapped, client_address, self)
        except OSError:
            pass  # the client hung up, or refused our certificate
        finally:
            with self._lock:
                self._live -= {request, wrapped}
            with contextlib.suppress(OSError):
                wrapped.close()

    def fault_for(self, path: str) -> str:
        return self._fault if path.endswith(self.fault_scope) else "off"

    # - taking what comes

    def decode(self, headers: Any, raw: bytes) -> tuple[Any, str]:
        """Return (the JSON value, what is wrong with it)."""

        def no_constant(name: str) -> Any:
            raise ValueError(f"{name} is no JSON")

        def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if self.api == "v1" and len(dict(pairs)) != len(pairs):
                raise ValueError("a name stands twice")
            return dict(pairs)

        try:
            data = gzip.decompress(raw) if headers.get("Content-Encoding") == "gzip" else raw
            value = json.loads(data, parse_constant=no_constant, object_pairs_hook=no_twins)
        except (OSError, EOFError, ValueError) as error:
            return None, str(error)
        return value, ""

    def count_post(self, address: str, path: str, headers: Any) -> Headers:
        """Count a post; return the headers that tell of the limit, retry-after if it is over.

        The limit is that of all metrics together. What has no valid key is not counted.
        """
        if self.api == "v1" or path not in self._takers or not path.startswith(METRICS):
            return {}
        if headers.get("x-api-key") != self.key:
            return {}
        now = time.monotonic()
        with self._lock:
            start, count = self._windows.get(address, (now, 0))
            if now - start >= 60:
                start, count = now, 0
            self._windows[address] = start, count + 1
        left_s = str(math.ceil(start + 60 - now))
        over = {"retry-after": left_s} if count >= self.posts_per_minute else {}
        left = max(0, self.posts_per_minute - count - 1)
        return {**over, "x-ratelimit-limit": str(self.posts_per_minute),
                "x-ratelimit-remaining": str(left), "x-ratelimit-reset": left_s}

    def take(self, path: str, headers: Any, body: Any, problem: str) -> tuple[int, Any]:
        """Return the (status, answer) of an honest dashboard."""
        if self.api != "v1":
            return self._take_as_monitor(path, headers, body, problem)
        if headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"success": False, "error": "unknown key"}
        if headers.get("Content-Type") != "application/json":
            return 415, {"success": False, "error": "Content-Type is not application/json"}
        if not re.fullmatch(r"tinomail-agent/\d+\.\d+\.\d+.*", headers.get("User-Agent", "")):
            return 422, {"success": False, "error": "User-Agent"}
        if problem:
            return 422, {"success": False, "error": problem}
        if path == "/api/v1/nodes":
            return self._take_node(body)
        if path == "/api/v1/metrics/system":
            if headers.get("Content-Encoding") != "gzip":
                return 415, {"success": False, "error": "Content-Encoding is not gzip"}
            return self._take_sample(body)
        return 404, {"success": False, "error": "no such address"}

    # - the dialect tinomail-monitor, as measured on the running backend

    def _take_as_monitor(
        self, path: str, headers: Any, body: Any, problem: str
    ) -> tuple[int, Any]:
        if path not in self._takers:
            return 404, {"message": f"Route POST:{path} not found", "error": "Not Found",
                         "statusCode": 404}
        if "x-api-key" not in headers:
            return 401, refusal("UNAUTHORIZED", "Missing x-api-key header")
        if headers["x-api-key"] != self.key:
            return 401, refusal("UNAUTHORIZED", "Invalid API key")
        if status_and_answer := self._unreadable(headers, problem):
            return status_and_answer
        code, complaint = self._takers[path](body)
        if complaint:
            self.complaints.append(complaint)
            self._say(f"REFUSED: {complaint}")
        if code == "BLOCKED":
            return 403, refusal(code, f"Node {body['nodeId']} is blocked")
        if code:
            return 500, refusal(code, "Internal server error")
        if path.startswith(NODES):
            return 201, {"success": True, "data": {"id": body["nodeId"], "status": "active"}}
        return 201, {"success": True, "data": {"received": True}}

    @staticmethod
    def _unreadable(headers: Any, problem: str) -> tuple[int, Any] | None:
        """Return what the real one's HTTP layer answers to a body that it cannot read."""
        kind = headers.get("Content-Type")
        if kind == "text/plain":  # a string to it, and none of its schemas
            return 500, refusal("INTERNAL_SERVER_ERROR", "Internal server error")
        if kind != "application/json":
            return 415, refusal("FST_ERR_CTP_INVALID_MEDIA_TYPE", f"Unsupported Media Type: {kind}")
        if int(headers.get("Content-Length", "0")) > BODY_LIMIT_BYTES:
            return 413, refusal("FST_ERR_CTP_BODY_TOO_LARGE", "Request body is too large")
        if headers.get("Content-Length") == "0":
            return 400, refusal("FST_ERR_CTP_EMPTY_JSON_BODY", "Body cannot be empty when ..")
        if "Content-Encoding" in headers:
            return 400, refusal("FST_ERR_CTP_INVALID_CONTENT_LENGTH",
                                "Request body size did not match Content-Length")
        if "is no JSON" in problem:  # its error handler looks for the word "token"
            return 401, refusal("UNAUTHORIZED", "Unexpected token 'N', .. is not valid JSON")
        if problem:
            return 400, refusal("INTERNAL_SERVER_ERROR", "Expected property name or '}' in JSON")
        return None

    def _take_monitor_node(self, node: Any) -> tuple[str, str]:
        """Return (the code of an error, what is wrong); both are "" for what it takes."""
        if bad := MONITOR_NODE(node):
            return "INTERNAL_SERVER_ERROR", f"node{bad}"
        if node["nodeId"] in self.blocked:
            return "BLOCKED", ""
        metadata = node.get("metadata", {})
        with self._lock, self._db:
            self._db.execute(
                "INSERT INTO nodes VALUES (:nodeId, :hostname, :ipAddress, :role, :version, 1,"
                " :metadata, :seen) ON CONFLICT (node_id) DO UPDATE SET hostname = :hostname,"
                " ip = :ipAddress, role = :role, version = :version, metadata = :metadata,"
                " last_seen = :seen, registrations = registrations + 1",
                {**node, "version": metadata.get("agentVersion"), "seen": utc_now(),
                 "metadata": json.dumps(metadata)},
            )
        self._say(f"registered {node['nodeId']} ({node['role']}, {node['ipAddress']})")
        return "", ""

    def _take_monitor_sample(self, sample: Any) -> tuple[str, str]:
        if bad := MONITOR_SAMPLE(sample):
            return "INTERNAL_SERVER_ERROR", f"sample{bad}"
        stamp = sample.get("timestamp", utc_now())
        row = {"node_id": sample["nodeId"], "timestamp": stamp, "role": sample["nodeRole"]}
        for name, (column, _, largest) in MONITOR_SYSTEM.items():
            if sample.get(name, 0) > largest:
                return SQL_OUT_OF_RANGE, f"sample.{name} is out of range for its column"
            row[column] = sample.get(name)
        row["load_avg"] = json.dumps([sample.get(f"load{m}m") for m in (1, 5, 15)])
        processes = sample.get("processes")
        row["processes"] = json.dumps(processes) if processes else None
        names = ", ".join(row)
        places = ", ".join(f":{name}" for name in row)
        with self._lock, self._db:
            self._db.execute(f"INSERT INTO metrics_system ({names}) VALUES ({places})", row)
            if processes:  # or else the node does not count as alive
                self._db.execute(
                    "UPDATE nodes SET last_seen = ?, metadata = json_patch(metadata, ?)"
                    " WHERE node_id = ?",
                    (utc_now(), json.dumps({"processes": processes}), sample["nodeId"]),
                )
        running = [process["name"] for process in processes or () if process["running"]]
        self._say(
            f"{sample['nodeId']} {stamp} cpu {sample.get('cpuPercent')} % "
            f"ram {sample.get('ramPercent')} % disk {sample.get('diskPercent')} % "
            f"net {sample.get('netRxBytesSec')}/{sample.get('netTxBytesSec')} B/s "
            f"tcp {sample.get('tcpEstablished')} running: {', '.join(running) or '-'}"
        )
        return "", ""

    def _take_monitor_queue(self, queue: Any) -> tuple[str, str]:
        if bad := MONITOR_QUEUE(queue):
            return "INTERNAL_SERVER_ERROR", f"zonemta{bad}"
        for name, largest in MONITOR_ZONEMTA.items():
            if queue.get(name, 0) > largest:
                return SQL_OUT_OF_RANGE, f"zonemta.{name} is out of range for its column"
        values = [queue.get(name) for name in MONITOR_ZONEMTA]
        places = ", ".join("?" * (2 + len(values)))
        with self._lock, self._db:
            self._db.execute(f"INSERT INTO metrics_zonemta VALUES ({places})",
                             [queue["nodeId"], queue.get("timestamp", utc_now()), *values])
        self._say(f"{queue['nodeId']} queue {queue.get('queueSize')}")
        return "", ""

    # - the dialect v1

    def _take_node(self, node: Any) -> tuple[int, Any]:
        if bad := NODE(node):
            return 422, {"success": False, "error": f"node{bad}"}
        with self._lock, self._db:
            self._db.execute(
                "INSERT INTO nodes VALUES (:node_id, :hostname, :ip, :role, :version, 1, '', NULL)"
                " ON CONFLICT (node_id) DO UPDATE SET hostname = :hostname, ip = :ip,"
                " role = :role, version = :version, registrations = registrations + 1",
                node,
            )
        self._say(f"registered {node['node_id']} ({node['role']}, {node['ip']})")
        return 201, {"success": True, "data": {"node_id": node["node_id"]}}

    def _take_sample(self, sample: Any) -> tuple[int, Any]:
        if bad := SAMPLE(sample):
            self._say(f"REFUSED: sample{bad}")
            return 422, {"success": False, "error": f"sample{bad}"}
        if not self.query("SELECT 1 FROM nodes WHERE node_id = ?", sample["node_id"]):
            return 404, {"success": False, "error": "unknown node"}
        row: dict[str, Any] = {"node_id": sample["node_id"], "timestamp": sample["timestamp"]}
        row["role"] = ""  # the other dialect's samples have one
        row |= {name: sample["system"].get(name) for name in SYSTEM}
        parts = ("processes", "services", "accept_queue", "zonemta", "agent")
        row |= {name: sample.get(name) for name in parts}
        values = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()}
        names = ", ".join(values)
        places = ", ".join(f":{name}" for name in values)
        try:
            with self._lock, self._db:
                self._db.execute(f"INSERT INTO metrics_system ({names}) VALUES ({places})", values)
        except sqlite3.IntegrityError:
            return 409, {"success": False, "error": "duplicate"}
        self._say_sample(sample)
        return 201, {"success": True, "data": {"received": True}}

    def _say_sample(self, sample: Any) -> None:
        system = sample["system"]
        up = [name[5:] for name, is_up in sample.get("services", {}).items() if is_up]
        found = [n for n, p in sample.get("processes", {}).items() if p["status"] == "running"]
        self._say(
            f"{sample['node_id']} {sample['timestamp']} cpu {system.get('cpu_percent')} % "
            f"ram {system.get('ram_used_percent')} % disk {system.get('disk_used_percent')} % "
            f"net {system.get('net_rx_bytes_sec')}/{system.get('net_tx_bytes_sec')} B/s "
            f"tcp {system.get('tcp_established')} running: {', '.join(found) or '-'} "
            f"ports up: {', '.join(up) or '-'}"
        )

    def _say(self, line: str) -> None:
        if self.echo:
            print(line, flush=True)

    # - looking at what came

    def query(self, sql: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def forget_nodes(self) -> None:
        with self._lock, self._db:
            self._db.execute("DELETE FROM nodes")

    def stored(self) -> list[str]:
        """Return the timestamps of the stored samples, in the order of their arrival."""
        return [row[0] for row in self.query("SELECT timestamp FROM metrics_system ORDER BY rowid")]


def main() -> int:
    parser = argparse.ArgumentParser(description="A stand-in dashboard for the TinoMail agent.")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--key", default="demo-key")
    parser.add_argument("--api", choices=APIS, default="v1",
                        help="the dialect that it speaks")
    parser.add_argument("--db", default=":memory:", help="SQLite file; default: in memory")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"), help="serve HTTPS")
    parser.add_argument("--misbehave", choices=MODES, default="off")
    options = parser.parse_args()
    try:
        dashboard = Dashboard(
            options.key, options.port, db=options.db, host=options.host, echo=True,
            api=options.api,
            tls=tuple(options.tls) if options.tls else None,
        )
    except OSError as error:
        print(f"port {options.port} cannot be used: {error.strerror}", file=sys.stderr)
        return 1
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with dashboard:
        dashboard.fault = options.misbehave
        print(f"dashboard: listening at {dashboard.url}, speaks {options.api}", flush=True)
        signal.sigwait(signals)
    print("dashboard: stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
