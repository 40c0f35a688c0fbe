"""What outlives the process: the samples on disk, and the role. The disk is a real one."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import ROOT, eventually, make_config
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_sender import BEAT_S, NO_ANSWER, OK, REFUSAL, UNKNOWN, Site, said

import tinomail_agent as agent
from tinomail_agent import Buffer, State


def stamp(number: int) -> str:
    return agent.iso_utc(1_750_000_000 + number)


def sample(seq: int, number: int | None = None) -> agent.Sample:
    """Return a sample as the collector makes it, taken at stamp(number)."""
    body = {"timestamp": stamp(seq if number is None else number), "role": "haraka", "system": {}}
    return agent.Sample(seq, agent.pack(body))


def stamp_of(one: agent.Sample) -> str:
    return str(agent.unpack(one.packed)["timestamp"])


def loaded(buffer: Buffer) -> Buffer:
    buffer.load()
    return buffer


def saved(buffer: Buffer) -> bool:
    buffer.save()
    return True


class Node(Site):
    """A Site with a disk. What waits there from an earlier life is loaded."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self.state = State(str(folder))
        self.buffer = loaded(Buffer(self.config.buffer_size, self.state))
        self.sender = agent.Sender(
            self.config, self.buffer, self, clock=self.clock.monotonic,  # type: ignore[arg-type]
            now=self.clock.time, jitter=lambda: 0.5,
        )
        self.seq = max(seqs(self.buffer), default=0)

    def beat(self, count: int = 1, number: int | None = None) -> None:
        for _ in range(count):
            self.seq += 1
            self.buffer.put(sample(self.seq, number))
            self.run(self.clock.elapsed + BEAT_S)


@pytest.fixture
def folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.INFO)
    return tmp_path / "state"


def on_disk(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "buffer").glob("*.sample"))


def waiting(buffer: Buffer) -> list[agent.Sample]:
    """Return what waits, the oldest first."""
    return buffer.oldest(1000)


def seqs(buffer: Buffer) -> list[int]:
    return [one.seq for one in waiting(buffer)]


def disk_is_full(state: State, is_full: bool = True) -> None:
    def write(sample: agent.Sample) -> None:
        raise OSError(28, "No space left on device")

    if is_full:
        state.write = write  # type: ignore[method-assign]
    else:
        vars(state).pop("write", None)


# --- when a sample is written


def test_a_healthy_node_writes_nothing(folder: Path) -> None:
    site = Node(folder)
    site.beat(50)
    assert not folder.exists()


def test_a_sample_is_on_disk_when_its_first_attempt_has_failed(folder: Path) -> None:
    site = Node(folder)
    site.beat()
    site.answer = lambda request: NO_ANSWER
    site.seq += 1
    site.buffer.put(sample(site.seq))
    assert on_disk(folder) == []
    site.sender.step()
    assert on_disk(folder) == [2]


def test_in_an_outage_a_sample_is_on_disk_before_its_first_attempt(folder: Path) -> None:
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat()
    seen: list[list[int]] = []

    def answer(request: agent.Request) -> agent.Answer:
        seen.append(on_disk(folder))
        return NO_ANSWER

    site.answer = answer
    site.beat(2)
    assert (seen[0], seen[-1]) == ([1, 2], [1, 2, 3])


def test_a_sample_is_on_disk_at_once_while_those_of_the_last_run_are_not_read(
    folder: Path,
) -> None:
    """Others may wait: a kill in the first moments of an outage costs nothing."""
    buffer = Buffer(20, State(str(folder)))
    buffer.put(sample(1))
    assert on_disk(folder) == [1]


def test_what_was_not_delivered_within_a_second_is_written(folder: Path) -> None:
    """save() is what the collector calls a second after each sample."""
    buffer = loaded(Buffer(10, State(str(folder))))
    buffer.put(sample(1))
    buffer.save()
    assert on_disk(folder) == [1]
    buffer.settle(sample(1), "delivered")
    assert on_disk(folder) == []


def test_what_left_the_ring_leaves_the_disk(folder: Path) -> None:
    site = Node(folder, buffer_size=10)
    site.answer = lambda request: NO_ANSWER
    site.beat(14)
    assert on_disk(folder) == list(range(5, 15))  # 1 to 4 were dropped
    site.answer = lambda request: OK
    site.beat(2)
    assert on_disk(folder) == []


def test_a_sample_that_is_delivered_while_it_is_written_leaves_nothing(folder: Path) -> None:
    state = State(str(folder))
    buffer = loaded(Buffer(10, state))
    write, begun, settled = state.write, threading.Event(), threading.Event()

    def slow_write(one: agent.Sample) -> None:
        begun.set()
        assert settled.wait(10)
        write(one)

    state.write = slow_write  # type: ignore[assignment, method-assign]
    buffer.put(sample(1))
    writer = threading.Thread(target=buffer.save)
    writer.start()
    assert begun.wait(10)
    buffer.settle(sample(1), "delivered")
    settled.set()
    writer.join(10)
    eventually(lambda: saved(buffer) and on_disk(folder) == [])


def test_threads_that_fill_drain_and_mirror_at_once(folder: Path) -> None:
    """Nothing is raised, and in the end the disk holds what the ring holds: nothing."""
    buffer = loaded(Buffer(10, State(str(folder))))
    crashes: list[BaseException] = []
    is_over = threading.Event()

    def guarded(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                while not is_over.is_set():
                    work()
            except BaseException as error:
                crashes.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def deliver() -> None:
        if newest := buffer.newest():
            buffer.settle(newest, "delivered")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [guarded(deliver), guarded(buffer.save)]
        for seq in range(1, 3001):
            buffer.put(sample(seq))
    finally:
        sys.setswitchinterval(before)
        is_over.set()
        for thread in threads:
            thread.join(20)
    while buffer.newest():
        deliver()
    assert crashes == []
    eventually(lambda: saved(buffer) and on_disk(folder) == [])


def test_at_the_stop_all_that_waits_is_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the sender cannot end in time: it looks a name up that no server answers for."""
    monkeypatch.setattr("tinomail_agent.sdnotify.SystemdNotifier", Mock)
    service = agent.Agent(make_config(), {"STATE_DIRECTORY": str(folder)})
    is_over = threading.Event()
    collector, sender = threading.Thread(), threading.Thread(target=is_over.wait)
    service._buffer.load()
    service._buffer.put(sample(1))
    sender.start()
    collector.start()
    service._end(collector, sender)
    is_over.set()
    assert on_disk(folder) == [1]


# --- what the next life finds


def test_a_restart_goes_on_where_it_was(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Node(folder)
    first.answer = lambda request: NO_ANSWER
    first.beat(5)
    caplog.clear()
    second = Node(folder)
    assert said(caplog) == ["loaded 5 undelivered samples from the last run"]
    assert second.counters == agent.Counters(0, 0, 0, 0, 5, loaded=5)
    second.beat()
    assert second.delivered == [stamp(n) for n in (6, 1, 2, 3, 4, 5)]
    assert second.counters == agent.Counters(1, 6, 0, 0, 0, loaded=5)
    assert on_disk(folder) == []


def save_20(folder: Path) -> None:
    """Leave 20 samples on disk, as a run that has ended does."""
    buffer = loaded(Buffer(20, State(str(folder))))
    for seq in range(1, 21):
        buffer.put(sample(seq))
    buffer.save()


def test_a_smaller_buffer_keeps_the_newest(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_20(folder)
    second = loaded(Buffer(10, State(str(folder))))
    assert second.counters() == agent.Counters(0, 0, 0, 10, 10, loaded=20)
    assert seqs(second) == on_disk(folder) == list(range(11, 21))
    assert "dropped 10 saved samples: BUFFER_SIZE=10 is too small" in said(caplog)


def test_what_an_earlier_run_left_too_much_and_a_new_sample_then_drops(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_20(folder)
    site = Node(folder, buffer_size=10)
    site.beat(3)
    assert site.counters.waiting == 0
    assert [line for line in said(caplog) if "dropped" in line] == [
        "dropped 10 saved samples: BUFFER_SIZE=10 is too small",
        "the oldest samples are dropped: more than BUFFER_SIZE=10 wait",
        "no more samples are dropped (11 dropped so far)",
    ]


GOOD = sample(1).packed
NOT_SAMPLES = {
    "torn": GOOD[:-3],
    "empty": b"",
    "zeros, as a power cut may leave them": bytes(len(GOOD)),
    "one bit wrong": GOOD[:20] + bytes([GOOD[20] ^ 4]) + GOOD[21:],
    "not JSON": zlib.compress(b"{"),
    "not an object": zlib.compress(b"[]"),
    **{
        f"{name} is {value}": zlib.compress(json.dumps({
            "timestamp": stamp(1), "role": "haraka", "system": {}, name: json.loads(value)
        }).encode())
        for name in ("system", "processes", "seen")
        for value in ("5", "null", "[[]]")
        if (name, value) != ("seen", "[[]]")
    },
    "role is []": zlib.compress(b'{"timestamp":"2026-01-01T00:00:00.000Z","role":[],"system":{}}'),
    "no role": zlib.compress(b'{"timestamp":"2026-01-01T00:00:00.000Z","system":{}}'),
    "no time": zlib.compress(b'{"role":"haraka","system":{}}'),
    "nested": zlib.compress(b"[" * 100_000),
    "very large": zlib.compress(bytes(1 << 26)),
}


@pytest.mark.parametrize("content", NOT_SAMPLES.values(), ids=NOT_SAMPLES)
def test_what_is_no_sample_is_deleted(
    content: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = State(str(folder))
    state.write(sample(1))
    state.write(sample(3))
    (folder / "buffer/000000000002.sample").write_bytes(content)
    buffer = loaded(Buffer(10, State(str(folder))))
    assert seqs(buffer) == on_disk(folder) == [1, 3]
    assert "deleted 1 damaged sample files (a power cut?)" in said(caplog)


def test_what_cannot_be_deleted_is_not_said_to_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a disk that has become read-only."""
    state = State(str(folder))
    state.write(sample(1))
    (folder / "buffer/000000000002.sample").write_bytes(b"damaged")
    monkeypatch.setattr(State, "remove", Mock(side_effect=OSError(errno.EROFS, "")))
    assert (len(state.load()), state.unread, said(caplog)) == (1, "", [])


def test_foreign_files_are_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = folder / "buffer"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("hello")
    (place / "1.sample").write_bytes(GOOD)  # not a name that we give
    (place / "000000000004.sample").mkdir()
    (place / "000000000005.sample").symlink_to("/dev/zero")
    os.mkfifo(place / "000000000006.sample")
    (place / "new").write_bytes(GOOD[:9])  # the agent was killed while it wrote a sample
    before = set(place.iterdir())
    buffer = loaded(Buffer(10, State(str(folder))))
    assert (seqs(buffer), set(place.iterdir()), said(caplog)) == ([], before, [])


# --- a disk that fails


def test_a_full_disk_costs_the_mirror_only(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat(2)
    disk_is_full(site.state)
    site.beat(5)
    assert on_disk(folder) == [1, 2]
    disk_is_full(site.state, False)
    site.beat(1)
    assert on_disk(folder) == list(range(1, 9))
    site.answer = lambda request: OK
    site.beat()
    assert site.counters == agent.Counters(9, 9, 0, 0, 0)
    assert [line for line in said(caplog) if "disk" in line] == [
        "cannot write undelivered samples to disk: No space left on device",
        "writing undelivered samples to disk again",
    ]


def test_a_disk_that_becomes_read_only_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the number of files that cannot be removed, each with its own path."""
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat(30)
    for name in ("write", "remove"):
        monkeypatch.setattr(State, name, lambda state, what, name=name: (_ for _ in ()).throw(
            OSError(errno.EROFS, os.strerror(errno.EROFS), f"{folder}/{name} {what}")))
    site.answer = lambda request: OK
    site.beat(5)
    assert site.counters.waiting == 0
    [line] = [line for line in said(caplog) if "disk" in line]
    assert line.startswith("cannot write undelivered samples to disk: Read-only file system")


def test_a_file_that_could_not_be_removed_is_removed_later(folder: Path) -> None:
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat(3)
    remove = site.state.remove

    def is_read_only(seq: int) -> None:
        raise OSError(30, "Read-only file system")

    site.state.remove = is_read_only  # type: ignore[method-assign]
    site.answer = lambda request: OK
    site.beat()
    assert (site.counters.waiting, on_disk(folder)) == (0, [1, 2, 3, 4])
    site.state.remove = remove  # type: ignore[method-assign]
    site.buffer.save()
    assert on_disk(folder) == []


def test_a_file_that_cannot_be_removed_holds_up_no_other(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat(3)
    remove = site.state.remove

    def has_a_bad_sector(seq: int) -> None:
        if seq == 2:
            raise OSError(errno.EIO, "Input/output error")
        remove(seq)

    site.state.remove = has_a_bad_sector  # type: ignore[method-assign]
    site.answer = lambda request: OK
    site.beat()
    assert on_disk(folder) == [2]
    site.answer = lambda request: NO_ANSWER
    site.beat(2)
    assert on_disk(folder) == [2, 5, 6]
    site.state.remove = remove  # type: ignore[method-assign]
    site.buffer.save()
    assert on_disk(folder) == [5, 6]
    assert [line for line in said(caplog) if "disk" in line] == [
        "cannot write undelivered samples to disk: Input/output error",
        "writing undelivered samples to disk again",
    ]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_a_file_that_cannot_be_read_now_is_read_later(
    code: int, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Node(folder)
    first.answer = lambda request: NO_ANSWER
    first.beat(3)
    caplog.clear()
    read = agent.read_bytes

    def fail(path: str, limit: int = -1) -> bytes:
        if path.endswith("2.sample"):
            raise OSError(code, os.strerror(code))
        return read(path, limit)

    monkeypatch.setattr(agent, "read_bytes", fail)
    second = Node(folder)
    assert second.counters.loaded == 2
    second.answer = lambda request: NO_ANSWER
    second.seq = 3
    second.beat()
    assert on_disk(folder) == [1, 2, 3, 4]
    monkeypatch.undo()
    second.answer = lambda request: OK
    second.beat(2)
    assert second.counters == agent.Counters(3, 6, 0, 0, 0, loaded=3)
    assert [line for line in said(caplog) if "read" in line] == [
        f"cannot read saved samples: {os.strerror(code)}", "all saved samples are read",
    ]
    assert sorted(second.delivered) == [stamp(n) for n in range(1, 7)]


def test_a_disk_that_hangs_holds_nobody_up(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What hangs here is the opening of a FIFO, in the place of the file that is written."""
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat()
    os.mkfifo(folder / "buffer/new")
    started = time.monotonic()
    site.beat(20)
    assert time.monotonic() - started < 60
    assert [line for line in said(caplog) if "hangs" in line] == ["STATE_DIRECTORY hangs"]
    assert site.counters.waiting == 21
    with open(folder / "buffer/new", "rb"):
        eventually(lambda: saved(site.buffer) and len(on_disk(folder)) == 21)
    eventually(lambda: saved(site.buffer) and "STATE_DIRECTORY no longer hangs" in said(caplog))
    site.answer = lambda request: OK
    site.beat(3)
    assert site.counters == agent.Counters(24, 24, 0, 0, 0)
    eventually(lambda: saved(site.buffer) and on_disk(folder) == [])


def test_samples_that_are_loaded_late_take_their_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Node(folder)
    first.answer = lambda request: NO_ANSWER
    first.beat(3)
    may_go_on = threading.Event()
    load = State.load
    monkeypatch.setattr(agent, "LOAD_LIMIT_S", 0.2)
    monkeypatch.setattr(
        State, "load", lambda self, known: may_go_on.wait(60) and load(self, known)
    )
    second = Node(folder)
    second.seq = 3
    second.answer = lambda request: NO_ANSWER
    second.beat(2)
    assert (second.counters.loaded, seqs(second.buffer)) == (0, [4, 5])
    may_go_on.set()
    eventually(lambda: seqs(second.buffer) == [1, 2, 3, 4, 5])
    second.answer = lambda request: OK
    second.beat()
    assert second.delivered == [stamp(n) for n in (6, 1, 2, 3, 4, 5)]


def test_a_disk_that_could_not_be_read_loses_nothing_when_it_is_back(folder: Path) -> None:
    first = Node(folder)
    first.answer = lambda request: NO_ANSWER
    first.beat(3)
    (folder / "buffer").rename(folder / "away")
    (folder / "buffer").write_text("")  # not a directory
    second = Node(folder)
    (folder / "buffer").unlink()
    (folder / "away").rename(folder / "buffer")
    second.answer = lambda request: NO_ANSWER
    second.seq = 10
    second.beat(number=4)
    second.beat(number=5)
    third = Node(folder)
    assert third.counters.loaded == 5


def test_a_file_that_cannot_be_written_as_a_whole_is_not_there(folder: Path) -> None:
    """A real limit: the kernel takes the first ten bytes of a file and no more."""
    code = (
        "import resource, sys; sys.path.insert(0, 'tests')\n"
        "from test_state import sample; import tinomail_agent as a\n"
        "state = a.State(sys.argv[1]); state.load()\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (10, {resource.RLIM_INFINITY}))\n"
        "try:\n    state.write(sample(1))\nexcept OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)
    assert done.stdout.strip() in ("28", "27"), done.stderr  # ENOSPC, EFBIG
    assert on_disk(folder) == []


def test_a_state_directory_that_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    site = Node(tmp_path / "file")
    site.answer = lambda request: NO_ANSWER
    site.beat(3)
    site.answer = lambda request: OK
    site.beat()
    assert site.counters == agent.Counters(4, 4, 0, 0, 0)
    lines = [line for line in said(caplog) if "Not a directory" in line]
    assert [line.split(":")[0] for line in lines] == [
        "cannot read saved samples", "cannot write undelivered samples to disk",
    ]
    assert "writing undelivered samples to disk again" not in said(caplog)  # nothing was written


def test_a_state_directory_that_vanishes_is_made_again(folder: Path) -> None:
    site = Node(folder)
    site.answer = lambda request: NO_ANSWER
    site.beat()
    shutil.rmtree(folder)
    site.beat()
    assert on_disk(folder) == [2]


# --- the model: sender, buffer and disk against a plain list


class Model(RuleBasedStateMachine):
    """A node through whatever may happen to it, step by step, over many lives.

    `taken` is the plain list of all its samples. A crash forgets what is in memory; what was
    on disk is there again in the next life.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.taken: list[str] = []
        self.lost: set[str] = set()  # with the memory: the disk was full, or a file was torn
        self.delivered: list[str] = []  # in earlier lives
        self.gone = 0  # refused or dropped in earlier lives
        self.is_full = self.may_be_bare = False
        self.node = Node(self.folder, buffer_size=10)

    def teardown(self) -> None:
        self._folder.cleanup()

    def waiting(self) -> list[str]:
        return [stamp_of(one) for one in waiting(self.node.buffer)]

    # - the steps

    @rule(count=st.integers(1, 3))
    def take_samples(self, count: int) -> None:
        self.may_be_bare = self.is_full
        for _ in range(count):
            self.taken.append(stamp(len(self.taken)))
            self.node.beat(number=len(self.taken) - 1)

    @rule()
    def take_more_than_fit(self) -> None:
        self.take_samples(12)

    @rule(answer=st.sampled_from([
        OK, NO_ANSWER, UNKNOWN, agent.Answer(500), agent.Answer(401),
        agent.Answer(422, body=REFUSAL), agent.Answer(429, retry_after="20"),
        agent.Answer(200, body=b"<html>"),
    ]))
    def the_dashboard_answers(self, answer: agent.Answer) -> None:
        self.node.answer = lambda request: answer

    @rule(every=st.integers(2, 4))
    def the_dashboard_answers_at_times(self, every: int) -> None:
        turn = itertools.cycle([OK] + [agent.Answer(503)] * (every - 1))
        self.node.answer = lambda request: next(turn)

    @rule()
    def stop_and_start(self) -> None:
        self.node.buffer.save()
        self.next_life()

    @rule()
    def crash(self) -> None:
        self.next_life()

    @rule()
    def fill_or_empty_the_disk(self) -> None:
        self.is_full = not self.is_full
        self.may_be_bare = True  # until the next sample
        disk_is_full(self.node.state, self.is_full)

    @rule(data=st.data())
    def tear_a_file_and_crash(self, data: st.DataObject) -> None:
        files = sorted((self.folder / "buffer").glob("*.sample"))
        if files:
            torn = data.draw(st.sampled_from(files))
            whole = torn.read_bytes()
            found = agent.read_sample(0, whole)
            assert found
            self.lost.add(stamp_of(found))
            torn.write_bytes(whole[: len(whole) // 2])
        self.next_life()

    def next_life(self) -> None:
        before, answer = self.node, self.node.answer
        in_memory = set(self.waiting())
        self.delivered += before.delivered
        self.gone += before.counters.refused + before.counters.dropped
        self.node = Node(self.folder, buffer_size=10)
        self.node.answer = answer
        kept = set(self.waiting())
        assert kept <= in_memory
        if self.may_be_bare:  # what the disk did not take goes with the memory
            self.lost |= in_memory - kept
        assert in_memory - kept <= self.lost
        assert self.node.counters.loaded == len(kept)
        disk_is_full(self.node.state, self.is_full)

    # - what holds after each of them

    @invariant()
    def nothing_is_missing(self) -> None:
        delivered = self.delivered + self.node.delivered
        assert len(delivered) == len(set(delivered)), "delivered twice"
        accounted = {*delivered, *self.waiting(), *self.lost}
        counters = self.node.counters  # this checks the equation of this life
        missing = len(set(self.taken) - accounted)
        assert missing == self.gone + counters.refused + counters.dropped
        assert not set(self.waiting()) & set(delivered)

    @invariant()
    def the_order_is_kept(self) -> None:
        waiting = self.waiting()
        assert waiting == sorted(waiting) == [one for one in self.taken if one in waiting]

    @invariant()
    def the_disk_holds_what_waits(self) -> None:
        there = set(on_disk(self.folder))
        waits = set(seqs(self.node.buffer))
        assert there <= waits
        assert self.may_be_bare or there == waits


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
