"""Taking over from TinoMail Monitor's Node.js agent, in a box with a stand-in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually
from test_service import CUT_OFF, DEST, ENV_FILE, KEY, UNIT, Box
from test_service import boxes as boxes  # the fixtures
from test_service import bundle as bundle

import tinomail_agent as agent

pytestmark = pytest.mark.service

OLD = "/opt/tinomail-agent"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
TSX = f"{OLD}/node_modules/.bin/tsx src/index.ts"
OLD_UNIT = f"""[Unit]
Description=TinoMail Monitor Agent
After=network.target

[Service]
Type=simple
User=root
WorkingDirectory={OLD}
EnvironmentFile={OLD}/.env
ExecStart={TSX}
Restart=always
RestartSec=10

[Install]
WantedBy=multi-user.target
"""
DROP_IN = "[Service]\nNice=7\nEnvironment=LOCAL=1\n"
QUOTED_KEY = '"' + KEY.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'
LOOPBACK = "http://127.0.0.1:8080"
FLAG = "--replace-node-agent --without-mongodb"
INSTALL = "/root/bundle/install.sh"


def env_file(url: str = LOOPBACK, role: str = "zonemta", key: str = QUOTED_KEY) -> str:
    return (
        f"# by the installer\nAGENT_SERVER_URL={url}\nAGENT_API_KEY={key}\n"
        f"AGENT_NODE_ID=mta-07\nAGENT_NODE_ROLE={role}\nAGENT_HEARTBEAT_INTERVAL=2000\n\n"
        "AGENT_MONGODB_URI=mongodb://monitor:secret@localhost:27017\nAGENT_MONGODB_INTERVAL=30000\n"
    )


@pytest.fixture(scope="module")
def box(boxes: Callable[..., Box], bundle: Path) -> Iterator[Box]:
    """A box with a dashboard that speaks tinomail-monitor, on all of its addresses."""
    box = boxes("takeover")
    box.sh("ip addr add 192.0.2.1/32 dev lo")
    box.start_dashboard("--api tinomail-monitor --host 0.0.0.0")
    box.sh("cp /bin/sleep /usr/local/bin/redis-server; systemd-run -q redis-server 1000000")
    box.unpack(bundle)
    yield box
    box.down()


@pytest.fixture
def node(box: Box) -> Box:
    """The box, with the Node.js agent (its stand-in) at work, and nothing of ours."""
    box.sh(f"systemctl disable --now {UNIT} 2>/dev/null || :")
    box.sh(f"rm -rf {OLD} {UNIT_FILE} {UNIT_FILE}.d {Path(ENV_FILE).parent} /root/broken {DEST}"
           " /usr/local/sbin/tinomail-agent /var/lib/private/tinomail-agent"
           " /var/lib/tinomail-agent")
    box.write(f"{OLD}/node_modules/.bin/tsx", "#!/bin/sh\nexec sleep 1000000\n", "755")
    box.write(f"{OLD}/.env", env_file(), "600")
    box.write(UNIT_FILE, OLD_UNIT)
    box.write(f"{UNIT_FILE}.d/local.conf", DROP_IN)
    box.sh(f"systemctl daemon-reload; systemctl enable --now {UNIT} 2>&1")
    return box


def state_of(box: Box) -> str:
    """Everything that must be as before: the files, and what systemd says of the unit."""
    return box.sh(
        f"find {OLD} /etc/systemd /etc/tinomail-agent /usr/local /var/lib/private -path '*pycache*'"
        " -prune -o ! -type d -printf '%p %m %U %l ' -exec sha256sum {} ';' 2>/dev/null | sort;"
        f" systemctl show -p ActiveState -p UnitFileState -p DropInPaths -p Nice -p Environment"
        f" -p ExecStart {UNIT} | sed 's/ ; .*//'"
    )


def settings_of(box: Box) -> dict[str, str]:
    settings, problems = agent.parse_env(box.sh(f"cat {ENV_FILE}").encode())
    assert problems == []
    return settings


def break_agent(box: Box) -> None:
    """Make /root/broken a bundle whose agent fails in the service alone."""
    box.sh("cp -R /root/bundle /root/broken; sed -i 's/^    def run(self) -> int:/&\\n        "
           "raise OSError/' /root/broken/tinomail_agent.py")


def test_it_is_recognised_and_left_alone(node: Box) -> None:
    before, pid = state_of(node), node.pid()
    code, output = node.try_sh(INSTALL)
    assert code == 1
    assert f"the Node.js agent in {OLD}" in output
    assert 'its alert "MongoDB No Primary" fires and stays' in output
    assert f"{FLAG} replaces it. Nothing was changed." in output
    assert not any(word in output for word in ("Redis", "rspamd", "mails", "ZoneMTA"))
    assert (state_of(node), node.pid()) == (before, pid)
    assert "secret" not in output


def test_mongodbs_figures_are_not_given_up_by_accident(node: Box) -> None:
    before, pid = state_of(node), node.pid()
    code, output = node.try_sh(f"{INSTALL} --replace-node-agent")
    assert (code, f"{FLAG} replaces it. Nothing was changed." in output) == (1, True), output
    assert (state_of(node), node.pid()) == (before, pid)


def test_a_node_without_mongodb_needs_no_further_flag(node: Box) -> None:
    settings = "".join(
        line for line in env_file().splitlines(True) if not line.startswith("AGENT_MONGODB")
    )
    node.write(f"{OLD}/.env", f"{settings}AGENT_ZONEMTA_API_URL=http://127.0.0.1:9\n", "600")
    code, output = node.try_sh(INSTALL)
    assert (code, "MongoDB" in output) == (1, False), output
    output = node.install("--replace-node-agent")
    assert "done: the agent is active" in output
    assert settings_of(node)["ZONEMTA_URL"] == "http://127.0.0.1:9"
    node.expect_samples()


def test_it_is_not_ours_to_uninstall(node: Box) -> None:
    before = state_of(node)
    code, output = node.try_sh(f"{INSTALL} --uninstall --purge")
    assert (code, "is the Node.js agent's. Nothing was changed." in output) == (1, True)
    assert state_of(node) == before


def test_taken_over_and_away_again(node: Box) -> None:
    node.sh("rm -rf /root/seen; cat >/root/watch",
            "while :; do for f in /proc/[0-9]*/cmdline; do"
            " grep -aqF -f /root/key $f 2>/dev/null && echo $f; done; done >/root/seen")
    node.sh("systemd-run -q --unit=watch bash /root/watch")
    output = node.install(FLAG)
    node.sh("systemctl stop watch")
    assert settings_of(node) == {
        "DASHBOARD_URL": LOOPBACK, "API_KEY": KEY, "NODE_ID": "mta-07",
        "NODE_ROLE": "zonemta", "HEARTBEAT_INTERVAL": "2000",
        "DASHBOARD_API": "tinomail-monitor",
    }
    assert f"done: the agent is active ({agent.VERSION}), and the dashboard takes" in output
    assert f"the previous Node.js agent is in {OLD}, its unit and drop-ins in {OLD}/old-unit" in (
        output
    )
    assert "in clear text" not in output
    # ours runs, with none of the old drop-ins, and its samples arrive
    assert DEST in node.show("ExecStart")
    assert (node.show("DropInPaths"), node.show("UnitFileState")) == ("", "enabled")
    node.expect_samples()
    rows = "SELECT DISTINCT node_id, role FROM metrics_system"
    assert node.query(rows) == [["mta-07", "zonemta"]]
    [[seen, version]] = node.query("SELECT last_seen, version FROM nodes WHERE node_id = 'mta-07'")
    assert seen and version == agent.VERSION
    # the key is where it was, and with us; nobody else can read it
    assert node.sh("cat /root/seen") == ""
    assert node.try_sh("journalctl -o export | grep -aF -f /root/key")[0] == 1
    open_files = "find / -xdev -type f -perm /o=r ! -path '/proc/*' ! -path '/sys/*'"
    assert node.sh(f"{open_files} -exec grep -laF -f /root/key {{}} + || :") == ""
    # nothing of it is lost
    assert node.sh(f"cat {OLD}/.env") == env_file()
    assert node.sh(f"cat {OLD}/old-unit/{UNIT}") == OLD_UNIT
    assert node.sh(f"cat {OLD}/old-unit/{UNIT}.d/local.conf") == DROP_IN
    # and again: an upgrade as any
    assert "nothing to change" in node.install(FLAG)
    output = node.install("--uninstall --purge")
    assert f"the previous Node.js agent is in {OLD}" in output
    assert node.try_sh(f"systemctl status {UNIT}")[0] == 4  # no such unit
    assert node.sh(f"cat {OLD}/old-unit/{UNIT}") == OLD_UNIT


@pytest.mark.parametrize("state", ["active and enabled", "neither"])
def test_a_new_agent_that_fails_is_undone(node: Box, state: str) -> None:
    if state == "neither":
        node.sh(f"systemctl disable --now {UNIT} 2>&1")
    before = state_of(node)
    assert ("ActiveState=active" in before) is (state != "neither")
    break_agent(node)
    code, output = node.try_sh(f"/root/broken/install.sh {FLAG}")
    assert code == 1
    assert "OSError" in output
    assert "The Node.js agent is back" in output
    assert state_of(node) == before


def test_a_node_that_went_back_to_the_old_agent(node: Box) -> None:
    """Ours lies there unused, with the old unit over it: that, too, is as before."""
    node.install(FLAG)
    node.sh(f"systemctl stop {UNIT}; cp -R {OLD}/old-unit/* /etc/systemd/system;"
            f" systemctl daemon-reload; systemctl enable --now {UNIT} 2>&1")
    before = state_of(node)
    assert "path=/opt/tinomail-agent/node_modules/.bin/tsx" in before
    assert f"{DEST}/tinomail_agent.py" in before
    break_agent(node)
    code, output = node.try_sh(f"/root/broken/install.sh {FLAG}")
    assert (code, "The Node.js agent is back and active" in output) == (1, True), output
    assert state_of(node) == before


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        (env_file(key="wrong"), 1, "FAILED: answered 401"),
        (env_file(url="http://127.0.0.1:9"), 1, "FAILED: connection refused"),
        (env_file(role="x" * 51), 78, "NODE_ROLE: must be auto, or a name of 1 to 50"),
        (env_file(url="ftp://example.com"), 78, "DASHBOARD_URL: must be https://"),
        ("AGENT_NODE_ROLE=auto\n", 78, "API_KEY: is missing"),
    ],
)
def test_settings_that_do_not_serve_are_told_while_the_old_agent_runs(
    node: Box, settings: str, code: int, says: str
) -> None:
    node.write(f"{OLD}/.env", settings, "600")
    before, pid = state_of(node), node.pid()
    found, output = node.try_sh(f"{INSTALL} {FLAG}")
    assert (found, says in output) == (code, True), output
    assert (state_of(node), node.pid()) == (before, pid)


def test_http_and_auto(node: Box) -> None:
    node.write(f"{OLD}/.env", env_file("http://192.0.2.1:8080/", "auto", f" {QUOTED_KEY} "), "600")
    output = node.install(FLAG)
    assert "WARNING: the dashboard's address is http://: the key is sent in clear text" in output
    settings = settings_of(node)
    assert settings["DASHBOARD_URL"].rstrip("/") == "http://192.0.2.1:8080"
    assert (settings["ALLOW_HTTP"], settings["NODE_ROLE"]) == ("true", "auto")
    assert settings["API_KEY"] == KEY
    node.expect_samples()
    role = "SELECT role FROM nodes WHERE node_id = 'mta-07'"
    eventually(lambda: node.query(role) == [["redis"]])  # with the third sample


def test_options_come_before_what_is_taken_over(node: Box) -> None:
    node.install(f"{FLAG} --role haraka --node-id mta-08 --api tinomail-monitor")
    settings = settings_of(node)
    assert (settings["NODE_ROLE"], settings["NODE_ID"]) == ("haraka", "mta-08")


def test_a_takeover_succeeds_only_when_the_new_agent_has_delivered(node: Box) -> None:
    """--check delivers, the service does not: the old agent is put back."""
    before = state_of(node)
    node.sh("cp -R /root/bundle /root/broken;"
            " sed -i 's/^    def _fits(self)/    step = lambda self: math.inf\\n\\n&/'"
            " /root/broken/tinomail_agent.py;"
            " sed -i s/DELIVERS_WITHIN=60/DELIVERS_WITHIN=8/ /root/broken/install.sh")
    code, output = node.try_sh(f"/root/broken/install.sh {FLAG}")
    assert (code, "the agent does not deliver: starting: 0 sent" in output) == (1, True), output
    assert "The Node.js agent is back and active" in output
    assert state_of(node) == before


def test_a_takeover_that_is_cut_off_is_undone_by_the_next_run(node: Box) -> None:
    """Killed when the old agent is stopped and the new one has not been started yet."""
    before = state_of(node)
    node.write("/usr/local/sbin/timeout", CUT_OFF, "755")
    assert node.try_sh(f"{INSTALL} {FLAG}")[0] == 137
    assert TSX not in node.sh(f"cat {UNIT_FILE}")
    code, output = node.try_sh(INSTALL)
    assert (code, "The Node.js agent is back and active" in output) == (1, True), output
    assert state_of(node) == before
    node.install(FLAG)
    eventually(node.is_active, 10, "active")
    assert node.sh(f"ls -d {OLD}/old-unit*").split() == [f"{OLD}/old-unit"]


def test_without_its_settings_it_cannot_be_taken_over(node: Box) -> None:
    node.sh(f"rm {OLD}/.env")
    code, output = node.try_sh(f"{INSTALL} {FLAG}")
    assert (code, f"{OLD}/.env is missing. Nothing was changed." in output) == (1, True)


# A stand-in for a command; install.sh's PATH begins with /usr/local/sbin.
NO_SPACE = """#!/bin/sh
case "$*" in *{place}*) echo "no space left on device" >&2; exit 1 ;; esac
exec /bin/{command} "$@"
"""


def test_a_disk_that_is_full_before_anything_was_moved(node: Box) -> None:
    before, pid = state_of(node), node.pid()
    node.write("/usr/local/sbin/cp", NO_SPACE.format(command="cp", place="old-unit.new"), "755")
    try:
        code, output = node.try_sh(f"{INSTALL} {FLAG}")
    finally:
        node.sh("rm /usr/local/sbin/cp")
    assert (code != 0, "The Node.js agent keeps running" in output) == (True, True), output
    assert (state_of(node), node.pid()) == (before, pid)


def test_a_disk_that_fails_when_the_old_agent_is_to_come_back(node: Box) -> None:
    """Nothing of it is thrown away: the next run puts it back."""
    before = state_of(node)
    break_agent(node)
    node.write("/usr/local/sbin/ln", NO_SPACE.format(command="ln", place=f"{UNIT}.tmp"), "755")
    try:
        code, output = node.try_sh(f"/root/broken/install.sh {FLAG}")
        assert (code, "CANNOT be put back" in output) == (1, True), output
        assert node.try_sh(INSTALL)[0] == 1  # it still fails
    finally:
        node.sh("rm /usr/local/sbin/ln")
    code, output = node.try_sh(INSTALL)
    assert (code, "The Node.js agent is back and active" in output) == (1, True), output
    assert state_of(node) == before


def test_settings_in_the_unit_itself_are_not_overlooked(node: Box) -> None:
    node.write(f"{UNIT_FILE}.d/id.conf", "[Service]\nEnvironment=AGENT_NODE_ID=mta-77\n")
    node.sh("systemctl daemon-reload")
    before = state_of(node)
    code, output = node.try_sh(f"{INSTALL} {FLAG}")
    assert (code, "the old unit sets AGENT_" in output) == (1, True), output
    assert state_of(node) == before


def test_a_name_is_no_verdict(node: Box) -> None:
    """The last line of a good check holds the node's name."""
    node.install(f"{FLAG} --node-id TLS-certificate-answered-401")
    eventually(node.is_active, 10, "active")
