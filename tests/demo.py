"""`make run`: the stand-in dashboard and the agent, side by side, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def free_port(wanted: int) -> int:
    """Return the wanted port, or another one if it is taken."""
    for port in (wanted, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise SystemExit("no free port on 127.0.0.1")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--api", default="v1")
    options = parser.parse_args()
    port, key = free_port(options.port), secrets.token_urlsafe(24)
    # Ctrl-C reaches the whole process group: both end by themselves, in their own good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGINT))
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    dashboard = subprocess.Popen(
        [sys.executable, str(HERE / "dashboard.py"), "--port", str(port), "--key", key,
         "--api", options.api],
        stdout=subprocess.PIPE, text=True, preexec_fn=restore,
    )
    assert dashboard.stdout
    print(dashboard.stdout.readline(), end="", flush=True)
    settings = {
        "DASHBOARD_URL": f"http://127.0.0.1:{port}", "API_KEY": key, "DASHBOARD_API": options.api,
        "HEARTBEAT_INTERVAL": "2000",
    }
    agent = subprocess.Popen(
        [sys.executable, str(HERE.parent / "tinomail_agent.py"), "--env-file", os.devnull],
        env={**os.environ, **settings}, preexec_fn=restore,
    )
    print("agent: a sample every 2 s; Ctrl-C ends it", flush=True)
    for line in dashboard.stdout:
        print(line, end="", flush=True)
    agent.send_signal(signal.SIGINT)  # in case the dashboard ended by itself
    return agent.wait() or dashboard.wait()


if __name__ == "__main__":
    sys.exit(main())
