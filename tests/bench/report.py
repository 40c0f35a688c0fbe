"""Rows, budgets and the table: the part of the bench that measures nothing."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured, in several runs."""

    what: str
    unit: str
    runs: tuple[float, ...]
    budget: float | None = None  # the most that it may be; None: for comparison only
    beside: Mapping[str, float] = field(default_factory=dict)  # baselines, in the same unit

    @property
    def value(self) -> float:
        """Return the median of the runs; without any, nothing was measured and it is infinite."""
        return statistics.median(self.runs) if self.runs else float("inf")

    @property
    def is_met(self) -> bool:
        return self.budget is None or self.value <= self.budget


def number(value: float) -> str:
    """Return three significant digits, and whole numbers from 100 on."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text if "e" not in text else f"{value:.4f}"


def table(rows: Iterable[Row], facts: Mapping[str, str]) -> str:
    """Return the facts and the rows as Markdown, as docs/performance.md has them."""
    lines = [f"{name}: {text}  " for name, text in facts.items()]
    lines += ["", "| what | measured | budget | beside it |", "|---|---:|---:|---|"]
    for row in rows:
        budget = "" if row.budget is None else f"<= {number(row.budget)}"
        beside = ", ".join(f"{name} {number(value)}" for name, value in row.beside.items())
        mark = "" if row.is_met else " **over**"
        measured = f"{number(row.value)} {row.unit}".rstrip()
        lines.append(f"| {row.what} | {measured}{mark} | {budget} | {beside} |")
    return "\n".join(lines)


def as_json(rows: Iterable[Row], facts: Mapping[str, str]) -> str:
    measured = [
        {**dataclasses.asdict(row), "value": row.value, "is_met": row.is_met} for row in rows
    ]
    return json.dumps({"facts": dict(facts), "rows": measured}, indent=2) + "\n"


def verdict(rows: Iterable[Row]) -> tuple[int, str]:
    """Return the exit code, and what to say about the budgets."""
    judged = [row for row in rows if row.budget is not None]
    over = [row for row in judged if not row.is_met]
    if not judged:
        return 1, "no budget was measured"
    if not over:
        return 0, f"all {len(judged)} budgets are met"
    names = "; ".join(row.what for row in over)
    return 1, f"{len(over)} of {len(judged)} budgets are broken: {names}"
