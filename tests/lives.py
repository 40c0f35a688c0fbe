"""Lives of a real agent, one after the other, each in a process of its own.

    lives.py TAKEN HEARTBEAT_MS [--lives 200 --seed 1]     # each ended by SIGKILL
    lives.py TAKEN HEARTBEAT_MS [--clock FILE] [--impatient]  # one, until SIGTERM

Each of many lives is forked from a process that has imported everything, so that 200 of them take
a minute; pauses are a fraction of the real ones. The file TAKEN gets a line "LIFE TIMESTAMP"
for each sample as soon as the buffer has it; stdout a line "LIFE EPOCH_S" for each kill. The
file of --clock holds the seconds by which the wall clock is wrong. --impatient shortens the
deadlines of an attempt, too: on a busy machine a good answer may come too late.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import tinomail_agent as agent


def make_fast() -> None:
    agent.BACKOFF_S = (0.1, 0.2, 0.4)
    agent.PRIME_S = 0.02
    agent.SAVE_AFTER_S = 0.1


def make_clock_wrong(path: str) -> None:
    def now() -> float:
        return time.time() + float(Path(path).read_text() or 0)

    for made in (agent.Collector.__init__, agent.Sender.__init__):
        defaults: dict[str, Any] = made.__kwdefaults__ or {}
        assert "now" in defaults
        defaults["now"] = now


def note_samples(path: str, life: int) -> None:
    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    put = agent.Buffer.put

    def put_and_note(self: agent.Buffer, sample: agent.Sample) -> None:
        put(self, sample)
        os.write(notes, f"{life} {agent.unpack(sample.packed)['timestamp']}\n".encode())

    agent.Buffer.put = put_and_note  # type: ignore[method-assign]


def live(options: argparse.Namespace, life: int) -> int:
    note_samples(options.taken, life)
    config = agent.load_config(os.environ, os.devnull)
    agent.set_up_logging(config.log_level, config.api_key, os.environ)
    config = dataclasses.replace(config, heartbeat_interval=options.heartbeat_ms)
    return agent.Agent(config, os.environ).run()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("taken")
    parser.add_argument("heartbeat_ms", type=int)
    parser.add_argument("--lives", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", default="")
    parser.add_argument("--impatient", action="store_true")
    options = parser.parse_args()
    make_fast()
    if options.impatient:
        agent.REQUEST_DEADLINE_S, agent.SLOW_DEADLINE_S = 1.0, 2.0
    if options.clock:
        make_clock_wrong(options.clock)
    if not options.lives:
        return live(options, 0)
    chance = random.Random(options.seed)
    for life in range(1, options.lives + 1):
        pid = os.fork()
        if pid == 0:
            os._exit(live(options, life))
        time.sleep(chance.uniform(0.05, 8 * options.heartbeat_ms / 1000))
        os.kill(pid, signal.SIGKILL)
        print(life, time.time(), flush=True)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            return 1  # it had ended by itself
    return 0


if __name__ == "__main__":
    sys.exit(main())
