#!/usr/bin/env bash
# Installs, upgrades, changes or removes the TinoMail agent on this node. Asks nothing.
#
#   sudo ./install.sh --url https://monitor.example.com --key-file FILE|-
#   sudo ./install.sh                       upgrade; settings stay
#   sudo /usr/local/lib/tinomail-agent/install.sh --set NAME=VALUE   change settings
#   sudo ./install.sh --replace-node-agent  take over from TinoMail Monitor's Node.js agent
#   sudo ./install.sh --uninstall [--purge] remove it; --purge: settings, state, packages too
#
#   --key-file FILE  file that holds the dashboard's API key; "-" reads it from stdin
#   --ca-file FILE   CA of the dashboard's certificate, copied to /etc/tinomail-agent/ca.pem
#   --set NAME=VALUE any setting but API_KEY; may be repeated; an empty VALUE removes it
#   --url, --api, --role, --node-id VALUE  short for --set DASHBOARD_URL=VALUE, DASHBOARD_API,
#                    NODE_ROLE, NODE_ID
#   --python FILE    Python 3.10 or later to run it with (default: python3 of the system)
#   --force          go on although the dashboard takes samples now and would not afterwards
#   --replace-node-agent  if the Node.js agent of /opt/tinomail-agent runs this node's reports:
#                    take its settings, stop it, and put it back if the new agent does not deliver
#   --without-mongodb  beside it, where that agent reports MongoDB: go on without these figures
#
# The last line is "done: ...", "WARNING: ..." (active, but the dashboard cannot be reached now)
# or "install.sh: FAILED: ..." with the cause and what to do. Exit codes: 0 done or WARNING;
# 1 failed, and what was there before is back (but a first installation stays active when all that
# is wrong is the dashboard's answer); 2 wrong usage; 78 wrong settings, and nothing was changed.
case ${BASH:-/sh} in */bash) ;; *) exec bash "$0" "$@" ;; esac  # it was called as sh install.sh
set -Eeuo pipefail
umask 077
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1  # the service does not see root's ~/.local

UNIT=tinomail-agent.service
DEST=/usr/local/lib/tinomail-agent
COMMAND=/usr/local/sbin/tinomail-agent
STATE=/var/lib/private/tinomail-agent
UNIT_FILE=/etc/systemd/system/$UNIT
ETC=/etc/tinomail-agent
ENV_FILE=$ETC/agent.env
CA_FILE=$ETC/ca.pem
FILES=("$UNIT_FILE" "$ENV_FILE" "$CA_FILE")  # what is replaced, besides $DEST
BROUGHT=$ETC/packages  # what apt installed for the agent's sake
LOCK_LIMIT=120 ACTIVE_WITHIN=30 DELIVERS_WITHIN=60 UPGRADE_PROVES_ITSELF=20  # seconds
NODE_AGENT=/opt/tinomail-agent  # the Node.js agent, which has a unit of the same name
KEPT=$NODE_AGENT/old-unit       # its unit and drop-ins, once it has been replaced
# For a venv, when there is neither lib/ nor apt; as in pyproject.toml.
REQUIREMENTS=('psutil>=5.9.0' 'requests>=2.25.1' 'python-dotenv>=0.19.2' 'sdnotify>=0.3.1')
PACKAGES=(python3-psutil python3-requests python3-dotenv python3-sdnotify)
ROOM_MB=20  # for a second version beside the first

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
new=$DEST.new      # what is about to be installed
old=$DEST.old      # what was there before, until the new one has proved itself
key_file='' ca_file='' python='' force=no uninstall=no purge=no
settings=()  # NAME=VALUE, as given
replace=no without_mongodb=no takeover=no was_active=no was_enabled=no  # of the Node.js agent
# How far it got: something was there before; it is being replaced; the new one has proved itself;
# an earlier run was cut off before that.
had=no had_state=no at_work=no placed=no unproven=no
# What the last line will say: the cause and the way out; then what runs now.
cause='' outcome='Nothing was changed.' broken=''

say()  { printf '%s\n' "$*"; }
die()  { cause=$1; exit "${2:-1}"; }

version_of() { sed -n 's/^VERSION = "\(.*\)"/\1/p' "$1/tinomail_agent.py" 2>/dev/null || :; }

read_options() {
    local -A short=(
        [--url]=DASHBOARD_URL [--api]=DASHBOARD_API [--role]=NODE_ROLE [--node-id]=NODE_ID)
    while [ $# -gt 0 ]; do
        case $1 in
            --url|--api|--role|--node-id|--set|--key-file|--ca-file|--python)
                [ -n "${2:-}" ] || die "$1 needs a value; see --help" 2 ;;&
            --url|--api|--role|--node-id) settings+=("${short[$1]}=$2"); shift ;;
            --set)       settings+=("$2"); shift ;;
            --key-file)  key_file=$2; shift ;;
            --ca-file)   ca_file=$2; shift ;;
            --python)    python=$2; shift ;;
            --force)     force=yes ;;
            --uninstall) uninstall=yes ;;
            --purge)     purge=yes ;;
            --replace-node-agent) replace=yes ;;
            --without-mongodb) without_mongodb=yes ;;
            -h|--help)   sed -n '2,/^case /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
            *)           die "unknown option; see --help" 2 ;;  # it may be the key: never shown
        esac
        shift
    done
    [ $purge = no ] || [ $uninstall = yes ] || die "--purge goes with --uninstall" 2
}

# ---------------------------------------------------------------- what must hold

check_machine() {
    # Python takes modules from where it is started: never from a folder that others can write to.
    case $key_file in ''|-) ;; *) key_file=$(realpath -sm "$key_file") ;; esac
    [ -z "$ca_file" ] || ca_file=$(realpath -sm "$ca_file")
    case $python in */*) python=$(realpath -sm "$python") ;; esac
    cd /
    [ "$(id -u)" = 0 ] || die "must be run as root: sudo $0 ..."
    [ -d /run/systemd/system ] || die "this machine does not run systemd, which starts the agent"
    # Two at once would take each other's files for their own.
    exec 9>/run/tinomail-agent.install.lock
    flock -n 9 || { say "waiting for another install.sh on this node"; flock -w $LOCK_LIMIT 9; } ||
        die "another install.sh is still at work on this node: wait until it has ended"
}

check_room() {
    local place free
    for place in /etc /usr/local; do
        [ -w "$place" ] || die "$place cannot be written to (a read-only file system?)"
        free=$(df -Pm "$place" | awk 'END { print $4 }')
        [ "$free" -ge $ROOM_MB ] || die "the disk of $place has $free MB left: make room"
    done
}

# What has our names and is not ours is somebody's: look, then decide by hand.
check_foreign() {
    local path
    [ ! -e "$COMMAND" ] || [ "$(readlink "$COMMAND")" = "$DEST/tinomail-agent" ] ||
        die "$COMMAND is another program's: move it away, then run this again"
    [ $takeover = no ] || return 0
    path=$(systemctl show -p FragmentPath --value "$UNIT")
    [ -z "$path" ] || [ ! -e "$path" ] || grep -q "^ExecStart=$DEST/" "$path" ||
        die "$path is another agent's: it does not start $DEST. Remove it first
  (systemctl disable --now $UNIT, then the file), then run this again"
}

# The Node.js agent of TinoMail Monitor, by its unit.
is_node_agent() {
    [ -e "$UNIT_FILE" ] && grep -qE '^ExecStart=.*tsx src/index\.ts[[:space:]]*$' "$UNIT_FILE"
}

# It reports MongoDB if it has an address of it, or finds a replica set on the node.
reports_mongodb() {
    grep -qsE '^[[:space:]]*(export )?AGENT_MONGODB_URI=.' "$NODE_AGENT/.env" ||
        pgrep -f '(^|/)mongod( |$)' >/dev/null 2>&1
}

check_node_agent() {
    local flags=--replace-node-agent
    is_node_agent || return 0
    [ -s "$NODE_AGENT/.env" ] ||
        die "$UNIT_FILE is the Node.js agent's, but $NODE_AGENT/.env is missing. Nothing was changed."
    # Whose name would this node report under, if the unit says so and not the .env?
    if [[ " ${settings[*]}" != *" NODE_ID="* ]] && grep -qsh '^Environment=.*AGENT_' "$UNIT_FILE" "$UNIT_FILE.d"/*.conf; then
        die "the old unit sets AGENT_... by Environment=: move these lines into $NODE_AGENT/.env, or give
  --node-id and whatever else they set as options. Nothing was changed."
    fi
    say "this node is reported by the Node.js agent in $NODE_AGENT"
    if reports_mongodb; then
        say "it reports MongoDB's figures, which this agent does not: without them the dashboard's page of"
        say "MongoDB goes stale, and after two minutes its alert \"MongoDB No Primary\" fires and stays"
        flags+=' --without-mongodb'
    else
        without_mongodb=yes
    fi
    if [ $replace = no ] || [ $without_mongodb = no ]; then
        die "$flags replaces it. Nothing was changed."
    fi
    takeover=yes was_active=no was_enabled=no
    case $(systemctl show -p ActiveState --value "$UNIT") in active|activating|reloading) was_active=yes ;; esac
    if systemctl -q is-enabled "$UNIT" 2>/dev/null; then was_enabled=yes; fi
}

# Whole or not at all: while $KEPT.unproven is there, the new agent has not proved itself.
put_node_agent_aside() {
    rm -rf "$KEPT.new"
    mkdir "$KEPT.new"
    printf '%s\n' "was_active=$was_active" "was_enabled=$was_enabled" "had=$had" >"$KEPT.new/state"
    cp -p "$UNIT_FILE" "$KEPT.new/"
    [ ! -d "$UNIT_FILE.d" ] || cp -pR "$UNIT_FILE.d" "$KEPT.new/"
    find "$KEPT.new" -type f -exec sync {} +
    mv -T "$KEPT.new" "$KEPT.unproven"
    systemctl -q stop "$UNIT"
    rm -rf "$UNIT_FILE" "$UNIT_FILE.d"
}

bring_back_node_agent() {
    [ -d "$KEPT.unproven" ] || return 0  # it was not touched
    systemctl -q stop "$UNIT" 2>/dev/null || :
    if ! restore_node_unit; then
        say "The Node.js agent's unit CANNOT be put back (is the disk full?): it is in $KEPT.unproven;"
        say "make room, then run install.sh again, which puts it back first"
        return 0
    fi
    systemctl daemon-reload || :
    systemctl -q reset-failed "$UNIT" 2>/dev/null || :
    [ $was_enabled = no ] || systemctl -q enable "$UNIT" || :
    if [ $was_active = no ]; then say "The Node.js agent is back; it was not active before"
    elif systemctl -q start "$UNIT"; then say "The Node.js agent is back and active"
    else say "The Node.js agent is back, but does not start: systemctl status $UNIT"
    fi
    rm -rf "$KEPT.unproven"  # last: until here, another run would do all this again
}

restore_node_unit() {
    rm -rf "$UNIT_FILE.d" "$UNIT_FILE.tmp"
    cp -p "$KEPT.unproven/$UNIT" "$UNIT_FILE.tmp" && mv "$UNIT_FILE.tmp" "$UNIT_FILE" &&
        { [ ! -d "$KEPT.unproven/$UNIT.d" ] || cp -pR "$KEPT.unproven/$UNIT.d" "$UNIT_FILE.d"; }
}

# An earlier run was cut off (power, SIGKILL) after it had stopped the Node.js agent.
recover_node_agent() {
    [ -d "$KEPT.unproven" ] || return 0
    local state=$KEPT.unproven/state
    if grep -qsx was_active=yes "$state"; then was_active=yes; fi
    if grep -qsx was_enabled=yes "$state"; then was_enabled=yes; fi
    if grep -qsx had=yes "$state"; then had=yes; fi
    [ $had = yes ] || rm -rf "$DEST" "$COMMAND"
    restore_files
    rm -f "${FILES[@]/%/.old}"
    bring_back_node_agent >&2
    [ ! -d "$KEPT.unproven" ] || exit 1  # and it was said why
    had=no
}

choose_python() {
    [ "$here" != "$DEST" ] || [ -z "$python" ] || die "--python: needs a bundle or a checkout" 2
    if [ -z "$python" ]; then
        # The one of before, if it is still there; of a venv, the one that it was made with.
        [ ! -e "$DEST/tinomail-agent" ] || python=$(sed -n '1s/^#!//p' "$DEST/tinomail-agent")
        case $python in "$DEST"/*) python=$(readlink -f "$python") ;; esac
        [ -x "$python" ] || python=/usr/bin/python3
    fi
    python=$(command -v "$python") || die "there is no Python: apt-get install python3, or --python FILE"
    python=$(realpath -s "$python")
    case $python in *[[:space:]]*) die "--python: its path must not hold a blank" 2 ;; esac
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$python" -V 2>&1) is too old: the agent needs Python 3.10 or later (--python FILE)"
}

# ---------------------------------------------------------------- building $new

has_modules() { PYTHONPATH=$new/lib "$1" -c 'import psutil, requests, dotenv, sdnotify' 2>&-; }

# lib/ of the bundle, else what the system has, else the distribution's packages, else a venv.
add_dependencies() {
    if [ -d "$here/lib" ]; then
        [ -d "$here/lib/$(uname -m)" ] || die "the bundle has no libraries for $(uname -m)"
        mkdir "$new/lib"
        cp -R "$here/lib/any/." "$here/lib/$(uname -m)/." "$new/lib/"
        has_modules "$python" || die "the bundle's libraries do not work with $("$python" -V)"
        return
    fi
    if ! has_modules "$python" && [ "$(readlink -f "$python")" = "$(readlink -f /usr/bin/python3)" ]; then
        install_packages
    fi
    has_modules "$python" || make_venv
}

# Only adds: nothing is upgraded, removed or restarted for the agent's sake.
install_packages() {
    command -v apt-get >/dev/null || return 0
    say "installing ${PACKAGES[*]} (this takes half a minute)"
    (umask 022 && NEEDRESTART_SUSPEND=1 DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        --no-install-recommends --no-remove --no-upgrade \
        -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        install "${PACKAGES[@]}") </dev/null >"$new/apt.log" 2>&1 9>&- ||
        { tail -3 "$new/apt.log" >&2; say "apt-get could not install them; trying a venv"; }
    # What came with us leaves with us: --uninstall --purge. Others come to rely on ca-certificates
    # and openssl without a word to dpkg: they stay.
    [ -d "$ETC" ] || mkdir -m 755 "$ETC"
    tr -d '\r' <"$new/apt.log" |
        sed -n 's/^Selecting previously unselected package \(.*\)\.$/\1/p' |
        { grep -vxE 'ca-certificates|openssl' || :; } >>"$BROUGHT"
    rm "$new/apt.log"
}

make_venv() {
    say "making a virtual environment with pip (this takes half a minute)"
    if ! { "$python" -m venv "$new/venv" && "$new/venv/bin/python" -m pip install -q --no-compile \
            --no-input --disable-pip-version-check "${REQUIREMENTS[@]}"; } \
            >"$new/venv.log" 2>&1 </dev/null 9>&-; then
        tail -5 "$new/venv.log" >&2
        die "the libraries cannot be had: use the bundle, which holds them (make dist)"
    fi
    rm "$new/venv.log"
    python=$DEST/venv/bin/python
}

build_new() {
    rm -rf "$new"
    if [ "$here" = "$DEST" ]; then cp -a "$DEST" "$new"; return; fi  # other settings alone
    mkdir "$new"
    cp "$here"/{tinomail_agent.py,"$UNIT",install.sh,README.md,LICENSE,agent.env.example} \
        "$here/packaging/write_settings.py" "$new/"
    add_dependencies
    # A script is compiled at every start, a module is not: hence the launcher.
    cat >"$new/tinomail-agent" <<LAUNCHER
#!$python
import sys
sys.path.insert(1, "$DEST/lib")
import tinomail_agent
sys.exit(tinomail_agent.main(installed=True))
LAUNCHER
    # By content, not by time: the same sources give the same bytes.
    "$(new_python)" -m compileall -qf -s "$new" -p "$DEST" --invalidation-mode checked-hash "$new" ||
        die "this copy of the agent cannot be compiled"
    with_agent -c 'import tinomail_agent' || die "this copy of the agent is broken"
    chmod -R a+rX "$new"
    chmod 755 "$new/tinomail-agent" "$new/install.sh"
}

# Runs a Python program with the new agent at hand.
with_agent() {
    env -i PATH="$PATH" PYTHONNOUSERSITE=1 PYTHONPATH="$new:$new/lib" PYTHONDONTWRITEBYTECODE=1 \
        PYTHONUNBUFFERED=1 "$(new_python)" "$@" 9>&-
}
new_python() { if [ -d "$new/venv" ]; then echo "$new/venv/bin/python"; else echo "$python"; fi; }

# ---------------------------------------------------------------- settings

# Write the settings to $ENV_FILE.new, the CA to $CA_FILE.new; the agent itself judges them.
write_settings() {
    local said code=0 options=()
    [ -d "$ETC" ] || mkdir -m 755 "$ETC"
    [ ! -e "$ENV_FILE" ] || { chown 0:0 "$ENV_FILE"; chmod 600 "$ENV_FILE"; }
    [ -z "$key_file" ] || options+=(--key-file "$key_file")
    [ -z "$ca_file" ] || options+=(--ca-file "$ca_file" "$CA_FILE")
    [ $takeover = no ] || options+=(--node-agent "$NODE_AGENT/.env")
    said=$(with_agent "$new/write_settings.py" "$ENV_FILE" "${settings[@]/#/--set=}" \
        "${options[@]}" 2>&1) || { code=$?; say "$said" >&2; die "${said##*$'\n'}" $code; }
    [ -z "$said" ] || say "$said" >&2
}

# ---------------------------------------------------------------- what the dashboard says

# Sets `code` to the exit code of --check with the new version and settings, `check` to what it
# says, and `problem` to its last line.
check_new() {
    local file=$ENV_FILE.check ca=
    [ ! -e "$CA_FILE.new" ] || ca="s|^CA_BUNDLE=.*|CA_BUNDLE=$CA_FILE.new|"
    sed "$ca" "$ENV_FILE.new" >"$file"
    code=0
    check=$(with_agent -c 'import sys, tinomail_agent
sys.exit(tinomail_agent.main(installed=True))' --check --env-file "$file" 2>&1) || code=$?
    rm -f "$file"
    check=${check//"$file"/"$ENV_FILE"} check=${check//"$CA_FILE.new"/"$CA_FILE"}
    problem=${check##*$'\n'}
    problem=${problem#dashboard: FAILED: }
}

# The agent that works now is not given up for one that does not.
judge() {
    if [ "$code" = 0 ]; then return; fi
    [ $takeover = no ] || die "$problem. The Node.js agent goes on. Nothing was changed"
    if [ $force = no ] && [ -x "$COMMAND" ] && [ -s "$ENV_FILE" ] && env -i PATH="$PATH" \
            PYTHONNOUSERSITE=1 "$COMMAND" --check --env-file "$ENV_FILE" >/dev/null 2>&1 9>&-; then
        die "$problem. The agent as it is now does deliver: correct what is wrong, or use --force"
    fi
}

# ---------------------------------------------------------------- putting it in place

# The same file, or the same tree, as before?
same() { diff -rq "$1" "$2" >/dev/null 2>&1; }

is_installed() {
    local running=/run/credentials/$UNIT/agent.env  # the settings that the agent was started with
    same "$new" "$DEST" && same "$new/$UNIT" "$UNIT_FILE" && same "$ENV_FILE.new" "$ENV_FILE" &&
        { [ ! -e "$CA_FILE.new" ] || same "$CA_FILE.new" "$CA_FILE"; } &&
        { [ ! -e "$running" ] || same "$ENV_FILE" "$running"; } &&
        [ -L "$COMMAND" ] && systemctl -q is-active "$UNIT" && systemctl -q is-enabled "$UNIT"
}

put_in_place() {
    local file
    # Kept aside: what there was, to put back. While $old is there, the new one is unproven.
    for file in "${FILES[@]}"; do [ ! -e "$file" ] || cp -p "$file" "$file.old"; done
    [ ! -e "$STATE" ] || had_state=yes
    [ ! -e "$DEST" ] || had=yes
    find "$new" "$ETC" -type f -exec sync {} +
    placed=yes  # from here on the trap puts back
    [ $takeover = no ] || put_node_agent_aside
    [ $had = no ] || mv -T "$DEST" "$old"
    mv -T "$new" "$DEST"
    install -m 644 "$DEST/$UNIT" "$UNIT_FILE"
    mv "$ENV_FILE.new" "$ENV_FILE"
    [ ! -e "$CA_FILE.new" ] || mv "$CA_FILE.new" "$CA_FILE"
    ln -sfn "$DEST/tinomail-agent" "$COMMAND"
    systemctl daemon-reload
    systemctl -q enable "$UNIT"
}

# May be cut off and done again, and needs no room: the disk may be full.
restore_files() {
    local file
    for file in "${FILES[@]}"; do
        if [ -e "$file.old" ]; then ln -f "$file.old" "$file.tmp" && mv "$file.tmp" "$file"
        else rm -f "$file"
        fi
    done
}

show() { systemctl show -p "$1" --value "$UNIT"; }

# Type=notify: the restart returns when the agent has its first sample, or has failed.
start() { timeout "$ACTIVE_WITHIN" systemctl restart "$UNIT" 2>/dev/null 9>&-; }

# If --check could deliver a sample, the service must, too; an upgrade must outlive its first ones.
has_delivered() { [[ $(show StatusText) =~ ^ok:\ [1-9] ]]; }
prove() {
    local pid took=0 from=$SECONDS
    pid=$(show MainPID)
    until [ $took -ge "${watch_s:-0}" ] && { [ "$code" != 0 ] || has_delivered; }; do
        [ "$(show ActiveState),$(show MainPID)" = "active,$pid" ] || failed "ended after its start"
        [ $took -lt $DELIVERS_WITHIN ] || failed "does not deliver" "$(show StatusText)"
        sleep 0.3
        took=$((SECONDS - from))
    done
}

put_back() {
    if [ $takeover = yes ] && [ ! -d "$KEPT.unproven" ]; then  # nothing has been moved yet
        rm -rf "$KEPT.new"
        outcome='The Node.js agent goes on. Nothing was changed.'
        return
    fi
    if [ $had = no ] || [ $takeover = yes ]; then
        systemctl -q stop "$UNIT" 2>/dev/null
        [ $had_state = yes ] || systemctl clean --what=state "$UNIT" 2>/dev/null
        remove
        restore_files
        # an agent of ours that was not in use
        [ ! -e "$old" ] || { mv -T "$old" "$DEST"; ln -sfn "$DEST/tinomail-agent" "$COMMAND"; }
        outcome='Nothing is installed.'
        [ $takeover = no ] || outcome=$(bring_back_node_agent)
        return
    fi
    restore_files
    [ ! -e "$old" ] || { rm -rf "$DEST"; mv -T "$old" "$DEST"; }
    systemctl daemon-reload
    outcome="$(version_of "$DEST") and its settings are back"
    if start; then outcome+=' and active.'; else outcome+=", but not active: see its log"; fi
}

# The end of every run: what has not proved itself is undone, and the last line is said.
finish() {
    local status=$?
    trap '' INT TERM HUP PIPE  # a second Ctrl-C must not cut this
    set +eE && trap - ERR
    [ $placed = no ] || put_back
    [ $at_work = no ] || rm -rf "$new" "${FILES[@]/%/.old}" "${FILES[@]/%/.new}" "$ENV_FILE.check"
    [ $at_work = no ] || rmdir "$ETC" 2>/dev/null
    [ $status != 0 ] || return
    cause=$(tr -s ' \n' ' ' <<<"${cause:-${broken:-interrupted}}")
    cause="${cause%[. ]}."
    case $cause in *'othing was changed'*) outcome='' ;; esac
    printf 'install.sh: FAILED: %s\n' "${cause//\?./?}${outcome:+ $outcome}" >&2
}

last_lines() { journalctl --sync; journalctl -q --no-pager -ocat -n "$1" -u $UNIT | sed 's/^/  /'; }

failed() {
    local words=${2:-}
    { say "the last lines of its log:"; last_lines 12; } >&2
    [ -n "$words" ] || words=$(journalctl -q --no-pager -o cat -p err -n 1 \
        "_SYSTEMD_INVOCATION_ID=$(show InvocationID)")
    die "the agent $1: ${words:-$(show SubState), $(show Result), status $(show ExecMainStatus)}"
}

# ---------------------------------------------------------------- the two jobs

do_install() {
    local watch_s='' version before check code problem
    check_node_agent
    check_foreign
    check_room
    choose_python
    at_work=yes
    if [ -e "$old" ]; then  # an earlier run was cut off (power, SIGKILL) before it was proved
        unproven=yes
        restore_files
        rm -rf "$DEST"
        mv -T "$old" "$DEST"
    fi
    build_new
    write_settings
    check_new
    version=$(version_of "$new") before=$(version_of "$DEST")
    [ ! -e "$DEST" ] || same "$new" "$DEST" || watch_s=$UPGRADE_PROVES_ITSELF
    [ "${before:-$version}" = "$version" ] || version="$before -> $version"
    if [ $unproven = no ] && is_installed; then
        version+=", nothing to change"
    else
        judge
        say "starting $version${watch_s:+, and watching it for $watch_s s}"
        put_in_place
        start || failed "did not become active"
        prove
    fi
    placed=no outcome=''
    # $old means "unproven": it goes in one step.
    [ ! -e "$old" ] || { rm -rf "$new"; mv -T "$old" "$new"; }
    [ $takeover = no ] || { rm -rf "$KEPT"; mv -T "$KEPT.unproven" "$KEPT"; rm -f "$KEPT/state"; }
    report
}

report() {
    say "$check"$'\n\n'"last lines of its log (journalctl -u tinomail-agent):"
    last_lines 5
    say_node_agent
    case $code in
        0)  say "done: the agent is active ($version), and the dashboard takes this node's samples" ;;
        75) say "WARNING: the agent is active ($version), but cannot reach the dashboard now:" \
                "$problem. Samples wait; look again with: sudo tinomail-agent --check" ;;
        *)  die "the agent is active ($version), but $problem. Samples wait: correct the settings
                with $DEST/install.sh (--key-file, --ca-file, --set; see --help)" ;;
    esac
}

# The service and the program; settings and state stay.
remove() {
    systemctl -q disable --now "$UNIT" 2>/dev/null || :
    rm -rf "$DEST" "$UNIT_FILE"
    [ ! -L "$COMMAND" ] || rm -f "$COMMAND"
    systemctl daemon-reload
    systemctl -q reset-failed "$UNIT" 2>/dev/null || :
}

do_uninstall() {
    local packages=() stays
    if is_node_agent; then die "$UNIT_FILE is the Node.js agent's"; fi
    check_foreign
    at_work=yes
    [ ! -s "$BROUGHT" ] || mapfile -t packages <"$BROUGHT"
    if [ $purge = yes ]; then
        systemctl -q stop "$UNIT" 2>/dev/null || :
        # /var/lib/private/tinomail-agent, and the link to it
        systemctl clean --what=state "$UNIT" 2>/dev/null || :
    fi
    remove
    rm -rf "$old"
    say_node_agent
    if [ $purge = no ]; then
        stays=$(find "$ETC" "$UNIT_FILE.d" "$STATE" -maxdepth 0 -printf '%p ' 2>/dev/null) || :
        say "done: removed. These stay, until install.sh --uninstall --purge (of a bundle):" \
            "$stays${packages[*]}"
        return
    fi
    rm -rf "$ETC" "$UNIT_FILE.d" "$STATE" /var/lib/tinomail-agent
    systemctl daemon-reload
    # dpkg leaves alone what something else has come to need.
    [ ${#packages[@]} = 0 ] || dpkg --purge "${packages[@]}" >/dev/null 2>&1 || :
    say "done: removed, with its settings and state"
}

say_node_agent() {
    [ ! -d "$KEPT" ] ||
        say "the Node.js agent of before is in $NODE_AGENT, its unit and drop-ins in $KEPT"
}

trap finish EXIT
trap 'broken="failed: $BASH_COMMAND"' ERR
read_options "$@"
check_machine
recover_node_agent
if [ $uninstall = yes ]; then do_uninstall; else do_install; fi
