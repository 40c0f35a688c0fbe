"""README, agent.env.example and pyproject.toml say what the code does."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from conftest import ROOT
from dashboard import APIS, MONITOR_SAMPLE, MONITOR_SYSTEM, SAMPLE, SYSTEM

import tinomail_agent as agent

README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / "agent.env.example").read_text()


def test_the_settings_table_of_readme() -> None:
    rows = [
        f"| `{s.name}` | "
        + ("**required**" if s.required else f"`{s.default}`" if s.default else "(empty)")
        + f" | {s.help} |"
        for s in agent.SETTINGS
    ]
    section = README.split("## Settings")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows


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


def test_the_samples_of_readme_are_some() -> None:
    sample, other = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert MONITOR_SAMPLE(json.loads(other)) == ""
    assert set(MONITOR_SYSTEM) <= set(json.loads(other))
    value = json.loads(sample)
    assert SAMPLE(value) == ""
    assert set(value["system"]) == set(SYSTEM)
    assert value["agent"]["version"] == agent.VERSION


def test_readme_tells_how_to_find_the_dialect() -> None:
    section = README.split("## Which dashboard do I have?")[1].split("\n## ")[0]
    for api in APIS:
        assert f"DASHBOARD_API={api}" in section
    assert "Missing x-api-key header" in section and "--check" in section


def test_the_commands_of_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    installer = (ROOT / "install.sh").read_text()
    options = agent.build_parser().format_help() + installer.split("set -euo")[0]
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert option in options, option


def log_lines() -> list[str]:
    """Return the fixed beginnings of every line that the agent can log at INFO and above."""
    source = (ROOT / "tinomail_agent.py").read_text()
    call = (
        r"(?:log\.(?:info|warning|critical|log)\(\s*(?:logging\.\w+[^\"]*,\s*)?"
        r"|(?:begin|end)\(\s*\"[a-z ]+\",\s*f?)"
    )
    found = re.findall(call + r'"([^"]+)"', source)
    return [line for line in found if line != "%s"]


def test_readme_explains_every_log_line() -> None:
    lines = log_lines()
    assert len(lines) >= 7
    table = README.split("## What the log says")[1].split("\n## ")[0]
    for line in lines:
        words = re.split(r"%[a-z.\d]*|\{[^}]*\}", line)
        anchor = max((word.strip(" :,(") for word in words), key=len)
        assert anchor in table, (line, anchor)


@pytest.mark.parametrize("problem", [
    *(f"the dashboard's certificate {words}" for words in ("has expired",)),
    "no complete answer in time", "connection refused",
    "the connection was closed before the answer was complete",
    "the name in DASHBOARD_URL cannot be resolved",
    agent.NOT_THE_DASHBOARD,
    *(words for words in agent.STATUS_ADVICE.values() if "API_KEY" in words or "forbids" in words),
    *(hint.advice for dialect in agent.DIALECTS.values() for hint in dialect.hints),
])
def test_readme_explains_every_reason(problem: str) -> None:
    source = (ROOT / "tinomail_agent.py").read_text()
    head = problem.split(":")[0].removeprefix("the dashboard's certificate ")
    assert head in source
    assert head.split("(")[0].strip() in README


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
    import ast

    source = (ROOT / "tinomail_agent.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 45, f"{node.name} has {length} lines"
    assert source.count("threading.Thread(") == 3  # collector, sender, workers
    assert source.count("threading.Lock()") == 2  # of the buffer, of a worker
    assert logging.getLogger("tinomail_agent") is agent.log
