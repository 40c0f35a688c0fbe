"""How large a sample is on the wire, and a full buffer in memory; no process needed."""

from __future__ import annotations

import functools
import json
import os
import random
import tracemalloc
from typing import Any

import tinomail_agent as agent

RUNS = 20


@functools.cache
def real_sample() -> bytes:
    environ = {"DASHBOARD_URL": "https://127.0.0.1", "API_KEY": "k", "NODE_ROLE": "wildduck"}
    config = agent.load_config(environ, os.devnull)
    collector = agent.Collector(config)
    collector.prime()
    return collector.collect().packed


def busy_sample(cores: int, chance: random.Random, disks: int = 1) -> dict[str, Any]:
    """Return a sample of this machine as if it were busy: every field with many digits.

    Random digits are what gzip can do least with.
    """
    sample = agent.unpack(real_sample())
    system = sample["system"]
    system["cpu_cores"] = [
        {"core": i, "percent": round(chance.uniform(0, 100), 1)} for i in range(cores)
    ]
    for name, value in system.items():
        if isinstance(value, int):
            system[name] = chance.randrange(10**9)
        elif isinstance(value, float):
            system[name] = round(chance.uniform(0, 100), 1)
    system["pressure"] = {n: round(chance.uniform(0, 100), 1) for n in ("cpu", "memory", "io")}
    system["disks"] = [
        {"mount": f"/srv/mail/{i}", "used_percent": round(chance.uniform(0, 100), 1),
         "free_bytes": chance.randrange(10**13), "read_only": False,
         "inodes_used_percent": round(chance.uniform(0, 100), 1)}
        for i in range(disks)
    ]
    sample["accept_queue"] = {port: chance.randrange(100) for port in sample["services"]}
    for name in sample["processes"]:
        sample["processes"][name] = {
            "status": "running", "pid": chance.randrange(4_194_304),
            "memory_mb": round(chance.uniform(10, 2000), 1),
            "cpu_percent": round(chance.uniform(0, 400), 1),
            "uptime_seconds": chance.randrange(10**7),
        }
    sample["agent"].update(
        buffered=chance.randrange(100), sent_total=chance.randrange(10**6), dropped_total=0,
        refused_total=0, clock_offset_sec=0,
    )
    return sample


def body_bytes(cores: int, disks: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lengths of posted bodies, as gzip and as plain JSON."""
    chance = random.Random(1)
    dialect = agent.DIALECTS["v1"]
    packed, plain = [], []
    for _ in range(RUNS):
        sample = busy_sample(cores, chance, disks)
        packed.append(float(len(dialect.sample(sample, "mta-01", "k").body)))
        plain.append(float(len(json.dumps(sample, separators=(",", ":")))))
    return tuple(packed), tuple(plain)


def buffer_kib() -> float:
    """Return what 100 samples of a busy 8-core node hold in a Buffer."""
    chance = random.Random(1)
    samples = [busy_sample(8, chance) for _ in range(100)]
    tracemalloc.start()
    try:
        buffer = agent.Buffer(100)
        for seq, sample in enumerate(samples, 1):
            buffer.put(agent.Sample(seq, agent.pack(sample)))
        waiting = buffer.counters().waiting
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if waiting != 100:
        raise RuntimeError(f"the buffer holds {waiting} of 100")
    return held / 1024


def dicts_kib() -> float:
    """Return the same, not packed: what a plain list of samples would hold."""
    chance = random.Random(1)
    texts = [json.dumps(busy_sample(8, chance)) for _ in range(100)]
    tracemalloc.start()
    try:
        kept = [json.loads(text) for text in texts]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held / 1024 if kept else 0.0
