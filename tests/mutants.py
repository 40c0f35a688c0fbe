#!/usr/bin/env python3
"""Change one line of the agent at a time, and see whether the tests of its section notice.

    .venv/bin/python tests/mutants.py [--list] [--only N ...] [--section TITLE] [--seed N]

Chooses mutants with a fixed seed, for each section of tinomail_agent.py as many as its share of
the lines asks for, and runs each against the section's test files in a copy of the tree. Prints
which tests killed which mutant, and each survivor's change. Development only.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
AGENT = "tinomail_agent.py"
LIMIT_S = 900.0  # for the test files of one mutant; one that makes them hang is killed
PYTEST = (
    "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist",
    "-m", "not service and not long",
)

HEAD = "head"  # imports and constants, before the first section
# The test files of each section, the quick ones first.
TESTS = {
    HEAD: "docs collector settings sender transport agent crash state",
    "the service": "crash agent state fleet",
    "collecting": "collector zonemta dialects numbers",
    "the buffer": "sender state",
    "sending": "sender crash agent fleet",
    "problems, workers, ticks": "worker fleet collector",
    "what an answer leads to": "sender transport dialects",
    "dialects": "dialects transport sender",
    "the way to the dashboard": "transport dialects",
    "state on disk": "dialects state",
    "reading /proc and sysfs": "collector trouble numbers",
    "disks and networks": "collector numbers trouble side_by_side",
    "processes": "classify collector side_by_side",
    "services": "classify collector",
    "sockets": "numbers trouble side_by_side",
    "what runs here": "collector",
    "ZoneMTA's own figures": "zonemta",
    "settings": "settings write_settings docs",
    "log and command line": "settings agent dialects trouble docs",
}


class Mutant(NamedTuple):
    """One line, and what it becomes."""

    section: str
    line: int  # from 1
    what: str
    before: str
    after: str


class Outcome(NamedTuple):
    """What the tests said of a mutant."""

    mutant: Mutant
    killed_by: str  # "" if it survived
    took_s: float


# --- which mutants there are

OPERATORS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"),
}
TRUTHS = (ast.Compare, ast.BoolOp)


def sections(lines: list[str]) -> list[str]:
    """Return the title of the section that each line belongs to."""
    titles, title = [], HEAD
    for line in lines:
        if found := re.match(r"# --- (.+?) -+$", line):
            title = found[1]
        titles.append(title)
    return titles


def is_left_alone(node: ast.AST) -> bool:
    """Tell whether a node holds nothing that a test could notice, or only text."""
    if isinstance(node, ast.JoinedStr):
        return True
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(one, ast.Name) and one.id == "VERSION" for one in targets)


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """Return the nodes of a tree, but for annotations, texts and the version."""
    if is_left_alone(node):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes_of(child)


class Change(NamedTuple):
    """Columns of a line that get another text."""

    line: int  # from 1
    start: int
    end: int
    text: str
    what: str


def swap(left: ast.expr, operator: ast.AST, right: ast.expr, lines: list[str]) -> Iterator[Change]:
    """Put another operator between two operands on one line."""
    number, start = left.end_lineno or 0, left.end_col_offset or 0
    if number != right.lineno or type(operator) not in OPERATORS:
        return
    old, new = OPERATORS[type(operator)]
    if found := re.match(rf"[\s)]*({re.escape(old)})[\s(]", lines[number - 1][start:]):
        first = start + found.start(1)
        yield Change(number, first, first + len(old), new, f"{old} -> {new}")


def changed_operators(node: ast.AST, lines: list[str]) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from swap(node.left, node.ops[0], node.comparators[0], lines)
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:]):
            yield from swap(left, node.op, right, lines)
    elif isinstance(node, ast.BinOp):
        if not any(isinstance(one, ast.JoinedStr) or isinstance(getattr(one, "value", 0), str)
                   for one in (node.left, node.right)):
            yield from swap(node.left, node.op, node.right, lines)
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Sub)):
        old, new = OPERATORS[type(node.op)]
        first = lines[node.lineno - 1].index(f"{old}=", node.target.end_col_offset)
        yield Change(node.lineno, first, first + 1, new, f"{old}= -> {new}=")


def other_texts(node: ast.expr | ast.stmt, line: str) -> Iterator[tuple[str, str]]:
    """Return what can stand in the place of a node that is on one line, and what that is."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield line[node.operand.col_offset:node.end_col_offset], "not dropped"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value), "the other truth value"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        for step in (1, -1):
            yield str(node.value + step), f"constant {step:+}"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass", "call deleted"
    elif isinstance(node, ast.Return) and node.value is not None:
        is_not = isinstance(node.value, ast.UnaryOp) and isinstance(node.value.op, ast.Not)
        if isinstance(node.value, TRUTHS) or is_not:
            value = line[node.value.col_offset:node.end_col_offset]
            yield f"return not ({value})", "return value negated"
        elif not isinstance(node.value, ast.Constant):
            yield "return None", "return value None"


def all_mutants(source: str) -> list[Mutant]:
    lines = source.splitlines()
    titles = sections(lines)
    found = []
    for node in nodes_of(ast.parse(source)):
        changes = [*changed_operators(node, lines)]
        if isinstance(node, (ast.expr, ast.stmt)) and node.lineno == node.end_lineno:
            number, start, end = node.lineno, node.col_offset, node.end_col_offset or 0
            changes += [Change(number, start, end, text, what)
                        for text, what in other_texts(node, lines[number - 1])]
        for change in changes:
            before = lines[change.line - 1]
            if before.isascii():  # else columns, which count bytes, are elsewhere
                after = before[:change.start] + change.text + before[change.end:]
                title = titles[change.line - 1]
                found.append(Mutant(title, change.line, change.what, before, after))
    return found


def is_valid(lines: list[str], mutant: Mutant) -> bool:
    changed = [*lines]
    changed[mutant.line - 1] = mutant.after
    try:
        compile("\n".join(changed), AGENT, "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def shares(titles: list[str], number: int) -> dict[str, int]:
    """Return how many mutants each section gets, in proportion to its lines."""
    lines = {title: titles.count(title) for title in dict.fromkeys(titles)}
    exact = {title: number * count / len(titles) for title, count in lines.items()}
    whole = {title: int(share) for title, share in exact.items()}
    by_rest = sorted(exact, key=lambda title: whole[title] - exact[title])
    for title in by_rest[:number - sum(whole.values())]:
        whole[title] += 1
    return whole


def choose(source: str, number: int, seed: int) -> list[Mutant]:
    """Return that many mutants, at most one of a line.

    Each section has a random sequence of its own: a change of one section changes no other's.
    """
    candidates = all_mutants(source)
    chosen = []
    for title, share in shares(sections(source.splitlines()), number).items():
        chance = random.Random(f"{seed} {title}")
        by_line: dict[int, list[Mutant]] = {}
        for one in candidates:
            if one.section == title:
                by_line.setdefault(one.line, []).append(one)
        for line in sorted(chance.sample(sorted(by_line), min(share, len(by_line)))):
            chosen.append(chance.choice(by_line[line]))
    assert all(is_valid(source.splitlines(), one) for one in chosen)
    return chosen


# --- what the tests say of one


def copy_of_tree(folder: Path) -> Path:
    """Copy what git knows of the tree, as it is now, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def killer(folder: Path, files: list[str]) -> str:
    """Return the first test that fails, and fails again by itself; "" if there is none.

    One that passes the second time is left out: the machine was busy.
    """
    unsteady: list[str] = []
    while failed := run_tests(folder, [*files, *unsteady]):
        if "::" not in failed or run_tests(folder, [failed]):
            return failed
        unsteady += ["--deselect", failed]
    return ""


def run_tests(folder: Path, files: list[str]) -> str:
    """Return "" if the tests pass, else the first that fails."""
    try:
        done = subprocess.run(
            [sys.executable, *PYTEST, *files], cwd=folder, capture_output=True, text=True,
            timeout=LIMIT_S,
            env={**os.environ, "PYTHONPATH": str(folder), "LEAST_LIMIT_S": "40"},
        )
    except subprocess.TimeoutExpired:
        return "the time limit"
    if done.returncode == 0:
        return ""
    said: list[str] = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if not said:  # no verdict on the mutant
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")
    return said[0]


def try_mutant(mutant: Mutant) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        folder = copy_of_tree(Path(scratch))
        lines = (folder / AGENT).read_text("utf-8").splitlines()
        lines[mutant.line - 1] = mutant.after
        (folder / AGENT).write_text("\n".join(lines) + "\n", "utf-8")
        killed_by = killer(folder, test_files(mutant.section))
    return Outcome(mutant, killed_by, time.monotonic() - started)


def test_files(section: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in TESTS[section].split()]


# --- the command line


def show(number: int, mutant: Mutant) -> str:
    return f"{number:3} {mutant.section}, line {mutant.line}: {mutant.what}\n" \
           f"    - {mutant.before.strip()}\n    + {mutant.after.strip()}"


def table(outcomes: list[Outcome]) -> str:
    rows = [f"{'section':28} made killed survived"]
    for title in [*dict.fromkeys(one.mutant.section for one in outcomes), "all"]:
        those = [one for one in outcomes if title in (one.mutant.section, "all")]
        killed = sum(bool(one.killed_by) for one in those)
        rows.append(f"{title:28} {len(those):4} {killed:6} {len(those) - killed:8}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=60, help="how many mutants (60)")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--section", action="append", help="only mutants of this section")
    parser.add_argument("--only", type=int, nargs="+", help="only the mutants with these numbers")
    parser.add_argument("--jobs", type=int, default=1, help="how many at the same time (1)")
    parser.add_argument("--list", action="store_true", help="show the mutants; run no test")
    wanted = parser.parse_args()
    source = (ROOT / AGENT).read_text("utf-8")
    if unknown := set(sections(source.splitlines())) ^ set(TESTS):
        parser.error(f"the table TESTS and the sections of {AGENT} differ: {sorted(unknown)}")
    chosen = {
        number: one
        for number, one in enumerate(choose(source, wanted.number, wanted.seed), 1)
        if (not wanted.only or number in wanted.only)
        and (not wanted.section or one.section in wanted.section)
    }
    if wanted.list:
        print("\n".join(show(number, one) for number, one in chosen.items()))
        return 0
    with concurrent.futures.ThreadPoolExecutor(wanted.jobs) as pool:
        running = {pool.submit(try_mutant, one): number for number, one in chosen.items()}
        outcomes = {}
        for done in concurrent.futures.as_completed(running):
            number, one = running[done], done.result()
            outcomes[number] = one
            verdict = f"killed by {one.killed_by}" if one.killed_by else "SURVIVED"
            print(f"{show(number, one.mutant)}\n    {verdict} ({one.took_s:.0f} s)", flush=True)
    print(table([outcomes[number] for number in sorted(outcomes)]))
    return int(any(not one.killed_by for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
