#!/usr/bin/env python3
"""TinoMail agent: samples a mail node and reports it to a dashboard.

Every HEARTBEAT_INTERVAL it reads CPU, memory, disks, network, TCP, the mail daemons and the
mail ports of this machine, and posts them as JSON to DASHBOARD_URL with API_KEY.

    collector thread: at every tick, takes a sample and puts it into the buffer
                      |  Buffer.put() wakes the sender
    buffer:           a ring of BUFFER_SIZE samples, copied to disk when they wait
                      |  the newest sample first, then up to 10 of the oldest
    sender thread:    POST, judge the answer, plan the next attempt -> dashboard
    main thread:      checks both threads and the memory, answers signals, reports to systemd
    worker threads:   calls that may never return (a disk, a stuck process), with a time limit

Collecting never waits for the dashboard, and at most two seconds for a slow disk. A metric that
cannot be read is omitted and counted, never sent as 0.

A sample leaves the buffer when the dashboard confirms it; until then it is tried again. It is
written to STATE_DIRECTORY when an attempt failed, when it has waited for a second, and at once
if older samples still wait. A sample is lost when
    the ring is full, it is the oldest in it, and a new one comes: counted as dropped
    the dashboard rejects it five times, and accepts others in between: counted as refused
    its file is damaged: logged
    the agent is killed before it has a file, or stops while none can be written
    the power fails: files are not synced

To add a metric:   a reader in Collector.readers, which is enough for v1; MONITOR_SYSTEM
                   for tinomail-monitor. A new column of disks or processes: LATER_COLUMNS
       a service:  SERVICES and the tables below it; MONITOR_PROCESSES, MONITOR_ROLES
       a setting:  a field of Config
       an answer:  (what its status leads to) a row of RULES; the first row that fits counts.
                   For one dialect only: a row of its hints

This file, from the top:

    the service                 the three threads, supervision, stopping
    collecting                  what a sample is made of
    the buffer                  samples that wait, in memory and on disk
    sending                     registration, delivery, retries
    problems, workers, ticks    what is wrong now; calls that may never return; when to sample
    what an answer leads to     status and body of an answer -> outcome
    dialects                    how each kind of dashboard is spoken to
    the way to the dashboard    one HTTP request with a deadline, TLS, addresses
    state on disk               the files below STATE_DIRECTORY
    reading /proc and sysfs     parsers, rates, CPU, memory
    disks and networks          mounts, block devices, interfaces
    processes                   the table of processes, their memory and CPU
    services                    which mail service a process belongs to
    sockets                     TCP counts and port checks
    what runs here              the services seen on this node, its role and ports
    ZoneMTA's own figures       its queue, from its HTTP API
    settings                    the table of settings, the env file
    log and command line        lines for a terminal or the journal; --once, --check, main()
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import faulthandler
import glob
import gzip
import http.client
import io
import json
import logging
import math
import os
import platform
import queue
import random
import re
import select
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import dotenv.parser
import psutil
import requests
import requests.adapters
import requests.certs
import sdnotify
import urllib3  # requests' own: its connections get a deadline here
import urllib3.connection

VERSION = "1.1.0"
RELEASED = 1_795_651_200  # 2026-11-26, in epoch seconds: a clock that shows less is not set yet

PRIME_S = 1.0  # the first rates and CPU shares are measured over this long
HANG_LIMIT_S = 1.0  # for all calls of one Worker in one sample: they may hang
FILES_LIMIT_S = 4.0  # for all files that lxcfs may provide: late figures are better than none
ZONEMTA_POST_S = 5.0  # deadline of the post of ZoneMTA's figures
REQUEST_DEADLINE_S = 10.0  # connect, TLS, request and answer together, without the name look-up
SLOW_DEADLINE_S = 30.0  # the same, after an attempt that ran out of time
BACKOFF_S = (1.0, 2.0, 4.0)  # before the 1st, 2nd and 3rd retry
REGISTER_AGAIN_S = 300.0  # between two registrations because of a 404
STRIKES = 5  # a sample that the dashboard rejects so often is refused, if it accepts others between
DRAIN_PER_SUCCESS = 10
SAVE_AFTER_S = 1.0  # what is not delivered by then is written to the disk
DISK_LIMIT_S = 1.0  # for what is written to STATE_DIRECTORY at a time
LOAD_LIMIT_S = 10.0  # for reading it at the start
STOP_LIMIT_S = 5.0
POST_AT_STOP_S = 1.5  # of it, kept for posting the last sample
LOOK_UP_AT_STOP_S = 1.0  # of it, how long a stop waits for a name look-up
CLOCK_OFFSET_LIMIT_S = 30
CLOCK_AGREES = 20  # the clock is right again after so many answers in a row whose Date agrees
REFUSED_LOG_S = 3600.0  # between two lines about refused samples
CRASH_PAUSE_S = 10.0
SUPERVISE_S = 1.0
HANG_AFTER_S = 15.0  # overdue by this, or by the watchdog's time if longer: the thread hangs
MIB = 1024 * 1024

log = logging.getLogger("tinomail_agent")
T = TypeVar("T")


# --- the service -------------------------------------------------------------------------


class Agent:
    """The three threads: this one supervises, `collector` samples, `sender` delivers."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._config = config
        self._stop = threading.Event()
        folder = environ.get("STATE_DIRECTORY", "").split(":")[0]  # systemd.exec(5)
        self._buffer = Buffer(config.buffer_size, State(folder) if folder else None)
        transport = Transport(config.dashboard_url, config.ca_bundle)
        self._sender = Sender(config, self._buffer, transport)
        self._collector = Collector(
            config, agent_figures=self._figures, seen=ServicesSeen(folder)
        )
        self._collector_due = math.inf  # monotonic; infinite until the first sample
        self._clock_problem = Problems()  # of the collector thread
        self._problems = Problems()  # of the main thread
        self._systemd = sdnotify.SystemdNotifier()  # silent without $NOTIFY_SOCKET
        if self._systemd.socket:
            self._systemd.socket.settimeout(1.0)  # in case systemd does not read
        self._watchdog_s = int(environ.get("WATCHDOG_USEC", 0)) / 1e6  # 0: no watchdog
        self._ping_s = min(10.0, self._watchdog_s / 3) or 10.0
        self._next_ping = 0.0
        self._status = ""  # as systemd shows it; "": not ready yet

    def run(self) -> int:
        """Run until SIGTERM, SIGINT or SIGHUP; return the exit code."""
        # The handlers do nothing: the number of each signal arrives at this socket. Not
        # sigtimedwait(): when a SIGCONT ends it, it reports a signal that nobody sent.
        self._signals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        collector = threading.Thread(target=self._collect, name="collector", daemon=True)
        sender = threading.Thread(target=self._sender.run, name="sender", daemon=True)
        collector.start()
        sender.start()
        log.info(
            "TinoMail agent %s started: node %s, a sample every %g s to %s",
            VERSION, self._config.node_id or "(no host name yet)", self._config.interval_s,
            self._config.dashboard_url,
        )
        while (received := self._receive_signals()) <= {signal.SIGUSR1}:
            if received:
                log.info("%s", self._counters())
            self._supervise()
        self._end(collector, sender)
        log.info("stopped: %s", self._counters())
        return 0

    def _receive_signals(self) -> set[int]:
        """Wait a moment for signals; return the numbers of those that came."""
        pause = min(SUPERVISE_S, self._ping_s / 2) if self._status else 0.05
        is_there, _, _ = select.select([self._signals], [], [], pause)
        return set(self._signals.recv(4096)) if is_there else set()

    def _end(self, collector: threading.Thread, sender: threading.Thread) -> None:
        """Stop both threads; all of it takes about STOP_LIMIT_S at most."""
        deadline = time.monotonic() + STOP_LIMIT_S
        self._systemd.notify("STOPPING=1\nSTATUS=delivering what waits")
        self._sender.stop_by = deadline
        self._stop.set()
        collector.join(STOP_LIMIT_S - POST_AT_STOP_S)  # the sample that it is taking is posted too
        self._buffer.close()
        self._buffer.save()  # the time may be over before all is delivered
        look_up_deadline = time.monotonic() + LOOK_UP_AT_STOP_S
        while sender.is_alive() and time.monotonic() < deadline:
            if self._sender.due == math.inf and time.monotonic() > look_up_deadline:
                break  # the sender looks a name up
            sender.join(0.05)
        self._buffer.save()  # removes files of samples that were delivered during the save above

    # - the collector thread

    def _collect(self) -> None:
        """Put a sample into the buffer at every tick; a second later, save it if it waits."""
        interval = self._config.interval_s
        self._collector.guarded(self._collector.prime)
        due = time.monotonic() + PRIME_S
        extra = first_pause_s(self._config.node_id, interval) - interval  # of the first pause
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self._collector.guarded(self._take_sample)
            due, extra = next_tick(due + extra, time.monotonic(), interval), 0.0
            if self._stop.wait(min(SAVE_AFTER_S, max(0.0, due - time.monotonic()) / 2)):
                return
            self._collector.guarded(self._buffer.save)

    def _take_sample(self) -> None:
        now = time.time()
        if now < RELEASED:  # a sample of 1970 would not show on the dashboard
            self._clock_problem.begin(
                "clock", f"this machine's clock shows {iso_utc(now)[:10]}: no samples are taken "
                "until it is set",
            )
        else:
            self._clock_problem.end("clock", "the clock is set: taking samples")
            self._buffer.put(self._collector.collect())
        # The first pause is the longest: up to one and a half intervals.
        self._collector_due = time.monotonic() + 1.5 * self._config.interval_s

    # - supervision

    def _supervise(self) -> None:
        """Tell systemd that the agent is ready, and then that both threads make progress."""
        now, status = time.monotonic(), self._sender.status()
        if self._collector_due == math.inf or (now < self._next_ping and status == self._status):
            return  # there is nothing new to tell
        if not self._status:
            self._systemd.notify("READY=1")
        self._status, self._next_ping = status, now + self._ping_s
        rss_mib, limit_mib = 0.0, self._config.memory_limit_mb
        with contextlib.suppress(OSError):  # out of file descriptors, say
            rss_mib = own_rss_bytes() / MIB
        oldest_due = now - max(HANG_AFTER_S, self._watchdog_s)
        dues = {"collector": self._collector_due, "sender": self._sender.due}
        thread = next((name for name, due in dues.items() if due < oldest_due), "")
        if self._systemd.socket and rss_mib > limit_mib:
            self._problems.begin(
                "supervision", f"more memory is used than MEMORY_LIMIT_MB={limit_mib} allows, "
                "asking systemd for a restart", f"{rss_mib:.0f} MiB", logging.CRITICAL,
            )
            self._systemd.notify("WATCHDOG=trigger")
        elif thread:
            self._problems.begin(
                "supervision", f"the {thread} hangs: leaving it to systemd's watchdog", "",
                logging.CRITICAL,
            )
        else:
            self._problems.end("supervision")
            self._systemd.notify(f"WATCHDOG=1\nSTATUS={status}")

    def _figures(self) -> dict[str, Any]:
        """Return the agent's own counters for a sample."""
        c, offset = self._buffer.counters(), self._sender.clock_offset_s
        figures = {"buffered": c.waiting, "sent_total": c.delivered, "dropped_total": c.dropped,
                   "refused_total": c.refused}
        return figures if offset is None else {**figures, "clock_offset_sec": offset}

    def _counters(self) -> str:
        c = self._buffer.counters()
        return (
            f"{c.sampled} sampled, {c.loaded} loaded, {c.delivered} delivered, "
            f"{c.refused} refused, {c.dropped} dropped, {c.waiting} waiting, "
            f"{self._collector.collect_errors} collect errors, {self._sender.crashes} crashes"
        )


# --- collecting --------------------------------------------------------------------------


class Collector:
    """Takes the samples; used by one thread only."""

    def __init__(
        self, config: Config, *, proc: str = "/proc", sys_root: str = "/sys",
        clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time,
        agent_figures: Callable[[], dict[str, Any]] = dict, seen: ServicesSeen | None = None,
    ) -> None:
        """seen: the services seen on this node, in earlier runs too."""
        self._config = config
        self._clock = clock
        self._now = now
        self._agent_figures = agent_figures
        self._seen = seen or ServicesSeen(clock=clock)
        self._problems = Problems()
        self._unread: set[str] = set()  # the metrics that are missing in this sample
        self._was_unread: set[str] = set()  # the same, in the sample before
        self._zonemta = Worker(HANG_LIMIT_S, self._problems)
        self.collect_errors = 0
        self._processes = ProcessTable(
            proc, clock, self._missing, Worker(HANG_LIMIT_S, self._problems),
            cgroup_root=f"{sys_root}/fs/cgroup", watched=config.watch_processes,
        )
        self._files = Worker(FILES_LIMIT_S, self._problems)
        missing, disks = self._missing, Worker(HANG_LIMIT_S, self._problems)
        paths, interfaces = config.disk_paths, config.net_interfaces
        # What fills `system`: the metric's name for the log, and its reader. A reader returns
        # fields of `system`, None for one that has no value this time.
        self.readers: dict[str, Callable[[], dict[str, Any]]] = {
            "cpu": partial(read_cpu, proc, Meter(clock)),
            "memory": lambda: read_memory(proc),
            "disks": lambda: read_disks(proc, paths, missing, disks),
            "disk_io": partial(read_disk_io, proc, sys_root, Meter(clock)),
            "network": partial(read_network, sys_root, interfaces, missing, Meter(clock)),
            "load": lambda: {"load_avg": read_numbers(f"{proc}/loadavg", 3)},
            "tcp_connections": lambda: read_tcp(proc),
            "open_files": lambda: {"open_files": int(read_numbers(f"{proc}/sys/fs/file-nr")[0])},
            "uptime": lambda: {"uptime_seconds": int(read_numbers(f"{proc}/uptime")[0])},
            "pressure": partial(read_pressure, proc, Meter(clock)),
            "oom_kills": lambda: read_oom_kills(proc),
            "listen_overflows": lambda: read_listen_overflows(proc),
        }

    # - one sample

    def prime(self) -> None:
        """Take a first reading of every counter, so that the next one has rates."""
        self._read_files()
        for reader in (self._processes.read, self.readers["network"]):
            with contextlib.suppress(*READ_ERRORS):  # the first sample will log it
                reader()

    def collect(self) -> Sample:
        """Take one sample; what cannot be read is left out, logged once and counted."""
        started, taken = self._clock(), self._now()
        system: dict[str, Any] = {}
        for name, reader in {**self.readers, **self._read_files()}.items():
            system.update(self._try(name, reader))
        processes = self._try("processes", self._processes.read)
        runs = {service: row["status"] == "running" for service, row in processes.items()}
        self._seen.update(runs)
        check = partial(PORT_CHECKS[self._config.check_mode], self._config.check_host)
        parts = {
            "processes": processes,
            # before the port check, so that its own connections do not count
            "accept_queue": self._try("accept_queue", partial(self._by_port, accept_queues)),
            "services": self._try("services", partial(self._by_port, check)),
            "zonemta": self._try(
                "ZoneMTA's figures (ZONEMTA_URL)", partial(self._read_zonemta, runs)),
        }
        role = self._config.node_role
        body = {
            "timestamp": iso_utc(taken), "system": system,
            **{name: part for name, part in parts.items() if part},
            "role": self._seen.role() if role == "auto" else role, "seen": self._seen.services(),
        }
        body["agent"] = {
            "version": VERSION,
            **self._try("rss_bytes", lambda: {"rss_bytes": own_rss_bytes()}),
            "cpu_seconds": round(time.process_time(), 3),
            "collect_ms": round(1000 * (self._clock() - started), 1),
            "collect_errors": self.collect_errors,
            **self._agent_figures(),
        }
        self._log_readable()
        return Sample(int(taken * 1000), pack(body))

    def _read_files(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Read LXCFS_FILES in the worker; return name -> a call that gives its result."""
        paths = {name: path for name, path in LXCFS_FILES.items() if name in self.readers}
        answers = self._files.run({path: self.readers[name] for name, path in paths.items()})
        return {name: partial(Worker.result, answers, path) for name, path in paths.items()}

    def _try(self, name: str, reader: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a reader; drop and count what is None, not finite, or could not be read."""
        try:
            found = reader()
        except READ_ERRORS as error:
            self._missing(name, _reason(error))
            return {}
        for key, value in [*found.items()]:
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                self._missing(key, "no valid reading this time")
                del found[key]
        return found

    def _missing(self, name: str, why: str) -> None:
        self.collect_errors += 1
        self._unread.add(name)
        self._problems.begin(name, f"cannot read {name}: {why}; it is left out of the samples")

    def _log_readable(self) -> None:
        """Log what was missing in the sample before, and can be read again."""
        for name in sorted(self._was_unread - self._unread):
            self._problems.end(name, f"{name} can be read again")
        self._was_unread, self._unread = self._unread, set()

    def guarded(self, work: Callable[[], object]) -> None:
        """Do a piece of this thread's work; log and count an exception."""
        try:
            work()
        except Exception:
            self.collect_errors += 1
            self._problems.crash("the collector failed; trying again at the next tick")

    def _by_port(self, read: Callable[[tuple[int, ...]], Mapping[int, Any]]) -> dict[str, Any]:
        """Return what is read of each port to check."""
        role, services = self._config.node_role, self._seen.services()
        ports = self._config.check_ports or ports_of(role, services)
        return {f"port_{port}": value for port, value in read(ports).items()}

    def _read_zonemta(self, runs: Mapping[str, bool]) -> dict[str, Any]:
        name, url = "ZoneMTA's API", self._config.zonemta_url
        is_asked = url != "off" and runs.get("zonemta", False)
        results = self._zonemta.run({name: partial(ask_zonemta, url)} if is_asked else {})
        if is_asked and name not in results:  # it hangs; that is logged already
            self.collect_errors += 1
        return Worker.result(results, name) if name in results else {}


# --- the buffer --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, on its way from the collector to the dashboard."""

    seq: int  # the time at which it was taken, in ms since 1970; unique in a buffer
    packed: bytes  # JSON compressed by zlib; the same for every dialect, without the node id


@dataclass(frozen=True, slots=True)
class Counters:
    """At every moment: sampled + loaded = delivered + refused + dropped + waiting."""

    sampled: int
    delivered: int
    refused: int
    dropped: int
    waiting: int
    loaded: int = 0  # from disk


class Buffer:
    """The undelivered samples: a ring in memory, its copy on disk, and a queue of wake-ups.

    A full ring drops its oldest sample. With a State, save() copies the ring to STATE_DIRECTORY.
    A Worker does so: a disk that hangs is waited for once, then the samples stay in memory until
    it answers.
    """

    def __init__(self, size: int, state: State | None = None) -> None:
        self._size = size
        self._state = state
        self._worker = Worker(DISK_LIMIT_S, Problems())
        self._disk_problems = Problems()  # of the worker's thread
        self._is_loaded = state is None
        self.is_closed = False
        self._news: queue.Queue[None] = queue.Queue()  # put() and close() wake wait()
        # The lock guards everything below. Nothing blocks while it is held.
        self._lock = threading.Lock()
        self._ring: dict[int, Sample] = {}  # by seq, oldest first
        self._files: set[int] = set()  # the seq of each file on disk
        self._save_until = 0  # samples up to this seq must be on disk
        self._last_seq = 0
        self._count = dict.fromkeys(("sampled", "loaded", "delivered", "refused", "dropped"), 0)

    def put(self, sample: Sample) -> None:
        """Add a sample and wake the sender; first save it, if others wait or are not loaded yet."""
        with self._lock:
            is_behind = bool(self._ring) or not self._is_loaded
            sample = dataclasses.replace(sample, seq=max(sample.seq, self._last_seq + 1))
            self._last_seq = sample.seq
            self._ring[sample.seq] = sample
            self._count["sampled"] += 1
            self._make_room()
        if is_behind:
            self.save()
        self._news.put(None)

    def _make_room(self) -> None:
        while len(self._ring) > self._size:
            del self._ring[next(iter(self._ring))]
            self._count["dropped"] += 1

    def close(self) -> None:
        """Say that no more samples will come; end a wait() that is under way."""
        self.is_closed = True
        self._news.put(None)

    def wait(self, timeout_s: float) -> None:
        """Block until a sample comes, close() is called, or the time is over."""
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))

    def counters(self) -> Counters:
        with self._lock:
            return Counters(waiting=len(self._ring), **self._count)

    # - for the sender

    def newest(self) -> Sample | None:
        with self._lock:
            return next(reversed(self._ring.values()), None)

    def oldest(self, count: int, postponed: Container[int] = ()) -> list[Sample]:
        """Return the oldest samples; those whose seq is in `postponed` come after all others."""
        with self._lock:
            order = sorted(self._ring, key=lambda seq: (seq in postponed, seq))
            return [self._ring[seq] for seq in order[:count]]

    def get(self, seq: int) -> Sample | None:
        with self._lock:
            return self._ring.get(seq)

    def settle(self, sample: Sample, outcome: str) -> None:
        """Remove a sample that was `delivered` or `refused`."""
        with self._lock:
            if not self._ring.pop(sample.seq, None):  # the full ring dropped it meanwhile
                self._count["dropped"] -= 1
            self._count[outcome] += 1
        self._sync()

    # - the copy on disk

    def load(self) -> None:
        """Add the samples that an earlier run left on disk. What cannot be read is tried again."""
        self._sync(LOAD_LIMIT_S)

    def save(self) -> None:
        """Write all samples that wait. What the disk refuses is tried again later."""
        with self._lock:
            self._save_until = self._last_seq
        self._sync()

    def _sync(self, limit_s: float = DISK_LIMIT_S) -> None:
        if self._state and (not self._is_loaded or self._worker.hanging or self._due_files()):
            with contextlib.suppress(TimeoutError):  # the worker logs that it hangs
                self._worker.call(STATE_DIRECTORY, partial(self._sync_files, self._state), limit_s)

    def _due_files(self) -> list[int]:
        """Return the seq of each file to remove, then of each to write: removing makes room."""
        with self._lock:
            wanted = {seq for seq in self._ring if seq <= self._save_until}
            return [*sorted(self._files - self._ring.keys()), *sorted(wanted - self._files)]

    def _sync_files(self, state: State) -> None:
        """Read the files once, then remove and write what is due. Runs in the worker."""
        if not self._is_loaded:
            self._load_files(state)
        due = self._due_files()
        for seq in due:
            sample = self.get(seq)  # None: delivered or dropped, so its file goes
            try:
                if sample:
                    state.write(sample)
                else:
                    state.remove(seq)
            except OSError as error:
                problem = "cannot write undelivered samples to disk"
                self._disk_problems.begin("disk", problem, _reason(error))
                if sample:
                    break  # the next write would fail too; the next removal may not
            else:
                update_files = self._files.add if sample else self._files.discard
                with self._lock:
                    update_files(seq)
        if due and not self._due_files():
            self._disk_problems.end("disk", "writing undelivered samples to disk again")

    def _load_files(self, state: State) -> None:
        new = {sample.seq: sample for sample in state.load(self._files)}
        with self._lock:
            self._files |= new.keys()
            self._ring = dict(sorted({**new, **self._ring}.items()))
            self._last_seq = max(self._last_seq, *self._ring, 0)
            self._count["loaded"] += len(new)
            over = len(self._ring) - self._size
            self._make_room()
        self._is_loaded = not state.unread
        if new:
            log.info("loaded %d undelivered samples from the last run", len(new))
        if over > 0:
            log.warning("dropped %d saved samples: BUFFER_SIZE=%d is too small", over, self._size)
        if state.unread:
            self._disk_problems.begin("read", f"cannot read saved samples: {state.unread}")
        else:
            self._disk_problems.end("read", "all saved samples are read")


# --- sending -----------------------------------------------------------------------------


class Sender:
    """Registers the node and delivers what is in the buffer; used by one thread only.

    The newest sample is the heartbeat. If it is delivered, up to 10 of the oldest follow.
    """

    def __init__(
        self, config: Config, buffer: Buffer, transport: Transport, *,
        clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._buffer = buffer
        self._transport = transport
        self._dialect = DIALECTS[config.dashboard_api]
        self._clock = clock
        self._now = now
        self._jitter = jitter
        self._problems = Problems()
        self._own_id = config.node_id  # "" until the host name is set
        self._node_id = ""  # as the dashboard confirmed it; "": not registered yet
        self._registered: Request | None = None  # what the dashboard knows of this node
        self._plan: list[Sample] = []  # what to try next: the heartbeat, or the oldest after it
        self._heartbeat_seq = 0  # of the newest sample that was tried
        self._retry_at = -math.inf  # no retry before this time
        self._quiet_until = -math.inf  # no request at all before this time (Retry-After)
        self._register_after = -math.inf  # no other registration before this time
        self.stop_by = math.inf  # no attempt begins that would not end by then
        self._heartbeats = Tries()  # at all heartbeats since the last one that was delivered
        self._down_since = math.inf  # when a heartbeat had used up its retries; inf: no outage
        self._tries: dict[int, Tries] = {}  # by seq: at samples that failed, and come last
        self._last = Answer(0)
        self._dropped = 0  # how many samples the full ring had dropped
        self._refused_logged = 0  # how many refused samples the log has named
        self._refused_logged_at = -math.inf
        self._refusal: Verdict | None = None  # of the sample that was refused last
        self._clock_agrees = 0
        self.clock_offset_s: int | None = None  # this node's clock minus the dashboard's
        self.crashes = 0
        self._due = math.inf  # when the next step is due, or the one that runs has begun

    def run(self) -> None:
        """Deliver until the buffer is closed; then the newest, and up to 10 of the oldest."""
        self._guarded(self._buffer.load)
        self._dropped = self._buffer.counters().dropped
        while not self._buffer.is_closed:
            self._buffer.wait(self._guarded(self.step))
        if self._buffer.get(self._heartbeat_seq):
            self._heartbeat_seq = 0  # try the newest once more, even if it has just failed
        while self._guarded(self.step) == 0:
            pass

    def _guarded(self, work: Callable[[], float | None]) -> float:
        """Do a piece of work; return the pause in seconds. A crash is no progress."""
        self._due = min(self._due, self._clock())
        try:
            pause = work() or 0.0
        except Exception:
            self.crashes += 1
            self._problems.crash("the sender failed; trying again")
            return CRASH_PAUSE_S
        self._due = self._clock() + pause
        return pause

    @property
    def due(self) -> float:
        """When this thread must have made progress (monotonic); infinite: at rest, or a look-up."""
        return max(self._due, self._transport.deadline)

    def step(self) -> float:
        """Make the attempt that is due; return how long to wait, at most, for a new sample."""
        self._report_losses()
        newest = self._buffer.newest()
        if newest is None:
            return math.inf
        if newest.seq > self._heartbeat_seq:
            self._heartbeat_seq, self._retry_at = newest.seq, -math.inf
            self._plan = [newest]
            self._tries = {seq: t for seq, t in self._tries.items() if self._buffer.get(seq)}
        self._plan = [sample for sample in self._plan if self._buffer.get(sample.seq)]
        if not self._plan or not self._fits():
            return math.inf
        pause = max(self._retry_at, self._quiet_until) - self._clock()
        if pause > 0:
            return pause
        self._attempt(self._plan[0])
        return 0.0

    def _fits(self) -> bool:
        """Tell whether an attempt as long as the last one would end before the stop."""
        return self._clock() + 1.2 * self._last.took_s + 0.2 < self.stop_by

    # - one attempt, and what follows from it

    def _attempt(self, sample: Sample) -> None:
        """Post the first sample of the plan, and plan what its outcome asks for."""
        is_heartbeat = sample.seq == self._heartbeat_seq
        neutral = unpack(sample.packed)
        post = self._deliver if is_heartbeat else self._post
        verdict = post(sample, neutral)
        if verdict.outcome is Outcome.DELIVERED:
            self._buffer.settle(sample, "delivered")
            if is_heartbeat:
                self._plan = self._buffer.oldest(DRAIN_PER_SUCCESS, postponed=self._tries)
                self._heartbeats = Tries()
                self._report_recovery()
                self._register_anew(neutral)
                self._post_zonemta(neutral)
            return
        tries = self._heartbeats if is_heartbeat else self._tries.setdefault(sample.seq, Tries())
        tries.failures += verdict.outcome is Outcome.RETRY
        is_last_try = tries.failures > len(BACKOFF_S)
        is_rejected = verdict.outcome is Outcome.REFUSED or (verdict.is_own_error and is_last_try)
        if is_rejected and self._count_strike(sample) >= STRIKES:
            self._refusal = verdict
            self._buffer.settle(sample, "refused")
        else:
            self._plan_retry(verdict, tries, is_heartbeat)
        self._buffer.save()

    def _plan_retry(self, verdict: Verdict, tries: Tries, is_heartbeat: bool) -> None:
        """Plan a retry; if none is left, or Retry-After asks for a longer pause, log why it failed.

        A heartbeat then gives way to the next new sample. An old sample comes after all others;
        the next old one follows at once if the dashboard itself refused this one.
        """
        is_quiet = self._quiet_until - self._clock() > sum(BACKOFF_S)
        if verdict.outcome is Outcome.RETRY and tries.failures <= len(BACKOFF_S) and not is_quiet:
            pause = BACKOFF_S[tries.failures - 1] * (0.75 + 0.5 * self._jitter())
            self._retry_at = self._clock() + pause
            return
        self._plan = self._plan[1:] if verdict.outcome is Outcome.REFUSED else []
        if is_heartbeat:
            self._down_since = min(self._down_since, self._clock())
            tries.failures = len(BACKOFF_S)  # the next heartbeat that fails has used up its retries
            size = self._config.buffer_size
            self._report("delivery", f"cannot deliver samples (keeping up to {size})", verdict)
        else:
            tries.failures = 0
            self._report("drain", "cannot deliver an old sample", verdict)

    def _count_strike(self, sample: Sample) -> int:
        """Count a rejection, if another sample was delivered since the last; return the strikes."""
        if delivered := self._buffer.counters().delivered:
            self._tries.setdefault(sample.seq, Tries()).strikes.add(delivered)
        return len(self._tries.get(sample.seq, Tries()).strikes)

    # - registration

    def _deliver(self, newest: Sample, neutral: Neutral) -> Verdict:
        """Post the newest sample; register the node first if the dashboard does not know it."""
        if not self._node_id:
            verdict = self._register(neutral)
            if not self._node_id:
                return verdict
        verdict = self._post(newest, neutral)
        if verdict.outcome is Outcome.REGISTER and self._clock() >= self._register_after:
            registration = self._register(neutral)
            if registration.outcome is not Outcome.DELIVERED:
                return registration
            verdict = self._post(newest, neutral)
            if verdict.outcome is Outcome.REGISTER:
                self._register_after = self._clock() + REGISTER_AGAIN_S
        return verdict

    def _register_anew(self, neutral: Neutral) -> None:
        """Tell a dashboard that takes samples what is new about this node."""
        is_new = self._registered != self._registration(neutral, self._transport.local_ip or "")
        if is_new and self._clock() >= self._register_after:
            last = self._last
            self._register(neutral)
            self._last = last  # the status line tells of samples

    def _register(self, neutral: Neutral) -> Verdict:
        """Register the node as it was in that sample; at first with the address of the route."""
        self._own_id = self._own_id or host_name()
        if not self._own_id:
            return Verdict(Outcome.KEPT, problem="the host name is not set yet (or set NODE_ID)")
        ip = (self._node_id and self._transport.local_ip) or self._transport.route_ip()
        request = self._registration(neutral, ip)
        verdict, quiet_until = self._exchange(request, judge_registration)
        if verdict.outcome is Outcome.DELIVERED:
            self._node_id = self._dialect.confirmed_id(self._last.body) or self._own_id
            self._problems.end("registration")
            if request != self._registered:
                shown = printable(self._node_id, self._config.api_key)
                log.info("registered as %s (role %s, address %s)", shown, neutral["role"], ip)
            self._registered = request
        elif self._node_id:  # samples go on under the id that was confirmed before
            self._register_after = quiet_until
            self._report("registration", "cannot register again", verdict)
        else:
            self._quiet_until = quiet_until
        problem = f"registration: {verdict.problem}"
        # A registration that fails is no strike against the sample.
        return dataclasses.replace(verdict, problem=problem, is_own_error=False)

    def _registration(self, neutral: Neutral, ip: str) -> Request:
        return self._dialect.register(neutral, self._own_id, ip, self._config.api_key)

    # - posting

    def _post(self, sample: Sample, neutral: Neutral) -> Verdict:
        """Post a sample. What the dashboard refuses is posted once more at once."""
        request = self._dialect.sample(neutral, self._node_id, self._config.api_key)
        verdict, self._quiet_until = self._exchange(request, judge)
        if verdict.outcome is Outcome.REFUSED:
            verdict, self._quiet_until = self._exchange(request, judge)
        return verdict

    def _exchange(self, request: Request, weigh: Callable[..., Verdict]) -> tuple[Verdict, float]:
        """Post; return the verdict, and the end of the Retry-After (monotonic; -inf without)."""
        self._last = answer = self._transport.post(request, self.stop_by - self._clock())
        verdict = weigh(answer, self._config.api_key, self._dialect.hints)
        if verdict.outcome is Outcome.DELIVERED:
            self._note_clock(answer)
        else:
            self._transport.disconnect()
        if verdict.outcome is not Outcome.RETRY:
            return verdict, -math.inf
        pause = retry_after_s(answer, self._now() - (self.clock_offset_s or 0))
        # Up to an interval longer: nodes that got the same Retry-After do not return together.
        pause += self._jitter() * min(pause, self._config.interval_s)
        return verdict, self._clock() + pause

    def _post_zonemta(self, neutral: Neutral) -> None:
        """Post ZoneMTA's figures, once, where the dialect has an address of their own for them."""
        request = self._dialect.zonemta(neutral, self._node_id, self._config.api_key)
        if request is None or not self._fits():
            return
        answer = self._transport.post(request, min(self.stop_by - self._clock(), ZONEMTA_POST_S))
        verdict = judge(answer, self._config.api_key, self._dialect.hints)
        if verdict.outcome is Outcome.DELIVERED:
            self._problems.end("zonemta", "delivering ZoneMTA's figures again")
        else:
            self._report("zonemta", "cannot deliver ZoneMTA's figures", verdict)

    # - what the log and the samples tell of it

    def _report(self, name: str, what: str, verdict: Verdict) -> None:
        self._problems.begin(name, f"{what}: {verdict.problem}", verdict.detail)

    def _note_clock(self, answer: Answer) -> None:
        """Compare the clocks: a sample with a wrong time does not show on the dashboard."""
        if (date := http_date(answer.date)) is None:
            return
        self.clock_offset_s = offset = round(self._now() - date - 0.5)  # Date is cut to the second
        self._clock_agrees = self._clock_agrees + 1 if abs(offset) <= CLOCK_OFFSET_LIMIT_S else 0
        if not self._clock_agrees:
            way = "ahead of" if offset > 0 else "behind"
            what = f"this node's clock is {way} the dashboard's: is time synchronisation running?"
            self._problems.begin("clock", what, f"{abs(offset)} s")
        elif self._clock_agrees >= CLOCK_AGREES:
            self._problems.end("clock", "this node's clock agrees with the dashboard's again")

    def _report_recovery(self) -> None:
        """Log the end of an outage, and the end of trouble with old samples."""
        waiting = self._buffer.counters().waiting
        took_s, self._down_since = self._clock() - self._down_since, math.inf
        self._problems.end("delivery", f"delivering again after {took_s:.0f} s, {waiting} waiting")
        if not waiting:
            self._problems.end("drain")

    def _report_losses(self) -> None:
        """Log refused samples (the first at once, then one line an hour), and dropped ones."""
        counters, now, size = self._buffer.counters(), self._clock(), self._config.buffer_size
        refused = counters.refused - self._refused_logged
        if refused and now - self._refused_logged_at >= REFUSED_LOG_S:
            self._refused_logged, self._refused_logged_at = counters.refused, now
            log.warning(
                "the dashboard refused %d samples for good (%d since the start): %s",
                refused, counters.refused, self._refusal,
            )
        if counters.dropped > self._dropped:
            problem = f"the oldest samples are dropped: more than BUFFER_SIZE={size} wait"
            self._problems.begin("dropped", problem)
        elif counters.waiting <= size // 2:
            words = f"no more samples are dropped ({counters.dropped} dropped so far)"
            self._problems.end("dropped", words)
        self._dropped = counters.dropped

    def status(self) -> str:
        """Say in one line how the sending goes, for `systemctl status`."""
        counters, last = self._buffer.counters(), self._last
        state = "ok" if counters.delivered else "starting"
        if self._heartbeats.failures:
            state = "retrying" if self._down_since == math.inf else "not delivering"
        figures = f"{counters.delivered} sent, {counters.waiting} waiting"
        if last.status or last.reason:
            figures += f", last {last.status or 'unanswered'} in {1000 * last.took_s:.0f} ms"
        return f"{state}: {figures}"


# --- problems, workers, ticks ------------------------------------------------------------


class Problems:
    """What is wrong now: each problem is logged when it begins and when it ends.

    A problem has a name and one or more descriptions. Each description is logged once until
    the problem ends, and again the next time. Not thread-safe: each thread has its own.
    """

    def __init__(self) -> None:
        self._now: dict[str, set[str]] = {}  # name -> descriptions that were logged

    def begin(self, name: str, what: str, detail: str = "", level: int = logging.WARNING) -> None:
        """Log a problem, unless this description was logged since it began; detail may vary."""
        known = self._now.setdefault(name, set())
        if what not in known and len(known) < 100:  # some contain an answer's words, which vary
            known.add(what)
            text = f"{what}: {detail}" if detail else what
            log.log(level, "%s", text, exc_info=level == logging.ERROR)

    def end(self, name: str, message: str = "") -> None:
        """Log the end of a problem, if it had begun."""
        if self._now.pop(name, None) and message:
            log.info("%s", message)

    def crash(self, what: str) -> None:
        """Log the exception that is being handled with its traceback, once for each place."""
        line = traceback.extract_tb(sys.exc_info()[2])[-1].lineno
        self.begin("crash", f"{what} (line {line})", level=logging.ERROR)


@dataclass(slots=True)
class Batch:
    """Calls that one thread of a Worker makes, one after the other."""

    calls: Mapping[str, Callable[[], Any]]
    current: str = ""  # the name of the call that is being made
    begun: float = field(default_factory=time.monotonic)  # when it began
    results: dict[str, Any] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)
    is_abandoned: bool = False


class Worker:
    """Makes calls that may never return in a daemon thread, with a time limit for all of them.

    Each call has half of the time that is left when it begins; the last one has all of it. One
    that takes longer is abandoned with its thread: it is named in the log, and not made again
    until it returns. A new thread makes the calls that follow. While MOST_ABANDONED calls hang,
    none is made.
    """

    MOST_ABANDONED = 4

    def __init__(self, limit_s: float, problems: Problems) -> None:
        self._limit_s = limit_s
        self._problems = problems
        self._inbox: queue.SimpleQueue[Batch | None] | None = None  # of the thread at rest
        self._lock = threading.Lock()  # one run() at a time
        self.hanging: dict[str, Batch] = {}  # by the name of the call that hangs

    def run(
        self, calls: Mapping[str, Callable[[], T]], limit_s: float = 0.0
    ) -> dict[str, T | Exception]:
        """Make the calls in their order; return by name what each returned or raised.

        A call that is missing in the result hangs, or there was no time or thread left for it.
        A run() without calls logs what no longer hangs. A second run() at the same time waits
        for the first one; after the limit it makes no call. limit_s: other than the worker's.
        """
        if not self._lock.acquire(timeout=self._limit_s):
            return {}
        try:
            for name, batch in list(self.hanging.items()):
                if name in batch.results:
                    del self.hanging[name]
                    if name not in calls:  # else it is made again, and may hang again
                        self._note_return(name, batch.results[name])
            deadline = time.monotonic() + (limit_s or self._limit_s)
            results: dict[str, Any] = {}
            todo = {name: call for name, call in calls.items() if name not in self.hanging}
            while todo and len(self.hanging) < self.MOST_ABANDONED and time.monotonic() < deadline:
                batch = self._start(todo)
                is_finished = self._wait(batch, deadline)
                results.update(batch.results)
                if is_finished or not batch.current:
                    break  # without a current call, the thread did not even begin: a busy machine
                todo = {n: call for n, call in todo.items() if n not in {*results, batch.current}}
            for name, result in results.items():
                self._note_return(name, result)
            return results
        except RuntimeError:  # the machine can start no thread
            return {}
        finally:
            self._lock.release()

    def _note_return(self, name: str, result: Any) -> None:
        """Log that a call no longer hangs, unless it was given up by a time limit of its own."""
        if not isinstance(result, TimeoutError):
            self._problems.end(f"{name} hangs", f"{name} no longer hangs")

    def call(self, name: str, call: Callable[[], T], limit_s: float = 0.0) -> T:
        """Make one call; raise TimeoutError if it hangs."""
        return self.result(self.run({name: call}, limit_s), name)

    @staticmethod
    def result(results: Mapping[str, T | Exception], name: str) -> T:
        """Return what a call of run() returned; raise what it raised, TimeoutError if it hangs."""
        answer = results.get(name, TimeoutError(f"{name} hangs"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self, calls: Mapping[str, Callable[[], Any]]) -> Batch:
        if self._inbox is None:
            inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), name="worker", daemon=True).start()
            weakref.finalize(self, inbox.put, None)  # the thread ends with its Worker
            self._inbox = inbox
        batch = Batch(calls)
        self._inbox.put(batch)
        return batch

    @staticmethod
    def _work(inbox: queue.SimpleQueue[Batch | None]) -> None:
        while batch := inbox.get():
            for name, call in batch.calls.items():
                if batch.is_abandoned:
                    return
                batch.current, batch.begun = name, time.monotonic()
                try:
                    batch.results[name] = call()
                except Exception as error:
                    batch.results[name] = error
            batch.finished.set()
            if batch.is_abandoned:
                return

    def _wait(self, batch: Batch, deadline: float) -> bool:
        """Wait until a batch is finished; abandon it if one of its calls takes too long."""
        *_, last = batch.calls
        while not batch.finished.is_set():
            its_deadline = deadline if batch.current == last else (batch.begun + deadline) / 2
            left = its_deadline - time.monotonic()
            if left <= 0:
                batch.is_abandoned, self._inbox = True, None
                if batch.current:
                    self.hanging[batch.current] = batch
                    self._problems.begin(f"{batch.current} hangs", f"{batch.current} hangs")
                return False
            batch.finished.wait(left)
        return True


def next_tick(due: float, now: float, interval: float) -> float:
    """Return the first tick after now; missed ones are skipped, not made up in a burst."""
    return due + interval * (max(0, math.floor((now - due) / interval)) + 1)


def first_pause_s(node_id: str, interval_s: float) -> float:
    """Return the pause between a node's first two samples: half to one and a half intervals.

    It depends on the node: nodes that start together, after a power cut, then post apart.
    """
    return interval_s * (0.5 + zlib.crc32(node_id.encode()) / 2**32)


# --- what an answer leads to -------------------------------------------------------------

EXCERPT_CHARS = 200  # of a dashboard's answer, in the log
HEADER_CHARS = 60  # of a header of it
RETRY_AFTER_LIMIT_S = 300.0


class Outcome(Enum):
    """What becomes of a sample after an answer."""

    DELIVERED = "delivered"
    RETRY = "tried again after a pause, then kept"
    KEPT = "kept; tried again after the next success"
    REGISTER = "kept; the node registers and tries once more"
    REFUSED = "refused by the dashboard itself: kept until the last strike"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer means: the outcome for what was posted, and why in words for the log."""

    outcome: Outcome
    problem: str = ""  # the same each time
    detail: str = ""  # may differ: what the dashboard wrote
    is_own_error: bool = False  # a 5xx in JSON, but not 502 to 504

    def __str__(self) -> str:
        return f"{self.problem}: {self.detail}" if self.detail else self.problem


@dataclass(slots=True)
class Tries:
    """The attempts at one old sample, or at all heartbeats since the last success."""

    failures: int = 0  # of an attempt and its retries
    strikes: set[int] = field(default_factory=set)  # how many samples were delivered until each


def parse_json(body: bytes) -> dict[str, Any] | None:
    """Return the object of a JSON text, None if it is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_json(body: bytes) -> bool:
    return parse_json(body) is not None


# A field of an answer, and what it says if the request failed.
FAILURE_WORDS = {
    "success": "false|0|no", "ok": "false|0|no", "status": "error|fail|failed",
    "statusCode": "[4-9][0-9]{2}",
}


def is_failure(body: bytes) -> bool:
    """Tell whether an answer's JSON says that it failed, whatever its status."""
    said = parse_json(body) or {}
    return bool(said.get("error") or said.get("errors")) or any(
        re.fullmatch(words, str(said.get(name)).lower()) for name, words in FAILURE_WORDS.items()
    )


class Rule(NamedTuple):
    """What an answer with one of these statuses and such a body leads to."""

    statuses: Container[int]
    outcome: Outcome
    advice: str = ""  # logged in place of what the dashboard wrote
    body: Callable[[bytes], bool] | None = None  # None: any
    note: str = ""  # logged behind the status
    is_own_error: bool = False


NOT_THE_DASHBOARD = "this is not the dashboard's answer: is DASHBOARD_URL right?"

# The first rule that fits counts; those of a dialect (`hints`) come before these. Only the
# dashboard speaks JSON: a proxy, a CDN or a captive portal may answer with the same statuses.
RULES = (
    Rule(range(200, 300), Outcome.KEPT, body=is_failure, note="but reports a failure"),
    Rule(range(200, 300), Outcome.DELIVERED, body=is_json),
    Rule((201, 202, 204), Outcome.DELIVERED, body=lambda body: not body),
    Rule(range(200, 300), Outcome.KEPT, NOT_THE_DASHBOARD),
    Rule(range(300, 400), Outcome.KEPT, note="a redirect: correct DASHBOARD_URL"),
    Rule((401,), Outcome.KEPT,
         "the dashboard does not accept API_KEY: set the key that it gave out"),
    Rule((403,), Outcome.KEPT, "the dashboard forbids it: look there for a blocked key or node"),
    Rule((404,), Outcome.REGISTER, "no such address or node: is DASHBOARD_URL right?", is_json),
    Rule((409,), Outcome.DELIVERED, body=is_json),  # the dashboard has the sample already
    Rule((400, 413, 415, 422), Outcome.REFUSED, body=is_json),
    Rule((400, 404, 409, 413, 415, 422), Outcome.KEPT, NOT_THE_DASHBOARD),
    Rule((500, 501, *range(505, 600)), Outcome.RETRY, body=is_json, is_own_error=True),
    Rule((408, 425, 429, *range(500, 600)), Outcome.RETRY),  # overloaded, or out of reach
    Rule(range(1000), Outcome.KEPT),
)


def judge(answer: Answer, key: str, hints: tuple[Rule, ...] = ()) -> Verdict:
    """Return the verdict on the answer to a sample."""
    if answer.status == 0:
        return Verdict(Outcome.RETRY, answer.reason)
    rule = next(
        rule for rule in (*hints, *RULES)
        if answer.status in rule.statuses and (rule.body is None or rule.body(answer.body))
    )
    if rule.outcome is Outcome.DELIVERED:
        return Verdict(Outcome.DELIVERED)
    server = printable(answer.server, key, HEADER_CHARS)
    problem = (
        f"answered {answer.status}" + (f" (Server: {server})" if server else "")
        + (f", {rule.note}" if rule.note else "")
    )
    words = printable(message_of(answer.body), key) or printable(answer.location, key, HEADER_CHARS)
    return Verdict(rule.outcome, problem, rule.advice or words, rule.is_own_error)


def judge_registration(answer: Answer, key: str, hints: tuple[Rule, ...] = ()) -> Verdict:
    """Return the verdict on the answer to a registration, which has to name the node's id."""
    verdict = judge(answer, key, hints)
    if verdict.outcome in (Outcome.REGISTER, Outcome.REFUSED):
        return dataclasses.replace(verdict, outcome=Outcome.KEPT)
    names_id = answer.status == 409 or confirmed_id(answer.body) is not None
    if verdict.outcome is Outcome.DELIVERED and not names_id:
        problem = f"answered {answer.status} without the id of the node"
        return Verdict(Outcome.KEPT, problem, NOT_THE_DASHBOARD)
    return verdict


def message_of(body: bytes) -> str:
    """Return the `error` or `message` of an answer's JSON, "" if it has none."""
    said = parse_json(body) or {}
    for value in (said.get("error"), said.get("message")):
        if isinstance(value, dict):
            value = value.get("message") or value.get("code")
        if value and isinstance(value, str):
            return value
    return ""


def confirmed_id(body: bytes) -> str | None:
    """Return the node id that an answer to a registration confirms, None if it names none."""
    top = parse_json(body) or {}
    for name in ("node_id", "nodeId", "id"):
        for place in (top, top.get("data")):
            value = place.get(name) if isinstance(place, dict) else None
            if type(value) in (str, int) and str(value).strip():
                return str(value)[:255]
    return None


def printable(text: str, key: str, limit: int = EXCERPT_CHARS) -> str:
    """Return the beginning of a foreign text, fit for the log: one line, without the key."""
    return _printable(mask(text[: 2 * limit + len(key)], key))[:limit]


def mask(text: str, key: str) -> str:
    """Replace by *** each run of six or more characters of the key (of all, if it is shorter)."""
    size = min(6, len(key))
    pieces = {key[start : start + size] for start in range(len(key) - size + 1)} - {""}
    shown = list(text)
    for start in range(len(text)):
        if text[start : start + size] in pieces:
            shown[start : start + size] = "\0" * size
    return re.sub("\0+", "***", "".join(shown))


def http_date(text: str) -> float | None:
    """Return the epoch seconds of an HTTP date, None if it is none."""
    try:
        found = parsedate_to_datetime(text)
        # All three formats are in UTC (RFC 9110, 5.6.7); asctime's does not say so.
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def retry_after_s(answer: Answer, now: float) -> float:
    """Return how long the dashboard wants to be left alone, at most RETRY_AFTER_LIMIT_S.

    now: its clock as far as it is known, in epoch seconds, for an answer without a Date.
    """
    try:
        seconds: float = int(answer.retry_after)
    except ValueError:
        until = http_date(answer.retry_after)
        seconds = 0.0 if until is None else until - (http_date(answer.date) or now)
    return min(RETRY_AFTER_LIMIT_S, max(0.0, seconds))


# --- dialects ----------------------------------------------------------------------------

Neutral = Mapping[str, Any]  # a sample without node id and dialect, as unpack() returns it


class Request(NamedTuple):
    """A POST, ready to be sent."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of dashboard is spoken to; a sample is neutral until it is posted."""

    headers: Callable[[str], dict[str, str]]  # with the key
    node: Callable[[Neutral, str, str], dict[str, Any]]  # of a registration: node id, address
    body: Callable[[Neutral, str], dict[str, Any]]  # of a sample: node id
    queue: Callable[[Neutral, str], dict[str, Any]]  # ZoneMTA's figures, if they go by themselves
    hints: tuple[Rule, ...]  # answers that mean more than their status says
    is_gzip: bool  # samples are
    confirmed_id: Callable[[bytes], str | None]  # by the answer to a registration; None: our own

    def register(self, neutral: Neutral, node_id: str, ip: str, key: str) -> Request:
        """Render the registration of this machine, as it was in a neutral sample."""
        body = {"hostname": _printable(socket.gethostname()), **self.node(neutral, node_id, ip)}
        return Request("/api/v1/nodes", self.headers(key), _json(body))

    def sample(self, neutral: Neutral, node_id: str, key: str) -> Request:
        """Render a neutral sample; the same bytes each time for the same node id."""
        headers, body = self.headers(key), _json(self.body(neutral, node_id))
        if self.is_gzip:
            headers, body = {**headers, "Content-Encoding": "gzip"}, gzip.compress(body, mtime=0)
        return Request("/api/v1/metrics/system", headers, body)

    def zonemta(self, neutral: Neutral, node_id: str, key: str) -> Request | None:
        """Render what is posted after a sample; None if there is nothing."""
        body = self.queue(neutral, node_id)
        return Request("/api/v1/metrics/zonemta", self.headers(key), _json(body)) if body else None


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


OTHER_DIALECT = "the dashboard speaks another dialect: set DASHBOARD_API={}"
NOT_IN_V1 = ("node_id", "role", "seen")  # parts of a neutral sample

# The wire contract of docs/metrics.md: Bearer key, snake_case, samples as gzip JSON.
V1 = Dialect(
    headers=lambda key: {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    node=lambda neutral, node_id, ip: {
        "node_id": node_id, "ip": ip, "role": neutral["role"], "version": VERSION,
    },
    body=lambda neutral, node_id: {
        "node_id": node_id,
        **{name: part for name, part in neutral.items() if name not in NOT_IN_V1},
    },
    queue=lambda neutral, node_id: {},  # a part of the sample
    hints=(
        Rule((401,), Outcome.KEPT, OTHER_DIALECT.format("tinomail-monitor"),
             lambda body: b"x-api-key" in body.lower()),
    ),
    is_gzip=True,
    confirmed_id=confirmed_id,
)

# Our names -> those of tinomail-monitor.
MONITOR_SYSTEM = {
    "cpu_percent": "cpuPercent",
    "ram_used_percent": "ramPercent",
    "ram_used_bytes": "ramUsedBytes",
    "disk_used_percent": "diskPercent",
    "disk_free_bytes": "diskFreeBytes",
    "disk_read_bytes_sec": "diskReadBytesSec",
    "disk_write_bytes_sec": "diskWriteBytesSec",
    "net_rx_bytes_sec": "netRxBytesSec",
    "net_tx_bytes_sec": "netTxBytesSec",
    "net_rx_errors": "netRxErrors",
    "net_tx_errors": "netTxErrors",
    "tcp_established": "tcpEstablished",
    "tcp_time_wait": "tcpTimeWait",
    "open_files": "openFiles",
}
MONITOR_PROCESSES = {"zonemta": "zone-mta", "redis": "redis-server", "mongodb": "mongod"}
# Its pages have a tab for `zonemta`, none for these.
MONITOR_ROLES = {"zonemta-outbound": "zonemta", "zonemta-local": "zonemta"}
# Its name -> the sum of which of ours. Its page takes rates from `sentTotal`: all mails that were
# delivered, bounced, or tried at least once. `queueSize` is all that waits, as in mailq.
MONITOR_QUEUE = {
    "queueSize": ("queued", "deferred"),
    "deferredTotal": ("deferred",),
    "sentTotal": ("delivered_total", "bounced_total", "deferred"),
    "deliveredTotal": ("delivered_total",),
    "bouncedTotal": ("bounced_total",),
    "rejectedTotal": ("rejected_total",),
    "connectionsActive": ("connections",),
}


def _monitor_node(neutral: Neutral, node_id: str, ip: str) -> dict[str, Any]:
    metadata = {
        "agentVersion": VERSION, "platform": sys.platform, "arch": platform.machine(),
        "detectedServices": [name for name in neutral.get("seen", ()) if name in SERVICES],
    }
    with contextlib.suppress(OSError, ValueError):  # none, or not UTF-8
        system = platform.freedesktop_os_release()  # os-release(5)
        metadata |= {"distro": system["NAME"], "release": system.get("VERSION_ID", "rolling")}
    return {
        "nodeId": node_id, "role": MONITOR_ROLES.get(neutral["role"], neutral["role"]),
        "ipAddress": ip.partition("%")[0],  # fe80::1%eth0
        "metadata": metadata,
    }


def _monitor_body(neutral: Neutral, node_id: str) -> dict[str, Any]:
    system, role = neutral["system"], neutral["role"]
    body: dict[str, Any] = {
        "nodeId": node_id, "nodeRole": MONITOR_ROLES.get(role, role),
        "timestamp": neutral["timestamp"],
        **{new: system[old] for old, new in MONITOR_SYSTEM.items() if old in system},
        **dict(zip(("load1m", "load5m", "load15m"), system.get("load_avg", ()))),
    }
    processes = [
        {"name": MONITOR_PROCESSES.get(name, name), "running": row["status"] == "running",
         "pid": row.get("pid"),  # null, but never absent: that is a 500 for the whole sample
         "cpuPercent": row.get("cpu_percent", 0), "memoryMB": row.get("memory_mb", 0)}
        for name, row in neutral.get("processes", {}).items()
    ]
    # The dashboard counts a node as alive only with processes. But where none could be read, "not
    # running" would be a lie: the rest of the sample is posted without them.
    return {**body, "processes": processes} if processes else body


def _monitor_queue(neutral: Neutral, node_id: str) -> dict[str, Any]:
    figures = neutral.get("zonemta", {})
    known = {
        theirs: sum(figures[name] for name in ours)
        for theirs, ours in MONITOR_QUEUE.items() if figures.keys() >= set(ours)
    }
    return {"nodeId": node_id, "timestamp": neutral["timestamp"], **known} if known else {}


# TinoMail Monitor as it is deployed: x-api-key, camelCase, never gzip. It takes samples of nodes
# that it does not know, so that a 404 never asks for a registration.
MONITOR = Dialect(
    headers=lambda key: {"x-api-key": key, "Content-Type": "application/json"},
    node=_monitor_node,
    body=_monitor_body,
    queue=_monitor_queue,
    hints=(
        Rule((401,), Outcome.KEPT,
             "the dashboard does not accept API_KEY: set the key that it gave out; "
             "if it is that one, " + OTHER_DIALECT.format("v1")),
        Rule((403,), Outcome.KEPT, "the dashboard blocks this node: unblock it there",
             lambda body: b'"blocked"' in body.lower()),
        Rule((404,), Outcome.KEPT, "no such address: is DASHBOARD_URL right?"),
    ),
    is_gzip=False,
    confirmed_id=lambda answer: None,
)

DIALECTS = {"v1": V1, "tinomail-monitor": MONITOR}


# --- the way to the dashboard ------------------------------------------------------------

# Errors of a socket whose address family is off or has no route here.
NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EAFNOSUPPORT)
SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"
CONNECTION_LIMIT_S = 3600.0  # then a kept connection is closed: the dashboard may have moved
ANSWER_LIMIT_BYTES = 64 * 1024  # of an answer's body, compressed or not; twice that in all


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back from a POST. Status 0: no answer, and `reason` says why."""

    status: int
    reason: str = ""
    body: bytes = b""  # decompressed, ANSWER_LIMIT_BYTES at most; empty for a redirect
    server: str = ""
    date: str = ""
    retry_after: str = ""
    location: str = ""
    took_s: float = 0.0
    is_lasting: bool = False  # no answer, and waiting does not mend it


class Transport(requests.adapters.HTTPAdapter):
    """requests' adapter, to post over one kept-alive connection that is opened and limited here.

    A session of requests would follow redirects, keep cookies, decompress without limit, and take
    proxies, CA files and passwords from the environment.
    """

    def __init__(self, base_url: str, ca_bundle: str = "") -> None:
        super().__init__()
        self._url = urlsplit(base_url)
        self._ca_bundle = ca_bundle
        self._tls: ssl.SSLContext | None = None  # None: the CA files are to be read (again)
        self._connection: Any = None  # urllib3's; it may be closed by now
        self._opened = 0.0  # monotonic: when it was opened
        self._limit_s = REQUEST_DEADLINE_S  # of an attempt
        self._addresses: list[Any] = []  # (family, socket address), the best one first
        self._is_good = False  # the first one answered the last attempt with a 2xx
        self.local_ip: str | None = None  # this machine's address, of the last connection
        self.deadline = 0.0  # monotonic: when the attempt ends; infinite during a name look-up
        pool = self.poolmanager.pool_classes_by_scheme[self._url.scheme]
        connection = type("Connection", (pool.ConnectionCls,), {
            "connect": lambda opened: self.connect(opened), "response_class": self.response,
        })
        pool = type("Pool", (pool,), {"ConnectionCls": connection})
        self.poolmanager.pool_classes_by_scheme = {self._url.scheme: pool}

    def post(self, request: Request, within_s: float = math.inf) -> Answer:
        """Send one POST; never raises for what the network or the dashboard does.

        within_s: a limit besides its own, the look-up of the name aside.
        """
        url = self._url.geturl() + request.path
        headers = {"User-Agent": f"tinomail-agent/{VERSION}", **request.headers}
        prepared = requests.Request("POST", url, headers, data=request.body).prepare()
        started = time.monotonic()
        if self._connection and started - self._opened > CONNECTION_LIMIT_S:
            self._connection.close()
        answer = self._attempt(prepared, min(self._limit_s, within_s))
        took_s = time.monotonic() - started
        self._is_good = self._is_good or 200 <= answer.status < 300
        if answer.status and took_s < REQUEST_DEADLINE_S:
            self._limit_s = REQUEST_DEADLINE_S
        elif answer.reason == TIME_IS_OVER:
            self._limit_s = SLOW_DEADLINE_S
        return dataclasses.replace(answer, took_s=took_s)

    def disconnect(self) -> None:
        """Close the connection after a failure; try its address last, but a good one once more."""
        if self._connection:
            self._connection.close()
            if not self._is_good:
                self._addresses.append(self._addresses.pop(0))
            self._is_good = False

    def route_ip(self) -> str:
        """Return this machine's address on the way to the dashboard, "" without one."""
        with contextlib.suppress(OSError, UnicodeError):  # the post will say why
            for family, address in self._look_up():
                with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.connect(address)  # a datagram socket: nothing is sent
                    return str(sock.getsockname()[0])
        return ""

    # - what requests and urllib3 call

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Do nothing: requests would trust its own CA file."""

    def build_response(self, req: Any, resp: Any) -> Any:
        """Hand on urllib3's response: requests would take cookies from it."""
        return resp

    def connect(self, connection: Any) -> None:
        """Open the socket of urllib3's connection, with TLS where the dashboard has it."""
        self._opened, self._connection = time.monotonic(), None
        if self._url.scheme == "https" and not self._tls:
            self._tls = tls_context(self._ca_bundle)
        sock = self._dial()
        self._connection = connection
        self.local_ip = str(sock.getsockname()[0])
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(self._left_s())
        if self._tls:
            name = str(self._url.hostname).rstrip(".")
            try:
                sock = self._tls.wrap_socket(sock, server_hostname=name)
            except ssl.SSLCertVerificationError:
                self._tls = None
                raise
        connection.sock, connection.is_verified = sock, True

    def response(self, sock: Any, **named: Any) -> http.client.HTTPResponse:
        """Return http.client's response, with a time limit and a size limit for all of it.

        A socket's own time-out starts anew with every byte that arrives. http.client alone reads
        headers of 6 MB, interim answers without end, and a chunk of negative size without limit.
        """
        response = http.client.HTTPResponse(sock, **named)
        raw: Any = response.fp.raw
        read, left = raw.readinto, 2 * ANSWER_LIMIT_BYTES

        def read_some(buffer: Any) -> int:
            nonlocal left
            sock.settimeout(self._left_s())
            count: int = read(buffer)
            left -= count
            if left < 0:
                raise http.client.LineTooLong("answer")
            return count

        raw.readinto = read_some
        return response

    def _left_s(self) -> float:
        """Return the time that is left for the attempt; raise TimeoutError if it is over."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def _dial(self) -> socket.socket:
        """Connect to the first address that answers; none takes more than its share of the time."""
        failures: list[OSError] = []
        addresses = self._look_up()
        for index, (_, address) in enumerate(addresses):
            try:
                share_s = self._left_s() / (len(addresses) - index)
                # As text, a link-local address keeps its interface.
                host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
                sock = socket.create_connection((host, address[1]), share_s)
            except OSError as error:
                failures.append(error)
            else:
                addresses.insert(0, addresses.pop(index))
                return sock
        failure = min(failures, key=lambda failure: failure.errno in NO_WAY)
        raise urllib3.exceptions.HTTPError from failure  # urllib3 would swallow some OSErrors

    # - one attempt

    def _attempt(self, request: requests.PreparedRequest, limit_s: float) -> Answer:
        """Send a request over the kept connection, else over a new one."""
        raw, opened = None, self._opened
        self.deadline = time.monotonic() + limit_s
        try:
            raw = self.send(request, stream=True, timeout=SLOW_DEADLINE_S)
            with contextlib.closing(raw):
                return _read_answer(raw)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            answer = no_answer(error)
        if answer.reason == CLOSED and raw is None and self._opened == opened:
            # The server has just closed the kept connection, because it was idle.
            return self._attempt(request, self.deadline - time.monotonic())
        return answer

    def _look_up(self) -> list[Any]:
        """Return the addresses of the dashboard, in the order in which they are to be tried."""
        port = self._url.port or (443 if self._url.scheme == "https" else 80)
        left_s = max(0.0, self.deadline - time.monotonic())
        self.deadline = math.inf  # getaddrinfo() has no time limit
        try:
            rows = socket.getaddrinfo(self._url.hostname, port, type=socket.SOCK_STREAM)
            found = [(family, address) for family, *_, address in rows]
            order = self._addresses + found
            self._addresses = [*dict.fromkeys(one for one in order if one in found)]
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or not self._addresses:
                raise  # else no name server answers: the addresses of the last look-up
        finally:
            self.deadline = time.monotonic() + left_s
        return self._addresses


def _read_answer(raw: Any) -> Answer:
    """Read urllib3's response: of a redirect the headers alone, else ANSWER_LIMIT_BYTES at most."""
    body = b""
    if not 300 <= raw.status < 400:
        body = raw.read(ANSWER_LIMIT_BYTES, decode_content=False)
        if raw.length_remaining and len(body) < ANSWER_LIMIT_BYTES:  # urllib3 does not mind
            raise ConnectionError
    if raw.headers.get("Content-Encoding"):  # the agent asks for none, but some proxies compress
        with contextlib.suppress(zlib.error):
            body = zlib.decompressobj(47).decompress(body, ANSWER_LIMIT_BYTES)  # gzip or zlib
    head = (raw.headers.get(name, "") for name in ("Server", "Date", "Retry-After", "Location"))
    return Answer(raw.status, "", body, *head)


class TrustError(ValueError):
    """The CA to trust cannot be read; the text says why."""


def tls_context(ca_bundle: str) -> ssl.SSLContext:
    """Trust CA_BUNDLE, else the system's store, else certifi's. Raises TrustError."""
    # Not create_default_context(): from Python 3.13 on it refuses private CAs that older
    # versions, openssl verify and curl take.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    certifi: str = requests.certs.where()  # type: ignore[attr-defined]
    for path in [ca_bundle] if ca_bundle else [SYSTEM_CA, certifi]:
        try:
            context.load_verify_locations(cafile=path)
            return context
        except ssl.SSLError:
            why = "it holds no certificate in PEM form"
        except OSError as error:
            why = os.strerror(error.errno or 0)
    raise TrustError(f"cannot use CA_BUNDLE={ca_bundle or path}: {why}")


# X509_V_ERR_* of openssl/x509_vfy.h: what is wrong with a certificate.
CERTIFICATE_PROBLEMS = {
    9: "is not valid yet (are the clocks right?)",
    10: "has expired",
    18: "is self-signed",
    **dict.fromkeys((19, 20, 21), "comes from a CA that this node does not trust"),
    62: "is for another name",
    64: "is for another IP address",
}

CLOSED = "the connection was closed before the answer was complete"
TIME_IS_OVER = "no complete answer in time (a firewall, or a dashboard that hangs)"

# Why there was no answer: an exception, whether it is lasting (waiting does not help), and our own
# words, since another exception's text may hold the key. The first row that fits counts.
NETWORK_PROBLEMS: tuple[tuple[Any, bool, str | Callable[[Any], str]], ...] = (
    (TrustError, True, str),
    (socket.gaierror, True, "the name in DASHBOARD_URL cannot be resolved"),
    (TimeoutError, False, TIME_IS_OVER),
    (ConnectionRefusedError, False, "connection refused"),
    ((ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError, http.client.IncompleteRead), False,
     CLOSED),
    (ssl.SSLCertVerificationError, True, lambda e: "the dashboard's certificate "
     + CERTIFICATE_PROBLEMS.get(e.verify_code, f"is bad (OpenSSL: {e.verify_message})")
     + " (CA_BUNDLE names the CA to trust)"),
    (ssl.SSLError, True,
     lambda e: f"TLS failed ({e.reason or 'no reason given'}); is this an https:// address?"),
    (http.client.LineTooLong, True, "the answer is too long"),
    (http.client.HTTPException, True, "the answer is not HTTP; is DASHBOARD_URL right?"),
)


def no_answer(error: BaseException) -> Answer:
    """Say why there was no answer; of the text of OpenSSL's errors alone, a word may follow."""
    causes = [error]
    while cause := causes[-1].__context__ or causes[-1].__cause__:
        causes.append(cause)
    for kinds, is_lasting, words in NETWORK_PROBLEMS:
        for cause in causes:
            if isinstance(cause, kinds):
                no_name_server = getattr(cause, "errno", None) == socket.EAI_AGAIN
                reason = words(cause) if callable(words) else words
                return Answer(0, reason, is_lasting=is_lasting and not no_name_server)
    codes = [c.errno for c in causes if isinstance(c, OSError) and isinstance(c.errno, int)]
    other = f"the request failed ({type(error).__name__})"
    return Answer(0, os.strerror(codes[-1]) if codes else other)


# --- state on disk -----------------------------------------------------------------------

STATE_DIRECTORY = "STATE_DIRECTORY"  # its name in the log when it hangs
FILE_LIMIT_BYTES = 64 * 1024  # of a file with a sample; of the JSON in it: 16 times that
SAMPLE_FILE = re.compile(r"(\d{12}|[1-9]\d{12,17})\.sample")


class State:
    """What outlives the process: the samples that wait, one in each file buffer/SEQ.sample.

    Nothing is synced, since the disk is the mail server's: a power cut may damage files, and
    may bring back those that were deleted last.
    """

    def __init__(self, folder: str) -> None:
        self._buffer = os.path.join(folder, "buffer")
        self._new = os.path.join(self._buffer, "new")  # the file that is being written
        self.unread = ""  # why load() could not read some files, "" if it could

    def load(self, known: Iterable[int] = ()) -> list[Sample]:
        """Read the samples that are not known. Delete damaged files, leave unreadable ones."""
        samples, damaged, self.unread = [], 0, ""
        names: list[str] = []
        try:
            with contextlib.suppress(FileNotFoundError), os.scandir(self._buffer) as entries:
                names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            self.unread = _reason(error)
        seqs = {int(name.split(".")[0]) for name in names if SAMPLE_FILE.fullmatch(name)}
        for seq in sorted(seqs.difference(known)):
            try:
                packed = read_bytes(self._path(seq), FILE_LIMIT_BYTES)
            except OSError as error:
                self.unread = _reason(error)
                continue
            if sample := read_sample(seq, packed):
                samples.append(sample)
            else:
                with contextlib.suppress(OSError):
                    self.remove(seq)
                    damaged += 1
        if damaged:
            log.warning("deleted %d damaged sample files (a power cut?)", damaged)
        return samples

    def write(self, sample: Sample) -> None:
        """Write a sample so that it is there as a whole or not at all. Raises OSError."""
        os.makedirs(self._buffer, exist_ok=True)
        with open(self._new, "wb") as stream:
            stream.write(sample.packed)
        os.replace(self._new, self._path(sample.seq))

    def remove(self, seq: int) -> None:
        """Remove the file of a sample, if there is one. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(seq))

    def _path(self, seq: int) -> str:
        return os.path.join(self._buffer, f"{seq:012}.sample")


def read_sample(seq: int, packed: bytes) -> Sample | None:
    """Return the sample that a file holds, None if the file is damaged or holds none."""
    try:
        neutral = unpack(packed)
        for dialect in DIALECTS.values():  # what can be rendered now can be rendered each time
            dialect.register(neutral, "", "", "")
            dialect.sample(neutral, "", "")
            dialect.zonemta(neutral, "", "")
        return Sample(seq, packed)
    except Exception:  # whatever a file may hold: it must not stop the start
        return None


# 1.0.0 drops a process or a disk that has a column which it does not know. So that a downgrade
# loses none, they are saved without these columns, and the whole sample once more beside them.
LATER_COLUMNS = ("uptime_seconds", "inodes_used_percent", "read_only")


def pack(sample: Mapping[str, Any]) -> bytes:
    def older(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in LATER_COLUMNS}

    system = sample["system"]
    return zlib.compress(_json({
        **sample,
        "processes": {name: older(row) for name, row in sample.get("processes", {}).items()},
        "system": {**system, "disks": [older(row) for row in system.get("disks", ())]},
        "whole": sample,
    }))


def unpack(packed: bytes) -> dict[str, Any]:
    """Return the sample that pack() was given, or that an older version packed."""
    inflate = zlib.decompressobj()
    body = json.loads(inflate.decompress(packed, 16 * FILE_LIMIT_BYTES))
    if not inflate.eof:
        raise ValueError
    return dict(body.get("whole", body))


def iso_utc(epoch_s: float) -> str:
    """Return the time as ISO 8601 in UTC with milliseconds and a Z."""
    whole, milli = divmod(int(epoch_s * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{milli:03d}Z"


# --- reading /proc and sysfs -------------------------------------------------------------

# What a reader raises when a metric cannot be read.
READ_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, struct.error,
    psutil.Error, http.client.HTTPException,
)
# Reader -> its file. In a container it may be of lxcfs, a FUSE file system, and hang.
LXCFS_FILES = {
    "cpu": "/proc/stat", "memory": "/proc/meminfo", "disk_io": "/proc/diskstats",
    "load": "/proc/loadavg", "uptime": "/proc/uptime", "pressure": "/proc/pressure",
}
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Missing = Callable[[str, str], None]  # reports a metric that is left out, and the reason
Rates = Mapping[Any, list[float] | None]  # name -> growth a second of its counters


def read_bytes(path: str, limit: int = -1) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.read(limit) or b""


def read_feature(path: str) -> bytes:
    """Read a file of a kernel feature; return b"" if this kernel does not have it."""
    try:
        return read_bytes(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):  # EOPNOTSUPP: it is switched off
            return b""
        raise


def _reason(error: BaseException) -> str:
    """Return why something could not be read, in the same words each time."""
    if isinstance(error, OSError) and error.errno:
        where = f" ({error.filename})" if error.filename else ""
        return (error.strerror or os.strerror(error.errno)) + where
    return _printable(str(error))[:EXCERPT_CHARS] or type(error).__name__


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


class Meter:
    """Measures how fast counters grow between two readings.

    A counter falls when it was reset, or when one reading is wrong. The next one tells which.
    Both are kept until then: a wrong one must not become the base of a rate.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._bases: dict[Any, list[tuple[float, Sequence[float]]]] = {}  # the best base first

    def rates(self, readings: Mapping[Any, Sequence[float]]) -> Rates:
        """Return name -> growth a second, None if a counter fell; a new name has none yet."""
        now, found = self._clock(), {}
        before, self._bases = self._bases, {}
        for name, reading in readings.items():
            bases = before.get(name, [])
            rates = [
                [max(0, new - old) / (now - then) for old, new in zip(base, reading)]
                for then, base in bases if now > then
                # iowait may fall a little
                and all(new >= old - CLOCK_TICKS for old, new in zip(base, reading))
            ]
            self._bases[name] = [(now, reading)] if rates else [*bases[:1], (now, reading)]
            if bases:
                found[name] = rates[0] if rates else None
        return found


def total_rates(rates: Rates) -> tuple[int | None, ...]:
    """Return the rates of two counters, summed; None if one is missing."""
    known = [rate for rate in rates.values() if rate]
    if not known or len(known) < len(rates):
        return None, None
    return tuple(round(sum(column)) for column in zip(*known))


def percent(part: float, whole: float) -> float | None:
    """Return part of whole in percent, 0.0 to 100.0; None if whole is 0."""
    return min(100.0, max(0.0, round(100.0 * part / whole, 1))) if whole > 0 else None


def own_rss_bytes() -> int:
    return int(read_bytes("/proc/self/statm").split()[1]) * PAGE_BYTES


# proc_stat(5). The columns after the eighth are part of `user` and `nice`.
CPU_COLUMNS, CPU_IDLE, CPU_IOWAIT, CPU_STEAL = 8, 3, 4, 7


def parse_cpu_ticks(data: bytes) -> dict[int, list[int]]:
    """Return core -> its columns of /proc/stat."""
    rows = re.findall(rb"^cpu(\d+) (.*)$", data, re.MULTILINE)
    return {int(core): list(map(int, ticks.split()[:CPU_COLUMNS])) for core, ticks in rows}


def busy_percent(ticks: Sequence[float]) -> float | None:
    """Return the share of time that was not idle; iowait counts as idle."""
    return percent(sum(ticks) - ticks[CPU_IDLE] - ticks[CPU_IOWAIT], sum(ticks))


def read_cpu(proc: str, meter: Meter) -> dict[str, Any]:
    rates = meter.rates(parse_cpu_ticks(read_bytes(f"{proc}/stat")))
    cores = {core: ticks for core, ticks in rates.items() if ticks and sum(ticks)}
    total = [sum(column) for column in zip(*cores.values())] or [0] * CPU_COLUMNS
    rows = [{"core": core, "percent": busy_percent(ticks)} for core, ticks in cores.items()]
    return {
        "cpu_percent": busy_percent(total),
        "cpu_cores": rows or None,
        "cpu_iowait_percent": percent(total[CPU_IOWAIT], sum(total)),
        "cpu_steal_percent": percent(total[CPU_STEAL], sum(total)),
    }


def read_memory(proc: str) -> dict[str, Any]:
    rows = re.findall(rb"^(\w+): *(\d+) kB$", read_bytes(f"{proc}/meminfo"), re.MULTILINE)
    sizes = {name: int(kib) * 1024 for name, kib in rows}
    total = sizes[b"MemTotal"]
    used = max(0, total - sizes[b"MemAvailable"])
    found = {
        "ram_used_percent": percent(used, total),
        "ram_used_bytes": used,
        "ram_total_bytes": total,
    }
    if b"SwapTotal" in sizes:  # a kernel without swap has no such line
        found["swap_total_bytes"] = sizes[b"SwapTotal"]
        found["swap_used_bytes"] = max(0, sizes[b"SwapTotal"] - sizes[b"SwapFree"])
    return found


# In an LXC container loadavg and uptime show the container, the system calls the host.
def read_numbers(path: str, count: int = 1) -> list[float]:
    return [float(number) for number in read_bytes(path).split()[:count]]


def read_oom_kills(proc: str) -> dict[str, Any]:
    found = re.search(rb"\noom_kill (\d+)\n", read_feature(f"{proc}/vmstat"))  # Linux 4.13
    return {"oom_kills": int(found[1])} if found else {}


def read_pressure(proc: str, meter: Meter) -> dict[str, Any]:
    """Read the share of time in which some task waited (accounting/psi.rst)."""
    waited_us = {
        name: [int(total) for total in re.findall(rb"^some .*total=(\d+)", text)]
        for name in ("cpu", "memory", "io")
        if (text := read_feature(f"{proc}/pressure/{name}"))
    }
    rates = meter.rates(waited_us)
    shares = {name: percent(rate[0], 1e6) for name, rate in rates.items() if rate}
    return {"pressure": shares or None} if waited_us else {}


# --- disks and networks ------------------------------------------------------------------

DISKS_LIMIT = 16  # the fullest ones: a post stays under 2 KB
# File systems that wait for a server or a process.
REMOTE = re.compile(r"fuse.*|nfs4?|cifs|smb3|ceph|9p|afs|coda|lustre|gfs2|ocfs2|beegfs|virtiofs")


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    mount_id: int
    parent_id: int
    device: str  # "major:minor" of the file system
    root: str  # the directory of the file system that is mounted
    path: str
    fstype: str
    source: str
    options: tuple[str, ...]  # of the file system, not of this mount of it

    @property
    def may_hang(self) -> bool:
        may_expire = self.fstype == "autofs" and "timeout=0" not in self.options
        return may_expire or bool(REMOTE.fullmatch(self.fstype))

    @property
    def is_local_disk(self) -> bool:
        is_on_disk = not self.device.startswith("0:") or self.fstype in ("btrfs", "zfs")
        is_loop = self.source.startswith("/dev/loop")  # the number of btrfs does not tell
        is_for_boot = f"{self.path}/".startswith(("/boot/", "/efi/"))
        return (is_on_disk or self.path == "/") and not (self.may_hang or is_loop or is_for_boot)


def parse_mountinfo(data: bytes) -> Iterator[Mount]:
    """Parse /proc/self/mountinfo, in the order of mounting."""
    for line in filter(None, os.fsdecode(data).split("\n")):  # other breaks are part of a path
        fields, _, tail = line.partition(" - ")
        number, parent, device, root, path, *_ = fields.split(" ")
        fstype, source, options, *_ = tail.split(" ")
        # mangle_path() in fs/seq_file.c
        path = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
        yield Mount(int(number), int(parent), device, root, path,
                    fstype, source, tuple(options.split(",")))


class MountTable:
    """The mounts of this process, each known by the place where it is entered."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._mounts = list(mounts)
        # The parent of "/" is not listed, or is "/" itself, as an initramfs leaves it.
        ids = {mount.mount_id for mount in self._mounts}
        self._by_place = {
            (m.parent_id if m.parent_id in ids and m.parent_id != m.mount_id else -1, m.path): m
            for m in self._mounts
        }

    def way(self, path: str) -> Iterator[tuple[str, Mount]]:
        """Yield each directory of a path, with each mount entered there; end where it may hang."""
        here = Mount(-1, -1, "", "/", "/", "", "", ())
        for place in accumulate(filter(None, path.split("/")), os.path.join, initial="/"):
            while upper := self._by_place.get((here.mount_id, place)):
                here = upper
                yield place, here
                if here.may_hang and place != "/":  # all is below "/", whatever that is
                    return
            yield place, here

    def local_disks(self) -> list[list[Mount]]:
        """Return the mounts of each local disk: first those of all of it, with short paths."""
        found: dict[str, list[Mount]] = {}
        disks = [mount for mount in self._mounts if mount.is_local_disk]
        for mount in sorted(disks, key=lambda m: (m.path != "/", m.root != "/", len(m.path))):
            *_, (_, reached) = self.way(mount.path)
            if reached is mount:  # not hidden by another one, nor behind one that may hang
                found.setdefault(mount.device, []).append(mount)
        return list(found.values())

    def find(self, path: str, hops: int = 40) -> tuple[str, Mount]:
        """Follow the links of a path; return where it leads, and on which mount that is.

        Raises OSError before a file system is touched that may hang.
        """
        path = os.path.normpath(path)
        for place, mount in self.way(path):
            if hops and place != mount.path and os.path.islink(place):
                target = os.path.join(os.path.dirname(place), os.readlink(place))
                return self.find(f"{target}{path[len(place):]}", hops - 1)
        if mount.may_hang:
            raise OSError(errno.EREMOTE, "network, FUSE and automounted file systems are not read")
        return path, mount


def read_disks(
    proc: str, paths: tuple[str, ...] | None, missing: Missing, worker: Worker
) -> dict[str, Any]:
    """Read how full the file systems are: those of `paths`, or all local ones."""
    # ZFS gives no name of a mount while it receives or rolls back.
    data = worker.call("the list of mounts", lambda: read_bytes(f"{proc}/self/mountinfo"))
    table = MountTable(parse_mountinfo(data))
    calls = {f"disk {path} of DISK_PATHS": partial(read_disk, table, path) for path in paths or ()}
    if paths is None:
        ways = [[mount.path for mount in mounts] for mounts in table.local_disks()]
        calls = {f"disk {_printable(way[0])}": partial(read_disk, table, *way) for way in ways}
    answers = worker.run(calls)
    for name, answer in answers.items():
        if isinstance(answer, Exception):
            missing(name, getattr(answer, "strerror", None) or _reason(answer))
        elif answer is None and paths is not None:
            missing(name, "it has no size, or is read-only and always full")
    rows = {row["mount"]: row for row in answers.values() if isinstance(row, dict)}
    ranked = sorted(rows.values(), key=lambda row: -row["used_percent"])
    found: dict[str, Any] = {"disks": ranked[:DISKS_LIMIT]} if ranked else {}
    if len(answers) < len(calls):
        missing("disk_used_percent", "a disk hangs, and may be the fullest")
    elif ranked:
        found["disk_used_percent"] = ranked[0]["used_percent"]
        found["disk_free_bytes"] = ranked[0]["free_bytes"]
    else:
        raise ValueError("there is no local file system (DISK_PATHS may name one)")
    return found


def read_disk(table: MountTable, path: str, *others: str) -> dict[str, Any] | None:
    """Return a row of system.disks; None if the disk has no size, or is always full.

    others: paths on the same disk, for when the first cannot be entered.
    """
    try:
        path, mount = table.find(path)
        if path != mount.path:
            os.lstat(path)
        fs = os.statvfs(mount.path)  # of the file system: a path of its own may have a quota
    except OSError:
        if not others:
            raise
        return read_disk(table, *others)
    used = fs.f_blocks - fs.f_bfree
    share = percent(used, used + fs.f_bavail)
    if share is None or (fs.f_bfree == 0 and "ro" in mount.options):  # squashfs, for example
        return None
    # Of the file system: for a service, ProtectSystem= makes mounts read-only. emergency_ro is
    # ext4's after an error (Linux 6.15).
    is_read_only = not {"ro", "emergency_ro"}.isdisjoint(mount.options)
    row = {
        "mount": _printable(mount.path), "used_percent": share,
        "free_bytes": fs.f_bavail * fs.f_frsize, "read_only": is_read_only,
    }
    if fs.f_files:  # btrfs and FAT have no table of inodes
        row["inodes_used_percent"] = percent(fs.f_files - fs.f_ffree, fs.f_files)
    return row


def parse_diskstats(data: bytes) -> dict[str, tuple[int, int]]:
    """Return device, as sysfs names it -> (bytes read, bytes written)."""
    rows = (line.split() for line in os.fsdecode(data).splitlines())
    return {name.replace("/", "!"): (512 * int(read), 512 * int(written))
            for _, _, name, _, _, read, _, _, _, written, *_ in rows}


def read_disk_io(proc: str, sys_root: str, meter: Meter) -> dict[str, Any]:
    """Read the bytes a second of all physical disks together."""
    counters = parse_diskstats(read_bytes(f"{proc}/diskstats"))
    block = f"{sys_root}/block"
    chosen = {}
    for name in counters.keys() & os.listdir(block):  # partitions are not listed
        # nvme0c1n1 is a hidden path to nvme0n1 (drivers/nvme/host/multipath.c). Linux before
        # 6.2 counts at the paths alone, later kernels at the disk as well.
        disk = re.sub(r"^(nvme\d+)c\d+(n\d+)$", r"\1\2", name)
        is_counted_there = disk != name and any(counters.get(disk, ()))
        if os.path.exists(f"{block}/{name}/device") and not is_counted_there:
            chosen[name] = counters[name]
    if not chosen:
        raise ValueError(f"no disk in {block}")
    read, written = total_rates(meter.rates(chosen))
    return {"disk_read_bytes_sec": read, "disk_write_bytes_sec": written}


def read_network(
    sys_root: str, names: Sequence[str] | None, missing: Missing, meter: Meter
) -> dict[str, Any]:
    """Read the traffic of the interfaces: `names`, or those of choose_interfaces()."""
    counters = psutil.net_io_counters(pernic=True, nowrap=False)
    if names is None:
        names = choose_interfaces(f"{sys_root}/class/net", counters)
    for name in set(names) - counters.keys():
        missing(f"interface {name} of NET_INTERFACES", "there is none")
    chosen = {name: counters[name] for name in names if name in counters}
    if not chosen:
        raise ValueError("no interface but lo, or none of NET_INTERFACES")
    traffic = {name: (its.bytes_recv, its.bytes_sent) for name, its in chosen.items()}
    received, sent = total_rates(meter.rates(traffic))
    return {
        "net_rx_bytes_sec": received,
        "net_tx_bytes_sec": sent,
        "net_rx_errors": sum(its.errin for its in chosen.values()),
        "net_tx_errors": sum(its.errout for its in chosen.values()),
    }


# linux/if_arp.h: TUNNEL, TUNNEL6, SIT, IPGRE, IP6GRE, and NONE of tun and WireGuard.
TUNNEL = re.compile(rb"^((768|769|776|778|823|65534)|DEVTYPE=(vxlan|geneve))$", re.MULTILINE)


def choose_interfaces(base: str, present: Iterable[str]) -> Sequence[str]:
    """Return the interfaces to add up, so that no traffic is counted twice."""
    def has(name: str, file: str) -> bool:
        return bool(glob.glob(file, root_dir=f"{base}/{name}"))

    def kind(name: str) -> bytes:
        return read_feature(f"{base}/{name}/type") + read_feature(f"{base}/{name}/uevent")

    # The port of a DSA switch sends through another interface. A master with hardware behind
    # it, a paravirtual interface (Azure, Hyper-V), counts for its ports.
    hardware = [name for name in present if has(name, "device") and not has(name, "master/device")
                and b"DEVTYPE=dsa\n" not in kind(name)]
    if hardware:
        return hardware
    others = [name for name in present if name != "lo"]
    # A tunnel counts if it is the only way out of a container.
    lower = [name for name in others
             if not has(name, "lower_*") and not TUNNEL.search(kind(name))] or others
    # Traffic of a bridge's port, to a container, say, came in by another interface. If all
    # are in bridges, the kernel does not tell which one leads out.
    return [name for name in lower if not has(name, "master")] or lower


# --- processes ---------------------------------------------------------------------------


@dataclass(slots=True)
class Process:
    """A part of /proc/PID/stat (proc_pid_stat(5)), times in clock ticks; and what it is."""

    pid: int
    comm: str
    state: str
    ppid: int
    cpu_ticks: int  # user + system
    threads: int
    start_ticks: int  # since boot; a process is identified by its pid and this
    cgroup: str = ""  # the text of /proc/PID/cgroup
    candidates: tuple[str, ...] = ()  # the services that it may belong to
    service: str = ""  # "" for none
    proof: str = ""  # as in Identity
    until: int = 0  # the round until which it is read in each one
    cmdline: bytes | None = None  # None: not needed, or it could not be read yet

    @property
    def is_dead(self) -> bool:  # other threads may go on when the main one has ended
        return self.state in "ZXx" and self.threads <= 1


def parse_stat(data: bytes) -> Process:
    """Parse /proc/PID/stat; comm may hold blanks and parentheses."""
    head, _, rest = data.decode("utf-8", "replace").rpartition(") ")
    pid, _, comm = head.partition(" (")
    state, ppid, *fields = rest.split(None, 20)
    cpu_ticks = int(fields[9]) + int(fields[10])
    return Process(int(pid), comm, state, int(ppid), cpu_ticks, int(fields[15]), int(fields[17]))


def age_s(process: Process) -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_ticks / CLOCK_TICKS


def parse_statm(statm: bytes) -> tuple[int, int]:
    """Return resident KiB of /proc/PID/statm: (anonymous, of files and shared)."""
    resident, shared = (int(pages) * PAGE_BYTES // 1024 for pages in statm.split()[1:3])
    return max(0, resident - shared), shared


ENDED = (FileNotFoundError, ProcessLookupError, ValueError, IndexError)  # while it was read
COMMON_LIBRARIES_KIB = 6 * 1024  # libc and others, which other programs map
# What cannot belong to a service is read in its first LOOK_AGAIN samples, since it may still call
# exec(), then in one of LOOK_AGAIN. If it is older at first sight, the first ones are left out.
LOOK_AGAIN = 8
OLD_PROCESS_S = 120


@dataclass
class ProcessTable:
    """Finds the mail services in /proc and measures them."""

    proc: str
    clock: Callable[[], float]
    missing: Missing
    worker: Worker  # reads command lines
    cgroup_root: str = "/sys/fs/cgroup"
    watched: Iterable[tuple[str, str]] = ()  # (service, comm): WATCH_PROCESSES

    def __post_init__(self) -> None:
        self._watched = {comm: service for service, comm in self.watched}
        self._meter = Meter(self.clock)
        self._known: dict[int, Process] = {}  # by pid
        self._round = 0
        self._read_at = self.clock()

    def read(self) -> dict[str, dict[str, Any]]:
        """Return service -> {status, pid, memory_mb (MiB), cpu_percent (of one core), ...}.

        Raises PermissionError if /proc shows our own processes only (hidepid).
        """
        if not os.path.exists(f"{self.proc}/1/stat"):
            raise PermissionError("other users' processes are hidden (hidepid on /proc)")
        looked = self._look()
        self._identify(looked)
        members = self._members(looked)
        rates = self._meter.rates({
            (p.pid, p.start_ticks): (p.cpu_ticks,) for its in members.values() for p in its
        })
        self._read_at, seconds = self.clock(), self.clock() - self._read_at
        unclear = {service for p in looked if p.cmdline is None and not p.service
                   for service in p.candidates}
        rows = {s: self._describe(its, seconds, rates) for s, its in members.items()}
        for service in unclear:
            if rows[service]["status"] != "running":
                del rows[service]
                self.missing(service, "the command line of what may be its process hangs")
        return rows

    def _look(self) -> list[Process]:
        """Read the processes that are due, but not their command lines."""
        self._round += 1
        before, self._known = self._known, {}
        looked = []
        for pid in map(int, filter(str.isdigit, os.listdir(self.proc))):
            known = before.get(pid)
            if (known and (self._round + pid) % LOOK_AGAIN and not known.candidates
                    and not known.service and self._round > known.until):
                self._known[pid] = known
                continue
            with contextlib.suppress(*ENDED):
                now = parse_stat(read_bytes(f"{self.proc}/{pid}/stat", 4096))
                if known and (known.comm, known.start_ticks) == (now.comm, now.start_ticks):
                    known.state, known.ppid = now.state, now.ppid
                    known.cpu_ticks, known.threads = now.cpu_ticks, now.threads
                else:
                    known = now
                    known.cgroup = sys.intern(os.fsdecode(read_bytes(f"{self.proc}/{pid}/cgroup")))
                    known.candidates = candidates_of(known.comm, known.cgroup)
                    known.service = "" if known.candidates else self._watched.get(known.comm, "")
                    known.until = self._round + (0 if age_s(known) > OLD_PROCESS_S else LOOK_AGAIN)
                self._known[pid] = known
                looked.append(known)
        return looked

    def _identify(self, looked: list[Process]) -> None:
        """Read the command lines that are needed; drop what has ended."""
        asked = {f"the command line of process {p.pid} ({_printable(p.comm)})": p
                 for p in looked if p.candidates}
        cmdlines = self.worker.run({
            name: partial(read_bytes, f"{self.proc}/{process.pid}/cmdline", 4096)
            for name, process in asked.items()
        })
        for name, process in asked.items():
            cmdline = cmdlines.get(name)  # None: it hangs
            if isinstance(cmdline, ENDED):
                looked.remove(process)
            elif isinstance(cmdline, Exception):
                raise cmdline
            # That of a dead process is empty: what is known of it remains.
            elif process.cmdline is None or (cmdline and cmdline != process.cmdline):
                process.cmdline, comm = cmdline, process.comm
                process.service, process.proof = identify(comm, cmdline or b"", process.cgroup)
                if cmdline is not None and not process.service:
                    process.service = self._watched.get(comm, "")

    def _members(self, looked: Iterable[Process]) -> dict[str, list[Process]]:
        """Return service -> its processes.

        Beside one that is known by its own name, those in its cgroup that are known by their
        unit alone are helpers and do not count.
        """
        ours = [p for p in looked if p.service]
        named = {(p.service, p.cgroup) for p in ours if p.proof == "name" and not p.is_dead}
        node_cgroups = {p.cgroup for p in ours if p.service in NODE_SERVICES}
        self._node_processes = sum(  # that share Node's program
            p.service in NODE_SERVICES or bool(NODE_COMM.match(p.comm))
            for p in looked if p.cgroup in node_cgroups
        )
        members: dict[str, list[Process]] = {s: [] for s in (*SERVICES, *self._watched.values())}
        for process in ours:
            if process.proof != "unit" or (process.service, process.cgroup) not in named:
                members[process.service].append(process)
        return members

    def _describe(self, its: list[Process], seconds: float, rates: Rates) -> dict[str, Any]:
        if not its:
            return {"status": "not_found", "pid": None, "memory_mb": 0, "cpu_percent": 0}
        pids = {p.pid for p in its}
        main = min(its, key=lambda p: (p.is_dead, p.ppid in pids, p.start_ticks, p.pid))
        used = 0.0
        for process in its:
            key = process.pid, process.start_ticks
            if rate := rates.get(key):
                used += rate[0]
            elif key not in rates and age_s(process) < seconds:
                used += process.cpu_ticks / seconds  # started since the last reading
        return {
            "status": "stopped" if main.is_dead or main.state in "Tt" else "running",
            "pid": main.pid,
            "memory_mb": round(self._memory_kib(its) / 1024, 1),
            "cpu_percent": round(100 * used / CLOCK_TICKS, 1),
            "uptime_seconds": max(0, int(age_s(main))),
        }

    def _memory_kib(self, its: list[Process]) -> int:
        """Return the memory of a service; pages that its processes share count once.

        This is near the sum of PSS, which needs privileges: what its own cgroups account for,
        or else an estimate from what the processes hold.
        """
        held: dict[int, tuple[int, int]] = {}  # pid -> anonymous and other KiB
        for process in its:
            with contextlib.suppress(*ENDED):
                folder = f"{self.proc}/{process.pid}"
                if process.state == "Z" and not process.is_dead:  # its main thread has ended
                    folder += f"/task/{max(os.listdir(f'{folder}/task'), key=int)}"
                held[process.pid] = parse_statm(read_bytes(f"{folder}/statm"))
        largest_anon, largest_shared = map(max, zip((0, 0), *held.values()))
        program: int = max(0, largest_shared - COMMON_LIBRARIES_KIB)
        is_node = its[0].service in NODE_SERVICES
        if is_node:  # services that run on Node share its program
            program = program * len(its) // self._node_processes
        with contextlib.suppress(OSError, ValueError, LookupError):
            cgroups = {p.cgroup for p in its}
            accounts = [cgroup_kib(cgroup, self.cgroup_root, held.keys()) for cgroup in cgroups]
            anon = sum(anon for anon, _ in accounts)
            # A process that was moved into its cgroup left its pages with the one before.
            if anon >= 0.9 * largest_anon:
                # The program is often accounted for elsewhere: where it was read first.
                return anon + max(program, sum(mapped for _, mapped in accounts))
        # A child that a native server forks shares its parent's pages. Node starts programs.
        common = {p.pid: held[p.ppid][0] for p in its if p.ppid in held and not is_node}
        return program + sum(max(0, kib - common.get(pid, 0)) for pid, (kib, _) in held.items())


def cgroup_kib(cgroup: str, root: str, pids: Set[int]) -> tuple[int, int]:
    """Return (anonymous, mapped) KiB of a memory cgroup, without the page cache.

    cgroup: the text of /proc/PID/cgroup (cgroups(7)). LookupError if it holds others, too.
    """
    paths = dict(re.findall(r"^\d+:(.*?):(.*)$", cgroup, re.MULTILINE))
    if "memory" in paths:  # v1, or v1 and v2 side by side
        folder = f"{root}/memory{paths['memory']}"
        anon, mapped = b"total_rss", b"total_mapped_file"
    else:
        folder, anon, mapped = f"{root}{paths['']}", b"anon", b"file_mapped"
    inside = set(map(int, read_bytes(f"{folder}/cgroup.procs").split()))
    if not inside or not inside <= pids:
        raise LookupError
    sizes = dict(row.split() for row in read_bytes(f"{folder}/memory.stat").splitlines())
    return int(sizes[anon]) // 1024, int(sizes[mapped]) // 1024


# --- services ----------------------------------------------------------------------------

# Service -> its ports. The first one that runs on a node gives the node its role.
SERVICES = {
    "zonemta": (587, 12080), "wildduck": (993, 995), "haraka": (25,), "rspamd": (11334,),
    "mongodb": (27017,), "redis": (6379,),
}
NODE_SERVICES = ("zonemta", "wildduck", "haraka")  # they run on Node

# The service of a process, and what tells it: "name": its title, program or script; "child": a
# script that only the service's main process starts; "unit": its systemd unit alone.
Identity = tuple[str, str]
NOBODY = ("", "")

# Native servers keep the name of their program. Pattern of the comm -> service.
SERVICE_COMMS = (
    (re.compile(r"rspamd"), "rspamd"),
    (re.compile(r"(redis|valkey)-server[-.\d]*"), "redis"),  # with a version, too
    (re.compile(r"mongod"), "mongodb"),
)
# Arguments or titles of what is no server. Sentinel is redis' own program.
NOT_THE_SERVER = re.compile(
    r".*\[sentinel\].*|--sentinel|--test-memory|--check-system|--config-test|-t|--shutdown"
)

# Services on Node set a title. It replaces the command line, cut to the room of that, and its
# first 15 bytes are the comm (uv_set_process_title). Pattern -> service.
SERVICE_TITLES = (
    (re.compile(r"wilddu(c|ck|ck [mw]\w{0,5})?"), "wildduck"),
    (re.compile(r"zone-m(t|ta|ta: .*)?"), "zonemta"),
    (re.compile(r"Haraka (\(|cn=).*"), "haraka"),
)
# Without a title of theirs, the path of the script tells.
SERVICE_SCRIPTS = (
    (re.compile(r"(.*/)?wildduck(/(server|worker)(\.js)?)?"), ("wildduck", "name")),
    (re.compile(r"(.*/)?zone-?mta(/(app|index)(\.js)?)?"), ("zonemta", "name")),
    (re.compile(r"(.*/)?zone-?mta/services/(receiver|sender)\.js"), ("zonemta", "child")),
    (re.compile(r"(.*/)?(\.?bin/haraka|haraka\.js|[Hh]araka/haraka|Haraka)"), ("haraka", "name")),
)
# Else the systemd unit tells, if the administrator may have chosen the title (it is padded with
# NULs or has a colon), or if the name of the script is a common one.
SERVICE_UNIT = re.compile(r"(?mi)/(wildduck|zone-?mta|haraka)(?:@[^/\n]*)?\.service(?=/|$)")
OWN_TITLE = re.compile(r"[^:]+:( .*)?")
UNIT_SCRIPT = re.compile(r"(?!.*node_modules/)(.*/)?(server|worker|index|app|haraka)(\.js)?|\.")

# Titles of tools that run on Node, and start or watch other processes.
NODE_TOOLS = r"(npm|npx|pnpm|yarn|corepack|PM2|pm2|nodemon|forever|concurrently|cross-env|dotenv)\b"
# Titles that no service has. (node) is systemd's child before it starts node.
NOT_A_TITLE = re.compile(rf"\(.*|{NODE_TOOLS}.*")
NODE_COMM = re.compile(rf"(node(js)?|(node-)?MainThread)$|node |{NODE_TOOLS}")
NODE_OPTIONS_WITH_VALUE = frozenset(
    "-r --require --import --loader --experimental-loader -C --conditions --title --input-type "
    "--env-file --env-file-if-exists --icu-data-dir --openssl-config --redirect-warnings "
    "--diagnostic-dir --inspect-port --debug-port --disable-warning --unhandled-rejections "
    "--dns-result-order --max-http-header-size --tls-cipher-list --tls-keylog".split()
)
# With these options Node runs no script, or starts another process that does.
NODE_NOT_SERVING = re.compile(r"-[a-z]*[epc]|--(eval|print|check|test|run|watch).*")
# With these arguments `haraka` and `zone-mta` do not serve.
NOT_SERVING = frozenset(
    "-h --help -v --version -l --list -i --install -p --plugin -o --order -t --test "
    "--qlist --qstat --qempty --qunstick create".split()
)


def classify(comm: str, cmdline: bytes, *, cgroup: str = "", state: str = "S") -> str | None:
    """Return the service of a process, None for none; a zombie is judged without its cmdline."""
    return identify(comm, b"" if state == "Z" else cmdline, cgroup)[0] or None


def identify(comm: str, cmdline: bytes, cgroup: str = "") -> Identity:
    """Return the service of a process, NOBODY for none; by comm alone if cmdline is empty."""
    raw = cmdline.decode("utf-8", "replace")
    args = (raw.rstrip("\0") or comm).split("\0")
    if service := first_match(SERVICE_COMMS, comm):
        names = [os.path.basename(arg)[:15] for arg in args]
        is_script = names[0] != comm and comm in names[1:]  # args[0] is its interpreter
        is_other = is_script or any(NOT_THE_SERVER.fullmatch(arg) for arg in args)
        return NOBODY if is_other else (service, "name")
    by_unit = next(((unit, "unit") for unit in unit_services(cgroup)), NOBODY)
    if len(args) == 1 and args[0][:15].rstrip() == comm.rstrip():
        title = args[0]
        if service := first_match(SERVICE_TITLES, title):
            return service, "name"
        if not title.startswith("node "):
            is_chosen = raw.endswith("\0\0") or OWN_TITLE.fullmatch(title)
            return by_unit if is_chosen and not NOT_A_TITLE.fullmatch(title) else NOBODY
        args = title.split(" ")  # PM2 writes the command line into the title
    elif not NODE_COMM.match(comm):
        return NOBODY
    script, arguments = script_of(args)
    named = first_match(SERVICE_SCRIPTS, os.path.normpath(script))
    if named and not NOT_SERVING.intersection(arguments):
        return named
    return by_unit if not named and UNIT_SCRIPT.fullmatch(script) else NOBODY


def candidates_of(comm: str, cgroup: str) -> tuple[str, ...]:
    """Return the services that a process may belong to, judged without its cmdline."""
    if named := first_match(SERVICE_COMMS + SERVICE_TITLES, comm):
        return (named,)
    return NODE_SERVICES if NODE_COMM.match(comm) else unit_services(cgroup)


def unit_services(cgroup: str) -> tuple[str, ...]:
    return tuple(unit.lower().replace("-", "") for unit in SERVICE_UNIT.findall(cgroup))


def first_match(table: Iterable[tuple[re.Pattern[str], T]], text: str) -> T | None:
    return next((found for pattern, found in table if pattern.fullmatch(text)), None)


def script_of(args: list[str]) -> tuple[str, list[str]]:
    """Return the script that Node runs itself, "" for none, and its arguments."""
    rest = iter(args[1:])
    for arg in rest:
        if not arg.startswith("-"):
            return arg, list(rest)
        if NODE_NOT_SERVING.fullmatch(arg):
            return "", []
        if arg in NODE_OPTIONS_WITH_VALUE:
            next(rest, None)
    return "", []


# --- sockets -----------------------------------------------------------------------------

PORT_CHECK_LIMIT_S = 3.0  # for all ports together

# linux/netlink.h, linux/inet_diag.h, net/tcp_states.h
NETLINK_SOCK_DIAG = 4
TCPDIAG_GETSOCK = 18  # the legacy request: one dump holds both address families
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_ESTABLISHED, TCP_TIME_WAIT, TCP_CLOSE_WAIT, TCP_LISTEN = 1, 6, 8, 10
# SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING
TCP_OTHER_STATES = (2, 4, 5, 8, 9, 10, 11)
TIMEWAIT_TIMER = 3  # of a closed socket in FIN_WAIT2, which sockstat counts as `tw`
V6ONLY = struct.pack("=HHB", 5, 11, 1)  # INET_DIAG_SKV6ONLY is set


def dump_tcp(*states: int) -> Iterator[memoryview]:
    """Yield a struct inet_diag_msg for each TCP socket in these states."""
    request = struct.pack("=IHHII BBBB 48x II", 16 + 60, TCPDIAG_GETSOCK, NLM_F_REQUEST_DUMP,
                          1, 0, 0, 0, 0, 0, sum(1 << state for state in states), 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(HANG_LIMIT_S)
        sock.send(request)
        while data := memoryview(sock.recv(256 * 1024)):
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, 16)[0]
                    raise OSError(code, os.strerror(code))  # the kernel has no tcp_diag
                yield data[16:length]
                data = data[max(16, (length + 3) & ~3) :]


def tcp_rows(proc: str) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (state, local address, accept queue) of each row of /proc/net/tcp and tcp6."""
    for path in (f"{proc}/net/tcp", *glob.glob(f"{proc}/net/tcp6")):
        with open(path, "rb") as rows:
            next(rows)  # the names of the columns
            for row in rows:
                columns = row.split(None, 5)
                yield int(columns[3], 16), columns[1], columns[4].rpartition(b":")[2]


def read_tcp(proc: str) -> dict[str, Any]:
    """Count TCP connections as ss(8) does, without a walk over the established ones."""
    try:
        states = Counter(  # idiag_timer, idiag_state
            TCP_TIME_WAIT if message[2] == TIMEWAIT_TIMER else message[1]
            for message in dump_tcp(*TCP_OTHER_STATES)
        )
        closed = states.pop(TCP_TIME_WAIT, 0)
        in_use, time_wait = parse_sockstat(
            read_bytes(f"{proc}/net/sockstat") + read_feature(f"{proc}/net/sockstat6")
        )
        states[TCP_ESTABLISHED] = max(0, in_use - states.total())  # what the others leave
        states[TCP_TIME_WAIT] = max(0, time_wait - closed)
    except OSError:  # a kernel without sock_diag: it takes time for each socket
        states = Counter(state for state, _, _ in tcp_rows(proc))
    return {
        "tcp_established": states[TCP_ESTABLISHED], "tcp_close_wait": states[TCP_CLOSE_WAIT],
        "tcp_time_wait": states[TCP_TIME_WAIT],
    }


def parse_sockstat(data: bytes) -> tuple[int, int]:
    """Return (sockets in use, `tw`) of /proc/net/sockstat and sockstat6."""
    in_use = re.findall(rb"^TCP6?: inuse (\d+)", data, re.MULTILINE)
    time_wait = re.findall(rb"^TCP: .*\btw (\d+)", data, re.MULTILINE)
    return sum(map(int, in_use)), int(time_wait[0])


def read_listen_overflows(proc: str) -> dict[str, Any]:
    lines = read_feature(f"{proc}/net/netstat").splitlines()
    rows = (line.split() for line in lines if line.startswith(b"TcpExt:"))
    found = dict(zip(*rows)).get(b"ListenOverflows")
    return {} if found is None else {"listen_overflows": int(found)}


def check_by_connect(host: str, ports: Iterable[int]) -> dict[int, bool]:
    """Connect to all ports at once, send nothing; return port -> whether it accepted."""
    result = dict.fromkeys(ports, False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + PORT_CHECK_LIMIT_S
    waiting: dict[socket.socket, int] = {}
    with contextlib.ExitStack() as stack:
        for port in result:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            waiting[stack.enter_context(sock)] = port
            code = sock.connect_ex((host, port))
            if code in (errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN):
                raise OSError(code, os.strerror(code))  # no verdict on the daemon
        while waiting and (left := deadline - time.monotonic()) > 0:
            for sock in select.select([], waiting, [], left)[1]:
                port = waiting.pop(sock)
                with sock, contextlib.suppress(OSError):  # it is not connected
                    # It may be connected to itself: to a free port in the local range.
                    result[port] = sock.getpeername() != sock.getsockname()
    return result


class Listener(NamedTuple):
    address: bytes  # in network byte order, 4 or 16 bytes
    port: int
    queued: int  # connections that the daemon has not accepted
    limit: float  # of the queue; inf if the kernel does not tell
    is_v6only: bool = False


def listeners() -> list[Listener]:
    """Return the TCP sockets of both families that listen."""
    try:
        return [parse_listener(message) for message in dump_tcp(TCP_LISTEN)]
    except OSError:
        return [parse_listener_row(local, queued)
                for state, local, queued in tcp_rows("/proc") if state == TCP_LISTEN]


def parse_listener(message: memoryview) -> Listener:
    """Parse a struct inet_diag_msg and its attributes, which begin at 72."""
    size = 4 if message[0] == socket.AF_INET else 16
    port = struct.unpack_from("!H", message, 4)[0]
    queued, limit = struct.unpack_from("=II", message, 56)  # idiag_rqueue, idiag_wqueue
    is_v6only = V6ONLY in bytes(message[72:])
    return Listener(bytes(message[8 : 8 + size]), port, queued, limit, is_v6only)


def parse_listener_row(local: bytes, queued: bytes) -> Listener:
    """Parse columns of /proc/net/tcp: an address is words in the machine's order."""
    address, _, port = local.decode().partition(":")
    words = struct.iter_unpack("=I", bytes.fromhex(address))
    packed = b"".join(struct.pack("!I", word) for word, in words)
    return Listener(packed, int(port, 16), int(queued, 16), math.inf)


def check_by_listener(host: str, ports: Iterable[int]) -> dict[int, bool]:
    """Return port -> whether a listener serves this address and has room."""
    is_v6 = ":" in host
    wanted = socket.inet_pton(socket.AF_INET6 if is_v6 else socket.AF_INET, host)
    addresses = {wanted, bytes(len(wanted))}
    if not is_v6:  # an IPv6 socket may take it, as ::ffff:HOST
        addresses |= {bytes(16), bytes(10) + b"\xff\xff" + wanted}
    up = {one.port for one in listeners() if one.address in addresses
          and (is_v6 or not one.is_v6only) and one.queued <= one.limit}
    return {port: port in up for port in ports}


PORT_CHECKS = {"connect": check_by_connect, "listen": check_by_listener}


def accept_queues(ports: Iterable[int]) -> dict[int, int]:
    """Return port -> connections that its listeners have not accepted."""
    waiting: Counter[int] = Counter()
    for one in listeners():
        waiting[one.port] += one.queued
    return {port: waiting[port] for port in ports if port in waiting}


# --- what runs here ----------------------------------------------------------------------

ROLES = ("unknown", "zonemta-outbound", "zonemta-local", *SERVICES)
MAIL_PORTS = (25, 587, 993, 995, 12080, 11334)  # where none are known


def ports_of(role: str, services: Iterable[str]) -> tuple[int, ...]:
    """Return the ports of the service that the role begins with, or of these services."""
    if role == "wildduck":
        return MAIL_PORTS
    named = [service for service in SERVICES if role.lower().startswith(service)]
    ports = [port for service in named or services for port in SERVICES.get(service, ())]
    return tuple(dict.fromkeys(ports)) or MAIL_PORTS


def read_services(folder: str) -> dict[str, float]:
    """Return what ServicesSeen wrote to STATE_DIRECTORY. Raises OSError."""
    try:
        text = read_bytes(f"{folder}/services", 4096)
    except FileNotFoundError:  # version 1.0.0 saved the role alone
        role = read_feature(f"{folder}/role").decode("utf-8", "replace").strip()
        return {s: 0.0 for s in SERVICES if s == role.removesuffix("-outbound")}
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        saved = json.loads(text)
        return {s: float(saved[s]) for s in SERVICES if 0 <= saved.get(s, -1) < math.inf}
    return {}  # it is damaged: the services will be seen again


def write_services(folder: str, absent: Mapping[str, float]) -> None:
    path = f"{folder}/services"
    with open(f"{path}.new", "w") as stream:
        json.dump({service: round(seconds) for service, seconds in absent.items()}, stream)
    os.replace(f"{path}.new", path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/role")


@dataclass
class ServicesSeen:
    """The services that count as seen on this node.

    A service counts as seen once it has run for 10 minutes (in the agent's first 10 minutes:
    for three samples in a row), and no longer once it has been absent for 7 days.

    The file `services` holds {service: seconds of absence}. It is written when a service, or
    the hours of absence of one, change.
    """

    SETTLED_S, GONE_S = 600.0, 7 * 86400.0

    folder: str = ""  # STATE_DIRECTORY
    clock: Callable[[], float] = time.monotonic
    at_once: bool = False  # one sample is enough
    known: Iterable[str] = ()  # seen before

    def __post_init__(self) -> None:
        self._started = self._updated = self.clock()
        self._running: dict[str, tuple[float, int]] = {}  # since when, how many samples
        self._absent = dict.fromkeys(self.known, 0.0)  # seen -> seconds of absence
        self._saved: dict[str, float] | None = None  # hours, as written; None: not loaded yet
        self._problems = Problems()
        self._worker = Worker(HANG_LIMIT_S, self._problems)

    def role(self) -> str:
        """Return the role for NODE_ROLE=auto; "unknown" if no service counts as seen."""
        first = next(iter(self.services()), "unknown")
        return "zonemta-outbound" if first == "zonemta" else first

    def services(self) -> list[str]:
        return [service for service in SERVICES if service in self._absent]

    def update(self, running: Mapping[str, bool]) -> None:
        """Note whether services run; of one that is not named, nothing is known."""
        now = self.clock()
        passed, self._updated = now - self._updated, now
        for service in SERVICES.keys() & running.keys():
            if running[service]:
                since, samples = self._running.get(service, (now, 0))
                self._running[service] = since, samples + 1
                is_early = now - self._started < self.SETTLED_S
                is_settled = now - since >= self.SETTLED_S or (is_early and samples + 1 >= 3)
                if is_settled or self.at_once or service in self._absent:
                    self._absent[service] = 0.0
            else:
                self._running.pop(service, None)
                if service in self._absent:
                    self._absent[service] += passed
        self._absent = {s: absent for s, absent in self._absent.items() if absent <= self.GONE_S}
        if self.folder:
            self._sync()

    def _sync(self) -> None:
        """Load the file, once in each run, and write it when it is due."""
        name = "reading the list of services"
        try:
            if self._saved is None:
                saved = self._worker.call(name, partial(read_services, self.folder))
                self._absent = {**saved, **self._absent}
                self._saved = {}  # a service that it holds is written once in each run
            hours = {s: absent // 3600 for s, absent in self._absent.items()}
            if hours != self._saved:
                name = "writing the list of services"
                self._worker.call(name, partial(write_services, self.folder, dict(self._absent)))
                self._saved = hours
                self._problems.end("services", "the list of services can be read and written again")
        except TimeoutError:
            pass  # the worker logs what hangs
        except READ_ERRORS as error:
            self._problems.begin("services", f"{name} failed", _reason(error))


# --- ZoneMTA's own figures ---------------------------------------------------------------

ZONEMTA_ANSWER_S = 60.0  # a request that hangs is given up after this, and made again

# Our figure -> ZoneMTA's metric and the label to sum up, over all zones.
ZONEMTA_FIGURES = {
    "queued": ("queue_size", "queued"),
    "deferred": ("queue_size", "deferred"),
    "delivered_total": ("delivery_status", "delivered"),
    "bounced_total": ("bounce_generation", ""),
    "rejected_total": ("delivery_status", "rejected"),
    "connections": ("connection_pool_size", ""),
}
ZONEMTA_METRIC = re.compile(r"^zonemta_(\w+)(\{.*\})? (\d{1,15})$", re.MULTILINE)
ZONEMTA_LABEL = re.compile(r'[{,](?:status|type)="(\w*)"')


def parse_zonemta(text: str) -> dict[str, int]:
    """Parse ZoneMTA's answer to GET /metrics (Prometheus' text format)."""
    sums: Counter[tuple[str, str]] = Counter()
    for metric, labels, value in ZONEMTA_METRIC.findall(text):
        sums[metric, "".join(ZONEMTA_LABEL.findall(labels))] += int(value)
    return {
        name: sums[source] for name, source in ZONEMTA_FIGURES.items()
        # a counter that is declared and has no value yet is 0
        if source in sums or f"# TYPE zonemta_{source[0]} counter\n" in text
    }


def ask_zonemta(url: str) -> dict[str, int]:
    """Return the figures of ZoneMTA's HTTP API. Raises one of READ_ERRORS."""
    parts = urlsplit(url)
    # A new connection each time: ZoneMTA closes an idle one after 5 s.
    connection = http.client.HTTPConnection(parts.netloc, timeout=ZONEMTA_ANSWER_S)
    with contextlib.closing(connection):
        connection.request("GET", f"{parts.path}/metrics")
        answer = connection.getresponse()
        figures = parse_zonemta(answer.read(256 * 1024).decode("utf-8", "replace"))
        if answer.status != 200 or answer.read(1) or answer.length or not figures:
            raise ValueError(f"it answered {answer.status} without ZoneMTA's figures")
        return figures


# --- settings ----------------------------------------------------------------------------


@dataclass(eq=False)  # hashable, like every exception
class SettingsError(Exception):
    problems: list[str]  # a line for each


def _matching(pattern: str, words: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError(f"must be {words}")
    return text


def _choice(names: Iterable[str], text: str) -> str:
    if text.lower() not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return text.lower()


def _whole(low: int, high: int, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return int(text)


def _list_or_auto(separator: str, parse_item: Callable[[str], Any], text: str) -> Any:
    if text.lower() == "auto":
        return None
    return tuple(dict.fromkeys(map(parse_item, re.split(separator, text.strip()))))


def _url(text: str) -> str:
    if re.match("[^/]*//[^/]*@", text):
        raise ValueError("must not hold a user name or password; the key belongs in API_KEY")
    if re.search("[^!-~]|[?#]", text):
        raise ValueError("must not hold blanks, '?', '#' or letters outside ASCII")
    with contextlib.suppress(ValueError):  # a port that is no number, for one
        parts = urlsplit(text)
        has_host = HOST.fullmatch(parts.hostname or "")
        if parts.scheme in ("http", "https") and has_host and parts.port != 0:
            return parts.geturl().rstrip("/")  # with the scheme in lower case
    raise ValueError("must be https:// and a host name or IP address (IPv6 in brackets), "
                     "then a port and a path if needed")


def _zonemta_url(text: str) -> str:
    url = "off" if text.lower() == "off" else _url(text)
    if url.startswith("https:"):
        raise ValueError("must be off or begin with http://, since ZoneMTA's API has no TLS")
    return url


def _role(text: str) -> str:
    if not 1 <= len(text) <= 50 or not text.isprintable() or text != text.strip():
        raise ValueError("must be auto, or a name of 1 to 50 printable characters")
    return text.lower() if text.lower() in ("auto", *ROLES) else text


def _ip_literal(text: str) -> str:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL
            return socket.inet_ntop(family, socket.inet_pton(family, text))
    raise ValueError("must be an IPv4 or IPv6 address, not a name")


def _watched(pair: str) -> tuple[str, str]:
    found = re.fullmatch(r"([a-z0-9][a-z0-9_.-]{0,31})=([!-~]{1,255})", pair)
    if not found:
        raise ValueError("must be name=program pairs, separated by commas, "
                         "with names in lower case")
    service, program = found.groups()
    if service in SERVICES:
        raise ValueError(f"{service} is reported anyway; choose another name")
    if native := first_match(SERVICE_COMMS, program):
        raise ValueError(f"{program} is reported anyway, as {native}")
    return service, program[:15]  # the kernel cuts comm to 15 bytes


class Setting(NamedTuple):
    parse: Callable[[str], Any]  # its ValueError says what is wrong with the text
    default: str
    help: str
    example: str
    required: bool = False
    name: str = ""  # that of its field in Config, in capitals


def _setting(*row: Any, **more: Any) -> Any:
    """Return a field of Config. Its repr() shows `texts` instead, which does not hold the key."""
    return field(repr=False, metadata={"setting": Setting(*row, **more)})


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, parsed. None means auto."""

    dashboard_url: str = _setting(
        _url, "", "address of the dashboard", "https://monitor.example.com", required=True)
    api_key: str = _setting(
        partial(_matching, "[!-~]*", "visible ASCII without blanks or line breaks"), "",
        "key that the dashboard gave out for its agents", "k3yOfTheDashboard", required=True)
    node_id: str = _setting(
        partial(_matching, "[A-Za-z0-9._:@-]{0,100}", "1 to 100 letters, digits or . _ : @ -"), "",
        "name of this node; empty: its host name", "mta-01")
    node_role: str = _setting(
        _role, "auto", "role of this node; auto: by the mail daemons that run", "zonemta-outbound")
    heartbeat_interval: int = _setting(
        partial(_whole, 1_000, 300_000), "15000",
        "time between two samples, in milliseconds", "15000")
    log_level: str = _setting(
        partial(_choice, ("debug", "info", "warning", "error")), "info",
        "lowest level to log: debug, info, warning or error", "info")
    check_ports: tuple[int, ...] | None = _setting(
        partial(_list_or_auto, r"[,\s]+", partial(_whole, 1, 65535)), "auto",
        "TCP ports to check; auto: those of the role", "25,587,993")
    check_host: str = _setting(
        _ip_literal, "127.0.0.1", "IP address at which the ports are checked", "10.0.0.5")
    check_mode: str = _setting(
        partial(_choice, PORT_CHECKS), "connect",
        "connect to each port; listen: ask the kernel who listens (nothing in the mail log)",
        "listen")
    disk_paths: tuple[str, ...] | None = _setting(
        partial(_list_or_auto, r"\s*,\s*", partial(
            _matching, r"/[^\0]*", "auto or absolute paths, separated by commas")), "auto",
        "file systems to report; auto: all local ones", "/,/var/mail")
    net_interfaces: tuple[str, ...] | None = _setting(
        partial(_list_or_auto, r"[,\s]+", partial(
            _matching, r"[^/\0]{1,15}", "auto or names of interfaces, separated by commas")),
        "auto", "network interfaces to count; auto: those with hardware behind them", "eth0,eth1")
    watch_processes: tuple[tuple[str, str], ...] = _setting(  # (service, comm)
        lambda text: tuple(map(_watched, re.findall(r"[^,\s]+", text))), "",
        "more services to report, as name=program (the exact name that ps -o comm shows)",
        "postfix=master,dovecot=dovecot")
    zonemta_url: str = _setting(
        _zonemta_url, "http://127.0.0.1:12080",
        "address of ZoneMTA's HTTP API, for its queue; off: do not ask", "http://127.0.0.1:12080")
    buffer_size: int = _setting(
        partial(_whole, 10, 10_000), "100",
        "samples kept while the dashboard cannot be reached", "1000")
    ca_bundle: str = _setting(
        partial(_matching, r"(/[^\0-\x1f\x7f]*)?", "an absolute path"), "",
        "PEM file with the CA to trust; empty: the system's store", "/etc/ssl/certs/my-ca.pem")
    allow_http: bool = _setting(
        lambda text: _choice(("true", "false"), text) == "true", "false",
        "true: allow http:// to another machine (sends the key in clear text)", "true")
    memory_limit_mb: int = _setting(
        partial(_whole, 48, 72), "64",
        "resident memory in MiB above which the agent asks systemd for a restart", "64")
    dashboard_api: str = _setting(
        partial(_choice, ("v1", "tinomail-monitor")), "v1",
        "dialect that the dashboard speaks: v1 or tinomail-monitor", "tinomail-monitor")
    env_file: str = ""  # where settings were read from; "": from the environment alone
    warnings: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)  # of each setting; not the key

    @property
    def interval_s(self) -> float:
        return self.heartbeat_interval / 1000


SETTINGS: tuple[Setting, ...] = tuple(
    row.metadata["setting"]._replace(name=row.name.upper())
    for row in dataclasses.fields(Config) if row.metadata
)
KNOWN_NAMES = frozenset(setting.name for setting in SETTINGS)
# Labels of 1 to 63 letters, or an IPv6 address; in lower case, as urlsplit returns it.
HOST = re.compile(r"([a-z0-9_]([a-z0-9_-]{0,62})(\.|$))+|[0-9a-f]*:[0-9a-f:.]+")
AGENT_MIB = 34  # what the agent needs without its buffer
BUFFERED_SAMPLE_BYTES = 2560  # of a large machine, with what Python needs for it
DEAD_AFTER_MS = 45_000  # the dashboard's three heartbeats of 15 s
NO_HOST_NAME = "the host name is not set yet; set the host name or NODE_ID"
LOCAL_ENV_FILE = "./.agent.env"
SERVICE_ENV_FILE = "/etc/tinomail-agent/agent.env"  # LoadCredential= of the unit
SERVICE_STATE = "/var/lib/private/tinomail-agent"  # StateDirectory= of the unit


def find_env_file(environ: Mapping[str, str], installed: bool = False) -> str:
    """Return the env file to read: credential, ./ or /etc; "" if there is none."""
    folder = environ.get("CREDENTIALS_DIRECTORY")  # of systemd's copy (systemd.exec(5))
    credential = f"{folder}/agent.env" if folder else ""
    local = "" if installed else LOCAL_ENV_FILE  # in the current folder it may be anybody's
    return next(filter(os.path.lexists, (credential, local, SERVICE_ENV_FILE)), "")


def parse_env(data: bytes) -> tuple[dict[str, str], list[str]]:
    """Parse the bytes of an env file into (name -> value, problems), without interpolation."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return {}, [f"line {line}: is not UTF-8 text; save the file as UTF-8"]
    values: dict[str, str] = {}
    problems: list[str] = []
    for binding in dotenv.parser.parse_stream(io.StringIO(text)):
        found = binding.original.string  # with the blank lines before it
        line = binding.original.line + found.count("\n") - found.lstrip().count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            problems.append(f"line {line}: is not NAME=value, or a quote is not closed "
                            "(example: NODE_ROLE=auto)")
        elif binding.key in KNOWN_NAMES:
            values[binding.key] = binding.value or ""
        elif binding.key is not None:
            problems.append(f"line {line}: {_unknown_name(binding.key)}")
    return values, problems


def _unknown_name(name: str) -> str:
    """Say which setting may be meant. An odd name is not shown: it may be part of the key."""
    import difflib  # only when something is wrong

    near = difflib.get_close_matches(name.upper(), KNOWN_NAMES, 1)
    way_out = f"did you mean {near[0]}?" if near else "agent.env.example lists them all"
    if re.fullmatch("[A-Z_]{3,40}", name):
        return f"there is no setting {name}; {way_out}"
    return f"unknown setting; {way_out}"


def read_env_file(path: str, shown: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Return (name -> value, problems, warnings) of an env file; `shown` is its name in them."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MIB)
            mode = os.fstat(stream.fileno()).st_mode
    except PermissionError:
        way_out = "systemd gave no copy of it" if "NOTIFY_SOCKET" in os.environ else "use sudo"
        return {}, [f"{shown}: cannot be read: Permission denied; {way_out}"], []
    except OSError as error:
        return {}, [f"{shown}: cannot be read: {os.strerror(error.errno or 0)}"], []
    values, problems = parse_env(data)
    warnings = []
    if values.get("API_KEY") and mode & stat.S_IROTH:
        warnings.append(f"{shown}: every user can read the key in it: chmod 600 {shown}")
    return values, [f"{shown}, {problem}" for problem in problems], warnings


def host_name() -> str:
    """Return the machine's host name, "" as long as it is not set."""
    name = socket.gethostname()
    return "" if name.split(".")[0] in ("", "localhost", "(none)") else name


def load_config(
    environ: Mapping[str, str], env_file: str | None = None, *,
    need_dashboard: bool = True, installed: bool = False,
) -> Config:
    """Build the Config from the process environment, then the env file, then the defaults.

    An empty value counts as not set. Raises SettingsError with every problem at once.
    With need_dashboard=False, DASHBOARD_URL and API_KEY may be missing (then "").
    """
    path = find_env_file(environ, installed) if env_file is None else env_file
    if not need_dashboard and env_file is None and not os.access(path, os.R_OK):
        path = ""  # the service's file, which only root can read, is not needed for a sample
    shown = path if env_file or path == LOCAL_ENV_FILE else SERVICE_ENV_FILE
    from_file, problems, warnings = read_env_file(path, shown) if path else ({}, [], [])
    may_be_missing = not need_dashboard or bool(problems and not from_file)
    texts = {s.name: environ.get(s.name) or from_file.get(s.name) or s.default for s in SETTINGS}
    texts["NODE_ID"] = texts["NODE_ID"] or host_name()
    key = texts["API_KEY"]
    values: dict[str, Any] = {s.name.lower(): "" for s in SETTINGS if s.required}
    for setting in SETTINGS:
        text = texts[setting.name]
        try:
            if text or not setting.required:
                values[setting.name.lower()] = setting.parse(text)
            elif not may_be_missing:
                raise ValueError("is missing")
        except ValueError as error:
            problems.append(_problem(setting, str(error), text, key))
    more_problems, more_warnings = _check_values(values)
    if problems + more_problems:
        raise SettingsError(problems + more_problems)
    texts["API_KEY"] = f"set, {len(key)} characters"
    return Config(**values, env_file=path, warnings=(*warnings, *more_warnings), texts=texts)


def _problem(setting: Setting, reason: str, text: str, key: str) -> str:
    """Return the line for a wrong value, without the key and without a password in a URL."""
    safe = re.sub(r"(?s)\?.*", "?***", re.sub("(?s).*@", "***@", text))
    # Without a value of API_KEY, the key may be a part of this one.
    is_shown = text and key and setting.name != "API_KEY"
    shown = f"it is '{printable(safe, key, limit=60)}'; " if is_shown else ""
    return f"{setting.name}: {reason} ({shown}example: {setting.name}={setting.example})"


def _check_values(values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return (problems, warnings) of values that are right alone. Those that are not are absent."""
    problems, warnings = [], []
    url, allow_http = values["dashboard_url"], values.get("allow_http", True)
    if url.startswith("http://") and not allow_http and not is_loopback(url):
        problems.append("DASHBOARD_URL: http:// would send the key in clear text; "
                        "use https://, or set ALLOW_HTTP=true if the network is your own")
    limit_mib, size = values.get("memory_limit_mb", 64), values.get("buffer_size", 0)
    most = (limit_mib - AGENT_MIB) * MIB // BUFFERED_SAMPLE_BYTES
    if size > most:
        problems.append(f"BUFFER_SIZE: {size} samples do not fit into MEMORY_LIMIT_MB={limit_mib}; "
                        f"set BUFFER_SIZE={most} or less")
    node_id, interval_ms = values.get("node_id", "?"), values.get("heartbeat_interval", 0)
    if not node_id:
        warnings.append(f"NODE_ID: {NO_HOST_NAME}")
    elif node_id.split(".")[0] == "localhost":
        warnings.append("NODE_ID: this node reports as localhost; choose another name")
    if interval_ms > DEAD_AFTER_MS:
        warnings.append(f"HEARTBEAT_INTERVAL: {interval_ms} is too long: the dashboard "
                        f"considers a node dead after {DEAD_AFTER_MS} ms without a sample")
    return problems, warnings


def is_loopback(url: str) -> bool:
    """Tell whether a URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    return bool(re.fullmatch(r"localhost|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}|::1", host))


# --- log and command line ----------------------------------------------------------------

JOURNAL_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # sd-daemon(3)


class LogFormatter(logging.Formatter):
    """Time and level for a terminal, `<N>` for the journal; a traceback without the key."""

    def __init__(self, key: str, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)-8s %(message)s")
        self._key, self._journal = key, journal

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{JOURNAL_PRIORITY[record.levelname]}>" if self._journal else ""
        return "\n".join(prefix + line for line in super().format(record).splitlines())

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's own name)
        return mask(super().formatException(ei), self._key)


def set_up_logging(level: str, key: str, environ: Mapping[str, str]) -> None:
    """Log to stderr; with priorities if that is the journal ($JOURNAL_STREAM, systemd.exec(5))."""
    is_journal = False
    with contextlib.suppress(OSError):  # stderr is closed
        stderr = os.fstat(2)
        is_journal = environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(key, is_journal))
    log.handlers[:] = [handler]
    logging.raiseExceptions = False  # an agent that cannot write its log goes on
    log.setLevel(level.upper())


def build_parser() -> argparse.ArgumentParser:
    rows = []
    for s in SETTINGS:
        note = "required" if s.required else s.default
        rows.append(f"  {s.name:<19} {s.help}" + (f" [{note}]" if note else ""))
    parser = argparse.ArgumentParser(
        prog="tinomail_agent.py",
        description="Samples this mail node and reports it to a dashboard. "
        "Without an option it runs as a service.",
        epilog="\n".join(["settings, from the environment or the env file:", *rows, "",
                          "exit codes: 0 done, 1 failed, 2 wrong usage, 75 the dashboard cannot "
                          "be reached now, 78 wrong settings"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--once", action="store_true", help="print one sample as JSON; post nothing")
    mode.add_argument("--check", action="store_true",
                      help="show the settings and one sample, register this node, post the sample")
    parser.add_argument("--env-file", metavar="FILE", help="read the settings from this file")
    parser.add_argument("--version", action="version", version=f"tinomail-agent {VERSION}")
    return parser


def take_sample(config: Config, known: Iterable[str]) -> tuple[Sample, str]:
    """Take one sample with real rates; say what it cost. Its role: by `known`, and what runs."""
    collector = Collector(config, seen=ServicesSeen(at_once=True, known=known))
    collector.prime()
    time.sleep(PRIME_S)
    wall, cpu = time.monotonic(), time.process_time()
    sample = collector.collect()
    cpu_ms, wall_ms = 1000 * (time.process_time() - cpu), 1000 * (time.monotonic() - wall)
    return sample, (f"{cpu_ms:.1f} ms of CPU and {wall_ms:.0f} ms for this sample, "
                    f"{own_rss_bytes() / MIB:.1f} MiB of memory")


def run_check(config: Config, known: Iterable[str]) -> int:
    """Show the settings and a sample, and check whether the dashboard takes it."""
    print(f"TinoMail agent {VERSION}\n\nsettings: environment, then {config.env_file or 'no file'}")
    for name, text in config.texts.items():
        print(f"  {name:<19} {text or '(empty)'}")
    for warning in config.warnings:
        print(f"  warning: {warning}")
    sample, cost = take_sample(config, known)
    print("\nsample")
    for line in describe_sample(unpack(sample.packed)):
        print(f"  {line}")
    print(f"\ncost: {cost}\n\ndialect: DASHBOARD_API={config.dashboard_api}")
    code, words = try_dashboard(config, sample)
    print(f"dashboard: {words}")
    return code


def try_dashboard(config: Config, sample: Sample) -> tuple[int, str]:
    """Register this node and post a sample; return the exit code, and what came of it."""
    if not config.node_id:
        return 1, f"FAILED: {NO_HOST_NAME}"
    dialect, key, started = DIALECTS[config.dashboard_api], config.api_key, time.monotonic()
    transport = Transport(config.dashboard_url, config.ca_bundle)
    ip, neutral = transport.route_ip(), unpack(sample.packed)
    answer = transport.post(dialect.register(neutral, config.node_id, ip, key))
    verdict = judge_registration(answer, key, dialect.hints)
    words = f"{verdict}"
    if verdict.outcome is Outcome.DELIVERED:
        node_id = dialect.confirmed_id(answer.body) or config.node_id
        words = f"registered as {printable(node_id, key)} (role {neutral['role']}, address {ip})"
        neutral.pop("agent")  # this process is not the service
        answer = transport.post(dialect.sample(neutral, node_id, key))
        verdict = judge(answer, key, dialect.hints)
        if verdict.outcome is Outcome.DELIVERED:
            took_ms = (time.monotonic() - started) * 1000
            return 0, f"ok, {words}, and it took the sample, in {took_ms:.0f} ms"
        words += f", but it did not take the sample: {verdict}"
    may_pass = verdict.outcome is Outcome.RETRY and not answer.is_lasting
    return os.EX_TEMPFAIL if may_pass else 1, f"FAILED: {words}"


def describe_sample(sample: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of a neutral sample, a line each, under the names that are sent."""
    for part in ("system", "processes", "zonemta", "services", "accept_queue"):
        title = "accept_queue " if part == "accept_queue" else ""  # has the names of services, too
        for name, value in sample.get(part, {}).items():
            for row in value if name == "disks" else [value]:
                yield f"{title + name:<22} {describe_figure(row, name)}"


def describe_figure(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {describe_figure(v, k)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "; ".join(describe_figure(item, name) for item in value)
    return f"{value / MIB:.0f} MiB" if name.endswith("_bytes") else str(value)


def unit_environ() -> dict[str, str]:
    """Return the settings in Environment= of the unit and its drop-ins."""
    import shlex  # only on the command line
    import subprocess

    command = ["systemctl", "show", "-p", "Environment", "--value", "tinomail-agent"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
        return dict(word.split("=", 1) for word in shlex.split(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}  # no systemd or no unit


def become_nobody() -> None:
    """Give up root, so that each file is read with the rights of the service."""
    nobody_id = 65534  # user and group, on every distribution with systemd
    with contextlib.suppress(OSError):  # not root, or a user namespace without this user
        os.setgroups([])
        os.setgid(nobody_id)
        os.setuid(nobody_id)


def main(argv: list[str] | None = None, *, installed: bool = False) -> int:
    """Run the command line; return the exit code. `installed`: as the command of install.sh.

    Its --check and --once use what the service uses: the installed settings, the unit's
    Environment=, the services that it has seen, and files with the rights of an unprivileged user.
    """
    try:
        code = run(argv, installed)
    except SettingsError as error:
        set_up_logging("info", "", os.environ)
        for problem in error.problems:
            log.error("%s", problem)
        code = os.EX_CONFIG
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has gone
        code = 1
    except Exception:
        log.exception("the agent failed")
        code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()  # now, or Python complains at its exit
        except OSError:
            code = code or int(stream is sys.stdout)
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), stream.fileno())
    return code


def run(argv: list[str] | None, installed: bool) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.env_file == "":
        parser.error("--env-file needs the name of a file")
    by_hand = options.once or options.check
    if installed and not by_hand and "NOTIFY_SOCKET" not in os.environ:
        parser.error("tinomail-agent.service runs the agent; use --check or --once")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any bytes
    if not by_hand:  # a signal may come before the agent is up
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(0))
    environ = unit_environ() if installed and by_hand else os.environ
    config = load_config(
        environ, options.env_file, need_dashboard=not options.once, installed=installed)
    set_up_logging(config.log_level, config.api_key, os.environ)
    if not by_hand:
        for warning in config.warnings:
            log.warning("%s", warning)
        if sys.stderr:
            faulthandler.enable()  # SIGABRT from the watchdog leaves every thread's stack
        return Agent(config, os.environ).run()
    known: list[str] = []
    if installed:
        with contextlib.suppress(OSError):
            known = [*read_services(SERVICE_STATE)]
        become_nobody()
    if options.check:
        return run_check(config, known)
    sample, _ = take_sample(config, known)
    body = DIALECTS[config.dashboard_api].body(unpack(sample.packed), config.node_id)
    print(json.dumps(body, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
