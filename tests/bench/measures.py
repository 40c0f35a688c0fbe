"""The measures: each takes the Bench and returns rows. The load on the machine only grows."""

from __future__ import annotations

import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fleet import simulate

import tinomail_agent as agent

from . import procfs, sizes
from .machine import WATCHED, Agent, Machine, Sink
from .report import Row

REAL_HEARTBEAT_MS = 15_000
SETTLED_S = 0.2  # after this long, all that belongs to a sample has been done
IDLE_SOCKETS, FEW_SOCKETS, MANY_SOCKETS = 100, 360, 36_000
FLOOR = "Python with the four imports"
IDLE_PROCESSES, MANY_PROCESSES = 100, 2_000


@dataclass(frozen=True)
class Bench:
    """What the measures work with: the machine, and how much to measure."""

    machine: Machine
    runs: int = 5  # starts and stops
    agents: int = 3  # side by side, each a run
    samples: int = 60  # at 1 s: a minute
    warm: int = 1_000  # memory is measured after this many samples ...
    long: int = 10_000  # ... and its growth up to this many
    repeats: int = 20  # of a baseline
    # Most processes of a node are older than this, and looked at less often than young ones.
    age_s: float = agent.OLD_PROCESS_S + 5


QUICK = {
    "runs": 3, "agents": 2, "samples": 12, "warm": 200, "long": 1_000, "repeats": 5, "age_s": 0,
}


def _floor(bench: Bench, figure: str) -> float:
    """Return what a Python costs that has imported the agent's dependencies, and no more."""
    runs: list[float] = [bench.machine.baseline("imports", 1)[figure] for _ in range(bench.runs)]
    return statistics.median(runs)


# --- start and stop ------------------------------------------------------------------------


def start_and_stop(bench: Bench) -> Iterator[Row]:
    ready, first, stop, cpu = [], [], [], []
    for _ in range(bench.runs):
        one = Agent(bench.machine, REAL_HEARTBEAT_MS)
        ready.append(one.wait_ready() - agent.PRIME_S)
        first.append(one.sink.wait_for(1, 10)[0].at - one.started_at - agent.PRIME_S)
        time.sleep(SETTLED_S)
        cpu.append(1000 * procfs.cpu_s(one.pid))
        stop.append(one.stop())
    yield Row("start to READY, the first measuring second aside", "s", tuple(ready), 0.6)
    yield Row("start to first sample delivered, likewise", "s", tuple(first), 0.6)
    yield Row("stop, idle", "s", tuple(stop), 0.5)
    beside = {FLOOR: 1000 * _floor(bench, "since_start_s")}
    yield Row("CPU of a start, up to the first sample delivered", "ms", tuple(cpu), beside=beside)


# --- CPU -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What three agents, and one at the default heartbeat, took side by side."""

    cpu_ms: tuple[float, ...]  # per sample, of each agent
    collect_ms: tuple[float, ...]  # the median of each agent's samples
    at_default_ms: float  # CPU per sample at the default heartbeat: more waking in between
    last: dict[str, Any]  # a sample


def measure_load(bench: Bench) -> Load:
    steady = Agent(bench.machine, REAL_HEARTBEAT_MS)
    steady.sink.wait_for(1, 30)
    time.sleep(SETTLED_S)
    steady_from = procfs.cpu_s(steady.pid)
    agents = []
    for _ in range(bench.agents):
        agents.append(Agent(bench.machine, 1000))
        time.sleep(1 / bench.agents)  # their ticks do not meet
    start = [_cpu_after(one, 1) for one in agents]
    end = [_cpu_after(one, 1 + bench.samples) for one in agents]
    beats = max(1, bench.samples * 1000 // REAL_HEARTBEAT_MS)
    steady_s = _cpu_after(steady, 1 + beats) - steady_from
    samples = [[post.sample for post in one.sink.samples()] for one in agents]
    for one in [*agents, steady]:
        one.stop()
        bench.machine.end(one.process)
    return Load(
        tuple(1000 * (b - a) / bench.samples for a, b in zip(start, end)),
        tuple(statistics.median(s["agent"]["collect_ms"] for s in its) for its in samples),
        1000 * steady_s / beats,
        samples[0][-1],
    )


def _cpu_after(one: Agent, count: int) -> float:
    one.sink.wait_for(count, 30 + count * 2)
    time.sleep(SETTLED_S)
    return procfs.cpu_s(one.pid)


def idle(bench: Bench) -> Iterator[Row]:
    machine = bench.machine
    machine.add_processes(IDLE_PROCESSES)
    machine.add_connections(IDLE_SOCKETS)
    load = measure_load(bench)
    beside = {"at a heartbeat of 15 s": load.at_default_ms, **_posts(bench), **_exporter(bench)}
    yield Row("CPU per sample, idle node, POST included", "ms", load.cpu_ms, 12, beside)
    yield Row("wall time of one collection, idle node", "ms", load.collect_ms, 50)


def _posts(bench: Bench) -> dict[str, float]:
    """CPU of one POST over TLS, in the plain ways."""
    sink = Sink(bench.machine, tls=True)
    names = {
        "post": "requests.post alone", "session": "kept session alone",
        "bare_post": "http.client alone",
    }
    args = (sink.url, str(bench.machine.ca))
    return {text: _median(bench, name, *args) for name, text in names.items()}


def _median(bench: Bench, name: str, *args: str) -> float:
    """Return the median of a baseline's CPU milliseconds, the first one (a warm-up) aside."""
    result = bench.machine.baseline(name, 1 + bench.repeats, *args)
    cpu_ms: list[float] = result["cpu_ms"]
    return statistics.median(cpu_ms[1:])


def _exporter(bench: Bench, *, memory: bool = False) -> dict[str, float]:
    """CPU of a scrape of prometheus-node-exporter; with memory=True its RSS in MiB instead."""
    if bench.machine.exporter is None:
        return {}
    port = bench.machine.free_port()
    command = [bench.machine.exporter, f"--web.listen-address=127.0.0.1:{port}"]
    log = bench.machine.folder / "exporter.log"
    process = bench.machine.start(command, as_nobody=True, log=log)
    cpu = []
    try:
        _scrape(port, process)
        for _ in range(1 + bench.repeats):
            before = procfs.cpu_s(process.pid)
            _scrape(port, process)
            time.sleep(0.05)  # what it does after the answer counts too
            cpu.append(1000 * (procfs.cpu_s(process.pid) - before))
        rss, _ = procfs.memory_mib(process.pid)
    finally:
        bench.machine.end(process)
    if memory:
        return {"node-exporter": rss}
    return {"node-exporter, a scrape": statistics.median(cpu[1:])}


def _scrape(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                answer.read()
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    raise RuntimeError("the exporter does not answer; see exporter.log")


def loaded(bench: Bench) -> Iterator[Row]:
    machine = bench.machine
    machine.add_processes(MANY_PROCESSES)
    old_at = time.monotonic() + bench.age_s
    more_sockets = machine.add_connections(MANY_SOCKETS - IDLE_SOCKETS)
    yield from loaded_memory(bench)
    time.sleep(max(0.0, old_at - time.monotonic()))
    many = measure_load(bench)
    beside = {
        "at a heartbeat of 15 s": many.at_default_ms,
        "net_connections alone": _median(bench, "net_connections"),
        "process_iter with cmdline alone": _median(bench, "process_iter"),
        **_exporter(bench),
    }
    for process in more_sockets:
        machine.end(process)
    machine.add_connections(FEW_SOCKETS - IDLE_SOCKETS)
    few = measure_load(bench)
    seen = many.last["system"]["tcp_established"]
    running = [name for name in WATCHED if many.last["processes"][name]["status"] == "running"]
    if seen < MANY_SOCKETS or len(running) < len(WATCHED):
        raise RuntimeError(f"the agent does not see the load: {seen} sockets, {running}")
    where = "2,000 processes and 36,000 sockets"
    yield Row(f"CPU per sample, {where}", "ms", many.cpu_ms, 40, beside)
    more = tuple(sorted(b - statistics.median(few.cpu_ms) for b in many.cpu_ms))
    yield Row("... and above that at 360 sockets", "ms", more, 10)
    yield Row(f"wall time of one collection, {where}", "ms", many.collect_ms, 50)
    share = many.at_default_ms * 100 / REAL_HEARTBEAT_MS
    yield Row("... as a share of one core, default heartbeat", "%", (share,), 2)


# --- memory --------------------------------------------------------------------------------


def idle_memory(bench: Bench) -> Iterator[Row]:
    """RSS over many samples; what else a long run shows comes with it."""
    one = Agent(bench.machine, 15, tls=True)
    one.sink.wait_for(bench.warm, 300)
    rss, pss = procfs.memory_mib(one.pid)
    posts = one.sink.wait_for(bench.long, 900)
    later, _ = procfs.memory_mib(one.pid)
    started = procfs.children(one.pid)
    handshakes = len({post.connection for post in one.sink.posts()})
    one.stop()
    beside = {
        "PSS": pss, FLOOR: _floor(bench, "rss_mib"), f"{FLOOR}, PSS": _floor(bench, "pss_mib"),
        **_exporter(bench, memory=True),
    }
    warm, long = f"{bench.warm:,}", f"{bench.long:,}"
    yield Row(f"RSS after {warm} samples over TLS, idle node", "MiB", (rss,), 36, beside)
    yield Row(f"growth from sample {warm} to {long}", "MiB", (later - rss,), 0.5)
    rate = 100 * handshakes / len(one.sink.posts())
    yield Row("TLS handshakes per 100 posts", "", (rate,), 1, {"requests.post": 100.0})
    yield Row("processes started by the agent", "", (float(started),), 0)
    cores = len(posts[0].sample["system"]["cpu_cores"])
    lengths = tuple(float(len(post.body)) for post in posts)
    yield Row(f"gzip body as posted, {cores} cores", "bytes", lengths)


def loaded_memory(bench: Bench) -> Iterator[Row]:
    one = Agent(bench.machine, 60, tls=True)
    one.sink.wait_for(bench.warm, 600)
    rss, pss = procfs.memory_mib(one.pid)
    one.stop()
    beside = {"PSS": pss, **_exporter(bench, memory=True)}
    yield Row(f"RSS after {bench.warm:,} samples over TLS, both loads", "MiB", (rss,), 36, beside)


# --- sizes ---------------------------------------------------------------------------------


def bodies(bench: Bench) -> Iterator[Row]:
    for cores, disks, budget in ((2, 1, 1_000), (128, agent.DISKS_LIMIT, 2_000)):
        packed, plain = sizes.body_bytes(cores, disks)
        yield Row(
            f"gzip body, all services up, {cores} busy cores, disks: {disks}", "bytes", packed,
            budget,
            {"as plain JSON": statistics.median(plain)},
        )


def full_buffer(bench: Bench) -> Iterator[Row]:
    kib = tuple(sizes.buffer_kib() for _ in range(bench.agents))
    beside = {"kept as dicts": sizes.dicts_kib()}
    yield Row("full buffer of 100 in memory", "KiB", kib, 160, beside)


# --- many nodes, simulated -----------------------------------------------------------------


def fleet_returns(bench: Bench) -> Iterator[Row]:
    """1,000 nodes whose dashboard was away for an hour; see fleet.py."""
    found = simulate(1_000)
    beside = {"peak": float(found.peak_per_s), "mean": found.mean_per_s}
    yield Row("1,000 nodes drain after an hour: peak of requests in a second, over the mean", "x",
              (found.peak_per_s / found.mean_per_s,), 2, beside=beside)
    yield Row("... until all are drained", "s", (found.drained_after_s,), 900)
    yield Row("... longest silence of a node", "s", (found.longest_silence_s,), 45)


# In this order; the last needs no machine.
MEASURES: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    start_and_stop, idle, idle_memory, loaded, bodies, full_buffer, fleet_returns,
)
