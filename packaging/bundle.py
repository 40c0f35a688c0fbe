#!/usr/bin/env python3
"""Write dist/tinomail-agent-VERSION.tar.gz: the agent, its installer and its dependencies.

lib/any holds what is pure Python, lib/x86_64 and lib/aarch64 hold psutil; install.sh takes the
two that fit. The same tree gives the same bytes, whatever the clock, umask or user.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "packaging"
FILES = (
    "LICENSE", "README.md", "agent.env.example", "install.sh", "packaging/write_settings.py",
    "tinomail-agent.service", "tinomail_agent.py",
)
MACHINES = ("x86_64", "aarch64")
OLDEST_PYTHON = "3.10"
MTIME = 1_577_836_800  # 2020-01-01: any fixed time will do
# Not needed at run time. The licences stay.
LEFT_OUT = re.compile(r"\.(pyi|exe)$|/py\.typed$|/tests?/|\.dist-info/(?!.*(LICEN|NOTICE|COPYING))")


def download(requirements: str, folder: Path, *options: str) -> list[Path]:
    """Fetch what a requirements file pins into a folder, by pip; return the files."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-r", str(HERE / requirements), "-d", str(folder)]
    subprocess.run(command + list(options), check=True)
    return sorted(folder.iterdir())


def unpack_wheels(files: list[Path]) -> dict[str, bytes]:
    content = {}
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/") and not LEFT_OUT.search(name):
                    content[name] = wheel.read(name)
    return content


def unpack_sdnotify(file: Path) -> dict[str, bytes]:
    """Take the package and its licence out of the source archive: there is nothing to build."""
    content = {}
    with tarfile.open(file) as archive:
        for member in archive:
            top, _, name = member.name.partition("/")
            if member.isfile() and (name.startswith("sdnotify/") or name == "LICENSE.txt"):
                stream = archive.extractfile(member)
                assert stream is not None
                place = name if name != "LICENSE.txt" else f"{top}.dist-info/LICENSE.txt"
                content[place] = stream.read()
    return content


def dependencies() -> dict[str, bytes]:
    """Return path below lib/ -> content."""
    wheels = ("--only-binary", ":all:", "--python-version", OLDEST_PYTHON)
    content = {}
    with tempfile.TemporaryDirectory() as folder:
        pure = ("--platform", "any", "--implementation", "py", "--abi", "none")
        place = Path(folder, "any")
        found = unpack_wheels(download("requirements.txt", place, *wheels, *pure))
        found |= unpack_sdnotify(
            download("requirements-sdnotify.txt", Path(folder, "source"), "--no-binary", ":all:")[0]
        )
        content.update({f"any/{name}": data for name, data in found.items()})
        for machine in MACHINES:
            platform = ("--platform", f"manylinux2014_{machine}")
            files = download(
                "requirements-psutil.txt", Path(folder, machine), *wheels, *platform
            )
            content.update({f"{machine}/{k}": v for k, v in unpack_wheels(files).items()})
    return content


def pack(content: dict[str, bytes], target: Path) -> None:
    """Write a tar.gz whose bytes depend on names and contents alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        target.open("wb") as out,
        gzip.GzipFile(filename="", fileobj=out, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(content):
            member = tarfile.TarInfo(name)  # uid, gid 0 and no names
            member.size = len(content[name])
            member.mtime = MTIME
            member.mode = 0o755 if name.endswith("/install.sh") else 0o644
            archive.addfile(member, io.BytesIO(content[name]))


def write_sum(file: Path) -> None:
    """Write FILE.sha256 beside it, for `sha256sum -c`."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_name(f"{file.name}.sha256").write_text(f"{digest}  {file.name}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="folder to write to")
    into = parser.parse_args().into
    version = re.search(r'^VERSION = "(.+)"', (ROOT / "tinomail_agent.py").read_text(), re.M)
    assert version, "no VERSION in tinomail_agent.py"
    top = f"tinomail-agent-{version[1]}"
    content = {f"{top}/{name}": (ROOT / name).read_bytes() for name in FILES}
    content |= {f"{top}/lib/{name}": data for name, data in dependencies().items()}
    pack(content, into / f"{top}.tar.gz")
    write_sum(into / f"{top}.tar.gz")
    print(into / f"{top}.tar.gz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
