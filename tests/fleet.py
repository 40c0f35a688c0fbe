#!/usr/bin/env python3
"""A thousand nodes whose dashboard returns after an hour: the agents' own pacing, simulated time.

    python tests/fleet.py [NODES]

All nodes were started at the same moment, as after a power cut, and have the real Buffer and
Sender; the network and the clock are made up, and a request takes no time.
"""

from __future__ import annotations

import heapq
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass

import tinomail_agent as agent

BEAT_S = 15.0
OUTAGE_S = 3600.0
WATCHED_S = 900.0  # after the return
OK = agent.Answer(201, body=b'{"success": true, "id": "mta"}')
DOWN = agent.Answer(0, "connection refused")


@dataclass(frozen=True, slots=True)
class Result:
    """What the dashboard saw after its return."""

    nodes: int
    requests: int  # until the last node was drained
    drained_after_s: float  # inf: not within WATCHED_S
    peak_per_s: int
    mean_per_s: float
    longest_silence_s: float  # of any node, the wait for its first sign included
    lost: int  # samples dropped, beyond those that 100 places cannot hold


class Node:
    """One node; stands in for the Transport of its Sender, too."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self._fleet = fleet
        environ = {"DASHBOARD_URL": "https://monitor.example.com", "API_KEY": "k", "NODE_ID": name}
        config = agent.load_config(environ, os.devnull)
        self.buffer = agent.Buffer(config.buffer_size)
        self.sender = agent.Sender(
            config, self.buffer, self, clock=lambda: fleet.now,  # type: ignore[arg-type]
            now=lambda: fleet.now, jitter=fleet.chance.random,
        )
        self.pause = agent.first_pause_s(name, BEAT_S)
        self.seq = 0

    deadline = 0.0
    local_ip = "192.0.2.1"

    def disconnect(self) -> None:
        pass

    def route_ip(self) -> str:
        return self.local_ip

    def post(self, request: agent.Request, within_s: float = 0.0) -> agent.Answer:
        if not self._fleet.is_up:
            return DOWN
        self._fleet.note(self)
        return OK

    def take_sample(self) -> float:
        """Put a sample into the buffer; return the seconds to the next."""
        self.seq += 1
        self.buffer.put(agent.Sample(self.seq, self._fleet.packed))
        pause, self.pause = self.pause, BEAT_S
        return pause


class Fleet:
    """The nodes, their time, and what their dashboard sees."""

    def __init__(self, nodes: int, seed: int) -> None:
        self.now = 0.0
        self.is_up = True
        self.chance = random.Random(seed)
        stamp = agent.iso_utc(1_750_000_000)
        self.packed = agent.pack({"timestamp": stamp, "role": "unknown", "system": {}})
        self.per_second: Counter[int] = Counter()
        self.seen: dict[Node, float] = {}
        self.silence_s = 0.0
        self._events: list[tuple[float, int, bool, Node]] = []
        self._count = 0
        self.nodes = [Node(self, f"mta-{i:04}") for i in range(nodes)]
        self._wakes = dict.fromkeys(self.nodes, 0)  # the event that counts; older ones do not
        for node in self.nodes:
            self._plan(agent.PRIME_S, node, is_tick=True)

    def _plan(self, when: float, node: Node, *, is_tick: bool) -> int:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, is_tick, node))
        return self._count

    def run(self, until: float) -> None:
        while self._events[0][0] <= until:
            self.now, number, is_tick, node = heapq.heappop(self._events)
            if is_tick:
                self._plan(self.now + node.take_sample(), node, is_tick=True)
            elif number != self._wakes[node]:
                continue
            pause = node.sender.step()
            self._wakes[node] = self._plan(self.now + max(0.0, pause), node, is_tick=False)
        self.now = until

    def note(self, node: Node) -> None:
        self.per_second[int(self.now)] += 1
        self.silence_s = max(self.silence_s, self.now - self.seen.get(node, self.now))
        self.seen[node] = self.now


def simulate(nodes: int = 1000, seed: int = 1) -> Result:
    """Let a dashboard be away for OUTAGE_S, and watch what its return brings it."""
    level = agent.log.level
    agent.log.setLevel("CRITICAL")  # each node would say it
    try:
        return _simulate(Fleet(nodes, seed), nodes)
    finally:
        agent.log.setLevel(level)


def _simulate(fleet: Fleet, nodes: int) -> Result:
    fleet.run(120)
    fleet.is_up = False
    back = 120 + OUTAGE_S
    fleet.run(back)
    fleet.is_up, fleet.silence_s = True, 0.0
    fleet.per_second.clear()
    fleet.seen = dict.fromkeys(fleet.nodes, back)
    drained = float("inf")
    for second in range(1, int(WATCHED_S) + 1):
        fleet.run(back + second)
        if drained > WATCHED_S and not any(n.buffer.counters().waiting for n in fleet.nodes):
            drained = second
            requests = dict(fleet.per_second)
    requests = requests if drained < WATCHED_S else dict(fleet.per_second)
    lasted = min(drained, WATCHED_S)
    counters = [node.buffer.counters() for node in fleet.nodes]
    return Result(
        nodes, sum(requests.values()), drained, max(requests.values()),
        sum(requests.values()) / lasted, fleet.silence_s,
        sum(max(0, c.dropped - (c.sampled - 100)) for c in counters),
    )


if __name__ == "__main__":
    print(simulate(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
