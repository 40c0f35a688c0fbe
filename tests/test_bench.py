"""The bench's own part: rows are judged by their median, and a broken budget fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from bench import procfs, report, sizes
from bench.report import Row

pytestmark = pytest.mark.alone


def test_a_row_is_judged_by_the_median_of_its_runs() -> None:
    assert Row("x", "ms", (1.0, 9.0, 2.0), 2.0).is_met
    assert not Row("x", "ms", (1.0, 3.0, 3.0), 2.0).is_met
    assert Row("x", "ms", (2.0, 3.0), 2.5).is_met
    assert Row("for comparison", "ms", (99.0,)).is_met
    assert not Row("nothing was measured", "ms", (), 2.0).is_met


@pytest.mark.parametrize("rows, code, text", [
    ([Row("a", "", (1.0,), 1.0), Row("b", "", (5.0,))], 0, "all 1 budgets are met"),
    ([Row("a", "", (1.1,), 1.0), Row("b", "", (0.0,), 0.0)], 1, "1 of 2 budgets are broken: a"),
    ([Row("b", "", (5.0,))], 1, "no budget was measured"),
    ([], 1, "no budget was measured"),
])
def test_a_broken_budget_is_a_failing_exit(rows: list[Row], code: int, text: str) -> None:
    assert report.verdict(rows) == (code, text)


def test_the_table_is_markdown_and_marks_what_is_over() -> None:
    rows = [
        Row("CPU", "ms", (46.94,), 40, {"a plain way": 866.2, "a floor": 0.1904}),
        Row("body", "bytes", (1348.0,), 2000),
    ]
    assert report.table(rows, {"date": "2026-11-25"}).splitlines() == [
        "date: 2026-11-25  ",
        "",
        "| what | measured | budget | beside it |",
        "|---|---:|---:|---|",
        "| CPU | 46.9 ms **over** | <= 40 | a plain way 866, a floor 0.19 |",
        "| body | 1,348 bytes | <= 2,000 |  |",
    ]


def test_json_holds_every_run() -> None:
    row = Row("CPU", "ms", (3.0, 1.0, 2.0), 2.0, {"floor": 0.5})
    assert json.loads(report.as_json([row], {"python": "3.11"})) == {
        "facts": {"python": "3.11"},
        "rows": [{
            "what": "CPU", "unit": "ms", "runs": [3.0, 1.0, 2.0], "budget": 2.0,
            "beside": {"floor": 0.5}, "value": 2.0, "is_met": True,
        }],
    }


def test_what_the_kernel_says_of_a_process() -> None:
    """CPU time of all threads and of ended ones, as the process itself sees it; and children."""
    before = time.process_time()
    seen = procfs.cpu_s(os.getpid())
    assert before <= seen <= time.process_time()
    rss, pss = procfs.memory_mib(os.getpid())
    assert 0 < pss <= rss
    script = "import subprocess; subprocess.run(['true']); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for code, expected in ((script, 1), ("print(1, flush=True); input()", 0)):
        with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:  # type: ignore[call-overload]
            child.stdout.readline()
            assert procfs.children(child.pid) == expected
            child.communicate(b"\n")


def test_bodies_stay_within_their_budgets() -> None:
    for cores, disks, budget in ((2, 1, 1_000), (128, 16, 2_000)):
        packed, _ = sizes.body_bytes(cores, disks)
        assert max(packed) <= budget
    assert sizes.buffer_kib() <= 160
