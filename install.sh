#!/usr/bin/env bash
# Installs, upgrades or removes the TinoMail agent on this node. Asks nothing.
#
#   sudo ./install.sh --url https://monitor.example.com --key-file FILE|-
#                     [--api API] [--role ROLE] [--node-id ID] [--python FILE]
#   sudo ./install.sh                       upgrade; settings of before are kept
#   sudo ./install.sh --replace-node-agent  take over from TinoMail Monitor's Node.js agent
#   sudo ./install.sh --uninstall [--purge] remove it; --purge: settings, state, packages too
#
#   --url URL        address of the dashboard
#   --key-file FILE  file that holds the dashboard's API key; "-" reads it from stdin
#   --api API        dialect of the dashboard: v1 or tinomail-monitor (default: v1)
#   --role ROLE      role of this node, e.g. zonemta-outbound (default: auto)
#   --node-id ID     name of this node (default: its host name)
#   --python FILE    Python 3.10 or later to run it with (default: python3 of the system)
#   --replace-node-agent  if the Node.js agent of /opt/tinomail-agent runs this node's reports:
#                    take its settings, stop it, and put it back if the new agent does not deliver
#   --without-mongodb  beside it, where that agent reports MongoDB: go on without these figures
#
# Settings are in /etc/tinomail-agent/agent.env (root only) and may also be written there before.
# Exit codes: 0 the agent is active; 1 failed, and what was there before is back (but a first
# installation stays, and is active, when all that is wrong is the key that the dashboard refuses);
# 2 wrong usage; 78 wrong settings, and nothing was changed.
set -euo pipefail
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
BROUGHT=$ETC/packages  # what apt installed for the agent's sake
ACTIVE_WITHIN=30  # seconds
DELIVERS_WITHIN=60
NODE_AGENT=/opt/tinomail-agent  # the Node.js agent, which has a unit of the same name
KEPT=$NODE_AGENT/old-unit       # its unit and drop-ins, once it has been replaced
# For a venv, when there is neither lib/ nor apt; as in pyproject.toml.
REQUIREMENTS=('psutil>=5.9.0' 'requests>=2.25.1' 'python-dotenv>=0.19.2' 'sdnotify>=0.3.1')
PACKAGES=(python3-psutil python3-requests python3-dotenv python3-sdnotify)
MODULES='psutil, requests, dotenv.parser, sdnotify'

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
new=$DEST.new      # what is about to be installed
old=$DEST.old      # what was there before, until the new one has proved itself
url='' key_file='' api='' role='' node_id='' python='' uninstall=no purge=no
replace=no without_mongodb=no takeover=no was_active=no was_enabled=no  # of the Node.js agent
# How far it got: something was there before; it is being replaced; the new one has proved itself;
# an earlier run was cut off before that.
had=no had_state=no placed=no proved=no unproven=no
fresh=()  # packages that came with this run

say()  { printf '%s\n' "$*"; }
die()  { printf 'install.sh: %s\n' "$1" >&2; exit "${2:-1}"; }
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

read_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --url|--key-file|--api|--role|--node-id|--python)
                if [ -z "${2:-}" ]; then die "$1 needs a value; see --help" 2; fi ;;&
            --url)       url=$2; shift ;;
            --key-file)  key_file=$2; shift ;;
            --api)       api=$2; shift ;;
            --role)      role=$2; shift ;;
            --node-id)   node_id=$2; shift ;;
            --python)    python=$2; shift ;;
            --uninstall) uninstall=yes ;;
            --purge)     purge=yes ;;
            --replace-node-agent) replace=yes ;;
            --without-mongodb) without_mongodb=yes ;;
            -h|--help)   usage; exit 0 ;;
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
    case $python in */*) python=$(realpath -sm "$python") ;; esac
    cd /
    [ "$(id -u)" = 0 ] || die "must be run as root: sudo $0 ..."
    [ -d /run/systemd/system ] || die "this machine does not run systemd, which starts the agent"
    # Two at once would take each other's files for their own.
    exec 9>/run/tinomail-agent.install.lock
    flock -n 9 || die "another install.sh is at work on this node"
}

# A unit of this name that is not ours is somebody's: look, then decide by hand.
check_foreign_unit() {
    local path
    [ $takeover = no ] || return 0
    path=$(systemctl show -p FragmentPath --value "$UNIT")
    [ -z "$path" ] || [ ! -e "$path" ] || grep -q "^ExecStart=$DEST/" "$path" ||
        die "$path is another agent's: it does not start $DEST. Remove it first
  (systemctl disable --now $UNIT, then the file), then run this again. Nothing was changed."
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
    if [ -z "$node_id" ] && grep -qsh '^Environment=.*AGENT_' "$UNIT_FILE" "$UNIT_FILE.d"/*.conf; then
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
        say "the Node.js agent's unit CANNOT be put back (is the disk full?): it is in $KEPT.unproven;"
        say "make room, then run install.sh again, which puts it back first"
        return 0
    fi
    systemctl daemon-reload || :
    systemctl -q reset-failed "$UNIT" 2>/dev/null || :
    [ $was_enabled = no ] || systemctl -q enable "$UNIT" || :
    if [ $was_active = no ]; then say "the Node.js agent is back; it was not active before"
    elif systemctl -q start "$UNIT"; then say "the Node.js agent is back and active"
    else say "the Node.js agent is back, but does not start: systemctl status $UNIT"
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
    if [ -e "$ENV_FILE.old" ]; then mv "$ENV_FILE.old" "$ENV_FILE"; else rm -f "$ENV_FILE"; fi
    rm -f "$UNIT_FILE.old"
    bring_back_node_agent >&2
    [ ! -d "$KEPT.unproven" ] || exit 1  # and it was said why
    had=no
}

# Does the dashboard take this node and a sample, as the old agent's settings have it? Asked
# while the old one still runs.
try_dashboard() {
    local said
    said=$(with_agent --check --env-file "$ENV_FILE.new" 2>&1 3<<<'import sys, tinomail_agent
sys.exit(tinomail_agent.main())') || die "${said##*dashboard: }
  The Node.js agent goes on. Nothing was changed."
}

# The new agent has taken over when it has delivered a sample (STATUS= of its pings).
has_delivered() {
    local s
    for ((s = 0; s < DELIVERS_WITHIN; s++)); do
        [[ ! $(systemctl show -p StatusText --value "$UNIT") =~ ^ok:\ [1-9] ]] || return 0
        sleep 1
    done
    return 1
}

check_foreign_command() {
    [ ! -e "$COMMAND" ] || [ "$(readlink "$COMMAND")" = "$DEST/tinomail-agent" ] ||
        die "$COMMAND is another program's: move it away, then run this again. Nothing was changed."
}

choose_python() {
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

has_modules() { PYTHONPATH=$new/lib "$1" -c "import $MODULES" 2>/dev/null; }

# lib/ of the bundle, else what the system has, else the distribution's packages, else a venv.
add_dependencies() {
    local machine
    machine=$(uname -m)
    if [ -d "$here/lib" ]; then
        [ -d "$here/lib/$machine" ] || die "the bundle has no libraries for $machine"
        mkdir "$new/lib"
        cp -R "$here/lib/any/." "$here/lib/$machine/." "$new/lib/"
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
    say "installing ${PACKAGES[*]}"
    (
        umask 022
        exec 9>&-
        NEEDRESTART_SUSPEND=1 DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
            --no-install-recommends --no-remove --no-upgrade \
            -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
            -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
            install "${PACKAGES[@]}" </dev/null
    ) >"$new/apt.log" 2>&1 ||
        { tail -3 "$new/apt.log" >&2; say "apt-get could not install them; trying a venv"; }
    # What came with us leaves with us: --uninstall --purge, or a failure of this run.
    mapfile -t fresh < <(
        tr -d '\r' <"$new/apt.log" |
            sed -n 's/^Selecting previously unselected package \(.*\)\.$/\1/p'
    )
    [ ${#fresh[@]} = 0 ] || mkdir -pm 755 "$ETC"
    # Others come to rely on these without a word to dpkg: they stay.
    [ ${#fresh[@]} = 0 ] || printf '%s\n' "${fresh[@]}" |
        { grep -vxE 'ca-certificates|openssl' || :; } >>"$BROUGHT"
    rm "$new/apt.log"
}

make_venv() {
    say "making a virtual environment with pip"
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
    local file
    rm -rf "$new"
    mkdir "$new"
    for file in tinomail_agent.py "$UNIT" install.sh README.md LICENSE agent.env.example; do
        cp "$here/$file" "$new/"
    done
    add_dependencies
    # A script is compiled at every start, a module is not: hence the launcher.
    cat >"$new/tinomail-agent" <<LAUNCHER
#!$python
import sys

sys.path.insert(1, "$DEST/lib")

import tinomail_agent

sys.exit(tinomail_agent.main())
LAUNCHER
    # By content, not by time: the same sources give the same bytes.
    "$(new_python)" -m compileall -qf -s "$new" -p "$DEST" --invalidation-mode checked-hash "$new" ||
        die "this copy of the agent cannot be compiled; nothing was changed"
    with_agent 3<<<'import tinomail_agent' || die "this copy of the agent is broken; nothing was changed"
    chmod -R a+rX "$new"
    chmod 755 "$new/tinomail-agent" "$new/install.sh"
}
# Runs a Python program, which comes on file descriptor 3, with the new agent at hand.
with_agent() {
    env -i PATH="$PATH" PYTHONNOUSERSITE=1 PYTHONPATH="$new:$new/lib" PYTHONDONTWRITEBYTECODE=1 \
        "$(new_python)" /dev/fd/3 "$@"
}
new_python() { if [ -d "$new/venv" ]; then echo "$new/venv/bin/python"; else echo "$python"; fi; }

# ---------------------------------------------------------------- settings

# Write the settings to $ENV_FILE.new and let the agent itself judge them. The key goes from its
# file, or stdin, straight into that process.
write_settings() {
    [ -d "$ETC" ] || mkdir -m 755 "$ETC"
    [ ! -e "$ENV_FILE" ] || { chown 0:0 "$ENV_FILE"; chmod 600 "$ENV_FILE"; }
    local from=
    [ $takeover = no ] || from=$NODE_AGENT/.env
    with_agent "$ENV_FILE" "$url" "$key_file" "$api" "$role" "$node_id" "$from" 3<<'PROGRAM'
import io
import os
import re
import sys
import urllib.parse

import dotenv.parser

import tinomail_agent as agent

path, url, key_file, api, role, node_id, node_agent = sys.argv[1:]


def fail(*lines):
    print(*(f"install.sh: {line}" for line in lines), sep="\n", file=sys.stderr)
    sys.exit(agent.EX_CONFIG)


def read(source):
    try:
        with open(0 if source == "-" else source, "rb") as stream:
            return stream.read(65536).decode("utf-8-sig")
    except OSError as error:
        fail(f"{source}: cannot be read: {os.strerror(error.errno)}")
    except UnicodeDecodeError:
        fail(f"{source}: is not text")


NODE_AGENT_NAMES = {  # of its settings, and of ours
    "AGENT_SERVER_URL": "DASHBOARD_URL", "AGENT_API_KEY": "API_KEY", "AGENT_NODE_ID": "NODE_ID",
    "AGENT_NODE_ROLE": "NODE_ROLE", "AGENT_HEARTBEAT_INTERVAL": "HEARTBEAT_INTERVAL",
    "AGENT_ZONEMTA_API_URL": "ZONEMTA_URL",
}


def unquoted(text):
    """The value of a line in an EnvironmentFile= (systemd.exec(5))."""
    text = text.strip()
    if text[:1] == "'" and text.endswith("'") and len(text) > 1:
        return text[1:-1]
    if text[:1] == '"' and text.endswith('"') and len(text) > 1:
        return re.sub(r'\\(["\\`$])', r"\1", text[1:-1])
    return re.sub(r"\\(.)", r"\1", text)


def taken_over(source):
    """What the Node.js agent was set to, as our settings."""
    lines = (line.strip().partition("=") for line in read(source).splitlines())
    theirs = {name.removeprefix("export ").strip(): unquoted(value) for name, _, value in lines}
    theirs.setdefault("AGENT_NODE_ID", "node-01")  # its own default: the node keeps its name
    found = {ours: theirs[name] for name, ours in NODE_AGENT_NAMES.items() if theirs.get(name)}
    found["DASHBOARD_API"] = "tinomail-monitor"
    address = found.get("DASHBOARD_URL", "").lower()
    if not url and address.startswith("http://") and not is_loopback(address):
        found["ALLOW_HTTP"] = "true"
        print("WARNING: the dashboard's address is http://: the key is sent in clear text, as the",
              "Node.js agent did (ALLOW_HTTP=true); use https:// as soon as you can", file=sys.stderr)
    return found


def is_loopback(address):
    try:
        return agent._is_loopback(urllib.parse.urlsplit(address).hostname)
    except ValueError:
        return False  # load_config() will say what is wrong with it


given = {"DASHBOARD_URL": url, "DASHBOARD_API": api, "NODE_ROLE": role, "NODE_ID": node_id}
given = {name: value for name, value in given.items() if value}
if node_agent:
    given = {**taken_over(node_agent), **given}
for name, value in given.items():
    if not value.isprintable():
        fail(f"{name}: holds a line break or another control character")
if key_file:
    given["API_KEY"] = read(key_file).strip()
    if not given["API_KEY"]:
        fail("--key-file: there is no key in it")

text = read(path) if os.path.exists(path) else ""
values, problems = agent.parse_env(text.encode())
if problems:
    fail(*(f"{path}, {problem}" for problem in problems))
given = {name: value for name, value in given.items() if values.get(name) != value}
if given:
    text = "".join(
        binding.original.string
        for binding in dotenv.parser.parse_stream(io.StringIO(text))
        if binding.key not in given
    )
    text = text.rstrip() + "\n" if text.strip() else "# Settings of the TinoMail agent.\n"


def spellings(value):
    """As it is, else in quotes: the first that the agent reads back equal is taken."""
    yield value
    yield "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


for name, value in sorted(given.items(), key=lambda item: item[0] == "API_KEY"):  # the key last
    kept, _ = agent.parse_env(text.encode())
    for spelling in spellings(value):
        longer = f"{text}{name}={spelling}\n"
        if agent.parse_env(longer.encode()) == ({**kept, name: value}, []):
            text = longer
            break
    else:
        fail(f"{name}: cannot be written so that it is read back equal")
with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8", newline="") as out:
    os.fchmod(out.fileno(), 0o600)
    out.write(text)
try:
    agent.load_config({}, f"{path}.new")
except agent.SettingsError as error:
    fail(*(line.replace(f"{path}.new", path) for line in error.problems))
PROGRAM
}

# ---------------------------------------------------------------- putting it in place

# The same file, or the same tree, as before?
same() { diff -rq "$1" "$2" >/dev/null 2>&1; }

is_installed() {
    local running=/run/credentials/$UNIT/agent.env  # the settings that the agent was started with
    same "$new" "$DEST" && same "$new/$UNIT" "$UNIT_FILE" && same "$ENV_FILE.new" "$ENV_FILE" &&
        { [ ! -e "$running" ] || same "$ENV_FILE" "$running"; } &&
        [ -L "$COMMAND" ] && systemctl -q is-active "$UNIT" && systemctl -q is-enabled "$UNIT"
}

put_in_place() {
    # Kept aside: what there was, to put back. While $old is there, the new one is unproven.
    [ ! -e "$UNIT_FILE" ] || cp -p "$UNIT_FILE" "$UNIT_FILE.old"
    [ ! -e "$ENV_FILE" ] || cp -p "$ENV_FILE" "$ENV_FILE.old"
    [ ! -e "$STATE" ] || had_state=yes
    [ ! -e "$DEST" ] || had=yes
    find "$new" "$ENV_FILE.new" -type f -exec sync {} +
    placed=yes  # from here on the trap puts back
    [ $takeover = no ] || put_node_agent_aside
    [ $had = no ] || mv -T "$DEST" "$old"
    mv -T "$new" "$DEST"
    install -m 644 "$DEST/$UNIT" "$UNIT_FILE"
    mv "$ENV_FILE.new" "$ENV_FILE"
    ln -sfn "$DEST/tinomail-agent" "$COMMAND"
    systemctl daemon-reload
    systemctl -q enable "$UNIT"
}

# Type=notify: the restart returns when the agent has its first sample, or has failed.
start() { timeout "$ACTIVE_WITHIN" systemctl restart "$UNIT" 2>/dev/null && systemctl -q is-active "$UNIT"; }

put_back() {
    if [ $takeover = yes ] && [ ! -d "$KEPT.unproven" ]; then  # nothing has been moved yet
        rm -rf "$KEPT.new"
        say "The Node.js agent goes on. Nothing was changed."
        return 0
    fi
    if [ $had = no ] || [ $takeover = yes ]; then
        systemctl -q stop "$UNIT" 2>/dev/null
        [ $had_state = yes ] || systemctl clean --what=state "$UNIT" 2>/dev/null
        [ ! -e "$old" ] || mv -T "$old" "$old.kept"  # an agent of ours that was not in use
        remove
        [ ! -e "$old.kept" ] || { mv -T "$old.kept" "$DEST"; ln -sfn "$DEST/tinomail-agent" "$COMMAND"; }
        rm -f "$ENV_FILE"
        [ ! -e "$ENV_FILE.old" ] || mv "$ENV_FILE.old" "$ENV_FILE"
        if [ $takeover = yes ]; then bring_back_node_agent; else say "nothing is installed"; fi
        return 0
    fi
    if [ -e "$old" ]; then
        rm -rf "$DEST"
        mv -T "$old" "$DEST"
    fi
    restore_files
    systemctl daemon-reload
    if start; then
        say "the version and the settings of before are back and active"
    else
        say "the version of before is back, but does not become active either: systemctl status $UNIT"
    fi
}

restore_files() {
    [ ! -e "$UNIT_FILE.old" ] || mv "$UNIT_FILE.old" "$UNIT_FILE"
    [ ! -e "$ENV_FILE.old" ] || mv "$ENV_FILE.old" "$ENV_FILE"
}

clean_up() {
    trap '' INT TERM HUP PIPE  # a second Ctrl-C must not cut this
    set +e
    [ $placed = no ] || put_back >&2
    if [ $proved = no ] && [ ${#fresh[@]} -gt 0 ]; then
        dpkg --purge "${fresh[@]}" >/dev/null 2>&1
        sed -i "$(printf '/^%s$/d;' "${fresh[@]}")" "$BROUGHT"
        [ -s "$BROUGHT" ] || rm -f "$BROUGHT"
    fi
    rm -rf "$new" "$ENV_FILE.new" "$UNIT_FILE.old" "$ENV_FILE.old"
    rmdir "$ETC" 2>/dev/null
}

last_lines() { journalctl --sync; journalctl -q --no-pager -o cat -n "$1" -u "$UNIT" | sed 's/^/  /'; }

failed() {
    { say "the agent $1; its last lines:"; last_lines 12; } >&2
    die "failed: the new version does not run on this node"
}

# ---------------------------------------------------------------- the two jobs

do_install() {
    local check refusal
    [ "$here" != "$DEST" ] || die "this copy can only --uninstall; upgrade from a bundle or a checkout"
    check_node_agent
    check_foreign_unit
    check_foreign_command
    choose_python
    trap clean_up EXIT
    if [ -e "$old" ]; then  # an earlier run was cut off (power, SIGKILL) before its agent proved itself
        unproven=yes
        rm -rf "$DEST"
        mv -T "$old" "$DEST"
        restore_files
    fi
    build_new
    write_settings
    [ $takeover = no ] || try_dashboard
    if [ $unproven = no ] && is_installed; then
        say "already installed and active: nothing to change"
    else
        put_in_place
        start || failed "did not become active within $ACTIVE_WITHIN s"
        [ $takeover = no ] || has_delivered || failed "did not deliver within $DELIVERS_WITHIN s"
    fi
    check=$(env -i PATH="$PATH" PYTHONNOUSERSITE=1 "$COMMAND" --check --env-file "$ENV_FILE" 2>&1) || :
    systemctl -q is-active "$UNIT" || failed "did not stay active"
    refusal=
    case $(say "$check" | tail -1) in
        'dashboard: FAILED: answered 40'[13]*) refusal=yes ;;
    esac
    if [ -n "$refusal" ] && [ -e "$ENV_FILE.old" ] && ! same "$ENV_FILE" "$ENV_FILE.old"; then
        die "the dashboard refuses the key, or this node, with these settings: they are not kept"
    fi
    proved=yes placed=no
    # $old means "unproven": it goes in one step.
    [ ! -e "$old" ] || { rm -rf "$new"; mv -T "$old" "$new"; }
    [ $takeover = no ] || { rm -rf "$KEPT"; mv -T "$KEPT.unproven" "$KEPT"; rm -f "$KEPT/state"; }
    say "$check"
    say
    say "last lines of its log (journalctl -u tinomail-agent):"
    last_lines 5
    say
    case $(say "$check" | tail -1) in
        'dashboard: ok'*) say "done: the agent is active, and the dashboard knows this node" ;;
        *'answered 401'*|*'answered 403'*)
            die "the agent is active, but the dashboard refuses the key: run this again with --key-file" ;;
        *) say "done: the agent is active. WARNING: the dashboard did not take this node just now;"
           say "samples wait in the agent until it does. $(say "$check" | tail -1)" ;;
    esac
    say_node_agent
}

# The service and the program; settings and state stay.
remove() {
    systemctl -q disable --now "$UNIT" 2>/dev/null || :
    rm -rf "$DEST" "$new" "$old" "$UNIT_FILE" "$UNIT_FILE.old" "$ENV_FILE.new"
    [ ! -L "$COMMAND" ] || rm -f "$COMMAND"
    systemctl daemon-reload
    systemctl -q reset-failed "$UNIT" 2>/dev/null || :
}

do_uninstall() {
    local packages=()
    if is_node_agent; then die "$UNIT_FILE is the Node.js agent's. Nothing was changed."; fi
    check_foreign_unit
    [ ! -s "$BROUGHT" ] || mapfile -t packages <"$BROUGHT"
    if [ $purge = yes ]; then
        systemctl -q stop "$UNIT" 2>/dev/null || :
        # /var/lib/private/tinomail-agent, and the link to it
        systemctl clean --what=state "$UNIT" 2>/dev/null || :
    fi
    remove
    rm -f "$ENV_FILE.old"
    say_node_agent
    if [ $purge = no ]; then
        say "removed; settings stay in $ETC (--uninstall --purge takes them too)"
        return
    fi
    rm -rf "$ETC" "$UNIT_FILE.d" "$STATE" /var/lib/tinomail-agent
    systemctl daemon-reload
    if [ ${#packages[@]} -gt 0 ]; then
        # dpkg leaves alone what something else has come to need.
        dpkg --purge "${packages[@]}" >/dev/null 2>&1 || say "some of its packages are needed by others and stay"
    fi
    say "removed, with its settings and state"
}

say_node_agent() {
    [ ! -d "$KEPT" ] ||
        say "the Node.js agent of before is in $NODE_AGENT, its unit and drop-ins in $KEPT"
}

read_options "$@"
check_machine
recover_node_agent
if [ $uninstall = yes ]; then do_uninstall; else do_install; fi
