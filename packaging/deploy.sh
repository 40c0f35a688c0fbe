#!/usr/bin/env bash
# Copies a bundle to nodes and installs it there over ssh, several at once.
#
#   packaging/deploy.sh BUNDLE HOST...      (make deploy HOSTS="mta-01 root@mta-02")
#
#   KEY_FILE=FILE       the dashboard's API key; it goes to install.sh by stdin
#   INSTALL_ARGS="..."  for install.sh, e.g. --url https://monitor.example.com --api v1;
#                       none: an upgrade
#   JOBS=8              nodes at once
#   SSH_OPTIONS="..."   for ssh and scp
#
# One line for each node, failures once more at the end; exit code 1 if there is one.
set -euo pipefail

JOBS=${JOBS:-8} KEY_FILE=${KEY_FILE:-} INSTALL_ARGS=${INSTALL_ARGS:-}
export LOGS=${LOGS:-dist/deploy}

# Runs on the node, in a folder that holds the bundle; the key, if any, is on stdin. One line,
# since the login shell there may be any.
# shellcheck disable=SC2016  # expanded there
REMOTE='cd "$0" || exit; s=; [ "$(id -u)" = 0 ] || s="sudo -n"; tar -xzf bundle.tar.gz && $s bash tinomail-agent-*/install.sh "$@"; c=$?; cd /; rm -rf "$0"; exit $c'

install_on() {
    local host=$1 folder args=() ssh=(-o BatchMode=yes -o ConnectTimeout=10)
    # A node that freezes after the log-in ends its own line, not the whole run.
    ssh+=(-o ServerAliveInterval=15 -o ServerAliveCountMax=4)
    case $host in -*) echo "not the name of a host"; return 1 ;; esac
    read -ra args <<<"$INSTALL_ARGS"
    [ -z "$KEY_FILE" ] || args+=(--key-file -)
    # shellcheck disable=SC2206  # words
    ssh+=(${SSH_OPTIONS:-})
    folder=$(ssh -n "${ssh[@]}" "$host" mktemp -d) || return
    scp -q "${ssh[@]}" "$bundle" "$host:$folder/bundle.tar.gz" ||
        { ssh -n "${ssh[@]}" "$host" "rm -rf $folder"; return 1; }
    # shellcheck disable=SC2029  # expanded here, quoted for there
    timeout 900 ssh "${ssh[@]}" "$host" "$(printf '%q ' sh -c "$REMOTE" "$folder" "${args[@]}")" \
        <"${KEY_FILE:-/dev/null}"
}

if [ "${1:-}" = --one ]; then
    bundle=$2 host=$3 log=$LOGS/${3//\//_}.log
    if install_on "$host" >"$log" 2>&1; then
        printf '%s: ok: %s\n' "$host" "$(sed -n '/^done: /,$p' "$log" | tr '\n' ' ')"
    else
        printf '%s: FAILED: %s\n' "$host" "$(grep -v '^ *$' "$log" | tail -1)"
        echo "$host" >>"$LOGS/failed"
    fi
    exit 0
fi

[ $# -ge 2 ] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
[ -z "$KEY_FILE" ] || [ -r "$KEY_FILE" ] || { echo "KEY_FILE cannot be read: $KEY_FILE" >&2; exit 2; }
bundle=$1
shift
mkdir -p "$LOGS"
rm -f "$LOGS/failed"
export KEY_FILE INSTALL_ARGS
printf '%s\0' "$@" | sort -zu | xargs -0 -n 1 -P "$JOBS" "$0" --one "$bundle"
if [ -e "$LOGS/failed" ]; then
    echo "failed: $(sort "$LOGS/failed" | tr '\n' ' ')(what they said is in $LOGS)" >&2
    exit 1
fi
