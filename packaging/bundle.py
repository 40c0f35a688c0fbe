#!/usr/bin/env python3
"""Write dist/tinomail-agent-VERSION.tar.gz: the agent, its installer and its dependencies.

lib/any holds the pure Python packages, lib/x86_64 and lib/aarch64 hold psutil; install.sh copies
the two that fit. The same tree gives the same bytes, whatever the clock, umask or user.
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
    "CHANGELOG.md", "LICENSE", "README.md", "agent.env.example", "install.sh",
    "packaging/write_settings.py", "tinomail-agent.service", "tinomail_agent.py",
    *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))),
)
MACHINES = ("x86_64", "aarch64")
WHEELS = ("--only-binary", ":all:", "--python-version", "3.10")  # the oldest Python supported
PURE = (*WHEELS, "--platform", "any", "--implementation", "py", "--abi", "none")
SOURCE = ("--no-deps", "--no-binary", ":all:")
# The file with the pins, the folder below lib/, options for pip, packages to pin (pip adds what
# they need).
PINS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("requirements.txt", "any", PURE, ("requests", "python-dotenv")),
    ("requirements-sdnotify.txt", "any", SOURCE, ("sdnotify",)),
    *(
        ("requirements-psutil.txt", machine, (*WHEELS, "--platform", f"manylinux2014_{machine}"),
         ("psutil",))
        for machine in MACHINES
    ),
)
MTIME = 1_577_836_800  # 2020-01-01; any fixed time would do
# Not needed at run time. The licences are kept.
LEFT_OUT = re.compile(r"\.(pyi|exe)$|/py\.typed$|/tests?/|\.dist-info/(?!.*(LICEN|NOTICE|COPYING))")


def download(folder: Path, *words: str) -> list[Path]:
    """Download packages into a folder with pip; return the files."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    if subprocess.run([*command, "-d", str(folder), *words], check=False).returncode:
        sys.exit("the libraries cannot be downloaded (see above): is the package index reachable?")
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
    """Take the package and its licence out of the source archive; nothing has to be built."""
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
    content = {}
    for pins, place, options, _ in PINS:
        with tempfile.TemporaryDirectory() as folder:
            pinned = ("--no-deps", "--require-hashes", "-r", str(HERE / pins))
            files = download(Path(folder), *pinned, *options)
            found = unpack_sdnotify(files[0]) if options is SOURCE else unpack_wheels(files)
        content.update({f"{place}/{name}": data for name, data in found.items()})
    return content


def renew_pins() -> None:
    """Pin the newest versions that fit together, with the hashes of their files."""
    lines: dict[str, dict[str, set[str]]] = {}
    for pins, _, options, packages in PINS:
        with tempfile.TemporaryDirectory() as folder:
            for file in download(Path(folder), *packages, *options):
                name, version = file.name.removesuffix(".tar.gz").split("-")[:2]
                sums = lines.setdefault(pins, {}).setdefault(
                    f"{name.replace('_', '-')}=={version}", set()
                )
                sums.add(f"--hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    for pins, packages_found in lines.items():
        old = (HERE / pins).read_text().splitlines()
        head = [line for line in old if line.startswith("#")]
        new = [" \\\n    ".join([package, *sorted(sums)]) if len(sums) > 1
               else " ".join([package, *sums]) for package, sums in sorted(packages_found.items())]
        (HERE / pins).write_text("\n".join([*head, *new]) + "\n")


def pack(content: dict[str, bytes], target: Path) -> None:
    """Write a tar.gz whose bytes depend only on names and contents."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        target.open("wb") as out,
        gzip.GzipFile(filename="", fileobj=out, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(content):
            member = tarfile.TarInfo(name)  # uid and gid 0, no user names
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
    parser.add_argument("--renew-pins", action="store_true", help="only renew requirements*.txt")
    options = parser.parse_args()
    into = options.into
    if options.renew_pins:
        renew_pins()
        return 0
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
