"""ZoneMTA's own figures: what is read from its HTTP API, and what a bad API costs."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock, eventually, make_config
from test_collector import FakeProc

import tinomail_agent as agent

# In the form of ZoneMTA 3.10: labels only after the first count, the queue after 10 s.
FRESH = """\
# HELP zonemta_delivery_status Delivery status
# TYPE zonemta_delivery_status counter

# HELP zonemta_message_push Messages pushed to queue
# TYPE zonemta_message_push counter

# HELP zonemta_bounce_generation Bounce generation
# TYPE zonemta_bounce_generation counter
zonemta_bounce_generation 0

# HELP zonemta_connection_pool_size Connection Pool Size
# TYPE zonemta_connection_pool_size gauge
zonemta_connection_pool_size 0

# HELP zonemta_queue_size Current size of the queue
# TYPE zonemta_queue_size gauge

# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 2.4352759999999996
"""
BUSY = """\
# TYPE zonemta_delivery_status counter
zonemta_delivery_status{status="delivered",zone="default"} 20
zonemta_delivery_status{status="deferred",zone="default"} 7
zonemta_delivery_status{zone="bounces",status="rejected"} 5
zonemta_delivery_status{status="delivered",zone="odd} \\"zone\\",status=\\"rejected\\""} 300
zonemta_delivery_status{status="rejected",zone="default"} 1
zonemta_message_push{result="success"} 32
zonemta_bounce_generation 5
zonemta_connection_pool_size 4
zonemta_queue_size{type="queued"} 3
zonemta_queue_size{type="deferred"} 7
zonemta_blacklisted 0
"""
FIGURES = {"queued": 3, "deferred": 7, "delivered_total": 320, "bounced_total": 5,
           "rejected_total": 6, "connections": 4}
ZEROS = {"delivered_total": 0, "bounced_total": 0, "rejected_total": 0, "connections": 0}


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        (BUSY, FIGURES),
        (FRESH, ZEROS),  # no queue: it has not been counted yet
        ("", {}),
        ("<html>zonemta_queue_size</html>", {}),
        ("zonemta_queue_size 3\n", {}),
        ('zonemta_queue_size{type="queued"} NaN\n', {}),
        ('zonemta_queue_size{type="queued"} -1\n', {}),
        ('zonemta_queue_size{type="queued"} 12', {"queued": 12}),
        ('zonemta_queue_size{type="queued"} 1.5\n', {}),
        (f'zonemta_queue_size{{type="queued"}} {"9" * 400}\n', {}),
    ],
)
def test_parsing(text: str, figures: dict[str, int]) -> None:
    assert agent.parse_zonemta(text) == figures


class Api(ThreadingHTTPServer):
    """ZoneMTA's API: `answer` writes one; counts connections and requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.connections = 0
        self.finished = 0  # connections that were closed
        self.requests: list[str] = []
        self.answer: Callable[[Any], None] = lambda handler: send(handler, BUSY.encode())
        self.release = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                api.connections += 1

            def finish(self) -> None:
                super().finish()
                api.finished += 1

            def do_GET(self) -> None:
                api.requests.append(self.path)
                api.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


def send(handler: Any, body: bytes, status: int = 200, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def serving() -> Iterator[Api]:
    api = Api()
    threading.Thread(target=api.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield api
    finally:
        api.release.set()
        api.shutdown()
        api.server_close()


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as server:
        yield server


def test_no_connection_stays_open(api: Api) -> None:
    for _ in range(3):
        assert agent.ask_zonemta(api.url) == FIGURES
    assert (api.requests, api.connections) == (["/metrics"] * 3, 3)
    eventually(lambda: api.finished == 3)


def test_a_path_in_front_of_the_api(api: Api) -> None:
    assert agent.ask_zonemta(f"{api.url}/mta") == FIGURES
    assert api.requests == ["/mta/metrics"]


def chunked(handler: Any, end: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    data = BUSY.encode()
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) + end)
    handler.close_connection = True


def cut_off(handler: Any) -> None:
    send(handler, BUSY.encode()[:-300], length=len(BUSY.encode()))
    handler.close_connection = True


def no_http(handler: Any) -> None:
    handler.wfile.write(b"220 mail.example.com ESMTP\r\n")
    handler.close_connection = True


BAD: dict[str, Callable[[Any], None]] = {
    "500": lambda handler: send(handler, BUSY.encode(), 500),
    "503 without a body": lambda handler: send(handler, b"", 503),
    "a web page": lambda handler: send(handler, b"<html>Welcome</html>"),
    "a redirect": lambda handler: send(handler, b"", 302),
    "cut off": cut_off,
    "more than 256 KiB": lambda handler: send(handler, BUSY.encode() + b"#" * 256 * 1024),
    "not HTTP": no_http,
    "chunks that end early": lambda handler: chunked(handler, b""),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_gives_no_figures_and_the_next_good_one_does(kind: str, api: Api) -> None:
    good = api.answer
    for _ in range(2):
        api.answer = BAD[kind]
        with pytest.raises(agent.READ_ERRORS):
            agent.ask_zonemta(api.url)
        api.answer = good
        assert agent.ask_zonemta(api.url) == FIGURES


def test_chunks_are_as_good(api: Api) -> None:
    api.answer = lambda handler: chunked(handler, b"0\r\n\r\n")
    assert agent.ask_zonemta(api.url) == FIGURES


def hang(api: Api) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        api.release.wait(120)

    return answer


def drip(api: Api) -> Callable[[Any], None]:
    """An answer of a byte a second: the time limit of a socket begins anew with each."""

    def answer(handler: Any) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500:
            if api.release.wait(1.0):
                return
            handler.wfile.write(bytes([byte]))

    return answer


# --- in a sample


ZONEMTA_PID = 70


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    """A machine on which ZoneMTA runs."""
    found = FakeProc(tmp_path)
    found.add(ZONEMTA_PID, "zone-mta: maste", b"zone-mta: master process\0\0")
    return found


def collector_for(url: str, proc: FakeProc) -> agent.Collector:
    collector = agent.Collector(
        make_config(zonemta_url=url, node_role="haraka", check_ports="1"),
        proc=str(proc.root), clock=FakeClock().monotonic,
    )
    collector.readers = {}
    return collector


def taken(collector: agent.Collector) -> dict[str, Any]:
    return agent.unpack(collector.collect().packed)


def test_a_sample_has_the_figures_while_zonemta_runs(api: Api, proc: FakeProc) -> None:
    collector = collector_for(api.url, proc)
    assert taken(collector)["zonemta"] == FIGURES
    assert "zonemta" not in taken(collector_for("off", proc))
    proc.remove(ZONEMTA_PID)
    assert "zonemta" not in taken(collector)
    assert len(api.requests) == 1


def test_it_is_not_asked_while_zonemta_does_not_run(api: Api, tmp_path: Path) -> None:
    assert "zonemta" not in taken(collector_for(api.url, FakeProc(tmp_path)))
    assert api.connections == 0


def test_an_api_that_does_not_answer_means_no_figures_and_one_line(
    proc: FakeProc, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    collector = collector_for(f"http://127.0.0.1:{port}", proc)
    samples = [taken(collector) for _ in range(3)]
    assert not any("zonemta" in sample for sample in samples)
    lines = [r.getMessage() for r in caplog.records if "ZoneMTA" in r.getMessage()]
    assert len(lines) == 1
    assert "ZONEMTA_URL" in lines[0] and "Connection refused" in lines[0]
    errors = [sample["agent"]["collect_errors"] for sample in samples]
    assert errors[2] - errors[0] == 2


def test_a_hanging_api_is_a_line_and_a_collect_error_and_delays_a_sample_once(
    api: Api, proc: FakeProc, caplog: pytest.LogCaptureFixture
) -> None:
    api.answer = hang(api)
    collector = collector_for(api.url, proc)
    assert "zonemta" not in taken(collector)
    started = time.monotonic()
    sample = taken(collector)
    assert time.monotonic() - started < 1
    assert sample["agent"]["collect_errors"] >= 2
    lines = [r.getMessage() for r in caplog.records if "ZoneMTA" in r.getMessage()]
    assert lines == ["ZoneMTA's API hangs"]


@pytest.mark.parametrize("is_dripping", [False, True])
def test_an_api_that_hangs_is_logged_once_and_asked_again_when_it_returned(
    is_dripping: bool, api: Api, proc: FakeProc, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tinomail_agent")

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if "ZoneMTA" in r.getMessage()]

    collector, good = collector_for(api.url, proc), api.answer
    api.answer = drip(api) if is_dripping else hang(api)
    started = time.monotonic()
    assert not any("zonemta" in taken(collector) for _ in range(3))
    assert time.monotonic() - started < 3 * agent.HANG_LIMIT_S + 4
    assert said() == ["ZoneMTA's API hangs"]
    api.answer = good
    api.release.set()
    eventually(lambda: taken(collector).get("zonemta") == FIGURES)
    assert said() == ["ZoneMTA's API hangs", "ZoneMTA's API no longer hangs"]
