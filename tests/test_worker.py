"""What is wrong now, and calls that may never return."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import eventually

import tinomail_agent as agent


class Fifo:
    """A file whose reading blocks, as that of a dead disk or a stuck process does."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        os.mkfifo(self.path)

    def read(self) -> bytes:
        return agent.read_bytes(str(self.path))

    def release(self) -> None:
        self.path.write_bytes(b"late")


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "worker"]


def quick(value: int) -> Callable[[], int]:
    return lambda: value


def test_results_come_by_name_in_order_and_exceptions_too() -> None:
    worker = agent.Worker(5.0, agent.Problems())

    def fail() -> int:
        raise FileNotFoundError

    turn = itertools.count(1)
    found = worker.run({"a": lambda: next(turn), "bad": fail, "b": lambda: next(turn)})
    assert (found["a"], found["b"]) == (1, 2)
    assert isinstance(found["bad"], FileNotFoundError)
    assert worker.run({}) == {} and not worker.hanging


def test_one_thread_serves_all_runs_while_nothing_hangs() -> None:
    before = set(workers())
    worker = agent.Worker(5.0, agent.Problems())
    for value in range(50):
        assert worker.run({"a": quick(value), "b": quick(-value)}) == {"a": value, "b": -value}
    assert len(set(workers()) - before) == 1


def test_a_machine_without_a_thread_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is called, nothing hangs, and the worker works when there is one again."""
    worker = agent.Worker(5.0, agent.Problems())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("no new thread")))
        for _ in range(3):
            assert worker.run({"a": quick(1)}) == {} and not worker.hanging
        with pytest.raises(TimeoutError):
            worker.call("a", quick(1))
    assert worker.run({"a": quick(1)}) == {"a": 1}


def test_the_thread_ends_with_its_worker() -> None:
    worker = agent.Worker(10.0, agent.Problems())
    thread = worker.run({"which": threading.current_thread})["which"]
    assert isinstance(thread, threading.Thread)
    del worker
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_what_hangs_is_named_once_and_not_called_again_until_it_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tinomail_agent")
    fifo = Fifo(tmp_path, "stuck")
    worker = agent.Worker(3.0, agent.Problems())
    calls = {"first": quick(1), "the stuck one": fifo.read, "last": quick(3)}
    for round_no in range(3):
        started = time.monotonic()
        assert worker.run(calls) == {"first": 1, "last": 3}
        if round_no:
            assert "the stuck one" in worker.hanging
            assert time.monotonic() - started < 60  # never for ever
    assert [r.message for r in caplog.records] == ["the stuck one hangs"]
    fifo.release()
    eventually(lambda: worker.run({}) == {} and not worker.hanging)
    assert [r.message for r in caplog.records][1:] == ["the stuck one no longer hangs"]
    assert worker.run({"first": quick(1)}) == {"first": 1}


def test_at_most_four_calls_are_abandoned_and_none_is_left(tmp_path: Path) -> None:
    before = set(workers())
    fifos = [Fifo(tmp_path, f"stuck-{number}") for number in range(10)]
    worker = agent.Worker(0.8, agent.Problems())
    started = time.monotonic()
    for _ in range(5):
        worker.run({fifo.path.name: fifo.read for fifo in fifos})
    assert len(worker.hanging) == agent.Worker.MOST_ABANDONED
    assert len(set(workers()) - before) == agent.Worker.MOST_ABANDONED
    assert worker.run({"healthy": quick(1)}) == {}  # nothing new: it counts as hanging
    assert time.monotonic() - started < 60
    for fifo in fifos:
        if fifo.path.name in worker.hanging:
            fifo.release()
    eventually(lambda: not worker.run({}) and not worker.hanging)
    eventually(lambda: len(set(workers()) - before) == 0, what="abandoned threads end")
    assert worker.run({"healthy": quick(1)}) == {"healthy": 1}


def test_a_thread_that_does_not_get_to_run_is_no_hang(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine is so busy that the thread has not begun by half of the time."""
    starts: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: starts.append(thread))
    worker = agent.Worker(0.2, agent.Problems())
    assert worker.run({"a": quick(1)}) == {}
    assert len(starts) == 1 and not worker.hanging and caplog.records == []
    monkeypatch.undo()
    assert worker.run({"a": quick(1)}, 60.0) == {"a": 1}


def test_slow_calls_that_return_are_no_hang(caplog: pytest.LogCaptureFixture) -> None:
    worker = agent.Worker(30.0, agent.Problems())
    calls = {str(number): lambda: time.sleep(0.02) for number in range(30)}
    assert len(worker.run(calls)) == 30
    assert caplog.records == []


def test_a_problem_is_logged_when_it_begins_and_ends_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "tinomail_agent")
    problems = agent.Problems()
    for _ in range(2):
        problems.end("disk", "the disk is back")  # it is not away
        for _ in range(3):
            problems.begin("disk", "the disk is away", "EIO")
            problems.begin("disk", "the disk is slow")
        problems.end("disk", "the disk is back")
    episode = ["the disk is away: EIO", "the disk is slow", "the disk is back"]
    assert [r.message for r in caplog.records] == episode * 2


def test_a_description_that_varies_without_end_is_not_logged_without_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problems = agent.Problems()
    for number in range(1000):
        problems.begin("dashboard", f"answered {number}")
    assert len(caplog.records) == 100
