"""Which service a process belongs to: captured processes, look-alikes, and rules one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import ROOT

import tinomail_agent as agent

CAPTURED: list[dict[str, Any]] = json.loads((ROOT / "tests/data/processes.json").read_text())


@pytest.mark.parametrize("row", CAPTURED, ids=lambda row: f"{row['source']}:{row['comm']}")
def test_captured_processes(row: dict[str, Any]) -> None:
    """All are told apart by what every user can read; what only cwd tells may be told, too."""
    service = agent.classify(
        row["comm"], row["cmdline"].encode(), cgroup="\n".join(row["cgroup"] or []),
        state=row["state"],
    )
    assert service in (row["expect"], row.get("truth", row["expect"]))


@pytest.mark.parametrize("row", CAPTURED, ids=lambda row: f"{row['source']}:{row['comm']}")
def test_the_command_line_of_what_may_be_a_service_is_read(row: dict[str, Any]) -> None:
    """Of all other processes it is not, so that it cannot hang; and none of them is a service."""
    candidates = agent.candidates_of(row["comm"], "\n".join(row["cgroup"] or []))
    assert row["expect"] is None or row["expect"] in candidates


@pytest.mark.parametrize(
    ("comm", "cmdline", "service"),
    [
        ("rspamd", b"rspamd: main process\0\0\0", "rspamd"),
        ("redis-server", b"/usr/bin/redis-server 127.0.0.1:6379\0\0", "redis"),
        ("valkey-server", b"/usr/bin/valkey-server *:6379\0", "redis"),
        ("redis-server", b"redis-rdb-bgsave 127.0.0.1:6379\0", "redis"),
        ("mongod", b"/usr/bin/mongod\0--config\0/etc/mongod.conf\0", "mongodb"),
        ("wildduck", b"wildduck\0\0\0", "wildduck"),
        ("wilddu", b"wilddu\0", "wildduck"),  # `node .`: cut to the room there was
        ("wildduck worker", b"wildduck worker\0\0", "wildduck"),
        ("zone-mta: maste", b"zone-mta: master process\0\0", "zonemta"),
        ("zone-mta: sende", b"zone-mta: sender/default\0\0", "zonemta"),
        ("zone-m", b"zone-m\0", "zonemta"),
        ("redis-server", b"mailcache 7003\0\0\0", "redis"),  # proc-title-template
        ("redis-server-7.", b"/opt/redis-server-7.0 *:7008\0\0", "redis"),
        ("redis-server-7.", b"redis-server-7.0\0--set-proc-title\0no\0", "redis"),
        ("redis-server", b"", "redis"),  # its main thread has ended: the name is all there is
        ("rspamd", b"/usr/bin/rspamd\0-f\0-u\0_rspamd\0", "rspamd"),  # before its title is set
        ("Haraka (worker)", b"Haraka (worker) cn=0 cc=0 cps=0/0\0", "haraka"),
        ("Haraka cn=0 cc=", b"Haraka cn=0 cc=0 cps=0/0/0\0", "haraka"),
        ("node", b"/usr/bin/node\0/opt/wildduck/server.js\0--config=x\0", "wildduck"),
        ("node", b"node\0--title\0imap\0/opt/wildduck/server.js\0", "wildduck"),
        ("MainThread", b"node\0/opt/zone-mta/services/receiver.js\0", "zonemta"),
        ("node-MainThread", b"node\0--max-old-space-size=64\0/opt/zone-mta/app.js\0", "zonemta"),
        ("node", b"node\0./node_modules/.bin/haraka\0-c\0.\0", "haraka"),
        ("node", b"node\0/opt/haraka/node_modules/Haraka/haraka.js\0-c\0.\0", "haraka"),
        ("node", b"node\0haraka.js\0", "haraka"),  # as WildDuck's container images start it
        ("node", b"/usr/local/bin/node\0/app/haraka.js\0", "haraka"),
        ("node /opt/wildd", b"node /opt/wildduck/server.js\0\0\0", "wildduck"),  # PM2
    ],
)
def test_services(comm: str, cmdline: bytes, service: str) -> None:
    assert agent.classify(comm, cmdline) == service


@pytest.mark.parametrize(
    ("comm", "cmdline"),
    [
        ("tail", b"tail\0-f\0/var/log/haraka.log\0"),
        ("vi", b"vi\0/etc/redis/redis-server.conf\0"),
        ("bash", b"bash\0./redis-server\0"),
        ("redis-server", b"/usr/bin/redis-server *:26379 [sentinel]\0"),
        ("redis-server", b"redis-server\0/etc/s.conf\0--sentinel\0"),
        ("redis-sentinel", b"/usr/bin/redis-sentinel *:26379 [sentinel]\0"),
        ("redis-cli", b"redis-cli\0monitor\0"),
        ("rspamc", b"rspamc\0stat\0"),
        ("mongos", b"mongos\0"),
        ("mongodb_exporte", b"mongodb_exporter\0"),
        ("nginx", b"nginx: master process /usr/sbin/nginx\0"),
        ("sshd", b"sshd: wildduck [priv]\0"),
        ("outbound-7: mas", b"outbound-7: master process\0"),  # any program has masters
        ("redis-server", b"cache [sentinel] 26379\0\0"),  # a title of its own
        ("redis-server", b"redis-server\0--test-memory\x004000\0"),
        ("rspamd", b"/usr/bin/rspamd\0-t\0"),
        ("mongod", b"mongod\0--shutdown\0--dbpath\0/data\0"),
        ("redis-server-ex", b"redis-server-exporter 9121\0"),
        ("node", b"node\0--watch\0/opt/wildduck/server.js\0"),
        ("node", b"node\0--watch-path=./lib\0/opt/wildduck/server.js\0"),
        ("node", b"node\0--test\0/opt/wildduck/server.js\0"),
        ("node", b"node\0server.js\0--config=/etc/wildduck/wildduck.toml\0"),
        ("node", b"node\0/opt/node_modules/forever/bin/monitor\0/opt/wildduck/server.js\0"),
        ("node", b"node\0/opt/wildduck/indexer.js\0"),
        ("wildduck-www", b"wildduck-www\0\0"),
        ("node", b"node\0/opt/wildduck-webmail/server.js\0"),
        ("node", b"node\0/opt/haraka/bin/haraka\0--qlist\0"),
        ("node", b"node\0haraka.js\0--qlist\0"),
        ("node", b"node\0install-haraka-plugin.js\0"),
        ("node", b"node\0-e\0require('/opt/wildduck/server.js')\0"),
        ("npm install har", b"npm install haraka-plugin-rspamd\0"),
        ("PM2 v5: God Dae", b"PM2 v5: God Daemon (/opt/wildduck/.pm2)\0"),
        ("node", b"node\0"),
        ("node", b""),
    ],
)
def test_look_alikes(comm: str, cmdline: bytes) -> None:
    assert agent.classify(comm, cmdline) is None


def test_a_zombie_is_known_by_its_comm() -> None:
    assert agent.classify("wildduck", b"", state="Z") == "wildduck"
    assert agent.classify("rspamd", b"", state="Z") == "rspamd"


@pytest.mark.parametrize(
    ("cgroup", "service"),
    [
        ("0::/system.slice/wildduck.service", "wildduck"),
        ("0::/system.slice/wildduck@2.service", "wildduck"),
        ("9:name=systemd:/system.slice/zone-mta.service\n0::/x", "zonemta"),
        ("0::/system.slice/system-haraka.slice/haraka@out.service/inner", "haraka"),
        ("0::/system.slice/wildduck-webmail.service", None),
        ("0::/system.slice/pm2-root.service", None),
        ("0::/user.slice/user-0.slice/session-1.scope", None),
        ("", None),
    ],
)
@pytest.mark.parametrize(
    ("comm", "cmdline"),
    [("node", b"node\0server.js\0"), ("MainThread", b"node\0-r\0x\0index.js\0"),
     ("imap-store", b"imap-store\0\0\0\0"), ("outbound-relay-", b"outbound-relay-fra1:\0")],
)
def test_the_unit_tells_when_nothing_else_does(
    comm: str, cmdline: bytes, cgroup: str, service: str | None
) -> None:
    assert agent.classify(comm, cmdline, cgroup=cgroup) == service


@pytest.mark.parametrize(
    ("comm", "cmdline"),
    [("sh", b"sh\0-c\0node server.js\0"), ("npm start", b"npm start\0\0\0"),
     ("tail", b"tail\0-f\0x\0"),
     ("npm exec haraka", b"npm exec haraka -c .\0\0"), ("cat", b"cat\0"), ("bash", b"-bash\0"),
     ("node", b"node\0/opt/haraka/bin/haraka\0--qlist\0"), ("kworker/0:1", b""),
     ("node", b"node\0/opt/tools/exporter.js\0"), ("node", b"node\0-e\x000\0"),
     ("node", b"node\0--run\0start\0"), ("node", b"node\0--watch\0haraka.js\0"),
     ("node", b"node\0/opt/node_modules/.bin/nodemon\0haraka.js\0"),
     ("node", b"node\0/opt/node_modules/.bin/pm2-runtime\0start\0haraka.js\0"),
     ("node", b"node\0/opt/node_modules/tool/index.js\0"), ("yarn start", b"yarn start\0\0\0"),
     ("(sd-pam)", b"(sd-pam)" + bytes(50)), ("(node)", b"(node)" + bytes(52)),
     ("nodemon", b"nodemon\0\0\0"), ("my-long-exporte", b"my-long-exporter-name\0")],
)
def test_not_everything_in_a_unit_is_the_service(comm: str, cmdline: bytes) -> None:
    cgroup = "0::/system.slice/haraka.service"
    assert agent.classify(comm, cmdline, cgroup=cgroup) is None


@pytest.mark.parametrize(
    ("comm", "cmdline"),
    [
        ("redis-server", b"/bin/bash\0/usr/local/bin/redis-server\0"),
        ("redis-server", b"python3\0/opt/redis-server\0"),
        ("mongod", b"/usr/bin/perl\0/opt/mongod\0"),
        ("rspamd", b"/opt/tool/bin/runner\0-u\0/usr/local/bin/rspamd\0--x\0"),
        ("redis-server-7.", b"python3\0/opt/redis-server-7.0.11\0"),  # a comm has 15 bytes
    ],
)
def test_a_script_of_the_same_name(comm: str, cmdline: bytes) -> None:
    """Whatever the interpreter: it is the first argument then."""
    assert agent.classify(comm, cmdline) is None


def test_a_daemon_in_the_unit_of_another_one() -> None:
    """Its own title or script goes before the unit."""
    cgroup = "0::/system.slice/haraka.service"
    assert agent.classify("wildduck", b"wildduck\0\0", cgroup=cgroup) == "wildduck"
    script = b"node\0/opt/zone-mta/app.js\0"
    assert agent.classify("node", script, cgroup=cgroup) == "zonemta"


def test_any_bytes_are_classified() -> None:
    for cmdline in (b"\xff\xfe\0\xff", b"\0\0\0", b"a" * 5000, "müller\0".encode()):
        assert agent.classify("node", cmdline) is None
