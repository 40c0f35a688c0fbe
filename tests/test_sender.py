"""Buffer and sender: what each answer leads to, in which order, when, and what the log says.

The clock is made up and so is the network; the rest is the real thing. test_agent.py does the
same with real processes and a real server.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import logging
import math
import random
import tracemalloc
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from conftest import KEY, FakeClock, make_config
from dashboard import APIS
from hypothesis import given, settings
from hypothesis import strategies as st

import tinomail_agent as agent
from tinomail_agent import Answer, Buffer, Sender

BEAT_S = 15.0
OK = Answer(201, body=b'{"success": true}')
REGISTERED = Answer(201, body=b'{"success": true, "data": {"id": "mta-01"}}')
REFUSAL = b'{"error": "validation failed"}'
UNKNOWN = Answer(404, body=b'{"error": "unknown node"}')
NO_ANSWER = Answer(0, "connection refused")


def sample(seq: int, role: str = "haraka", **parts: Any) -> agent.Sample:
    body = {"timestamp": f"t{seq}", "role": role, "system": {}, **parts}
    return agent.Sample(seq, agent.pack(body))


def json_of(request: agent.Request) -> Any:
    packed = request.headers.get("Content-Encoding") == "gzip"
    return json.loads(gzip.decompress(request.body) if packed else request.body)


def stamp_of(request: agent.Request) -> str:
    return str(json_of(request)["timestamp"])


class Site:
    """A node and its dashboard: the sender, its buffer, and a network that obeys."""

    def __init__(self, api: str = "v1", *, jitter: float = 0.5, **settings: Any) -> None:
        self.api = api
        settings["dashboard_api"] = api
        self.clock = FakeClock()
        self.config = make_config("https://monitor.example.com", **settings)
        self.buffer = Buffer(self.config.buffer_size)
        self.answer: Callable[[agent.Request], Answer] = lambda request: OK
        self.registration: Callable[[], Answer] = lambda: REGISTERED
        self.ip = "10.0.0.1"  # of the last connection
        self.route = ""  # to the address that comes next, if that is another one
        self.deadline = 0.0
        self.closed = 0  # connections, after a failure
        self.posts: list[tuple[float, str]] = []  # (when, timestamp) of each sample posted
        self.delivered: list[str] = []
        self.nodes: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.duration_s = 0.0
        self.within_s = math.inf  # what was left for the last post
        self.seq = 0
        self.role = "haraka"
        self.parts: dict[str, Any] = {}  # of the next samples
        self.queues: list[str] = []  # timestamps of what went to metrics/zonemta
        self.queue_answer = OK
        self.sender = Sender(
            self.config, self.buffer, self, clock=self.clock.monotonic,  # type: ignore[arg-type]
            now=self.clock.time, jitter=lambda: jitter,
        )

    # - the network, as Transport has it

    def post(self, request: agent.Request, within_s: float = math.inf) -> Answer:
        self.clock.advance(self.duration_s)
        self.within_s = within_s
        if request.path.endswith("/nodes"):
            self.nodes.append(json_of(request))
            return self.registration()
        body = json_of(request)
        if request.path.endswith("/zonemta"):
            self.queues.append(body["timestamp"])
            return self.queue_answer
        self.posts.append((self.clock.elapsed, body["timestamp"]))
        self.ids.append(body["node_id" if self.api == "v1" else "nodeId"])
        answer = self.answer(request)
        if answer in (OK, REGISTERED):
            self.delivered.append(body["timestamp"])
        return dataclasses.replace(answer, took_s=self.duration_s)

    @property
    def local_ip(self) -> str:
        return self.ip

    def route_ip(self) -> str:
        return self.route or self.ip

    def disconnect(self) -> None:
        self.closed += 1

    # - time

    def beat(self, count: int = 1) -> None:
        """Let heartbeats pass: a new sample at each, and what the sender does until the next."""
        for _ in range(count):
            self.seq += 1
            self.buffer.put(sample(self.seq, self.role, **self.parts))
            self.run(self.clock.elapsed + BEAT_S)

    def run(self, until: float) -> None:
        for _ in range(1000):
            pause = self.sender.step()
            if self.clock.elapsed + pause >= until:
                self.clock.advance(max(0.0, until - self.clock.elapsed))
                return
            self.clock.advance(pause)
        raise AssertionError("the sender spins")

    @property
    def counters(self) -> agent.Counters:
        found = self.buffer.counters()
        assert found.sampled + found.loaded == (
            found.delivered + found.refused + found.dropped + found.waiting
        )
        return found

    def posted(self) -> list[str]:
        return [stamp for _, stamp in self.posts]


def stamps(*seqs: int) -> list[str]:
    return [f"t{seq}" for seq in seqs]


@pytest.fixture
def site(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Site:
    caplog.set_level(logging.INFO)
    return Site(getattr(request, "param", "v1"))


each_dialect = pytest.mark.parametrize("site", APIS, indirect=True)  # those that touch one


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= level]


# --- a healthy dashboard


@each_dialect
def test_healthy(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.beat(20)
    assert site.posted() == site.delivered == stamps(*range(1, 21))
    assert len(site.nodes) == 1
    role, ip = site.nodes[0]["role"], site.nodes[0]["ip" if site.api == "v1" else "ipAddress"]
    assert (role, ip) == ("haraka", "10.0.0.1")
    assert said(caplog) == ["registered as mta-01 (role haraka, address 10.0.0.1)"]
    assert site.counters == agent.Counters(20, 20, 0, 0, 0)


@each_dialect
def test_the_confirmed_id_is_used(site: Site) -> None:
    site.registration = lambda: Answer(201, body=b'{"data": {"id": "uuid-7"}}')
    site.beat(2)
    assert set(site.ids) == {"uuid-7" if site.api == "v1" else "mta-01"}


@each_dialect
def test_a_confirmed_id_may_be_anything(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    key = json.dumps(KEY)[1:-1].encode()
    site.registration = lambda: Answer(201, body=b'{"id": "\\ud800\\n' + key + b'"}')
    site.beat(2)
    assert site.counters.delivered == 2
    shown = "??***" if site.api == "v1" else "mta-01"
    assert said(caplog) == [f"registered as {shown} (role haraka, address 10.0.0.1)"]


# --- outages


def test_down_at_the_start(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.registration = lambda: NO_ANSWER
    site.beat(5)
    assert (site.posts, site.counters.waiting) == ([], 5)
    assert len(site.nodes) == 8  # three retries, then one attempt per heartbeat
    site.registration = lambda: REGISTERED
    site.beat()
    assert site.delivered == stamps(6, 1, 2, 3, 4, 5)  # the newest, then the oldest first
    assert said(caplog) == [
        "cannot deliver samples (keeping up to 100): registration: connection refused",
        "registered as mta-01 (role haraka, address 10.0.0.1)",
        "delivering again after 68 s, 5 waiting",
    ]


def test_at_most_ten_of_the_oldest_per_success(site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(24)
    site.posts.clear()
    site.answer = lambda request: OK
    site.beat(3)
    assert site.posted() == stamps(26, *range(2, 12), 27, *range(12, 22), 28, 22, 23, 24, 25)
    assert site.counters.waiting == 0


def test_a_long_outage_keeps_the_newest(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.beat()
    caplog.clear()
    site.answer = lambda request: NO_ANSWER
    site.beat(130)
    assert site.counters == agent.Counters(131, 1, 0, 30, 100)
    site.answer = lambda request: OK
    site.beat(11)
    assert site.counters == agent.Counters(142, 111, 0, 31, 0)
    assert sorted(site.delivered, key=lambda stamp: int(stamp[1:])) == stamps(
        1, *range(33, 143)
    )
    assert said(caplog) == [
        "cannot deliver samples (keeping up to 100): connection refused",
        "the oldest samples are dropped: more than BUFFER_SIZE=100 wait",
        "delivering again after 1943 s, 99 waiting",
        "no more samples are dropped (31 dropped so far)",
    ]


def test_an_hour_of_outage_writes_four_lines(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.beat(3)
    caplog.clear()
    site.answer = lambda request: NO_ANSWER
    site.beat(240)
    site.answer = lambda request: OK
    site.beat(20)
    assert len(said(caplog)) == 4


def test_retries_and_then_one_attempt_per_heartbeat(site: Site) -> None:
    site.beat()
    site.posts.clear()
    site.answer = lambda request: NO_ANSWER
    start = site.clock.elapsed
    site.beat(3)
    assert [(round(at - start, 1), stamp) for at, stamp in site.posts] == [
        (0.0, "t2"), (1.0, "t2"), (3.0, "t2"), (7.0, "t2"), (15.0, "t3"), (30.0, "t4"),
    ]


@pytest.mark.parametrize(("jitter", "pauses"), [(0.0, [0.75, 1.5, 3.0]), (1.0, [1.25, 2.5, 5.0])])
def test_the_pauses_before_retries_vary(jitter: float, pauses: list[float]) -> None:
    site = Site(jitter=jitter)
    site.answer = lambda request: NO_ANSWER
    site.beat()
    times = [at for at, _ in site.posts]
    assert [later - at for at, later in itertools.pairwise(times)] == pytest.approx(pauses)


def test_once_down_for_any_reason_there_is_one_attempt_per_heartbeat(site: Site) -> None:
    site.beat()
    site.answer = lambda request: Answer(401)
    site.beat()
    site.posts.clear()
    site.answer = lambda request: Answer(503)
    site.beat(3)
    assert site.posted() == stamps(3, 4, 5)


def test_a_short_trouble_is_silent(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.beat()
    caplog.clear()
    answers = iter([NO_ANSWER, Answer(503), OK])
    site.answer = lambda request: next(answers)
    site.beat()
    assert (site.delivered, said(caplog)) == (stamps(1, 2), [])


def test_the_newer_sample_goes_first_while_retries_are_under_way(site: Site) -> None:
    site.beat()
    site.posts.clear()
    site.duration_s = 10.0  # each attempt runs into its deadline
    site.answer = lambda request: NO_ANSWER
    site.seq += 1
    site.buffer.put(sample(site.seq))
    site.run(site.clock.elapsed + 15)
    assert set(site.posted()) == {"t2"}
    site.beat()
    assert site.posted()[-1] == "t3"


def test_a_drain_gives_way_to_a_new_sample(site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(6)
    site.posts.clear()

    def answer(request: agent.Request) -> Answer:
        if len(site.posts) == 3:  # a new one comes while the third is under way
            site.buffer.put(sample(99))
        return OK

    site.answer = answer
    site.beat()
    assert site.posted() == stamps(8, 2, 3, 99, 4, 5, 6, 7)


# --- each answer


@each_dialect
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
def test_answers_that_are_tried_again(status: int, site: Site) -> None:
    site.beat()
    site.answer = lambda request: Answer(status)
    site.beat(2)
    assert site.posted() == stamps(1, 2, 2, 2, 2, 3)
    site.answer = lambda request: OK
    site.beat()
    assert site.delivered == stamps(1, 4, 2, 3)


@each_dialect
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(401), "answered 401: the dashboard does not accept API_KEY"),
        (Answer(403), "answered 403: the dashboard forbids it"),
        (Answer(403, body=b'{"error":{"code":"BLOCKED"}}'), "answered 403: the dashboard "),
        (Answer(301, location="https://x.example/"), "a redirect: correct DASHBOARD_URL: https://x"),
        (Answer(200, body=b"<html>"), "answered 200: this is not the dashboard's answer"),
        (Answer(200), "answered 200: this is not the dashboard's answer"),
        (Answer(201, body=b"ok", server="Caddy"), "201 (Server: Caddy): this is not the dashboard"),
        (Answer(200, body=b'{"success":false}'), "answered 200, but reports a failure"),
        (Answer(200, body=b'{"errors":["x"],"message":"no"}'), "200, but reports a failure: no"),
        (Answer(410, body=b'{"message": "gone"}'), "answered 410: gone"),
        (Answer(400, body=b"<html>", server="nginx"), "400 (Server: nginx): this is not the dash"),
        (Answer(404, body=b"<html>"), "answered 404: "),
        (Answer(409, body=b"<html>"), "answered 409: this is not the dashboard's answer"),
        (Answer(422, body=b"[]"), "answered 422: this is not the dashboard's answer"),
    ],
)
def test_answers_that_keep_the_sample(
    answer: Answer, says: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.beat()
    site.answer = lambda request: answer
    site.beat(4)
    assert site.posted() == stamps(1, 2, 3, 4, 5)  # one attempt per heartbeat
    assert len(site.nodes) == 1  # never registers again because of it
    assert site.counters.waiting == 4
    [line] = said(caplog, logging.WARNING)
    assert says in line
    site.answer = lambda request: OK
    site.beat()
    assert site.counters == agent.Counters(6, 6, 0, 0, 0)
    assert said(caplog)[-1].startswith("delivering again after 60 s")


@each_dialect
def test_409_is_delivered(site: Site) -> None:
    site.answer = lambda request: Answer(409, body=b"{}")
    site.beat(3)
    assert site.counters == agent.Counters(3, 3, 0, 0, 0)


def test_an_unknown_node_registers_and_tries_once_more(site: Site) -> None:
    site.beat()
    answers = iter([UNKNOWN, OK])
    site.answer = lambda request: next(answers)
    site.beat()
    assert (site.posted(), len(site.nodes)) == (stamps(1, 2, 2), 2)
    assert site.counters.delivered == 2


@each_dialect
def test_404_for_ever_is_kept(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.beat()
    site.answer = lambda request: UNKNOWN
    site.beat(3)
    # tinomail-monitor takes samples of unknown nodes: a 404 never asks for a registration
    assert site.posted() == stamps(*([1, 2, 2, 3, 4] if site.api == "v1" else [1, 2, 3, 4]))
    assert len(site.nodes) == (2 if site.api == "v1" else 1)
    assert site.counters.waiting == 3
    [line] = said(caplog, logging.WARNING)
    assert "answered 404: no such address" in line
    site.beat(20)  # 300 s
    assert len(site.nodes) == (3 if site.api == "v1" else 1)


def test_404_and_a_registration_that_fails(site: Site) -> None:
    site.beat()
    site.answer, site.registration = (lambda request: UNKNOWN), (lambda: Answer(500))
    site.beat(3)
    # a try and three retries, then one attempt per heartbeat
    assert len(site.nodes) == 1 + 4 + 2


REFUSALS = [400, 413, 415, 422]


@each_dialect
@pytest.mark.parametrize("status", REFUSALS)
def test_a_sample_that_the_dashboard_refuses_for_ever(
    status: int, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Two refusals are a strike, if others get through; five strikes are the end of it."""
    error = b'{"error": "bad field' + b"x" * 999 + b'"}'
    site.beat(2)
    site.answer = lambda request: (
        Answer(status, body=error) if stamp_of(request) == "t3" else OK
    )
    site.beat(5)
    assert site.posted().count("t3") == 2 * 5
    assert site.counters == agent.Counters(7, 6, 1, 0, 0)
    line = said(caplog, logging.WARNING)[-1]
    assert line.startswith(
        f"the dashboard refused 1 samples for good (1 since the start): answered {status}: bad fi"
    )
    assert len(line) < 300
    assert set(site.delivered) == set(stamps(1, 2, 4, 5, 6, 7))
    assert site.delivered == sorted(site.delivered)  # none is late for it


@pytest.mark.parametrize("status", REFUSALS)
def test_a_dashboard_that_refuses_everything_loses_nothing_but_by_the_ring(
    status: int, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.beat()
    seen = 0

    def answer(request: agent.Request) -> Answer:
        nonlocal seen
        seen += 1
        return Answer(status, body=b'{"error": "request %d is bad"}' % seen)

    site.answer = answer
    site.beat(130)
    assert site.counters == agent.Counters(131, 1, 0, 30, 100)
    assert len(said(caplog, logging.WARNING)) == 2  # cannot deliver, and then: dropped


@pytest.mark.parametrize("is_random", [False, True], ids=["round robin", "random"])
def test_one_of_two_backends_refuses_everything(is_random: bool, site: Site) -> None:
    dice, turn = random.Random(11), itertools.count()

    def answer(request: agent.Request) -> Answer:
        is_bad = dice.random() < 0.5 if is_random else next(turn) % 2
        return Answer(422, body=REFUSAL) if is_bad else OK

    site.beat()
    site.answer = answer
    site.beat(200)
    site.answer = lambda request: OK
    site.beat(5)
    assert site.counters.refused <= 2
    assert site.counters.waiting == 0


def test_a_poison_sample_is_given_up(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The dashboard answers 500 to t3 for ever; the others get through."""

    def answer(request: agent.Request) -> Answer:
        return Answer(500, body=b'{"error": "boom"}') if stamp_of(request) == "t3" else OK

    site.answer = answer
    site.beat(12)
    assert site.counters == agent.Counters(12, 11, 1, 0, 0)
    # five rounds of a try and three retries, each behind one that was taken
    assert site.posted().count("t3") == agent.STRIKES * (1 + len(agent.BACKOFF_S))
    assert [line for line in said(caplog, logging.WARNING) if "refused" in line] == [
        "the dashboard refused 1 samples for good (1 since the start): answered 500: boom"
    ]


def test_a_poison_sample_is_given_up_at_a_short_heartbeat_too(site: Site) -> None:
    """New samples cut its rounds of retries off: its failures count all the same."""
    site.answer = lambda request: (
        Answer(500, body=b"{}") if stamp_of(request) == "t3" else OK
    )
    for seq in range(1, 60):
        site.buffer.put(sample(seq))
        site.run(site.clock.elapsed + 2.0)
    assert site.counters == agent.Counters(59, 58, 1, 0, 0)
    round_of = 1 + len(agent.BACKOFF_S)
    assert agent.STRIKES * round_of <= site.posted().count("t3") < (agent.STRIKES + 1) * round_of


def test_what_is_known_of_a_sample_is_forgotten_when_it_left_the_buffer() -> None:
    """Every second sample is refused at its first attempts; most of them are dropped."""
    site = Site(buffer_size=10)
    site.answer = lambda request: (
        Answer(422, body=REFUSAL) if int(stamp_of(request)[1:]) % 2 else OK
    )
    for _ in range(100):
        site.beat()
        assert len(site.sender._tries) <= 11
    assert site.counters.refused + site.counters.dropped > 30


def test_refused_samples_make_a_line_an_hour(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: agent.Request) -> Answer:
        is_bad = int(stamp_of(request)[1:]) % 2
        return Answer(422, body=REFUSAL) if is_bad else OK

    def numbers() -> list[int]:
        lines = [line for line in said(caplog, logging.WARNING) if "refused" in line]
        return [int(line.split()[3]) for line in lines]

    site.beat()
    site.answer = answer
    while not numbers():
        site.beat()
    site.beat(int(3600 / BEAT_S) - 1)
    assert numbers() == [1]
    site.beat()
    first, second = numbers()
    assert 100 < second < 130
    assert site.counters.refused >= first + second


@each_dialect
@pytest.mark.parametrize("answer", [Answer(403), Answer(301), Answer(500), NO_ANSWER,
                                    Answer(500, body=b'{"error": "boom"}'),
                                    Answer(200, body=b"<html>"), Answer(418)])
def test_samples_that_are_not_taken_do_not_block_the_others(
    answer: Answer, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Something on the way does not let three of the samples through."""
    site.beat(2)
    site.answer = lambda request: NO_ANSWER
    site.beat(12)
    held = {"t4", "t5", "t6"}
    site.answer = lambda request: answer if stamp_of(request) in held else OK
    site.beat(8)
    assert {f"t{seq}" for seq in range(1, 23)} - set(site.delivered) == held
    assert any("cannot deliver an old sample" in line for line in said(caplog))
    site.beat(60)
    # only the dashboard's own 5xx, again and again, is its word against a sample
    assert site.counters.refused == (3 if answer.body == b'{"error": "boom"}' else 0)
    assert len(said(caplog)) < 10


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_rate_limit_in_front_of_the_dashboard_is_no_verdict_on_samples(
    status: int, site: Site
) -> None:
    """One request in 10 s gets through; all that wait do so in the end."""
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(8)
    taken_at = [0.0]

    def answer(request: agent.Request) -> Answer:
        if site.clock.elapsed - taken_at[0] < 10:
            return Answer(status, body=REFUSAL)
        taken_at[0] = site.clock.elapsed
        return OK

    site.answer = answer
    site.beat(60)
    assert site.counters.refused == site.counters.dropped == 0


def test_a_dashboard_that_answers_only_every_third_request(site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(20)
    count = 0

    def answer(request: agent.Request) -> Answer:
        nonlocal count
        count += 1
        return OK if count % 3 == 0 else Answer(500, body=REFUSAL)

    site.answer = answer
    site.beat(40)
    assert site.counters.refused == site.counters.dropped == 0
    assert site.counters.waiting < 3


def test_a_connection_is_closed_after_every_attempt_that_failed(site: Site) -> None:
    site.beat(3)
    assert site.closed == 0
    for number, answer in enumerate((Answer(401), Answer(422, body=REFUSAL), Answer(200))):
        site.answer = lambda request, answer=answer: answer  # type: ignore[misc]
        before = len(site.posts)
        site.beat()
        assert site.closed >= number + 1
        assert site.closed - len(site.posts) <= 0 < len(site.posts) - before


# --- Retry-After: kept to, and up to a heartbeat longer, by the node's own luck (here half of it)


def test_retry_after_is_honoured_across_samples(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.beat()
    start = site.clock.elapsed
    answers = iter([Answer(429, retry_after="30")])
    site.answer = lambda request: next(answers, OK)
    site.beat(4)
    assert [(at - start, stamp) for at, stamp in site.posts[1:]] == [
        (0, "t2"), (37.5, "t4"), (37.5, "t2"), (37.5, "t3"), (45, "t5"),
    ]
    assert "answered 429" in said(caplog, logging.WARNING)[0]  # so long a pause is worth a line


def test_retry_after_is_honoured_once_down(site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat()
    start = site.clock.elapsed
    site.answer = lambda request: Answer(503, retry_after="20")
    site.beat(6)
    assert [at - start for at, _ in site.posts if at >= start] == [0, 27.5, 55, 82.5]


def test_a_short_retry_after_is_spread_in_proportion(site: Site) -> None:
    site.beat()
    start = site.clock.elapsed
    answers = iter([Answer(429, retry_after="4")])
    site.answer = lambda request: next(answers, OK)
    site.beat()
    assert [at - start for at, _ in site.posts[1:]] == [0, 6]


@each_dialect
def test_retry_after_of_a_registration(site: Site) -> None:
    site.registration = lambda: Answer(429, retry_after="100")
    site.beat(10)
    assert len(site.nodes) == 2


# --- registration


@each_dialect
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(401), "registration: answered 401: the dashboard does not accept API_KEY"),
        (Answer(400, body=b'{"error":"no"}'), "registration: answered 400: no"),
        (Answer(200, body=b"<html>"), "registration: answered 200: this is not the dashboard's"),
        (OK, "registration: answered 201 without the id of the node: this is not the dashboard"),
        (Answer(201), "registration: answered 201 without the id of the node"),
    ],
)
def test_samples_wait_for_the_first_registration(
    answer: Answer, says: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.registration = lambda: answer
    site.beat(4)
    assert (site.posts, len(site.nodes), site.counters.waiting) == ([], 4, 4)
    [line] = said(caplog)
    assert says in line
    site.registration = lambda: Answer(409, body=b"{}")
    site.beat()
    assert site.counters.delivered == 5


@each_dialect
def test_a_new_role_registers_again(site: Site) -> None:
    site.beat(2)
    site.role = "wildduck"
    site.beat(2)
    assert [node["role"] for node in site.nodes] == ["haraka", "wildduck"]


def test_a_registration_is_tried_again_like_a_sample(site: Site) -> None:
    answers = iter([NO_ANSWER, Answer(500), REGISTERED])
    site.registration = lambda: next(answers)
    site.beat()
    assert (len(site.nodes), site.delivered) == (3, stamps(1))


@each_dialect
def test_a_new_address_registers_again(site: Site) -> None:
    site.beat(2)
    site.ip = "10.0.0.2"
    site.beat(2)
    name = "ip" if site.api == "v1" else "ipAddress"
    assert [node[name] for node in site.nodes] == ["10.0.0.1", "10.0.0.2"]


@pytest.mark.parametrize("answer", [NO_ANSWER, Answer(429, retry_after="100")])
def test_a_registration_that_hangs_or_asks_to_wait_does_not_hold_up_samples(
    answer: Answer, site: Site
) -> None:
    site.beat()
    site.ip = "10.0.0.2"
    site.registration = lambda: answer
    site.beat(4)
    assert site.counters.delivered == 5
    assert len(site.nodes) == (2 if answer.status == 429 else 5)  # and is asked as it wants it


def test_the_first_registration_has_the_address_of_the_route(site: Site) -> None:
    """The last connection failed, and the next one goes to another address."""
    site.ip, site.route = "::1", "10.0.0.1"
    site.registration = lambda: Answer(502)
    site.beat(2)
    site.registration, site.ip = lambda: REGISTERED, site.route
    site.beat(2)
    assert {node["ip"] for node in site.nodes} == {"10.0.0.1"}


@each_dialect
def test_samples_go_on_when_a_later_registration_fails(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.beat()
    site.registration = lambda: Answer(500)
    site.role = "wildduck"
    site.beat(5)
    assert site.counters.delivered == 6
    [line] = said(caplog, logging.WARNING)
    assert line.startswith("cannot register again: answered 500")
    assert site.sender.status() == "ok: 6 sent, 0 waiting, last 201 in 0 ms"  # of samples
    site.registration = lambda: REGISTERED
    site.beat()
    assert (len(site.nodes), site.nodes[-1]["role"]) == (7, "wildduck")
    site.beat(3)
    assert len(site.nodes) == 7


@each_dialect
def test_what_is_new_about_a_node_is_told_to_a_dashboard_that_takes_samples(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is away costs no second line of the log: it cannot register again either."""
    site.beat()
    site.answer = lambda request: Answer(502)
    site.registration = lambda: Answer(502)
    site.role = "wildduck"
    site.beat(5)
    assert (len(site.nodes), len(said(caplog, logging.WARNING))) == (1, 1)
    site.answer, site.registration = lambda request: OK, lambda: REGISTERED
    site.beat()
    assert (len(site.nodes), site.nodes[-1]["role"]) == (2, "wildduck")


def test_registers_again_when_the_services_seen_change(api: str) -> None:
    """Where the dashboard is told of them."""
    site = Site(api)
    for seen in (["redis"], ["redis"], ["redis", "zonemta"], ["redis", "zonemta"], ["redis"]):
        site.parts = {"seen": seen}
        site.beat()
    if api == "v1":
        assert len(site.nodes) == 1
    else:
        found = [node["metadata"]["detectedServices"] for node in site.nodes]
        assert found == [["redis"], ["redis", "zonemta"], ["redis"]]
    assert site.counters.delivered == 5


# --- ZoneMTA's figures

QUEUE = {"zonemta": {"queued": 3, "deferred": 4}}


def test_zonemtas_figures_go_out_after_the_newest_sample_alone(api: str) -> None:
    site = Site(api)
    site.beat(2)  # without figures
    site.parts = QUEUE
    site.answer = lambda request: Answer(503)
    site.beat(3)
    assert (site.queues, site.counters.waiting) == ([], 3)
    site.answer = lambda request: OK
    site.beat(2)
    assert site.counters.delivered == 7
    assert site.queues == ([] if api == "v1" else ["t6", "t7"])  # not those that waited


def test_zonemtas_figures_have_no_more_time_than_is_left_before_the_stop() -> None:
    site = Site("tinomail-monitor")
    site.parts = QUEUE
    site.beat()
    assert (len(site.queues), site.within_s) == (1, agent.ZONEMTA_POST_S)
    site.sender.stop_by = site.clock.monotonic() + 3.0
    site.beat()
    assert (len(site.queues), site.within_s) == (2, 3.0)


@pytest.mark.parametrize(
    "answer", [Answer(500, body=b"{}"), NO_ANSWER, Answer(401), Answer(404, body=b"{}"),
               Answer(429, retry_after="60"), Answer(422, body=b"{}")], ids=str,
)
def test_figures_that_are_not_taken_are_not_tried_again_and_cost_no_sample(
    answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site("tinomail-monitor")
    site.parts, site.queue_answer = QUEUE, answer
    site.beat(4)
    assert site.queues == ["t1", "t2", "t3", "t4"]
    assert site.delivered == ["t1", "t2", "t3", "t4"]
    times = [at for at, _ in site.posts]
    assert [later - at for at, later in itertools.pairwise(times)] == [BEAT_S] * 3
    assert (site.counters.waiting, len(site.nodes)) == (0, 1)
    [line] = said(caplog, logging.WARNING)
    assert line.startswith("cannot deliver ZoneMTA's figures: ")


# --- the clock of the node


def http_date(epoch_s: float) -> str:
    return formatdate(epoch_s, usegmt=True)


def test_a_wrong_clock_is_said_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.answer = lambda request: Answer(201, date="Sun, 15 Jun 2025 14:00:00 GMT")
    site.clock.wall = 1_749_996_000.0 + 90  # that moment, and 90 s
    site.beat(3)
    assert site.sender.clock_offset_s == pytest.approx(90 + 2 * BEAT_S, abs=1)
    [line] = said(caplog, logging.WARNING)
    assert "clock is ahead of the dashboard's: is time synchronisation running?: 90 s" in line
    site.answer = lambda request: Answer(201, date=http_date(site.clock.wall))
    site.beat(agent.CLOCK_AGREES)
    assert said(caplog)[-1] == "this node's clock agrees with the dashboard's again"
    site.answer = lambda request: Answer(201, date=http_date(site.clock.wall - 90))
    site.beat()
    assert len(said(caplog, logging.WARNING)) == 2  # and again, the next time


@each_dialect
def test_two_dashboards_with_clocks_of_their_own(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    dates = itertools.cycle(["Sun, 15 Jun 2025 14:00:00 GMT", "Sun, 15 Jun 2025 15:06:40 GMT"])
    site.answer = lambda request: Answer(201, date=next(dates))
    site.beat(10)
    assert len(said(caplog, logging.WARNING)) == 1


@pytest.mark.parametrize("fraction", [0.1, 0.9])  # of the second that Date leaves out
@pytest.mark.parametrize("offset", [-20, 0, 20])
def test_a_small_offset_is_not_said(
    offset: int, fraction: float, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.answer = lambda request: Answer(201, date="Sun, 15 Jun 2025 14:00:00 GMT")
    site.clock.wall = 1_749_996_000 + fraction + offset
    site.beat()
    assert site.sender.clock_offset_s == offset
    assert said(caplog, logging.WARNING) == []


def test_a_long_look_up_is_no_hang() -> None:
    site = Site()
    due: list[float] = []

    def look_up(request: agent.Request) -> Answer:
        site.deadline = math.inf
        due.append(site.sender.due)
        site.clock.advance(600)
        site.deadline = site.clock.elapsed + 10
        due.append(site.sender.due - site.clock.elapsed)
        return OK

    site.answer = look_up
    finish(site)
    assert due == [math.inf, 10]


def test_samples_that_were_refused_and_dropped_leave_nothing_in_memory() -> None:
    """A dashboard that took one sample, and refuses all that follow."""
    site = Site(buffer_size=10)
    site.beat()
    site.answer = lambda request: Answer(422, body=REFUSAL)
    site.beat(20)
    ours = [tracemalloc.Filter(True, agent.__file__)]
    tracemalloc.start()
    try:
        site.beat(200)
        found = tracemalloc.take_snapshot().filter_traces(ours)
    finally:
        tracemalloc.stop()
    assert site.counters.dropped >= 200
    assert sum(trace.size for trace in found.traces) < 10_000


# --- the end


def finish(site: Site) -> None:
    """Let a last sample come, and the sender do what it does after the end of the collector."""
    site.seq += 1
    site.buffer.put(sample(site.seq))
    site.buffer.close()
    site.sender.run()


def test_the_end_delivers_the_last_sample_and_some_of_the_oldest(site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(14)
    site.answer = lambda request: OK
    finish(site)
    assert site.delivered == stamps(1, 16, *range(2, 12))


@pytest.mark.parametrize("count", [1, 5])
def test_after_the_close_the_newest_is_tried_once_more_and_the_oldest_follow(
    count: int, site: Site
) -> None:
    site.answer = lambda request: Answer(401)
    site.beat(count)
    site.answer = lambda request: OK
    site.buffer.close()
    site.sender.run()
    assert site.delivered == stamps(count, *range(1, count))


def test_the_end_comes_with_the_first_failure(site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(4)
    site.posts.clear()
    finish(site)
    assert (len(site.posts), site.counters.waiting) == (1, 5)


@pytest.mark.parametrize("took_s", [0.1, 1.0, 2.5])
def test_no_post_begins_that_would_not_end_before_the_stop(took_s: float, site: Site) -> None:
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.beat(99)
    site.answer = lambda request: OK
    site.duration_s = took_s
    site.beat()
    before = len(site.delivered)
    site.sender.stop_by = site.clock.elapsed + 5.0
    finish(site)
    assert site.clock.elapsed <= site.sender.stop_by
    assert len(site.delivered) - before == min(11, int(4.8 / took_s) - (took_s < 1))


def test_a_success_with_retry_after_is_no_reason_to_wait(site: Site) -> None:
    site.answer = lambda request: Answer(200, body=b"{}", retry_after="120")
    site.beat(4)
    assert site.counters.delivered == 4
    site.answer = lambda request: Answer(401, retry_after="120")
    site.beat(4)
    assert len(site.posts) == 8


def test_a_dashboard_that_is_too_slow_is_said(
    api: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    site = Site(api, buffer_size=10)
    site.duration_s = 0.9 * BEAT_S
    answers = iter([NO_ANSWER] * 12)
    site.answer = lambda request: next(answers, OK)
    for _ in range(40):  # two samples for every post
        site.seq += 2
        site.buffer.put(sample(site.seq - 1))
        site.buffer.put(sample(site.seq))
        site.sender.step()
    assert site.counters.dropped > 10
    assert said(caplog, logging.WARNING)[-1:] == [
        "the oldest samples are dropped: more than BUFFER_SIZE=10 wait"
    ]
    dropped = site.counters.dropped
    site.duration_s = 0.0
    site.beat(5)
    assert said(caplog)[-1] == f"no more samples are dropped ({dropped} dropped so far)"


def test_the_end_leaves_a_dashboard_alone_that_asked_for_it(site: Site) -> None:
    site.beat()
    site.answer = lambda request: Answer(429, retry_after="300")
    site.beat()
    site.posts.clear()
    finish(site)
    assert site.posts == []


def test_status_line(site: Site) -> None:
    site.beat(3)
    assert site.sender.status() == "ok: 3 sent, 0 waiting, last 201 in 0 ms"
    during = []

    def no_answer(request: agent.Request) -> Answer:
        during.append(site.sender.status())
        return NO_ANSWER

    site.answer = no_answer
    site.beat()
    assert during[0] == "ok: 3 sent, 1 waiting, last 201 in 0 ms"
    assert set(during[1:]) == {"retrying: 3 sent, 1 waiting, last unanswered in 0 ms"}
    assert site.sender.status() == "not delivering: 3 sent, 1 waiting, last unanswered in 0 ms"


# --- the buffer


def test_what_is_delivered_although_the_full_ring_dropped_it_meanwhile() -> None:
    buffer = Buffer(10)
    for seq in range(1, 11):
        buffer.put(sample(seq))
    [oldest] = buffer.oldest(1)
    assert oldest.seq == 1
    for seq in range(11, 16):
        buffer.put(sample(seq))
    assert buffer.counters() == agent.Counters(15, 0, 0, 5, 10)
    buffer.settle(oldest, "delivered")
    assert buffer.counters() == agent.Counters(15, 1, 0, 4, 10)
    assert [one.seq for one in buffer.oldest(2)] == [6, 7]
    assert [one.seq for one in buffer.oldest(10, postponed={6, 9})][-3:] == [15, 6, 9]


def test_a_full_buffer_is_small() -> None:
    collector = agent.Collector(make_config())
    collector.prime()
    assert len(collector.collect().packed) * 100 < 160 * 1024


ANSWERS = st.sampled_from([
    OK, NO_ANSWER, Answer(401), UNKNOWN, Answer(404), Answer(409), Answer(422, body=REFUSAL),
    Answer(422), Answer(429), Answer(429, retry_after="30"), Answer(500, body=REFUSAL),
    Answer(500), Answer(301), Answer(200, body=b"<html>"), REGISTERED,
])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=60), st.integers(1, 5),
    st.sampled_from(APIS),
)
def test_the_equation_holds_whatever_is_answered(
    script: list[tuple[Answer, Answer]], duration: int, api: str
) -> None:
    """sampled = delivered + refused + dropped + waiting; nothing is delivered twice; in the end,
    with a dashboard that is well again, nothing waits."""
    site = Site(api, buffer_size=10)
    site.duration_s = duration / 10
    for answer, registration in script:
        site.answer = lambda request, answer=answer: answer  # type: ignore[misc]
        site.registration = lambda registration=registration: registration  # type: ignore[misc]
        site.beat()
        assert site.counters.waiting <= 10
    site.answer, site.registration = (lambda request: OK), (lambda: REGISTERED)
    site.beat(40)
    assert site.counters.waiting == 0
    assert len(set(site.delivered)) == len(site.delivered)
    assert site.sender.step() == math.inf
    assert KEY not in site.sender.status()
