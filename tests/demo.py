"""`make run`: the stand-in dashboard and the agent, side by side, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

HERE = Path(__file__).resolve().parent
USUAL_PORT = 8080
STOP_LIMIT_S = 20.0


def free_port(wanted: int | None) -> int:
    """Return the wanted port; without one the usual port, or another one if that is taken."""
    for port in (wanted,) if wanted else (USUAL_PORT, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
                problem = f"port {port} of 127.0.0.1 cannot be used: {reason}"
                continue
            if wanted is None and port != USUAL_PORT:
                print(f"{problem}; taking another one")
            return int(sock.getsockname()[1])
    raise SystemExit(f"{problem}; take another one: make run PORT=9000")


def start(
    script: Path, *args: str, stdout: int | None = None, **settings: str
) -> subprocess.Popen[str]:
    """Start a program in a session of its own: Ctrl-C in the terminal reaches us alone."""
    return subprocess.Popen(
        [sys.executable, str(script), *args], env={**os.environ, **settings}, text=True,
        stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True,
    )


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def leave(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--api", choices=("v1", "tinomail-monitor"), default="v1")
    options = parser.parse_args()
    port, key = free_port(options.port), secrets.token_urlsafe(24)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    with contextlib.ExitStack() as at_end:
        try:
            # "=", since a key may begin with "-"
            dashboard = start(
                HERE / "dashboard.py", f"--key={key}", f"--port={port}", f"--api={options.api}",
                stdout=subprocess.PIPE,
            )
            at_end.callback(stop, dashboard)
            assert dashboard.stdout
            print(dashboard.stdout.readline(), end="", flush=True)
            at_end.callback(stop, start(
                HERE.parent / "tinomail_agent.py", "--env-file", os.devnull,
                DASHBOARD_URL=f"http://127.0.0.1:{port}", API_KEY=key,
                DASHBOARD_API=options.api, HEARTBEAT_INTERVAL="2000",
            ))
            print("agent: a sample every 2 s; Ctrl-C ends it", flush=True)
            for line in dashboard.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:
            return 0
    return 1  # the dashboard ended by itself


if __name__ == "__main__":
    sys.exit(main())
