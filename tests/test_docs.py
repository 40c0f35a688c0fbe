"""README, docs/, agent.env.example and pyproject.toml say what the code does."""

from __future__ import annotations

import ast
import difflib
import json
import logging
import re
from pathlib import Path

import dashboard
import loglines
import pytest
from conftest import ROOT

import tinomail_agent as agent

DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = DOCUMENTS["README.md"]
EXAMPLE = (ROOT / "agent.env.example").read_text()
SOURCE = (ROOT / "tinomail_agent.py").read_text()
UNIT = (ROOT / "tinomail-agent.service").read_text()


def section(document: str, title: str) -> str:
    """Return what stands below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", DOCUMENTS[document], re.M | re.S)
    assert found, f"{document} has no section {title!r}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """Return the rows of all tables in a text, without the headings; a row is its cells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for above, row in zip([[""], *rows], rows)
            if not set(row[0]) <= set("-:|") and not re.match("[a-z]", row[0])]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --- settings -----------------------------------------------------------------------------


def test_the_settings_table_of_readme() -> None:
    rows = [
        f"| `{s.name}` | "
        + ("**required**" if s.required else f"`{s.default}`" if s.default else "(empty)")
        + f" | {s.help} |"
        for s in agent.SETTINGS
    ]
    text = section("README.md", "Settings")
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


def test_the_example_names_every_setting_with_its_default() -> None:
    found = re.findall(r"^#?([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE)
    assert found == [(s.name, s.example if s.required else s.default) for s in agent.SETTINGS]
    for setting in agent.SETTINGS:
        assert f"# {setting.help[0].upper()}{setting.help[1:]}." in EXAMPLE


def test_the_example_is_a_good_env_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.env"
    path.write_text(EXAMPLE)
    path.chmod(0o600)
    config = agent.load_config({}, str(path))
    assert config.dashboard_url == "https://monitor.example.com"
    assert config.warnings == ()
    # and with every line of it in force
    path.write_text(re.sub(r"^#([A-Z_]+=)", r"\1", EXAMPLE, flags=re.MULTILINE))
    assert agent.load_config({}, str(path)) == config


# --- commands, links, length ---------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_names_exists(name: str) -> None:
    text = DOCUMENTS[name]
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`|    )make ([a-z]+)\b", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    installer = (ROOT / "install.sh").read_text()
    options = agent.build_parser().format_help() + installer.split("set -E")[0]
    for option in set(re.findall(r"(?:`|install\.sh )(--[a-z-]+)", text)):
        assert option in options, option
    for file in set(re.findall(r"`((?:tests|packaging|docs)/[\w./*]+)`", text)):
        assert list(ROOT.glob(file)), file
    variables = EXAMPLE + makefile + (ROOT / "packaging/fleet.sh").read_text() + installer
    for variable in set(re.findall(r"\b([A-Z]{2,}_[A-Z_]+)=", text)):
        assert variable in variables, variable
    for line in set(re.findall(r"`([A-Z][a-z]+[A-Za-z]+=[^ `]+)`", text)):
        assert re.search(rf"^{re.escape(line)}", UNIT, re.MULTILINE), line


def anchors(text: str) -> list[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md"])
def test_every_link_leads_somewhere(name: str) -> None:
    text = DOCUMENTS.get(name) or (ROOT / name).read_text()
    assert len(set(anchors(text))) == len(anchors(text)), "two headings with one anchor"
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_begins_with_its_contents(name: str) -> None:
    text = DOCUMENTS[name]
    wanted = anchors("\n".join(re.findall("^## .*$", text, re.MULTILINE)))
    head = text.split("\n## ")[0]
    assert re.findall(r"\]\(#([^)]*)\)", head) == wanted


def test_readme_is_short_and_leads_to_all_documents() -> None:
    assert len(README.splitlines()) <= 200
    assert {name for name in DOCUMENTS if f"]({name})" in README} == set(DOCUMENTS) - {"README.md"}


def test_the_unit_names_documents_that_are_installed() -> None:
    pages = re.findall("^Documentation=(.*)$", UNIT, re.MULTILINE)
    folder = "file:///usr/local/lib/tinomail-agent/"
    assert pages and {page.removeprefix(folder) for page in pages} <= set(DOCUMENTS)


def test_nothing_stands_twice() -> None:
    seen: dict[str, str] = {}
    for name, text in DOCUMENTS.items():
        flat = re.sub(r"\s+", " ", text.replace("|", "\n"))
        for sentence in re.split(r"(?<=[.:;]) |(?<=\|)", flat):
            words = re.sub(r"[^\w ]", "", sentence).strip()
            if len(words) > 60:
                assert words not in seen, f"in {seen[words]} and {name}: {sentence}"
                seen[words] = name


def test_readme_tells_how_to_find_the_dialect() -> None:
    text = section("README.md", "Which dashboard do I have?")
    for api in dashboard.APIS:
        assert f"DASHBOARD_API={api}" in text
    assert "Missing x-api-key header" in text and "--check" in text


# --- metrics ------------------------------------------------------------------------------


def fields(title: str) -> dict[str, str]:
    """Return the first two columns of a table of docs/metrics.md: v1's name -> the other one."""
    found: dict[str, str] = {}
    for first, second, *_ in table(section("docs/metrics.md", title)):
        ours, theirs = spans(first), spans(second)
        are_pairs = len(ours) == len(theirs)
        found |= zip(ours, theirs if are_pairs else [" ".join(theirs)] * len(ours))
    return found


def test_every_field_is_described() -> None:
    top = {"node_id", "timestamp", "system", "processes", "accept_queue", "services", "zonemta",
           "agent"}
    assert set(fields("The sample")) == top
    system = fields("system")
    others = {"load_avg": " ".join(("load1m", "load5m", "load15m"))}
    others |= {ours: theirs for theirs, (ours, _, _) in dashboard.MONITOR_SYSTEM.items()}
    assert set(system) == set(dashboard.SYSTEM)
    assert {name: other for name, other in system.items() if other} == others
    assert set(fields("disks")) == {
        "mount", "used_percent", "free_bytes", "inodes_used_percent", "read_only"}
    assert fields("processes") == {
        "status": "running", "pid": "pid", "memory_mb": "memoryMB", "cpu_percent": "cpuPercent",
        "uptime_seconds": ""}
    assert set(fields("zonemta")) == set(dashboard.ZONEMTA)
    assert set(fields("agent")) == set(dashboard.AGENT)


def test_the_samples_in_metrics_are_some() -> None:
    sample, other = re.findall(r"```json\n(.*?)```", DOCUMENTS["docs/metrics.md"], re.DOTALL)
    assert dashboard.MONITOR_SAMPLE(json.loads(other)) == ""
    assert set(dashboard.MONITOR_SYSTEM) <= set(json.loads(other))
    value = json.loads(sample)
    assert dashboard.SAMPLE(value) == ""
    assert set(value["system"]) == set(dashboard.SYSTEM)


# --- the log ------------------------------------------------------------------------------


def explained() -> list[str]:
    """Return the lines of docs/log.md: what stands in the first cell of a row, in backticks."""
    rows = table(DOCUMENTS["docs/log.md"].split("\n## Troubleshooting")[0])
    assert all(len(row) == 2 and row[1] for row in rows), "a row without an explanation"
    return [line for row in rows for line in spans(row[0])]


def unexplained(source: str, rows: list[str]) -> tuple[list[loglines.Text], list[str]]:
    """Return the texts that no row explains, and the rows that no text makes up any more."""
    known = loglines.texts(source, vars(agent))
    reader = loglines.Reader(known)
    parts = {row: reader.read(row) for row in rows}
    found = {text for its in parts.values() for text in its or ()}
    return [text for text in known if text not in found], [
        row for row, its in parts.items() if its is None
    ]


def test_log_md_explains_every_line_of_the_log() -> None:
    missing, stale = unexplained(SOURCE, explained())
    assert not missing and not stale, "\n".join([
        "docs/log.md does not follow the code.",
        *(f"nothing logs any more: | `{row}` |" for row in stale),
        *(f"no row explains, of line {text.line}: | `{text.words}` |"
          + "".join(f" (near: {row})" for row in difflib.get_close_matches(text.words, stale, 1))
          for text in missing),
    ])


NEW_LINES = (
    'log.warning("new text: %s", error)',
    'log.log(logging.ERROR, "new text")',
    'log.exception("new text")',
    'self._problems.begin("x", f"new text: {x}")',
    'self._problems.begin("x", "cannot deliver an old sample", "new text")',
    'self._problems.end("x", "new text")',
    'self._problems.crash("new text")',
    'self._missing("x", "new text")',
    'self._missing("new text", "why")',
    'return Verdict(Outcome.KEPT, problem="new text")',
    'return dataclasses.replace(verdict, detail="new text")',
    'Rule((401,), Outcome.KEPT, "new text")',
    'Answer(0, "new text")',
    'raise OSError(errno.EREMOTE, "new text")',
    'raise ValueError("new text")',
    'raise SettingsError(["new text"])',
    'self._worker.run({"new text": call})',
)


def test_a_new_line_is_seen_wherever_it_is_written() -> None:
    lines = [f"        {line.replace('new text', f'new text {number:02}')}"
             for number, line in enumerate(NEW_LINES)]
    head, _, tail = SOURCE.partition("class Collector:\n")
    method = "\n".join(["    def new(self, x: str) -> Any:", *lines])
    found = loglines.texts(f"{head}class Collector:\n{method}\n{tail}", vars(agent))
    seen = {int(number) for text in found for number in re.findall(r"new text (\d\d)", text.words)}
    assert [line for number, line in enumerate(NEW_LINES) if number not in seen] == []


def test_a_new_row_of_a_table_needs_a_row() -> None:
    source = f'{SOURCE}\nCERTIFICATE_PROBLEMS[99] = "something new"\n'
    missing, _ = unexplained(source, explained())
    assert [text.words for text in missing] == ["something new"]


def test_a_row_whose_line_is_gone_is_found() -> None:
    rows = ["the sender failed; trying again (line 700)", "this was logged once: ..."]
    assert unexplained(SOURCE, rows)[1] == rows[1:]


# --- the code -----------------------------------------------------------------------------


def test_dependencies() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert block
    assert re.findall(r'"(.*?)"', block[1]) == [
        "psutil>=5.9.0", "requests>=2.25.1", "python-dotenv>=0.19.2", "sdnotify>=0.3.1",
    ]
    assert 'tinomail-agent = "tinomail_agent:main"' in project
    assert 'requires-python = ">=3.10"' in project


def test_house_rules() -> None:
    """STYLE: lines of 100, functions of 40, three threads and their workers."""
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 45, f"{node.name} has {length} lines"
    assert SOURCE.count("threading.Thread(") == 3  # collector, sender, workers
    assert SOURCE.count("threading.Lock()") == 2  # of the buffer, of a worker
    assert logging.getLogger("tinomail_agent") is agent.log


def test_limits_that_the_documents_give() -> None:
    pauses = [f"{pause:g}" for pause in agent.BACKOFF_S]
    for words in (
        f"{agent.HANG_LIMIT_S:g} s ({agent.FILES_LIMIT_S:g} s for the host's files)",
        f"While {agent.Worker.MOST_ABANDONED} calls of a kind hang",
        f"given up after {agent.ZONEMTA_ANSWER_S:g} s, and the post of its figures after "
        f"{agent.ZONEMTA_POST_S:g} s",
        f"{agent.HANG_AFTER_S:g} s without a watchdog",
        f"after {', '.join(pauses[:-1])} and {pauses[-1]} s",
        f"up to {agent.DRAIN_PER_SUCCESS} of the oldest",
        f"up to {agent.RETRY_AFTER_LIMIT_S:g} s",
        f"{agent.REQUEST_DEADLINE_S:g} s, and {agent.SLOW_DEADLINE_S:g} s after one that ran out",
        f"At most {agent.ANSWER_LIMIT_BYTES // 1024} KiB of an answer's body",
        f"for up to {agent.STOP_LIMIT_S:g} s",
    ):
        assert words in " ".join(DOCUMENTS["docs/design.md"].split()), words
