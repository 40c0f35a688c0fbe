#!/usr/bin/env bash
# Installs the agent on nodes, or shows its state there, over ssh; several nodes at once.
#
#   packaging/fleet.sh deploy BUNDLE HOST...|FILE     make deploy HOSTS="mta-01 root@mta-02"
#   packaging/fleet.sh status HOST...|FILE            make status HOSTS=hosts.txt
#
# FILE has a line for each node: HOST NAME=VALUE ... (settings of that node only). An empty VALUE
# removes the setting; "#" begins a comment.
#
#   KEY_FILE=FILE       holds the dashboard's API key; install.sh gets it by stdin
#   CA_FILE=FILE        CA of the dashboard's certificate, for each node
#   INSTALL_ARGS="..."  options of install.sh, e.g. --url https://monitor.example.com --api v1;
#                       none: an upgrade
#   KEEP_GOING=1        continue although the first node, which is done alone, is not ok
#   JOBS=8              number of nodes at once
#   SSH_OPTIONS="..."   options of ssh and scp
#
# Prints one line for each node: ok, WARN or FAILED, and why; then the counts. The output of each
# node is in dist/deploy. Exit codes: 0; 1 a node failed (deploy) or is not well (status); 2 wrong
# usage.
set -euo pipefail

JOBS=${JOBS:-8} KEY_FILE=${KEY_FILE:-} CA_FILE=${CA_FILE:-} INSTALL_ARGS=${INSTALL_ARGS:-}
export LOGS=${LOGS:-dist/deploy} KEY_FILE CA_FILE INSTALL_ARGS

# INSTALL and ASK run on the node. $0 is the folder with the bundle and perhaps ca.pem; the key, if
# there is one, is on stdin.
# shellcheck disable=SC2016  # expanded on the node
INSTALL='cd "$0" || exit; s=; [ "$(id -u)" = 0 ] || s="sudo -n"; tar -xzf bundle.tar.gz &&
    $s bash tinomail-agent-*/install.sh "$@"; c=$?; cd /; rm -rf "$0"; exit $c'
INSTALL=${INSTALL//$'\n'/}  # one line, for any login shell
ASK="/usr/local/sbin/tinomail-agent --version; systemctl show tinomail-agent \
-p ActiveState -p StateChangeTimestamp -p StatusText"

say() { printf '%s\n' "$*"; }
wrong() { say "$*" >&2; exit 2; }

# With a time limit: a node that hangs after the login must not stop the whole run.
on_node() {
    # shellcheck disable=SC2086  # SSH_OPTIONS holds several words
    timeout 900 "$1" -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 \
        -o ServerAliveCountMax=4 ${SSH_OPTIONS:-} "${@:2}"
}

install_on() {
    local host=$1 folder args=() word
    read -ra args <<<"$INSTALL_ARGS"
    for word in "${@:2}"; do args+=(--set "$word"); done
    [ -z "$KEY_FILE" ] || args+=(--key-file -)
    # A login shell may say something before it.
    folder=$(on_node ssh -n "$host" mktemp -d | tail -n 1) && [[ $folder == /* ]] || return
    [ -z "$CA_FILE" ] || args+=(--ca-file "$folder/ca.pem")
    if ! { on_node scp -q "$BUNDLE" "$host:$folder/bundle.tar.gz" &&
        { [ -z "$CA_FILE" ] || on_node scp -q "$CA_FILE" "$host:$folder/ca.pem"; }; }
    then
        on_node ssh -n "$host" "rm -rf $(printf %q "$folder")" >/dev/null 2>&1
        return 1
    fi
    # shellcheck disable=SC2029  # expanded here, quoted for the node
    on_node ssh "$host" "$(printf '%q ' sh -c "$INSTALL" "$folder" "${args[@]}")" \
        <"${KEY_FILE:-/dev/null}"
}

# Prints the state of the agent in one line. Well means: active, and its last sample was delivered.
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
    [ "$state" = active ] || status=  # it tells of a run that has ended
    say "${version:-not installed}, $state${since:+ since $since}${status:+, $status}"
    [[ $state == active && $status == ok:* ]]
}

# Does one node: prints its line and adds its name to the file of its verdict.
one() {
    local log=$LOGS/${2//\//_}.log verdict=FAILED line
    if [ "$1" = status ]; then
        if line=$(ask "$2"); then verdict=ok; fi
    else
        if install_on "${@:2}" >"$log" 2>&1; then verdict=ok; fi
        line=$(grep -v '^ *$' "$log" | tail -1) || :
        case $verdict$line in "okWARNING: "*) verdict=WARN ;; esac
        line=${line#WARNING: } line=${line#install.sh: FAILED: } line=${line#done: }
    fi
    say "$2: $verdict: ${line:-it printed nothing}"
    echo "$2" >>"$LOGS/$verdict"
}

# Prints a line for each node: its name, and its settings.
nodes() {
    if [ $# = 1 ] && [ -f "$1" ]; then sed 's/#.*//; s/\r$//' "$1"; else printf '%s\n' "$@"; fi |
        awk 'NF && !seen[$1]++'
}

check_nodes() {
    local line words word
    [ ${#lines[@]} -gt 0 ] || wrong "there is no host in: $*"
    for line in "${lines[@]}"; do
        read -ra words <<<"$line"
        case $line in -*|*[[:cntrl:]]*) wrong "not the name of a host: ${words[0]}" ;; esac
        [[ " $line" != *\ API_KEY=* ]] || wrong "${words[0]}: API_KEY is not allowed here; use KEY_FILE"
        for word in "${words[@]:1}"; do
            [[ $word =~ ^[A-Z_]+= ]] || wrong "${words[0]}: not NAME=VALUE: $word"
        done
    done
}

count() { if [ -e "$LOGS/$1" ]; then wc -l <"$LOGS/$1"; else echo 0; fi; }

job=${1:-}
case $job in
    deploy) [ $# -ge 3 ] || wrong "deploy needs hosts: make deploy HOSTS=\"mta-01 mta-02\" (or HOSTS=FILE)" ;;
    status) [ $# -ge 2 ] || wrong "status needs hosts: make status HOSTS=\"mta-01 mta-02\" (or HOSTS=FILE)" ;;
    --one)  read -ra words <<<"$3"; one "$2" "${words[@]}"; exit ;;
    *)      job= ;;
esac
[ -n "$job" ] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
shift
if [ "$job" = deploy ]; then
    export BUNDLE=$1
    shift
    for file in "$BUNDLE" "$BUNDLE.sha256" $KEY_FILE $CA_FILE; do
        [ -r "$file" ] || wrong "cannot read $file"
    done
    [ -z "$CA_FILE" ] || grep -q -e '-BEGIN CERTIFICATE-' "$CA_FILE" ||
        wrong "CA_FILE=$CA_FILE holds no certificate in PEM form"
    (cd "$(dirname "$BUNDLE")" && sha256sum --status -c "$(basename "$BUNDLE").sha256") ||
        wrong "$BUNDLE is damaged: its hash is not the one in $BUNDLE.sha256; remove it, then make dist"
fi
mapfile -t lines < <(nodes "$@")
check_nodes "$@"
mkdir -p "$LOGS"
rm -f "$LOGS"/{ok,WARN,FAILED}

first=0
if [ "$job" = deploy ]; then  # the first node alone: a mistake would affect all nodes
    "$0" --one deploy "${lines[0]}"
    first=1
    if [ ! -e "$LOGS/ok" ] && [ -z "${KEEP_GOING:-}" ] && [ ${#lines[@]} -gt 1 ]; then
        say "stopped: ${lines[0]%% *} is not ok; the other nodes were not tried (KEEP_GOING=1: continue)"
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
