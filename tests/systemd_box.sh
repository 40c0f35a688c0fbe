#!/usr/bin/env bash
# shellcheck disable=SC1090,SC1091,SC2015,SC2016,SC2094
# systemd_box.sh: a throw-away "machine" with a real systemd as PID 1, made from
# Linux namespaces, private sub-cgroups and an overlay on a cached Debian root.
#
#   systemd_box.sh build               make (and cache) the root for $BOX_SUITE
#   systemd_box.sh up [--keep]         boot it; --keep reuses the last run's disk
#   systemd_box.sh exec CMD [ARG...]   run a command inside as root (stdin passes)
#   systemd_box.sh push SRC DST        copy a file or directory in (dirs: contents)
#   systemd_box.sh pull SRC DST        copy a file or directory out
#   systemd_box.sh reboot              clean shutdown, then boot the same disk
#   systemd_box.sh down [--keep]       clean shutdown; removes the disk unless --keep
#   systemd_box.sh status              say whether it is up, and its PID 1
#
# Needs root, a writable cgroup v1 (or hybrid) tree, util-linux, and for
# `build` mmdebstrap. Nothing outside the box's own namespaces and sub-cgroups
# is mounted, unmounted or moved.
set -euo pipefail

BOX_NAME=${BOX_NAME:-box}                  # several boxes may run side by side
BOX_SUITE=${BOX_SUITE:-bookworm}           # bullseye | bookworm | trixie
BOX_CACHE=${BOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/systemd-box}
STATE=${BOX_STATE:-/run/systemd-box}/$BOX_NAME   # pids, cgroup list
DISK=${BOX_DISK:-$BOX_CACHE/disk}/$BOX_NAME      # overlay upper layer
BOX_NET=${BOX_NET:-host}                   # host: apt/pip work; none: own loopback only
BOX_PACKAGES=${BOX_PACKAGES:-}             # more packages, comma-separated
BOX_PYTHON=${BOX_PYTHON:-}                 # a Python prefix of this host to show as /opt/python
BOX_BIND=${BOX_BIND:-}                     # more read-only binds: "SRC:DST SRC:DST"
BOX_TIMEOUT=${BOX_TIMEOUT:-300}            # seconds allowed for boot, and for shutdown

BASE_PACKAGES=systemd,systemd-sysv,dbus,ca-certificates,procps,iproute2,python3,python3-venv
SELF=$(readlink -f "${BASH_SOURCE[0]}")

# A box that is up (or kept) goes on with the settings it was started with.
case ${1:-} in
    exec|push|pull|down|reboot|status) if [ -e "$STATE/settings" ]; then . "$STATE/settings"; fi ;;
esac

say() { printf 'systemd-box: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

packages() { echo "$BASE_PACKAGES${BOX_PACKAGES:+,$BOX_PACKAGES}"; }
rootfs()   { echo "$BOX_CACHE/$BOX_SUITE-$(packages | sha256sum | cut -c1-12)"; }

# ---------------------------------------------------------------- build

# The host's apt sources, with the suite it runs replaced by the one wanted.
host_sources() {
    local here f
    here=$(. /etc/os-release && echo "$VERSION_CODENAME")
    for f in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        if [ -s "$f" ]; then sed "s/\b$here\b/$BOX_SUITE/g" "$f"; return; fi
    done
    die "no apt sources found on this host"
}

cmd_build() {
    local root tmp opts=() f
    root=$(rootfs)
    if [ -e "$root/.complete" ]; then say "cached: $root"; return 0; fi
    command -v mmdebstrap >/dev/null || die "mmdebstrap is missing (apt-get install mmdebstrap)"
    mkdir -p "$BOX_CACHE"
    exec 8>"$root.lock"                    # two at once: the second finds it built
    flock 8
    if [ -e "$root/.complete" ]; then say "cached: $root"; return 0; fi
    tmp=$(mktemp -d "$root.XXXXXX")
    host_sources >"$tmp.sources"
    # Files of the host's own making in apt.conf.d (mirror quirks) go in too.
    for f in /etc/apt/apt.conf.d/*; do
        dpkg -S "$f" >/dev/null 2>&1 || case $f in
            *docker*) ;;
            *) opts+=(--aptopt="$f") ;;
        esac
    done
    mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
        --include="$(packages)" \
        --aptopt='APT::Install-Recommends "false"' "${opts[@]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$BOX_SUITE" "$tmp" "$tmp.sources" >&2 ||
        { rm -rf "$tmp" "$tmp.sources"; die "mmdebstrap failed"; }
    rm -f "$tmp.sources"

    # No logins on consoles and no timers that would use the network.
    local unit
    for unit in console-getty.service getty@.service getty.target \
        apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
        e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer \
        systemd-firstboot.service systemd-networkd.service \
        systemd-networkd-wait-online.service systemd-resolved.service; do
        ln -sf /dev/null "$tmp/etc/systemd/system/$unit"
    done
    ln -sf /lib/systemd/system/multi-user.target "$tmp/etc/systemd/system/default.target"
    mkdir -p "$tmp/var/log/journal"        # a journal that outlives a reboot
    chmod 755 "$tmp"
    touch "$tmp/.complete"
    rm -rf "$root"
    mv "$tmp" "$root"
    say "built: $root"
}

# ---------------------------------------------------------------- cgroups

# Print "KIND DIR" for each hierarchy used: DIR is this box's own sub-cgroup,
# below the one the caller is in, so the caller's limits and accounts hold.
# v1 cpuset is left out: a new cpuset takes no process until it is configured.
box_cgroups() {
    local kinds path mnt
    while IFS=: read -r _ kinds path; do
        case $kinds in
            '')   mnt=/sys/fs/cgroup/unified; kinds=unified ;;
            name=systemd) mnt=/sys/fs/cgroup/systemd ;;
            cpuset) continue ;;
            *)    mnt=/sys/fs/cgroup/$kinds ;;
        esac
        mountpoint -q "$mnt" || continue
        echo "$kinds $(readlink -m "$mnt/$path/systemd-box.$BOX_NAME")"
    done </proc/self/cgroup
}

remove_cgroups() {
    local kind dir d
    [ -e "$STATE/cgroups" ] || return 0
    while read -r kind dir; do
        for _ in 1 2 3 4 5; do
            [ -d "$dir" ] || break
            find "$dir" -depth -type d 2>/dev/null | while read -r d; do rmdir "$d" 2>/dev/null || :; done
            [ -d "$dir" ] && sleep 0.2
        done
        [ ! -d "$dir" ] || say "left over: $dir"
    done <"$STATE/cgroups"
}

# ---------------------------------------------------------------- up

is_up() {
    [ -s "$STATE/pid" ] && [ -s "$STATE/start" ] &&
        [ "$(start_time "$(cat "$STATE/pid")")" = "$(cat "$STATE/start")" ]
}
# Field 22 of /proc/PID/stat: tells a process from a later one with its number.
start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20 || :; }

# Copy the host's settings for names, certificates, apt and pip into the disk.
carry_settings() {
    local up=$1 f
    mkdir -p "$up/etc/ssl/certs" "$up/etc/apt/apt.conf.d" "$up/root"
    for f in /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
        [ ! -e "$f" ] || install -D -m 644 "$(readlink -f "$f")" "$up$f"
    done
    for f in /etc/xdg/pip /usr/local/share/ca-certificates; do
        [ ! -d "$f" ] || { mkdir -p "$up$f"; cp -aL "$f/." "$up$f/"; }
    done
    [ ! -d /root/.config/pip ] || { mkdir -p "$up/root/.config/pip"; cp -aL /root/.config/pip/. "$up/root/.config/pip/"; }
    chmod 700 "$up/root"
    printf '127.0.0.1 localhost %s\n::1 localhost\n' "$BOX_NAME" >"$up/etc/hosts"
    echo "$BOX_NAME" >"$up/etc/hostname"
}

# Local package folders that the host's pip settings point at.
pip_folders() {
    { cat /etc/pip.conf /etc/xdg/pip/pip.conf /root/.config/pip/pip.conf 2>/dev/null || :
      env | grep '^PIP_' || :; } |
        grep -oE '(file://)?/[A-Za-z0-9._/-]+' | sed 's,^file://,,' | sort -u |
        while read -r f; do
            case $f in /opt/*|/srv/*) echo "$f" | cut -d/ -f1-3 ;; esac
        done | sort -u | while read -r f; do [ ! -d "$f" ] || echo "$f"; done
}

cmd_up() {
    local keep=0 root pid leader kind dir
    [ "${1:-}" != --keep ] || keep=1
    ! is_up || die "already up (PID 1 is $(cat "$STATE/pid"))"
    [ "$(id -u)" = 0 ] || die "must be root"
    cmd_build
    root=$(rootfs)
    remove_cgroups
    rm -rf "$STATE"; mkdir -p "$STATE"
    if [ $keep = 0 ] || [ ! -d "$DISK/upper" ]; then
        rm -rf "$DISK"
        mkdir -p "$DISK/upper/etc" "$DISK/work"
        tr -d - </proc/sys/kernel/random/uuid >"$DISK/upper/etc/machine-id"
        carry_settings "$DISK/upper"
    fi
    mkdir -p "$DISK/root"
    declare -p BOX_SUITE BOX_CACHE BOX_NET BOX_PACKAGES BOX_PYTHON BOX_BIND DISK >"$STATE/settings"
    box_cgroups >"$STATE/cgroups"
    grep -q '^name=systemd ' "$STATE/cgroups" ||
        die "this host has no cgroup v1 (hybrid) tree for the box"
    while read -r kind dir; do mkdir "$dir"; done <"$STATE/cgroups"

    local net=()
    [ "$BOX_NET" = host ] || net=(--net)
    pip_folders >"$STATE/pip_folders"
    BOX_ROOTFS=$root setsid unshare --pid --mount --uts --ipc "${net[@]}" --fork \
        --propagation private --kill-child=SIGKILL \
        bash "$SELF" __stage1 </dev/null >"$STATE/console" 2>&1 &
    pid=$!
    for _ in $(seq 100); do
        leader=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || pgrep -P "$pid" || :)
        leader=${leader%% *}
        [ -z "$leader" ] || break
        sleep 0.05
    done
    [ -n "$leader" ] || { cat "$STATE/console" >&2; die "the box did not start"; }
    echo "$leader" >"$STATE/pid"; start_time "$leader" >"$STATE/start"
    local end=$((SECONDS + BOX_TIMEOUT)) state=
    until [ -S "/proc/$leader/root/run/systemd/private" ] &&
        [ "$(cat "/proc/$leader/comm" 2>/dev/null)" = systemd ]; do
        is_up && [ $SECONDS -lt $end ] ||
            { cat "$STATE/console" >&2; cmd_down || :; die "systemd did not come up"; }
        sleep 0.05
    done
    state=$(cmd_exec timeout "$BOX_TIMEOUT" systemctl is-system-running --wait 2>&1 || :)
    case $state in
        running) ;;
        degraded) say "degraded:"; cmd_exec systemctl --no-pager --no-legend --failed list-units >&2 ;;
        *) cmd_down || :; die "boot ended as '$state'" ;;
    esac
}

# Stage 1: PID 1 of the new namespaces, still with the caller's cgroups.
cmd___stage1() {
    local kind dir
    while read -r kind dir; do echo 0 >"$dir/cgroup.procs"; done <"$STATE/cgroups"
    exec unshare --cgroup bash "$SELF" __stage2
}

# Stage 2: lay out the file systems, then become systemd.
cmd___stage2() {
    local r=$DISK/root kind dir d f src dst
    mount -t overlay overlay -o "lowerdir=$BOX_ROOTFS,upperdir=$DISK/upper,workdir=$DISK/work" "$r"

    mount -t proc -o nosuid,nodev,noexec proc "$r/proc"
    # A boot ID of its own, so that `journalctl -b` tells one boot from the next.
    cat /proc/sys/kernel/random/uuid >"$STATE/boot_id"
    mount --bind "$STATE/boot_id" "$r/proc/sys/kernel/random/boot_id"
    mount -o remount,bind,ro "$r/proc/sys/kernel/random/boot_id"
    for f in sys sysrq-trigger irq bus; do      # the kernel's knobs are the host's
        [ -e "$r/proc/$f" ] || continue
        mount --rbind "$r/proc/$f" "$r/proc/$f"
        mount -o remount,bind,ro,nosuid,nodev,noexec "$r/proc/$f"
    done
    if [ "$BOX_NET" != host ]; then mount --bind /proc/self/net "$r/proc/net" 2>/dev/null || :; fi

    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$r/sys"
    mount -t tmpfs -o mode=755,nosuid,nodev,noexec tmpfs "$r/sys/fs/cgroup"
    while read -r kind dir; do
        d=$r/sys/fs/cgroup/${kind#name=}
        mkdir "$d"
        if [ "$kind" = unified ]; then
            mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$d"
        else
            mount -t cgroup -o "nosuid,nodev,noexec,$kind" cgroup "$d"
        fi
    done <"$STATE/cgroups"
    mount -o remount,ro "$r/sys/fs/cgroup"

    mount -t tmpfs -o mode=755,nosuid tmpfs "$r/dev"
    mknod -m 666 "$r/dev/null" c 1 3
    mknod -m 666 "$r/dev/zero" c 1 5
    mknod -m 666 "$r/dev/full" c 1 7
    mknod -m 666 "$r/dev/random" c 1 8
    mknod -m 666 "$r/dev/urandom" c 1 9
    mknod -m 666 "$r/dev/tty" c 5 0
    mkdir "$r/dev/pts" "$r/dev/shm" "$r/dev/mqueue"
    mount -t devpts -o newinstance,nosuid,noexec,mode=620,ptmxmode=666,gid=5 devpts "$r/dev/pts"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$r/dev/shm"
    ln -s pts/ptmx "$r/dev/ptmx"
    ln -s /proc/self/fd "$r/dev/fd"
    for f in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${f%%:*}" "$r/dev/${f#*:}"; done

    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$r/run"
    mkdir -p "$r/run/host" "$r/run/lock"
    echo systemd-box >"$r/run/host/container-manager"

    while read -r f; do
        mkdir -p "$r$f"; mount --bind "$f" "$r$f"; mount -o remount,bind,ro "$r$f"
    done <"$STATE/pip_folders"
    [ -z "$BOX_PYTHON" ] || BOX_BIND+=" $BOX_PYTHON:/opt/python"
    for f in $BOX_BIND; do
        src=${f%%:*} dst=${f#*:}
        if [ -d "$src" ]; then mkdir -p "$r$dst"; else mkdir -p "$(dirname "$r$dst")"; touch "$r$dst"; fi
        mount --bind "$src" "$r$dst"; mount -o remount,bind,ro "$r$dst"
    done

    hostname "$BOX_NAME" 2>/dev/null || :
    mkdir -p "$r/.host"
    cd "$r"
    pivot_root . .host
    cd /
    umount -l /.host && rmdir /.host
    hash -r                                 # look commands up in the new root
    if [ -n "$BOX_PYTHON" ]; then           # for a Python built with --enable-shared
        echo /opt/python/lib >/etc/ld.so.conf.d/opt-python.conf
        ldconfig
    fi
    mount --make-rshared /
    # systemd 256 and later want this word (read from PID 1's own arguments in
    # a container) before they accept a cgroup v1 tree; older ones ignore it.
    exec env -i container=systemd-box PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        LANG=C.UTF-8 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 \
        setpriv --bounding-set=-sys_time,-sys_module,-sys_rawio,-syslog,-wake_alarm \
        /lib/systemd/systemd SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1
}

# ---------------------------------------------------------------- the rest

cmd_exec() {
    is_up || die "not up"
    local vars=() v
    while read -r v; do vars+=("$v"); done < <(env | grep -E '^(PIP_|TERM=|CI=|([a-z]+_proxy|[A-Z]+_PROXY)=)' || :)
    nsenter --target "$(cat "$STATE/pid")" --mount --uts --ipc --net --pid --cgroup --root \
        -- /usr/bin/env -i -C /root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME=/root USER=root LOGNAME=root LANG=C.UTF-8 SYSTEMD_PAGER=cat "${vars[@]}" "$@"
}

cmd_push() {
    [ $# = 2 ] || die "push SRC DST"
    if [ -d "$1" ]; then
        tar -C "$1" -cf - . | cmd_exec sh -c 'mkdir -p "$1" && tar -C "$1" --no-same-owner -xf -' sh "$2"
    else
        cmd_exec sh -c 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"' \
            sh "$2" "$(stat -c %a "$1")" <"$1"
    fi
}

cmd_pull() {
    [ $# = 2 ] || die "pull SRC DST"
    if cmd_exec test -d "$1"; then
        mkdir -p "$2"; cmd_exec tar -C "$1" -cf - . | tar -C "$2" -xf -
    else
        cmd_exec cat "$1" >"$2"
    fi
}

cmd_down() {
    local keep=0 leader end
    [ "${1:-}" != --keep ] || keep=1
    if is_up; then
        leader=$(cat "$STATE/pid")
        kill -s RTMIN+4 "$leader" || :                    # systemd's "power off"
        end=$((SECONDS + BOX_TIMEOUT))
        while is_up && [ $SECONDS -lt $end ]; do sleep 0.1; done
        if is_up; then say "no clean shutdown in ${BOX_TIMEOUT}s: killed"; kill -KILL "$leader" || :; sleep 0.5; fi
    fi
    remove_cgroups
    rm -rf "$STATE"
    [ $keep = 1 ] || rm -rf "$DISK"
}

cmd_reboot() { cmd_down --keep; cmd_up --keep; }

cmd_rootfs() { rootfs; }                   # where `build` puts the root

cmd_status() { if is_up; then echo "up $(cat "$STATE/pid")"; else echo down; return 1; fi; }

case ${1:-} in
    build|up|exec|push|pull|down|reboot|status|rootfs|__stage1|__stage2) c=$1; shift; "cmd_$c" "$@" ;;
    *) sed -n '3,/^set /{/^#/s/^# \{0,1\}//p}' "$SELF"; exit 2 ;;
esac
