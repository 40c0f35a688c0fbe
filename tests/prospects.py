"""What `make test` says before it starts: how long it takes, and what it skips here."""

from __future__ import annotations

import os
import shutil

# What a part of the tests needs, beside root, as Debian's package: program.
BOXES = {"mmdebstrap": "mmdebstrap"}
FLEET = {"openssh-client": "ssh"}
DISKS = {
    "btrfs-progs": "mkfs.btrfs", "dmsetup": "dmsetup", "e2fsprogs": "mkfs.ext4",
    "squashfs-tools": "mksquashfs", "xorriso": "xorriso",
}
NETWORK = {"iproute2": "ip", "util-linux": "unshare"}
PARTS = (
    ("the service in boxes with a real systemd", {**BOXES, **FLEET}),
    ("real file systems", DISKS),
    ("networks of their own", NETWORK),
)


def main() -> None:
    is_root = os.geteuid() == 0
    lacking = {
        part: [package for package, program in needs.items() if not shutil.which(program)]
        for part, needs in PARTS
    }
    with_boxes = is_root and not lacking[PARTS[0][0]]
    minutes = "20 minutes" if with_boxes else "5 minutes"
    print(f"the tests take about {minutes} on two idle cores", flush=True)
    for part, packages in lacking.items():
        if not is_root:
            print(f"  skipped, since they need root: tests of {part}")
        elif packages:
            print(f"  skipped: tests of {part}: apt-get install {' '.join(packages)}")


if __name__ == "__main__":
    main()
