"""Answers that mean harm: a real agent stays small, refuses no sample, and goes on."""

from __future__ import annotations

import contextlib
import py_compile
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, AgentProcess, eventually, running_agents
from dashboard import Dashboard, Handler

pytestmark = pytest.mark.long

LIMIT_S = 240.0
MIB = 1 << 20


def gzip_of(data: bytes, times: int = 1) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(pack.compress(data) for _ in range(times)) + pack.flush()


BOMB = gzip_of(bytes(MIB), 200)
DOUBLE = gzip_of(BOMB)
DEFLATE = zlib.compress(bytes(64 * MIB), 9)


def http(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(start: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + start


# What is sent, and what follows until the agent hangs up.
Attack = tuple[bytes, bytes]
ATTACKS: dict[str, Attack] = {
    "redirect, gzip in gzip": (http(302, DOUBLE, "Location: https://right.example.org/",
                                    "Content-Encoding: gzip, gzip"), b""),
    **{f"gzip bomb under {status}": (http(status, BOMB, "Content-Encoding: gzip"), b"")
       for status in (200, 201, 206, 301, 308, 400, 401, 403, 404, 409, 413, 415, 422, 500, 503)},
    "gzip in gzip": (http(200, DOUBLE, "Content-Encoding: gzip"), b""),
    "deflate bomb": (http(200, DEFLATE, "Content-Encoding: deflate"), b""),
    "unknown encoding": (http(200, BOMB, "Content-Encoding: br, zstd"), b""),
    "no gzip at all": (http(200, b"\x1f\x8bnone", "Content-Encoding: gzip"), b""),
    "endless headers": (b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"a" * 1000 + b"\r\n"),
    "endless header": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"a" * 65536),
    "endless status line": (b"HTTP/1.1 200 ", b"a" * 65536),
    "endless 100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless 103 Early Hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100),
    "header bomb": (http(500, b"", *[f"X-{i}: {'a' * 600}" for i in range(95)]), b""),
    "too many headers": (http(500, b"", *[f"X-{i}: a" for i in range(5000)]), b""),
    "endless body": (b"HTTP/1.1 200 OK\r\n\r\n", bytes(65536)),
    "huge length": (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999\r\n\r\n",
                    bytes(65536)),
    "negative length": (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", bytes(65536)),
    "huge chunk": (chunked(b"f" * 30 + b"\r\n"), bytes(65536)),
    "negative chunk": (chunked(b"-1\r\n"), bytes(65536)),
    "endless chunk size": (chunked(b""), b"0" * 65536),
    "endless chunk extension": (chunked(b"1;"), b"a" * 65536),
    "tiny chunks": (chunked(b""), b"1\r\nx\r\n" * 10000),
    "nested JSON": (http(200, b"[" * 65536), b""),
    "nested objects": (http(422, b'{"error":' * 7000), b""),
    "nested JSON that is whole": (http(200, b"[" * 900 + b"]" * 900), b""),
    "wide JSON": (http(500, b'{"a":[' + b"{}," * 20000 + b"0]}"), b""),
    "long number": (http(200, b'{"statusCode":' + b"9" * 65000 + b"}"), b""),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", b""),
    "nothing": (b"", b""),
    "half": (b'HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{"success"', b""),
}
# A byte at a time: the agent's own deadline ends them.
SLOW: dict[str, Attack] = {
    "dripping body": (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b" "),
    "dripping headers": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
    "dripping 100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless trailers": (chunked(b"1\r\nx\r\n0\r\n"), b"X-Trailer: more\r\n" * 1000),
    "silence": (b"HTTP/1.1 200 OK\r\n", b""),
}


class Hostile(Dashboard):
    """A dashboard that answers samples with each attack in turn, and well in between."""

    def __init__(self, attacks: dict[str, Attack]) -> None:
        super().__init__(KEY)
        self.handler_class = HostileHandler
        self.left = list(attacks.items())
        self.attacks = 0

    def next_attack(self) -> tuple[str, Attack] | None:
        """Return an attack every other time, None for a good answer."""
        self.attacks += 1
        return self.left.pop(0) if self.left and self.attacks % 2 else None


class HostileHandler(Handler):
    server: Hostile

    def do_POST(self) -> None:  # noqa: N802
        attack = self.server.next_attack() if self.path.endswith("/system") else None
        if attack is None:
            return super().do_POST()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.close_connection = True
        name, (start, more) = attack
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):
            self.connection.sendall(start)
            while more:
                self.connection.sendall(more)
                if name.startswith("dripping"):
                    time.sleep(0.1)
            if name == "silence":
                self.connection.recv(1)
        return None


@dataclass
class Run:
    peak_mib: float
    agent: AgentProcess
    stored: list[str]


def attacked(folder: Path, attacks: dict[str, Attack], **options: Any) -> Run:
    server = Hostile(attacks)
    with server, running_agents(folder) as start:
        agent = start(server.url, CHECK_PORTS="1", BUFFER_SIZE="1000", **options)
        eventually(lambda: not server.left or agent.process.poll() is not None, LIMIT_S, "attacked")
        count = len(server.stored())
        eventually(lambda: len(server.stored()) > count + 20, LIMIT_S, "goes on")
        eventually(lambda: server.posts[-1].body["agent"]["buffered"] <= 1, LIMIT_S, "drained")
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+)", status)
        assert peak
        assert agent.stop() == 0
        return Run(int(peak[1]) / 1024, agent, server.stored())


# How it runs -> (options of its start, the attacks, the most MiB that it may take at any time).
# With its real times the slow attacks would take minutes; they are the same for it.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Attack], float]] = {
    "as installed": ({"heartbeat_ms": 100, "deadlines": (1.0, 2.0)}, {**ATTACKS, **SLOW}, 36),
    "as a script": ({}, ATTACKS, 44),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    py_compile.compile(str(ROOT / "tinomail_agent.py"))  # as install.sh does: compiling takes 3 MiB
    with ThreadPoolExecutor(len(WAYS)) as pool:
        yield {
            way: pool.submit(attacked, tmp_path_factory.mktemp("hostile"), attacks, **options)
            for way, (options, attacks, _) in WAYS.items()
        }


@pytest.mark.parametrize("way", WAYS)
def test_it_stays_small_and_goes_on(way: str, runs: dict[str, Future[Run]]) -> None:
    run = runs[way].result(2 * LIMIT_S)
    print(f"{way}: peak {run.peak_mib:.1f} MiB")
    counters = run.agent.counters()
    assert run.peak_mib <= WAYS[way][2]
    assert counters["refused"] == counters["dropped"] == counters["crashes"] == 0, run.agent.output
    assert counters["delivered"] == len(run.stored) == len(set(run.stored))
    assert counters["sampled"] == counters["delivered"] + counters["waiting"]
    assert counters["waiting"] <= 1
    assert "Traceback" not in run.agent.output
    assert run.agent.lines("a redirect: .*https://right.example.org/")
