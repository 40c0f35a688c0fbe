"""Ten thousand each of env files, answers and /proc contents: no error but those that are meant.

Each is a real one with something broken. The seed is fixed: a failure comes again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import signal
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT

import tinomail_agent as agent

pytestmark = pytest.mark.long

ROUNDS = 10_000
HANG_S = 300  # for all rounds together: a loop that does not end


class Breaker:
    """Breaks bytes, in the ways that files and answers are broken."""

    def __init__(self, seed: int, corpus: list[bytes], words: list[bytes]) -> None:
        self.chance = random.Random(seed)
        self._corpus = corpus
        self._words = words
        self._ways = (self._cut, self._flip, self._insert, self._repeat, self._swap)

    def next(self) -> bytes:
        data = self.chance.choice(self._corpus)
        for _ in range(self.chance.randrange(5)):
            data = self.chance.choice(self._ways)(data)
        return data

    def _place(self, data: bytes) -> int:
        return self.chance.randrange(len(data) + 1)

    def _cut(self, data: bytes) -> bytes:
        low, high = sorted((self._place(data), self._place(data)))
        return data[:low] + data[high:] if self.chance.random() < 0.5 else data[:low]

    def _flip(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + self.chance.randbytes(1) + data[at + 1 :]

    def _insert(self, data: bytes) -> bytes:
        at = self._place(data)
        new = self.chance.choice([self.chance.randbytes(self.chance.randrange(1, 9)), *self._words])
        return data[:at] + new + data[at:]

    def _repeat(self, data: bytes) -> bytes:
        low, high = sorted((self._place(data), self._place(data)))
        return data[:high] + data[low:high] * self.chance.randrange(1, 20) + data[high:]

    def _swap(self, data: bytes) -> bytes:
        lines = data.split(b"\n")
        self.chance.shuffle(lines)
        return b"\n".join(lines)


@contextlib.contextmanager
def no_hang_no_growth() -> Iterator[Callable[[], None]]:
    """Yield what is to be called half way: from there on, memory stays where it is."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"not done within {HANG_S} s")

    at_half = 0

    def half_way() -> None:
        nonlocal at_half
        at_half = agent.own_rss_bytes()

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG_S)
    try:
        yield half_way
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert at_half
    assert agent.own_rss_bytes() - at_half < 8 * agent.MIB


def test_env_files(tmp_path: Path) -> None:
    secret = b"topSecretOfTheDashboard"
    good = (ROOT / "agent.env.example").read_bytes().replace(b"k3yOfTheDashboard", secret)
    in_force = good.replace(b"\n#", b"\n")
    words = [b"'", b'"', b"\\", b"=", b"#", b"\xef\xbb\xbf", b"\0", b"\r", b"export ", b"${HOME}",
             b"\nAPI_KEY=x y\n", b"\nDASHBOARD_URL=http://u:p@h:70000\n", b"\xff"]
    breaker = Breaker(1, [good, in_force, b"\xef\xbb\xbf" + good, b""], words)
    path = tmp_path / "agent.env"
    outcomes = {"good": 0, "bad": 0}
    with no_hang_no_growth() as half_way:
        for count in range(ROUNDS):
            if count == ROUNDS // 2:
                half_way()
            path.write_bytes(breaker.next())
            try:
                agent.load_config({}, str(path))
                outcomes["good"] += 1
            except agent.SettingsError as error:
                outcomes["bad"] += 1
                assert error.problems
                for problem in error.problems:
                    assert "\n" not in problem and problem.isprintable(), problem
                    assert secret.decode() not in problem
    assert min(outcomes.values()) > 500, outcomes


ANSWERS = [
    b'HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 45\r\n'
    b'Date: Wed, 25 Nov 2026 03:00:00 GMT\r\n\r\n{"success":true,"data":{"node_id":"mta-0001"}}',
    b"HTTP/1.1 429 Too Many\r\nRetry-After: 30\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 429 Too Many\r\nRetry-After: Wed, 25 Nov 2026 03:00:00 GMT\r\n"
    b"Date: Wed, 25 Nov 2026 02:00:00 GMT\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.0 301 Moved\r\nLocation: https://elsewhere.invalid/\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b'{"success":false}'),
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nboom",
    b'HTTP/1.1 422 No\r\nContent-Length: 60\r\n\r\n{"error":"' + KEY.encode() + b'"}' + b" " * 28,
    b"<html><body>hello</body></html>",
]
ANSWER_WORDS = [b"\r\n", b": ", b"Content-Length: 99999999999999999999\r\n", b"\0",
                b"Retry-After: -1", b"Retry-After: 1e400\r\n", b"NaN",
                b"Date: Mon, 99 Foo 99999 99:99:99 +9999\r\n",
                b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"[" * 3000,
                b"HTTP/1.1 ", b"Set-Cookie: a=b\r\n", b"9" * 5000, b"\xf0\x9f\x92\xa9"]


class AnyServer:
    """Gives each request the next of some answers, then closes the connection."""

    def __init__(self, answers: Iterator[bytes]) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError, StopIteration):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(ConnectionError):
                    request = b"-"
                    while request and not request.endswith(b"{}"):  # else the answer may be lost
                        request = connection.recv(65536)
                    connection.sendall(next(self._answers))


def test_answers(caplog: pytest.LogCaptureFixture) -> None:
    """Over a real socket, through all that the agent does with an answer."""
    caplog.set_level("CRITICAL", "urllib3")  # its complaints would be kept, and are not ours
    breaker = Breaker(2, ANSWERS, ANSWER_WORDS)
    server = AnyServer(breaker.next() for _ in range(2 * ROUNDS))
    transport = agent.Transport(server.url)
    request = agent.Request("/api/v1/metrics/system", {"Content-Type": "application/json"}, b"{}")
    fates = dict.fromkeys(agent.Outcome, 0)
    try:
        with no_hang_no_growth() as half_way:
            for count in range(ROUNDS):
                if count == ROUNDS // 2:
                    half_way()
                answer = transport.post(request, 5)
                verdict = agent.judge(answer, KEY)
                fates[verdict.outcome] += 1
                shown = f"{verdict} {agent.printable(answer.body.decode('utf-8', 'replace'), KEY)}"
                assert shown.isprintable() and len(shown) < 1000
                assert KEY not in shown
                assert 0 <= agent.retry_after_s(answer, 1.8e9) <= agent.RETRY_AFTER_LIMIT_S
                date = agent.http_date(answer.date)
                assert date is None or isinstance(date, float)
                confirmed = agent.confirmed_id(answer.body)
                assert confirmed is None or len(confirmed) <= 255
    finally:
        server.close()
        transport.disconnect()
    assert min(fates[outcome] for outcome in (agent.Outcome.DELIVERED, agent.Outcome.RETRY,
                                        agent.Outcome.KEPT, agent.Outcome.REFUSED)) > 50, fates


def proc(name: str) -> bytes:
    return Path("/proc", name).read_bytes()


def text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def find_cgroup(data: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # it was parsed
        agent.cgroup_kib(text(data), "/nowhere", {1})


SAMPLE = {"timestamp": "2026-01-01T00:00:00.000Z", "role": "haraka", "system": {"cpu_percent": 1.5}}
CLUSTER = b"Haraka (master)\0\0\0"
# What is parsed -> how, and real contents of it.
PARSERS: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
    "PID/stat": (agent.parse_stat, [proc("self/stat"), b"7 (a) b) c) S 1 2 3" + b" 4" * 40]),
    "PID/statm": (agent.parse_statm, [proc("self/statm")]),
    "stat": (agent.parse_cpu_ticks, [proc("stat")]),
    "PID/cmdline": (
        lambda data: agent.identify(text(data[:15]), data),
        [proc("self/cmdline"), CLUSTER, b"node\0/opt/wildduck/server.js\0", b"rspamd: main"],
    ),
    "PID/cgroup": (
        lambda data: agent.identify("node", b"node\0x.js\0", text(data)),
        [proc("self/cgroup"), b"0::/system.slice/wildduck@1.service\n"],
    ),
    "memory cgroup": (
        find_cgroup,
        [proc("self/cgroup"), b"0::/system.slice/redis.service\n", b"4:memory:/x\n0::/\n"],
    ),
    "mountinfo": (
        lambda data: agent.MountTable(agent.parse_mountinfo(data)).local_disks(),
        [proc("self/mountinfo")],
    ),
    "diskstats": (agent.parse_diskstats, [proc("diskstats")]),
    "net/sockstat": (agent.parse_sockstat, [proc("net/sockstat") + proc("net/sockstat6")]),
    "a sample on disk": (
        lambda data: agent.read_sample(1, data),
        [agent.pack(SAMPLE), zlib.compress(b'{"timestamp":"2026-01-01T00:00:00.000Z","role":[]}')],
    ),
    "a sample's JSON": (
        lambda data: agent.read_sample(1, zlib.compress(data)), [json.dumps(SAMPLE).encode()],
    ),
}
PROC_WORDS = [b" ", b"\n", b"\t", b"\0", b"(", b")", b":", b"/", b"\\040", b"-", b"Tcp: ", b"TCP: ",
              b"9" * 30, b"-1", b"\xff\xfe", b" - ", b"NaN", b"1e999", b"0::"]


@pytest.mark.parametrize("name", PARSERS)
def test_parsers(name: str) -> None:
    """A reader of /proc may raise what the collector takes for "could not be read"."""
    parse, corpus = PARSERS[name]
    breaker = Breaker(3, corpus, PROC_WORDS)
    passed = 0
    with no_hang_no_growth() as half_way:
        for count in range(ROUNDS):
            if count == ROUNDS // 2:
                half_way()
            with contextlib.suppress(*agent.READ_ERRORS):
                parse(breaker.next())
                passed += 1
    assert passed > ROUNDS / 20
