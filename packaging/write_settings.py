#!/usr/bin/env python3
"""Write changed settings to ENV_FILE.new, and let the agent itself judge them.

install.sh calls it with the new agent on PYTHONPATH. The key goes from its file, or stdin,
straight into this process; it is in no argument and in no message.

Exit codes: 0 written; 1 cannot be written; 78 the settings are wrong, one line for each problem.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import ssl
import sys
import urllib.parse
from collections.abc import Iterator
from typing import NoReturn

import dotenv.parser

import tinomail_agent as agent

FIRST_LINE = "# Settings of the TinoMail agent.\n"
NODE_AGENT_NAMES = {  # settings of the Node.js agent, and ours
    "AGENT_SERVER_URL": "DASHBOARD_URL", "AGENT_API_KEY": "API_KEY", "AGENT_NODE_ID": "NODE_ID",
    "AGENT_NODE_ROLE": "NODE_ROLE", "AGENT_HEARTBEAT_INTERVAL": "HEARTBEAT_INTERVAL",
    "AGENT_ZONEMTA_API_URL": "ZONEMTA_URL",
}


def fail(*lines: str, code: int = agent.EX_CONFIG) -> NoReturn:
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
        fail(f"{source}: is not text")


# --- what the Node.js agent was set to ---------------------------------------------------


def unquoted(text: str) -> str:
    """Return the value of a line in an EnvironmentFile= (systemd.exec(5))."""
    text = text.strip()
    if text[:1] == "'" and text.endswith("'") and len(text) > 1:
        return text[1:-1]
    if text[:1] == '"' and text.endswith('"') and len(text) > 1:
        return re.sub(r'\\(["\\`$])', r"\1", text[1:-1])
    return re.sub(r"\\(.)", r"\1", text)


def taken_over(source: str, url: str) -> dict[str, str]:
    """Return the Node.js agent's settings as ours; `url` is the one given as an option, or ""."""
    lines = (line.strip().partition("=") for line in read(source).splitlines())
    theirs = {name.removeprefix("export ").strip(): unquoted(value) for name, _, value in lines}
    theirs.setdefault("AGENT_NODE_ID", "node-01")  # its own default: the node keeps its name
    found = {ours: theirs[name] for name, ours in NODE_AGENT_NAMES.items() if theirs.get(name)}
    found["DASHBOARD_API"] = "tinomail-monitor"
    address = found.get("DASHBOARD_URL", "").lower()
    if not url and address.startswith("http://") and not is_loopback(address):
        found["ALLOW_HTTP"] = "true"
        print("WARNING: the dashboard's address is http://: the key is sent in clear text, as the",
              "Node.js agent did (ALLOW_HTTP=true); use https:// as soon as you can",
              file=sys.stderr)
    return found


def is_loopback(address: str) -> bool:
    try:
        return agent._is_loopback(urllib.parse.urlsplit(address).hostname)
    except ValueError:
        return False  # load_config() will say what is wrong with it


# --- the env file ------------------------------------------------------------------------


def parse_changes(words: list[str]) -> dict[str, str]:
    """Turn NAME=VALUE words into changes; an empty value removes the setting."""
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name == "API_KEY":
            fail("API_KEY: comes from --key-file alone: an argument is seen by every user")
        _, problems = agent.parse_env(f"{name}=\n".encode())
        if not equals or problems:
            reason = problems[0].partition(": ")[2] if equals and problems else "is not NAME=VALUE"
            fail(f"--set: {reason} (example: --set NODE_ROLE=redis)")
        changes[name] = value
    return changes


def spellings(value: str) -> Iterator[str]:
    """Yield the value as it is, then in quotes: the first that reads back equal is taken."""
    yield value
    yield "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def edit(text: str, changes: dict[str, str]) -> str:
    """Return the text of an env file with these changes; all other lines stay as they are."""
    values, _ = agent.parse_env(text.encode())
    changes = {name: value for name, value in changes.items() if values.get(name, "") != value}
    if changes:
        text = "".join(
            binding.original.string
            for binding in dotenv.parser.parse_stream(io.StringIO(text))
            if binding.key not in changes
        )
        text = text.rstrip() + "\n" if text.strip() else FIRST_LINE
    for name in sorted(filter(changes.get, changes), key="API_KEY".__eq__):  # the key last
        kept, _ = agent.parse_env(text.encode())
        wanted: tuple[dict[str, str], list[str]] = ({**kept, name: changes[name]}, [])
        longer = (f"{text}{name}={spelling}\n" for spelling in spellings(changes[name]))
        found = next((one for one in longer if agent.parse_env(one.encode()) == wanted), None)
        if found is None:
            fail(f"{name}: cannot be written so that it is read back equal")
        text = found
    return text


def stage_ca(source: str, place: str) -> None:
    """Copy CA certificates to PLACE.new, where every user can read them."""
    text = read(source)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        fail(f"--ca-file: {source} holds no certificate in PEM form")
    write(f"{place}.new", text, mode=0o644)


def write(path: str, text: str, mode: int = 0o600) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(fd, "w", encoding="utf-8", newline="") as out:
            os.fchmod(fd, mode)
            out.write(text)
            out.flush()
            os.fsync(fd)
    except OSError as error:
        fail(f"{path}: cannot be written: {os.strerror(error.errno or 0)}", code=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("env_file", metavar="ENV_FILE")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument("--key-file", help='file that holds the key; "-" is stdin')
    parser.add_argument("--ca-file", nargs=2, metavar=("FILE", "PLACE"), default=("", ""),
                        help="copy FILE to PLACE.new, for CA_BUNDLE=PLACE")
    parser.add_argument("--node-agent", help="settings of the Node.js agent to take over")
    options = parser.parse_args()
    path, changes = options.env_file, parse_changes(options.set)
    if options.node_agent:
        theirs = taken_over(options.node_agent, changes.get("DASHBOARD_URL", ""))
        changes = {**theirs, **changes}
    for name, value in changes.items():
        if not value.isprintable():
            fail(f"{name}: holds a line break or another control character")
    if options.key_file:
        changes["API_KEY"] = read(options.key_file).strip()
        if not changes["API_KEY"]:
            fail("--key-file: there is no key in it")
    if options.ca_file[0]:
        changes["CA_BUNDLE"] = options.ca_file[1]
        stage_ca(*options.ca_file)
    text = read(path) if os.path.exists(path) else ""
    _, problems = agent.parse_env(text.encode())
    if problems:
        fail(*(f"{path}, {problem}" for problem in problems))
    write(f"{path}.new", edit(text, changes))
    try:
        staged = f"{options.ca_file[1]}.new" if options.ca_file[0] else ""
        agent.load_config({"CA_BUNDLE": staged}, f"{path}.new")
    except agent.SettingsError as error:
        fail(*(line.replace(f"{path}.new", path) for line in error.problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
