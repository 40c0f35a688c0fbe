#!/usr/bin/env bash
# Installs the agent on nodes, or asks how it is there, over ssh; several nodes at once.
#
#   packaging/fleet.sh deploy BUNDLE HOST...|FILE     make deploy HOSTS="mta-01 root@mta-02"
#   packaging/fleet.sh status HOST...|FILE            make status HOSTS=hosts.txt
#
# FILE has a line for each node: HOST NAME=VALUE ..., settings of that node alone; an empty VALUE
# removes the setting; "#" begins a comment.
#
#   KEY_FILE=FILE       the dashboard's API key; it goes to install.sh by stdin
#   CA_FILE=FILE        CA of the dashboard's certificate, for each node
#   INSTALL_ARGS="..."  for install.sh, e.g. --url https://monitor.example.com --api v1;
#                       none: an upgrade
#   KEEP_GOING=1        go on although the first node, which comes alone, is not ok
#   JOBS=8              nodes at once
#   SSH_OPTIONS="..."   for ssh and scp
#
# One line for each node: ok, WARN or FAILED, and why; then the counts. What each node said is in
# dist/deploy. Exit codes: 0; 1 if a node failed (deploy), or is not well (status); 2 wrong usage.
set -euo pipefail

JOBS=${JOBS:-8} KEY_FILE=${KEY_FILE:-} CA_FILE=${CA_FILE:-} INSTALL_ARGS=${INSTALL_ARGS:-}
export LOGS=${LOGS:-dist/deploy} KEY_FILE CA_FILE INSTALL_ARGS

# Both run on the node. The folder holds the bundle and perhaps ca.pem; a key is on stdin.
# shellcheck disable=SC2016  # expanded there
INSTALL='cd "$0" || exit; s=; [ "$(id -u)" = 0 ] || s="sudo -n"; tar -xzf bundle.tar.gz &&
    $s bash tinomail-agent-*/install.sh "$@"; c=$?; cd /; rm -rf "$0"; exit $c'
INSTALL=${INSTALL//$'\n'/}  # the login shell there may be any
ASK="/usr/local/sbin/tinomail-agent --version; systemctl show tinomail-agent \
-p ActiveState -p StateChangeTimestamp -p StatusText"

say() { printf '%s\n' "$*"; }
wrong() { say "$*" >&2; exit 2; }

# A node that freezes after the log-in ends its own line, not the whole run.
on_node() {
    # shellcheck disable=SC2086  # words
    timeout 900 "$1" -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 \
        -o ServerAliveCountMax=4 ${SSH_OPTIONS:-} "${@:2}"
}

install_on() {
    local host=$1 folder args=() word
    read -ra args <<<"$INSTALL_ARGS"
    for word in "${@:2}"; do args+=(--set "$word"); done
    [ -z "$KEY_FILE" ] || args+=(--key-file -)
    folder=$(on_node ssh -n "$host" mktemp -d) || return
    [ -z "$CA_FILE" ] || args+=(--ca-file "$folder/ca.pem")
    if ! { on_node scp -q "$BUNDLE" "$host:$folder/bundle.tar.gz" &&
        { [ -z "$CA_FILE" ] || on_node scp -q "$CA_FILE" "$host:$folder/ca.pem"; }; }
    then
        on_node ssh -n "$host" "rm -rf $folder"
        return 1
    fi
    # shellcheck disable=SC2029  # expanded here, quoted for there
    on_node ssh "$host" "$(printf '%q ' sh -c "$INSTALL" "$folder" "${args[@]}")" \
        <"${KEY_FILE:-/dev/null}"
}

# Says in one line how the agent is; well is: active, and its last sample was delivered.
ask() {
    local answer version state since status
    # shellcheck disable=SC2029
    if ! answer=$(on_node ssh -n "$1" "$(printf '%q ' sh -c "$ASK")" 2>&1); then
        say "${answer##*$'\n'}"
        return 1
    fi
    field() { sed -n "s/^$1//p" <<<"$answer"; }
    version=$(field 'tinomail-agent ') state=$(field ActiveState=)
    since=$(field StateChangeTimestamp=) status=$(field StatusText=)
    say "${version:-not installed}, $state${since:+ since $since}${status:+, $status}"
    [[ $state == active && $status == ok:* ]]
}

# One node, one line; its name goes into the file of its verdict.
one() {
    local log=$LOGS/${2//\//_}.log verdict=FAILED line
    if [ "$1" = status ]; then
        if line=$(ask "$2"); then verdict=ok; fi
    else
        if install_on "${@:2}" >"$log" 2>&1; then verdict=ok; fi
        line=$(grep -v '^ *$' "$log" | tail -1)
        case $verdict$line in "okWARNING: "*) verdict=WARN ;; esac
        line=${line#WARNING: } line=${line#install.sh: FAILED: } line=${line#done: }
    fi
    say "$2: $verdict: ${line:-it ended without a word}"
    echo "$2" >>"$LOGS/$verdict"
}

# Prints a line for each node: its name, and its settings.
nodes() {
    if [ $# = 1 ] && [ -f "$1" ]; then sed 's/#.*//' "$1"; else printf '%s\n' "$@"; fi |
        awk 'NF && !seen[$1]++'
}

check_nodes() {
    local line words word
    [ ${#lines[@]} -gt 0 ] || wrong "there is no host in: $*"
    for line in "${lines[@]}"; do
        read -ra words <<<"$line"
        case $line in -*|*[[:cntrl:]]*) wrong "not the name of a host: ${words[0]}" ;; esac
        [[ " $line" != *\ API_KEY=* ]] || wrong "${words[0]}: API_KEY comes from KEY_FILE alone"
        for word in "${words[@]:1}"; do
            [[ $word =~ ^[A-Z_]+= ]] || wrong "${words[0]}: is not NAME=VALUE: $word"
        done
    done
}

count() { if [ -e "$LOGS/$1" ]; then wc -l <"$LOGS/$1"; else echo 0; fi; }

job=${1:-}
case $job in
    deploy) [ $# -ge 3 ] || job= ;;
    status) [ $# -ge 2 ] || job= ;;
    --one)  read -ra words <<<"$3"; one "$2" "${words[@]}"; exit ;;
    *)      job= ;;
esac
[ -n "$job" ] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
shift
if [ "$job" = deploy ]; then
    export BUNDLE=$1
    shift
    for file in "$BUNDLE" "$BUNDLE.sha256" $KEY_FILE $CA_FILE; do
        [ -r "$file" ] || wrong "$file cannot be read"
    done
    (cd "$(dirname "$BUNDLE")" && sha256sum --status -c "$(basename "$BUNDLE").sha256") ||
        wrong "$BUNDLE does not have the sum in its .sha256: remove it and run make dist"
fi
mapfile -t lines < <(nodes "$@")
check_nodes "$@"
mkdir -p "$LOGS"
rm -f "$LOGS"/{ok,WARN,FAILED}

first=0
if [ "$job" = deploy ]; then  # what is wrong for all shows at the first one
    "$0" --one deploy "${lines[0]}"
    first=1
    if [ ! -e "$LOGS/ok" ] && [ -z "${KEEP_GOING:-}" ] && [ ${#lines[@]} -gt 1 ]; then
        say "stopped: ${lines[0]%% *} is not ok; the others were left alone (KEEP_GOING=1 goes on)"
        first=${#lines[@]}
    fi
fi
if [ "$first" -lt ${#lines[@]} ]; then
    printf '%s\0' "${lines[@]:$first}" | xargs -0 -n 1 -P "$JOBS" "$0" --one "$job"
fi

good=$(count ok) warned=$(count WARN) failed=$(count FAILED)
left=$((${#lines[@]} - good - warned - failed))
say "${#lines[@]} nodes: $good ok, $warned WARN, $failed FAILED, $left not tried"
[ "$failed" = 0 ] || say "FAILED: $(sort "$LOGS/FAILED" | tr '\n' ' ')" >&2
[ "$failed" = 0 ] && [ $left = 0 ]
