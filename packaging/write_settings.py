#!/usr/bin/env python3
"""Write changed settings to ENV_FILE.new, and let the agent check them.

install.sh calls it with the new agent on PYTHONPATH. The key is read from its file or from stdin:
it is in no argument and in no message.

Exit codes: 0 written; 1 cannot be written; 78 the settings are wrong, one line for each problem.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from typing import NoReturn

import dotenv.parser

import tinomail_agent as agent

FIRST_LINE = "# Settings of the TinoMail agent.\n"
NODE_AGENT_NAMES = {  # setting of the Node.js agent -> ours
    "AGENT_SERVER_URL": "DASHBOARD_URL", "AGENT_API_KEY": "API_KEY", "AGENT_NODE_ID": "NODE_ID",
    "AGENT_NODE_ROLE": "NODE_ROLE", "AGENT_HEARTBEAT_INTERVAL": "HEARTBEAT_INTERVAL",
    "AGENT_ZONEMTA_API_URL": "ZONEMTA_URL",
}


def fail(*lines: str, code: int = os.EX_CONFIG) -> NoReturn:
    print(*lines, sep="\n", file=sys.stderr)
    sys.exit(code)


def read(source: str) -> str:
    """Return the text of a file; "-" is stdin."""
    try:
        with open(0 if source == "-" else source, "rb") as stream:
            return stream.read(65536).decode("utf-8-sig")
    except OSError as error:
        fail(f"{source}: cannot be read: {os.strerror(error.errno or 0)}")
    except UnicodeDecodeError:
        fail(f"{source}: is not UTF-8 text")


def write(path: str, text: str) -> None:
    """Write a file that only root can read."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "w", encoding="utf-8", newline="") as out:
            os.fchmod(fd, 0o600)
            out.write(text)
            out.flush()
            os.fsync(fd)
    except OSError as error:
        fail(f"{path}: cannot be written: {os.strerror(error.errno or 0)}", code=1)


# --- settings of the Node.js agent -------------------------------------------------------


def unquoted(text: str) -> str:
    """Return the value of a line of an EnvironmentFile= (systemd.exec(5))."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    if len(text) > 1 and text[0] == text[-1] == '"':
        return re.sub(r'\\(["\\`$])', r"\1", text[1:-1])
    return re.sub(r"\\(.)", r"\1", text)


def taken_over(source: str, url: str) -> dict[str, str]:
    """Return the Node.js agent's settings as ours; `url` is the one given as an option, or ""."""
    lines = (line.strip().partition("=") for line in read(source).splitlines())
    theirs = {name.removeprefix("export ").strip(): unquoted(value) for name, _, value in lines}
    theirs.setdefault("AGENT_NODE_ID", "node-01")  # its default: the node keeps its name
    found = {ours: theirs[name] for name, ours in NODE_AGENT_NAMES.items() if theirs.get(name)}
    found["DASHBOARD_API"] = "tinomail-monitor"
    address = found.get("DASHBOARD_URL", "").lower()
    if not url and address.startswith("http://") and not agent.is_loopback(address):
        found["ALLOW_HTTP"] = "true"
        print("WARNING: the dashboard's address is http://: the key is sent in clear text, as the "
              "Node.js agent did (ALLOW_HTTP=true); use https:// as soon as you can",
              file=sys.stderr)
    return found


# --- the env file ------------------------------------------------------------------------


def parse_changes(words: list[str]) -> dict[str, str]:
    """Turn NAME=VALUE words into changes; an empty value removes the setting."""
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name == "API_KEY":
            fail("API_KEY: give it by --key-file: every user can see an argument")
        problems = ["line 1: is not NAME=VALUE"]
        if equals:
            _, problems = agent.parse_env(f"{name}=\n".encode())
        if problems:
            fail(f"--set: {problems[0].partition(': ')[2]} (example: --set NODE_ROLE=redis)")
        if not value.isprintable():
            fail(f"{name}: must not hold a line break or another control character")
        changes[name] = value
    return changes


def edit(text: str, changes: dict[str, str]) -> str:
    """Return the text of an env file with these changes; all other lines stay as they are."""
    values, _ = agent.parse_env(text.encode())
    changes = {name: value for name, value in changes.items() if values.get(name, "") != value}
    if not changes:
        return text
    kept = "".join(
        binding.original.string for binding in dotenv.parser.parse_stream(io.StringIO(text))
        if binding.key not in changes
    ).rstrip()
    text = f"{kept}\n" if kept else FIRST_LINE
    values = {name: value for name, value in values.items() if name not in changes}
    for name in sorted(filter(changes.get, changes), key="API_KEY".__eq__):  # the key last
        values[name] = value = changes[name]
        quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        for spelling in (value, quoted):  # the first one that is read back equal
            longer = f"{text}{name}={spelling}\n"
            if agent.parse_env(longer.encode()) == (values, []):
                break
        else:
            fail(f"{name}: this value cannot be written to an env file")
        text = longer
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("env_file", metavar="ENV_FILE")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument("--key-file", help='file that holds the key; "-" is stdin')
    parser.add_argument("--node-agent", help="settings of the Node.js agent to take over")
    options = parser.parse_args()
    path, changes = options.env_file, parse_changes(options.set)
    if options.node_agent:
        theirs = taken_over(options.node_agent, changes.get("DASHBOARD_URL", ""))
        changes = {**theirs, **changes}
    if options.key_file:
        changes["API_KEY"] = read(options.key_file).strip()
        if not changes["API_KEY"]:
            fail("--key-file: there is no key in it")
    text = read(path) if os.path.exists(path) else ""
    _, problems = agent.parse_env(text.encode())
    if problems:
        fail(*(f"{path}, {problem}" for problem in problems))
    write(f"{path}.new", edit(text, changes))
    try:
        agent.load_config({}, f"{path}.new")
    except agent.SettingsError as error:
        fail(*(line.replace(f"{path}.new", path) for line in error.problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
