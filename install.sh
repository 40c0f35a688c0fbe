#!/usr/bin/env bash
# Installs, upgrades, changes or removes the TinoMail agent on this node. Asks nothing.
#
#   sudo ./install.sh --url https://monitor.example.com --key-file FILE|-
#   sudo ./install.sh                       upgrade; the settings stay
#   sudo /usr/local/lib/tinomail-agent/install.sh --set NAME=VALUE   change settings
#   sudo ./install.sh --replace-node-agent  replace TinoMail Monitor's Node.js agent
#   sudo ./install.sh --uninstall [--purge] remove it; --purge: settings, state, packages too
#
#   --key-file FILE  file that holds the dashboard's API key; "-" reads it from stdin
#   --ca-file FILE   CA of the dashboard's certificate, copied to /etc/tinomail-agent/ca.pem
#   --set NAME=VALUE any setting but API_KEY; may be repeated; an empty VALUE removes it
#   --url, --api, --role, --node-id VALUE  short for --set DASHBOARD_URL=VALUE, DASHBOARD_API,
#                    NODE_ROLE, NODE_ID
#   --python FILE    Python 3.10 or later to run the agent with (default: python3 of the system)
#   --force          continue although the dashboard takes samples now and would not afterwards
#   --replace-node-agent  if the Node.js agent of /opt/tinomail-agent reports this node: take its
#                    settings, stop it, and start it again if the new agent does not deliver
#   --without-mongodb  with --replace-node-agent, where that agent reports MongoDB: continue,
#                    although the new agent does not report it
#
# The last line is "done: ...", "WARNING: ..." (active, but the dashboard cannot be reached now)
# or "install.sh: FAILED: ..." with the cause and what to do. Exit codes: 0 done or WARNING;
# 1 failed, and the previous state is restored (but a first installation stays active if only the
# dashboard's answer is wrong); 2 wrong usage; 78 wrong settings, and nothing was changed.
case ${BASH:-/sh} in */bash) ;; *) exec bash "$0" "$@" ;; esac  # called as "sh install.sh"
set -Eeuo pipefail
umask 077
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1  # the service cannot see root's ~/.local

UNIT=tinomail-agent.service
DEST=/usr/local/lib/tinomail-agent
COMMAND=/usr/local/sbin/tinomail-agent
STATE=/var/lib/private/tinomail-agent
UNIT_FILE=/etc/systemd/system/$UNIT
ETC=/etc/tinomail-agent
ENV_FILE=$ETC/agent.env
CA_FILE=$ETC/ca.pem
FILES=("$UNIT_FILE" "$ENV_FILE" "$CA_FILE")  # replaced together with $DEST
BROUGHT=$ETC/packages  # names of the packages that apt installed for the agent
LOCK_LIMIT=120 ACTIVE_WITHIN=30 DELIVERS_WITHIN=60 UPGRADE_PROVES_ITSELF=20  # seconds
NODE_AGENT=/opt/tinomail-agent  # the Node.js agent, which has a unit of the same name
KEPT=$NODE_AGENT/old-unit       # its unit and drop-ins after it was replaced
PACKAGES=(python3-psutil python3-requests python3-dotenv python3-sdnotify)
ROOM_MB=20  # for two versions side by side

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
new=$DEST.new            # the version to install
old=$DEST.old            # the previous version, until the new one has proved that it works
unproven=$DEST.unproven  # exists until then; holds what put_back() must know
key_file='' ca_file='' python='' force=no uninstall=no purge=no
settings=()  # NAME=VALUE
replace=no without_mongodb=no takeover=no was_active=no was_enabled=no  # of the Node.js agent
had=no had_state=no  # there was an agent of ours, and its state, before this run
at_work=no           # files of this run must be removed at its end
placed=no            # the new version is in place, but unproven
absent=''            # the files that were not there before
NOT_BACK='The previous state CANNOT be put back (is the disk full?): make room, run install.sh again'
# For the last line: the cause and the way out; then what runs now.
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
            *)           die "unknown option; see --help" 2 ;;  # not shown: it may be the key
        esac
        shift
    done
    [ $purge = no ] || [ $uninstall = yes ] || die "--purge needs --uninstall" 2
}

# ---------------------------------------------------------------- checks

check_machine() {
    # Python imports modules from the current folder, which others may be able to write to.
    case $key_file in ''|-) ;; *) key_file=$(realpath -sm "$key_file") ;; esac
    [ -z "$ca_file" ] || ca_file=$(realpath -sm "$ca_file")
    case $python in */*) python=$(realpath -sm "$python") ;; esac
    cd /
    [ "$(id -u)" = 0 ] || die "must be run as root: sudo $0"
    [ -d /run/systemd/system ] || die "this machine does not run systemd; the agent needs it"
    # Two runs at once would mix their files.
    exec 9>/run/tinomail-agent.install.lock
    flock -n 9 || { say "waiting for another install.sh on this node"; flock -w $LOCK_LIMIT 9; } ||
        die "another install.sh is still running on this node; wait until it ends"
}

check_room() {
    local place free
    for place in /etc /usr/local; do
        [ -w "$place" ] || die "cannot write to $place (a read-only file system?)"
        free=$(df -Pm "$place" | awk 'END { print $4 }')
        [ "$free" -ge $ROOM_MB ] || die "the disk of $place has only $free MB free; make room"
    done
}

# A file or a unit of our name that is not ours stays as it is.
check_foreign() {
    local path
    [ ! -e "$COMMAND" ] || [ "$(readlink "$COMMAND")" = "$DEST/tinomail-agent" ] ||
        die "$COMMAND belongs to another program; move it away, then run this again"
    [ $takeover = no ] || return 0
    path=$(systemctl show -p FragmentPath --value "$UNIT")
    [ -z "$path" ] || [ ! -e "$path" ] || grep -q "^ExecStart=$DEST/" "$path" ||
        die "$path belongs to another agent: it does not start $DEST. Remove it (systemctl
            disable --now $UNIT, then the file), then run this again"
}

# ---------------------------------------------------------------- the Node.js agent

is_node_agent() {
    [ -e "$UNIT_FILE" ] && grep -qE '^ExecStart=.*tsx src/index\.ts[[:space:]]*$' "$UNIT_FILE"
}

# It reports MongoDB if it has its address, or finds a replica set on the node.
reports_mongodb() {
    grep -qsE '^[[:space:]]*(export )?AGENT_MONGODB_URI=.' "$NODE_AGENT/.env" ||
        pgrep -f '(^|/)mongod( |$)' >/dev/null 2>&1
}

check_node_agent() {
    local flags=--replace-node-agent
    is_node_agent || return 0
    [ -s "$NODE_AGENT/.env" ] ||
        die "$UNIT_FILE is the Node.js agent's, but $NODE_AGENT/.env is missing"
    # Without these settings the node could report under another name.
    if [[ " ${settings[*]}" != *" NODE_ID="* ]] &&
        grep -qsh '^Environment=.*AGENT_' "$UNIT_FILE" "$UNIT_FILE.d"/*.conf; then
        die "the old unit sets AGENT_... by Environment=; move these lines into $NODE_AGENT/.env, or
            give --node-id and the other settings as options"
    fi
    say "this node is reported by the Node.js agent in $NODE_AGENT"
    if reports_mongodb; then
        say "it also reports MongoDB, which this agent does not do: the dashboard's page of MongoDB" \
            "goes stale, and after two minutes its alert \"MongoDB No Primary\" fires and stays"
        flags+=' --without-mongodb'
    else
        without_mongodb=yes
    fi
    if [ $replace = no ] || [ $without_mongodb = no ]; then
        die "$flags replaces it"
    fi
    takeover=yes outcome='The Node.js agent keeps running. Nothing was changed.'
    case $(show ActiveState) in active|activating|reloading) was_active=yes ;; esac
    if systemctl -q is-enabled "$UNIT" 2>/dev/null; then was_enabled=yes; fi
}

# ---------------------------------------------------------------- building $new

choose_python() {
    [ "$here" != "$DEST" ] || [ -z "$python" ] || die "--python needs a bundle or a checkout" 2
    if [ -z "$python" ]; then
        # The previous one, if it still exists; for a venv, the one that it was made with.
        [ ! -e "$DEST/tinomail-agent" ] || python=$(sed -n '1s/^#!//p' "$DEST/tinomail-agent")
        case $python in "$DEST"/*) python=$(readlink -f "$python") ;; esac
        [ -x "$python" ] || python=/usr/bin/python3
    fi
    command -v "$python" >/dev/null || die "there is no $python: apt-get install python3, or --python FILE"
    python=$(realpath -s "$(command -v "$python")")
    case $python in *[[:space:]]*) die "--python: the path must not contain a blank" 2 ;; esac
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$python" -V 2>&1) is too old: the agent needs Python 3.10 or later (--python FILE)"
}

has_modules() { PYTHONPATH=$new/lib "$1" -c 'import psutil, requests, dotenv, sdnotify' 2>&-; }

# From lib/ of the bundle, else from the system, else from apt, else from pip in a venv.
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

# Only adds packages; nothing is upgraded, removed or restarted.
install_packages() {
    command -v apt-get >/dev/null || return 0
    say "installing ${PACKAGES[*]} (takes half a minute)"
    (umask 022 && NEEDRESTART_SUSPEND=1 DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        --no-install-recommends --no-remove --no-upgrade \
        -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        install "${PACKAGES[@]}") </dev/null >"$new/apt.log" 2>&1 9>&- ||
        { tail -3 "$new/apt.log" >&2; say "apt-get cannot install them; trying pip in a venv"; }
    # --uninstall --purge removes what was installed here, but not ca-certificates and openssl:
    # other software may use them without a dependency that dpkg knows.
    [ -d "$ETC" ] || mkdir -m 755 "$ETC"
    tr -d '\r' <"$new/apt.log" |
        sed -n 's/^Selecting previously unselected package \(.*\)\.$/\1/p' |
        { grep -vxE 'ca-certificates|openssl' || :; } >>"$BROUGHT"
    rm "$new/apt.log"
}

make_venv() {
    local wanted
    say "making a virtual environment with pip (takes half a minute)"
    mapfile -t wanted < <(sed -n '/^dependencies = /,/^]/s/^ *"\(.*\)",$/\1/p' "$here/pyproject.toml")
    if ! { "$python" -m venv "$new/venv" && "$new/venv/bin/python" -m pip install -q --no-compile \
            --no-input --disable-pip-version-check "${wanted[@]}"; } \
            >"$new/venv.log" 2>&1 </dev/null 9>&-; then
        tail -5 "$new/venv.log" >&2
        die "pip cannot install the libraries; use the bundle, which contains them (make dist)"
    fi
    rm "$new/venv.log"
    python=$DEST/venv/bin/python
}

build_new() {
    rm -rf "$new"
    if [ "$here" = "$DEST" ]; then cp -a "$DEST" "$new"; return; fi  # only the settings change
    mkdir "$new"
    cp "$here"/{tinomail_agent.py,"$UNIT",install.sh,packaging/write_settings.py} "$new/"
    cp "$here"/{README.md,CHANGELOG.md,LICENSE,agent.env.example} "$new/"
    [ ! -d "$here/docs" ] || { mkdir "$new/docs"; cp "$here"/docs/*.md "$new/docs/"; }
    add_dependencies
    # Python compiles a script at every start, but a module only once: hence this launcher.
    cat >"$new/tinomail-agent" <<LAUNCHER
#!$python
import sys
sys.path.insert(1, "$DEST/lib")
import tinomail_agent
sys.exit(tinomail_agent.main(installed=True))
LAUNCHER
    # Checked by hash, not by time: the same sources give the same bytes.
    "$(new_python)" -m compileall -qf -s "$new" -p "$DEST" --invalidation-mode checked-hash "$new" ||
        die "this copy of the agent cannot be compiled"
    with_agent -c 'import tinomail_agent' || die "this copy of the agent is broken"
    chmod -R a+rX "$new"
    chmod 755 "$new/tinomail-agent" "$new/install.sh"
}

# Runs a Python program that can import the new agent.
with_agent() {
    env -i PATH="$PATH" PYTHONNOUSERSITE=1 PYTHONPATH="$new:$new/lib" PYTHONDONTWRITEBYTECODE=1 \
        PYTHONUNBUFFERED=1 "$(new_python)" "$@" 9>&-
}
new_python() { if [ -d "$new/venv" ]; then echo "$new/venv/bin/python"; else echo "$python"; fi; }

# ---------------------------------------------------------------- settings

# For the two settings that each node needs.
way_out() {
    [[ $1 != *": is missing"* ]] ||
        say '; give --url and --key-file (make deploy: KEY_FILE=, and --url in INSTALL_ARGS)'
}

# Writes the settings to $ENV_FILE.new and the CA to $CA_FILE.new.
write_settings() {
    local said code=0 options=()
    [ -d "$ETC" ] || mkdir -m 755 "$ETC"
    [ ! -e "$ENV_FILE" ] || { chown 0:0 "$ENV_FILE"; chmod 600 "$ENV_FILE"; }
    if [ -n "$ca_file" ]; then
        grep -qs -e '-BEGIN CERTIFICATE-' "$ca_file" ||
            die "--ca-file: cannot read a certificate in PEM form from $ca_file" 78
        install -m 644 "$ca_file" "$CA_FILE.new"
        settings+=("CA_BUNDLE=$CA_FILE")
    fi
    [ -z "$key_file" ] || options+=(--key-file "$key_file")
    [ $takeover = no ] || options+=(--node-agent "$NODE_AGENT/.env")
    said=$(with_agent "$new/write_settings.py" "$ENV_FILE" "${settings[@]/#/--set=}" \
        "${options[@]}" 2>&1) || { code=$?; say "$said" >&2; die "${said//$'\n'/; }$(way_out "$said")" $code; }
    [ -z "$said" ] || say "$said" >&2
}

# Runs --check with the new version and settings. Sets `code` to its exit code, `check` to its
# output and `problem` to the last line of that.
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

# An agent that delivers is not replaced by one that does not.
judge() {
    [ "$code" != 0 ] || return 0
    [ $takeover = no ] || die "$problem"
    if [ $force = no ] && [ -x "$COMMAND" ] && [ -s "$ENV_FILE" ] && env -i PATH="$PATH" \
            PYTHONNOUSERSITE=1 "$COMMAND" --check --env-file "$ENV_FILE" >/dev/null 2>&1 9>&-; then
        die "$problem. The agent delivers with its present version and settings: correct the new
            ones, or use --force"
    fi
}

# ---------------------------------------------------------------- putting it in place

same() { diff -rq "$1" "$2" >/dev/null 2>&1; }  # two files, or two folders

is_installed() {
    local running=/run/credentials/$UNIT/agent.env  # the settings that the agent was started with
    same "$new" "$DEST" && same "$new/$UNIT" "$UNIT_FILE" && same "$ENV_FILE.new" "$ENV_FILE" &&
        { [ ! -e "$CA_FILE.new" ] || same "$CA_FILE.new" "$CA_FILE"; } &&
        { [ ! -e "$running" ] || same "$ENV_FILE" "$running"; } &&
        [ -L "$COMMAND" ] && systemctl -q is-active "$UNIT" && systemctl -q is-enabled "$UNIT"
}

put_in_place() {
    local file
    rm -rf "$old" "${FILES[@]/%/.old}" "$UNIT_FILE.d.old"
    for file in "${FILES[@]}"; do
        if [ -e "$file" ]; then cp -p "$file" "$file.old"; else absent+=" $file"; fi
    done
    [ ! -e "$STATE" ] || had_state=yes
    [ ! -e "$DEST" ] || had=yes
    if [ $takeover = yes ]; then
        rm -rf "$KEPT.new"
        mkdir "$KEPT.new"
        cp -p "$UNIT_FILE" "$KEPT.new/"
        [ ! -d "$UNIT_FILE.d" ] || cp -pR "$UNIT_FILE.d" "$KEPT.new/"
    fi
    printf '%s\n' "had=$had had_state=$had_state takeover=$takeover" \
        "was_active=$was_active was_enabled=$was_enabled absent='$absent'" >"$unproven.new"
    find "$new" "$unproven.new" "$ETC" -type f -exec sync {} +
    mv "$unproven.new" "$unproven"
    placed=yes  # from here on finish() restores what was there
    if [ $takeover = yes ]; then
        systemctl -q stop "$UNIT"
        [ ! -d "$UNIT_FILE.d" ] || mv -T "$UNIT_FILE.d" "$UNIT_FILE.d.old"
    fi
    [ $had = no ] || mv -T "$DEST" "$old"
    mv -T "$new" "$DEST"
    install -m 644 "$DEST/$UNIT" "$UNIT_FILE"
    mv "$ENV_FILE.new" "$ENV_FILE"
    [ ! -e "$CA_FILE.new" ] || mv "$CA_FILE.new" "$CA_FILE"
    ln -sfn "$DEST/tinomail-agent" "$COMMAND"
    systemctl daemon-reload
    systemctl -q enable "$UNIT"
}

show() { systemctl show -p "$1" --value "$UNIT"; }

# Type=notify: the restart returns when the agent has its first sample, or has failed.
start() { timeout "$ACTIVE_WITHIN" systemctl restart "$UNIT" 2>/dev/null 9>&-; }

has_delivered() { [[ $(show StatusText) =~ ^ok:\ [1-9] ]]; }

# Waits until the agent has delivered, if --check could, and has run for watch_s seconds.
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

# Restores what was there before put_in_place and sets `outcome`. Needs no space on the disk, and
# may be repeated after it was cut off.
put_back() {
    if [ $had,$takeover != yes,no ]; then
        systemctl -q disable --now "$UNIT"
        [ $had_state = yes ] || systemctl clean --what=state "$UNIT"
    fi 2>/dev/null
    restore_files || return
    if [ $had = no ] || [ -e "$old" ]; then rm -rf "$DEST"; fi
    [ ! -e "$old" ] || mv -T "$old" "$DEST"
    [ $had = yes ] || rm -f "$COMMAND"
    systemctl daemon-reload
    systemctl -q reset-failed "$UNIT" 2>/dev/null
    if [ $takeover = yes ]; then
        outcome='The Node.js agent is back'
        [ $was_enabled = no ] || systemctl -q enable "$UNIT"
    elif [ $had = yes ]; then
        outcome="$(version_of "$DEST") and its settings are back" was_active=yes
    else
        outcome='Nothing is installed.'
        return 0
    fi
    if [ $was_active = no ]; then outcome+='; it was not active before.'
    elif start; then outcome+=' and active.'
    else outcome+=", but not active: systemctl status $UNIT."
    fi
}

restore_files() {
    local file
    for file in "${FILES[@]}"; do
        if [[ " $absent " == *" $file "* ]]; then rm -f "$file"
        elif [ -e "$file.old" ] && ! [ "$file" -ef "$file.old" ]; then
            ln -f "$file.old" "$file.tmp" && mv "$file.tmp" "$file" || return
        fi
    done
    [ ! -d "$UNIT_FILE.d.old" ] || mv -T "$UNIT_FILE.d.old" "$UNIT_FILE.d"
}

# Removes the files of this run. Without $unproven, what is in place counts as proved.
clean_up() {
    rm -f "$unproven"
    rm -rf "$new" "$old" "${FILES[@]/%/.old}" "${FILES[@]/%/.new}" "$ENV_FILE.check" \
        "$UNIT_FILE.d.old" "$unproven.new" "$KEPT.new"
    rmdir "$ETC" 2>/dev/null || :
}

# An earlier run was cut off (power, SIGKILL) after it had begun to replace something.
recover() {
    [ -e "$unproven" ] || return 0
    # shellcheck source=/dev/null
    . "$unproven"
    put_back || { outcome=''; die "$NOT_BACK"; }
    say "an earlier run of install.sh was cut off. $outcome" >&2
    clean_up
    had=no had_state=no takeover=no was_active=no was_enabled=no absent=''
    outcome='Nothing was changed.'
}

# The end of every run: undoes what is unproven and prints the last line.
finish() {
    local status=$?
    trap '' INT TERM HUP PIPE  # a second Ctrl-C must not interrupt this
    set +eE && trap - ERR
    if [ $placed = yes ] && ! put_back; then outcome="$NOT_BACK."
    elif [ $at_work = yes ]; then clean_up
    fi
    [ $status != 0 ] || return
    cause=$(tr -s ' \n' ' ' <<<"${cause:-${broken:-interrupted}}")
    cause="${cause%[. ]}."
    printf 'install.sh: FAILED: %s\n' "${cause//\?./?}${outcome:+ $outcome}" >&2
}

# The journal may be down, or stuck.
journal() { timeout 10 journalctl "$@" || :; }
last_lines() { journal --sync; journal -q --no-pager -ocat -n "$1" -u $UNIT | sed 's/^/  /'; }

failed() {
    local words=${2:-}
    { say "the last lines of its log:"; last_lines 12; } >&2
    [ -n "$words" ] || words=$(journal -q --no-pager -o cat -p err -n 1 \
        "_SYSTEMD_INVOCATION_ID=$(show InvocationID)")
    die "the agent $1: ${words:-$(show SubState), $(show Result), status $(show ExecMainStatus)}"
}

# ---------------------------------------------------------------- install and uninstall

do_install() {
    local watch_s='' version before check code problem
    check_node_agent
    check_foreign
    check_room
    choose_python
    at_work=yes
    build_new
    write_settings
    check_new
    version=$(version_of "$new") before=$(version_of "$DEST")
    [ ! -e "$DEST" ] || same "$new" "$DEST" || watch_s=$UPGRADE_PROVES_ITSELF
    [ "${before:-$version}" = "$version" ] || version="$before -> $version"
    if is_installed; then
        version+=", nothing to change"
    else
        judge
        say "starting $version${watch_s:+, and watching it for $watch_s s}"
        put_in_place
        start || failed "did not become active"
        prove
    fi
    [ $takeover = no ] || { rm -rf "$KEPT"; mv -T "$KEPT.new" "$KEPT"; }
    placed=no outcome=''
    clean_up
    report
}

report() {
    say "$check"$'\n\n'"last lines of its log (journalctl -u tinomail-agent):"
    last_lines 5
    say_node_agent
    case $code in
        0)  say "done: the agent is active ($version), and the dashboard takes this node's samples" ;;
        75) say "WARNING: the agent is active ($version), but cannot reach the dashboard now:" \
                "$problem. Samples wait; check again with: sudo tinomail-agent --check" ;;
        *)  die "the agent is active ($version), but $problem. Samples wait: correct the settings
                with $DEST/install.sh (--key-file, --ca-file, --set; see --help)" ;;
    esac
}

do_uninstall() {
    local packages=() stays
    if is_node_agent; then die "$UNIT_FILE is the Node.js agent's"; fi
    check_foreign
    at_work=yes
    [ ! -s "$BROUGHT" ] || mapfile -t packages <"$BROUGHT"
    if [ $purge = yes ]; then
        systemctl -q stop "$UNIT" 2>/dev/null || :
        systemctl clean --what=state "$UNIT" 2>/dev/null || :  # $STATE and the link to it
    fi
    systemctl -q disable --now "$UNIT" 2>/dev/null || :
    rm -rf "$DEST" "$UNIT_FILE"
    [ ! -L "$COMMAND" ] || rm -f "$COMMAND"
    systemctl daemon-reload
    systemctl -q reset-failed "$UNIT" 2>/dev/null || :
    say_node_agent
    if [ $purge = no ]; then
        stays=$(find "$ETC" "$UNIT_FILE.d" "$STATE" -maxdepth 0 -printf '%p ' 2>/dev/null) || :
        stays+=${packages[*]}
        say "done: removed.${stays:+ These stay (install.sh --uninstall --purge of a bundle removes them): $stays}"
        return
    fi
    rm -rf "$ETC" "$UNIT_FILE.d" "$STATE" /var/lib/tinomail-agent
    systemctl daemon-reload
    # dpkg keeps a package that another one needs.
    [ ${#packages[@]} = 0 ] || dpkg --purge "${packages[@]}" >/dev/null 2>&1 || :
    say "done: removed, with its settings and state"
}

say_node_agent() {
    [ ! -d "$KEPT" ] ||
        say "the previous Node.js agent is in $NODE_AGENT, its unit and drop-ins in $KEPT"
}

trap finish EXIT
trap 'broken="failed: $BASH_COMMAND"' ERR
read_options "$@"
check_machine
recover
if [ $uninstall = yes ]; then do_uninstall; else do_install; fi
