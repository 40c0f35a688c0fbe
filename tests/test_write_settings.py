"""packaging/write_settings.py, as install.sh calls it."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import tinomail_agent as agent

URL = "DASHBOARD_URL=https://monitor.example.com"
GOOD = f"# ours\n\n{URL}\nNODE_ID=mta-01  # the first\nAPI_KEY=k3y\n"


class Run:
    """One call: its exit code, what it said, and what it wrote."""

    def __init__(self, env_file: Path, *options: str, stdin: str = "") -> None:
        done = subprocess.run(
            [sys.executable, str(ROOT / "packaging/write_settings.py"), str(env_file), *options],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            input=stdin, capture_output=True, text=True,
        )
        self.code, self.said = done.returncode, done.stderr
        self.place = env_file.with_name(f"{env_file.name}.new")
        self.text = self.place.read_text() if self.place.is_file() else ""
        self.values = agent.parse_env(self.text.encode())[0]


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "agent.env"
    path.write_text(GOOD)
    return path


def test_a_first_file_that_root_alone_can_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "agent.env", f"--set={URL}", "--key-file", "-", stdin="k3y\n")
    assert (run.code, run.said) == (0, "")
    assert run.text == f"{'# Settings of the TinoMail agent.'}\n{URL}\nAPI_KEY=k3y\n"
    assert run.place.stat().st_mode & 0o777 == 0o600


def test_without_a_change_every_byte_stays(env_file: Path) -> None:
    run = Run(env_file, f"--set={URL}", "--set=NODE_ROLE=", "--key-file", "-", stdin="k3y")
    assert (run.code, run.text) == (0, GOOD)


def test_a_change_leaves_the_other_lines_alone(env_file: Path) -> None:
    run = Run(env_file, "--set=NODE_ROLE=redis", "--set=NODE_ID=", "--set=DISK_PATHS=/,/a #b")
    assert run.code == 0
    assert run.text == f"# ours\n\n{URL}\nAPI_KEY=k3y\nNODE_ROLE=redis\nDISK_PATHS='/,/a #b'\n"
    assert run.values["DISK_PATHS"] == "/,/a #b"


@pytest.mark.parametrize("key", [
    "".join(c for c in map(chr, range(33, 127))), "'x", '"x"', "`$(id)\\", "a#b\\'c\\\\", "-x",
])
def test_any_key_is_read_back_equal(env_file: Path, key: str) -> None:
    assert set(key) <= set(string.printable)
    run = Run(env_file, "--key-file", "-", stdin=f"{key}\n")
    assert (run.code, run.values["API_KEY"]) == (0, key)


@pytest.mark.parametrize(("options", "says"), [
    (["--set=API_KEY=s3cret"], "API_KEY: give it by --key-file"),
    (["--set=NODE_ROLL=redis"], "there is no setting NODE_ROLL; did you mean NODE_ROLE?"),
    (["--set=s3cret"], "--set: is not NAME=VALUE"),
    (["--set=NODE_ID=a\nAPI_KEY=b"], "NODE_ID: must not hold a line break"),
    (["--set=BUFFER_SIZE=1"], "BUFFER_SIZE: must be a whole number from 10 to 10000 (it is '1'"),
    (["--set=DASHBOARD_URL="], "DASHBOARD_URL: is missing"),
    (["--key-file", "/nonexistent"], "/nonexistent: cannot be read: No such file"),
    (["--key-file", "/dev/null"], "--key-file: there is no key in it"),
])
def test_what_is_wrong_is_said(env_file: Path, options: list[str], says: str) -> None:
    run = Run(env_file, *options)
    assert (run.code, says in run.said) == (os.EX_CONFIG, True), run.said
    assert "s3cret" not in run.said
    assert env_file.read_text() == GOOD


def test_a_file_that_is_wrong_already(env_file: Path) -> None:
    env_file.write_text(f"{GOOD}NODE_ROLL=redis\n")
    run = Run(env_file, "--set=NODE_ROLE=redis")
    assert run.code == os.EX_CONFIG
    assert f"{env_file}, line 6: there is no setting NODE_ROLL" in run.said


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "agent.env").write_text(GOOD)
    (tmp_path / "agent.env.new").symlink_to("/dev/full")
    run = Run(tmp_path / "agent.env", "--set=NODE_ROLE=redis")
    assert (run.code, "cannot be written: No space left on device" in run.said) == (1, True)


@pytest.mark.parametrize(("url", "option", "allowed"), [
    ("https://m.example.com", "", False), ("http://10.0.0.1:8080", "", True),
    ("HTTP://10.0.0.1:8080", "", True), ("http://127.0.0.1:8080", "", False),
    ("http://10.0.0.1:8080", "https://m.example.com", False),
])
def test_the_settings_of_the_node_agent(
    url: str, option: str, allowed: bool, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        f"# theirs\nexport AGENT_SERVER_URL='{url}'\nAGENT_API_KEY=\"a\\\"b\\$c\\d\"\n"
        "AGENT_NODE_ROLE=re\\dis \nAGENT_HEARTBEAT_INTERVAL=\nAGENT_MONGODB_URI=mongodb://h\n"
    )
    options = [f"--set=DASHBOARD_URL={option}"] if option else []
    run = Run(tmp_path / "agent.env", "--node-agent", str(tmp_path / ".env"), *options)
    assert (run.code, "sent in clear text" in run.said) == (0, allowed), run.said
    assert run.values == {
        "DASHBOARD_URL": option or url, "API_KEY": 'a"b$c\\d', "NODE_ROLE": "redis",
        "NODE_ID": "node-01", "DASHBOARD_API": "tinomail-monitor",
        **({"ALLOW_HTTP": "true"} if allowed else {}),
    }
