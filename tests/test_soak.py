"""Twenty thousand samples of a real agent, through outages and recoveries: it does not grow."""

from __future__ import annotations

import hashlib
import os
import re
import socketserver
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, AgentProcess, eventually

import tinomail_agent as agent

pytestmark = pytest.mark.long

SAMPLES = 20_000
BEAT_MS = 5
KEY = b"k3y-of-the-soak"
CYCLE = 800  # requests: well for most of them, then 503, then no answer at all


class Dashboard(socketserver.ThreadingTCPServer):
    """Takes what comes without a look at it."""

    daemon_threads = True
    allow_reuse_address = True
    requests = delivered = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken: set[bytes] = set()  # digests of the samples
        self.twice: list[tuple[int, bytes]] = []  # number of the request, and what came again

    def take(self, head: bytes, sent: bytes) -> None:
        self.delivered += 1
        digest = hashlib.sha256(sent).digest()
        if digest in self.taken or KEY not in head:
            self.twice.append((self.requests, head + sent))
        self.taken.add(digest)


class Handler(socketserver.StreamRequestHandler):
    server: Dashboard

    def read_head(self) -> bytes:
        """Return the lines of a request's head; nothing at the end of the connection."""
        lines = []
        while (line := self.rfile.readline()) not in (b"", b"\r\n"):
            lines.append(line)
        return b"".join(lines)

    def handle(self) -> None:
        while head := self.read_head():
            found = re.search(rb"Content-Length: (\d+)", head)
            assert found
            sent = self.rfile.read(int(found[1]))
            self.server.requests += 1
            place = self.server.requests % CYCLE
            if place > CYCLE - 20:
                return  # it hangs up
            status = b"201 Created" if place < CYCLE - 60 else b"503 No"
            if status.startswith(b"201") and b"/system " in head:
                self.server.take(head, sent)
            body = b'{"id":"mta-01"}'
            self.wfile.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s"
                             % (status, len(body), body))


def facts(pid: int) -> dict[str, int]:
    status = dict(re.findall(r"(\w+):\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
    return {"rss_kib": int(status["VmRSS"]), "threads": int(status["Threads"]),
            "fds": len(os.listdir(f"/proc/{pid}/fd"))}


def test_it_does_not_grow(tmp_path: Path) -> None:
    with Dashboard(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "API_KEY": KEY.decode(),
            "DASHBOARD_URL": f"http://127.0.0.1:{server.server_address[1]}", "NODE_ID": "mta-01",
            "CHECK_PORTS": "1", "STATE_DIRECTORY": str(tmp_path / "state"),
            "ZONEMTA_URL": "off",  # another test's may run on this machine
        }
        command = [str(ROOT / "tests/lives.py"), str(tmp_path / "taken"), str(BEAT_MS)]
        process = AgentProcess(tmp_path / "log", environ, command)
        pid = process.process.pid
        try:
            seen: list[dict[str, int]] = []
            for wanted in [1000, *range(2000, SAMPLES + 1, 1000)]:
                eventually(lambda wanted=wanted: server.delivered >= wanted, 900, step_s=0.1)  # type: ignore[misc]
                seen.append(facts(pid))
            assert process.stop() == 0, process.output
        finally:
            if process.process.poll() is None:
                process.process.kill()
                process.process.wait(10)
        server.shutdown()
    print([one["rss_kib"] for one in seen], [one["fds"] for one in seen])
    growth_kib = max(one["rss_kib"] for one in seen) - seen[0]["rss_kib"]
    assert growth_kib < 1024, seen
    assert len({one["threads"] for one in seen}) == 1  # three, and one for each kind of call
    assert seen[0]["threads"] <= 3 + 5  # workers: processes, disks, /proc, services, the buffer
    # the connection, which may just be between two, or the port that is being checked
    assert max(one["fds"] for one in seen) - min(one["fds"] for one in seen) <= 2, seen
    counters = process.counters()
    assert counters["sampled"] >= SAMPLES
    assert counters["sampled"] == (
        counters["delivered"] + counters["refused"] + counters["dropped"] + counters["waiting"]
    )
    assert server.twice == []
    assert counters["delivered"] == server.delivered
    assert len(process.lines("delivering again after")) >= 10
    assert process.lines("Traceback") == []
    assert agent.BACKOFF_S == (1.0, 2.0, 4.0)  # only the agent's own process is fast
