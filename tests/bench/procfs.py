"""What the kernel says a process costs."""

from __future__ import annotations

import re
import time
from pathlib import Path

CPUCLOCK_SCHED = 2  # linux/posix-timers_types.h: the CPU time of all threads, in nanoseconds


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process, ended threads included (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def memory_mib(pid: int) -> tuple[float, float]:
    """Return (RSS, PSS) of a process: PSS counts a shared page by its share."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = dict(re.findall(r"^(Rss|Pss):\s*(\d+) kB", rollup, re.MULTILINE))
    return int(sizes["Rss"]) / 1024, int(sizes["Pss"]) / 1024


def children(pid: int) -> int:
    """Return how many children a process has, plus 1 if it ever had one that it waited for.

    Such a child shows in the parent's cminflt: no process starts without a page fault.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    waited_for = int(fields[8]) > 0  # proc_pid_stat(5), field 11
    living = [
        child for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return len(living) + waited_for


def processes() -> int:
    return sum(entry.name.isdigit() for entry in Path("/proc").iterdir())
