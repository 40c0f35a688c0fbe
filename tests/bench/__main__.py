"""`make bench`: measures, prints one table, writes build/bench.json, fails over a broken budget.

As root, in a network and PID namespace of its own, which counts nothing but the bench's load
and ends with it; without, on the machine as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tinomail_agent as agent

from . import measures, report
from .machine import HERE, PYTHON, ROOT, Machine, install

RESULT = ROOT / "build/bench.json"
EXPORTER = "prometheus-node-exporter"
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
# An interface besides lo, so that the agent has one to count; a kernel without veth has none.
NETWORK = "ip link set lo up; ip link add bench0 type veth peer name bench1; ip link set bench0 up"


def find_exporter(folder: Path) -> str | None:
    """Return the exporter's program: the installed one, else the distribution's, unpacked."""
    found = shutil.which(EXPORTER)
    if found or not shutil.which("apt-get"):
        return found
    for command in (["apt-get", "-q", "download", EXPORTER], ["dpkg-deb", "-x", "DEB", "."]):
        debs = [str(deb) for deb in folder.glob("*.deb")]
        command = [debs[0] if word == "DEB" and debs else word for word in command]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    program = folder / "usr/bin" / EXPORTER
    return str(program) if program.exists() else None


def facts() -> dict[str, str]:
    cpu = [
        line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    asked = "import platform as p, ssl; print(p.python_version(), ssl.OPENSSL_VERSION, sep=', ')"
    python = subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True).stdout.strip()
    version = agent.VERSION
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "agent": f"{version} {commit}".strip(),
        "machine": f"{os.cpu_count()} cores, {cpu[0] if cpu else platform.machine()}, "
        f"Linux {platform.release()}, load {os.getloadavg()[0]:.1f} at the start",
        "python": python,
    }


def measure(machine: Machine, *, quick: bool) -> int:
    """Take all measures; print and write the result. Returns the exit code."""
    bench = measures.Bench(machine, **(measures.QUICK if quick else {}))
    known = facts() | ({"quick": "few samples: a rough look only"} if quick else {})
    rows = []
    for one in measures.MEASURES:
        started = time.monotonic()
        rows += list(one(bench))
        name = one.__name__.replace("_", " ")
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    code, text = report.verdict(rows)
    print(f"\n{report.table(rows, known)}\n\n{text}", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(report.as_json(rows, known))
    return code


def outside(options: argparse.Namespace, folder: Path) -> int:
    """Prepare what needs the network, then measure in a process that can be ended as a whole."""
    install(folder)
    (folder / "exporter").mkdir()
    exporter = find_exporter(folder / "exporter")
    if exporter is None:
        print(f"{EXPORTER} cannot be had here: measured without it", file=sys.stderr)
    command = [sys.executable, "-m", "bench", "--inside", str(folder)]
    command += ["--exporter", exporter] if exporter else []
    command += ["--quick"] if options.quick else []
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True) if has_unshare() else None
    if tried and tried.returncode == 0:
        command = [*NAMESPACES, "sh", "-c", f'{NETWORK}; exec "$@"', "sh", *command]
    else:
        print("no namespaces here: on the machine as it is", file=sys.stderr)
    # In a session of its own: Ctrl-C reaches this process alone, which ends that one.
    process = subprocess.Popen(command, start_new_session=True, env=environment())
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()


def has_unshare() -> bool:
    return os.geteuid() == 0 and bool(shutil.which("unshare")) and bool(shutil.which("ip"))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{HERE.parent}:{ROOT}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="What the agent costs.")
    parser.add_argument("--quick", action="store_true", help="few samples: two minutes")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--exporter", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.inside:
            with Machine(options.inside, options.exporter) as machine:
                return measure(machine, quick=options.quick)
        with tempfile.TemporaryDirectory(prefix="tinomail-bench-") as folder:
            os.chmod(folder, 0o755)  # the agent runs as nobody
            return outside(options, Path(folder))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
