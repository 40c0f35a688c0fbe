"""Settings: where they come from, what is wrong with them, and that the key stays secret."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY, ROOT, StartAgent, eventually, make_config, v1_only
from dashboard import Dashboard
from hypothesis import given
from hypothesis import strategies as st

import tinomail_agent as agent

EXAMPLES = {setting.name: setting.example for setting in agent.SETTINGS}
GOOD = {"DASHBOARD_URL": "https://monitor.example.com", "API_KEY": KEY}


def problems_of(environ: dict[str, str], env_file: str = os.devnull) -> list[str]:
    try:
        agent.load_config(environ, env_file)
    except agent.SettingsError as error:
        return error.problems
    return []


def test_defaults() -> None:
    config = agent.load_config(GOOD, os.devnull)
    assert config.heartbeat_interval == 15_000
    assert config.buffer_size == 100
    assert config.check_host == "127.0.0.1"
    assert config.check_ports is None
    assert config.node_role == "auto"
    assert config.node_id == os.uname().nodename
    assert config.dashboard_api == "v1"
    assert config.memory_limit_mb == 64


def test_every_row_becomes_a_field() -> None:
    fields = set(agent.Config.__dataclass_fields__) - {"env_file", "warnings", "texts"}
    assert fields == {setting.name.lower() for setting in agent.SETTINGS}


@pytest.mark.parametrize("setting", agent.SETTINGS, ids=lambda s: s.name)
def test_defaults_and_examples_are_good(setting: agent.Setting, tmp_path: Path) -> None:
    if setting.default:
        setting.parse(setting.default)
    if setting.name != "CA_BUNDLE":  # its example is a file of another machine
        setting.parse(setting.example)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DASHBOARD_URL", "monitor.example.com", "must be https://"),
        ("DASHBOARD_URL", "ftp://monitor.example.com", "must be https://"),
        ("DASHBOARD_URL", "https://", "must be https://"),
        ("DASHBOARD_URL", "https://m.example.com:70000", "must be https://"),
        ("DASHBOARD_URL", "https://m.example.com:0", "must be https://"),
        ("DASHBOARD_URL", "https://[::1", "IPv6 in brackets"),
        ("DASHBOARD_URL", f"https://{'x' * 64}.example.com", "a host name or IP"),
        ("DASHBOARD_URL", "https://m..example.com", "a host name or IP"),
        ("DASHBOARD_URL", "https://*.example.com", "a host name or IP"),
        ("DASHBOARD_URL", "HTTP://monitor.example.com", "ALLOW_HTTP=true"),
        ("NET_INTERFACES", "eth0,", "names of interfaces"),
        ("DASHBOARD_URL", "https://joe:pass@m.example.com", "user name or password"),
        ("DASHBOARD_URL", "https://m.example.com/?a=b", "must not hold blanks, '?'"),
        ("DASHBOARD_URL", "https://m.example.com/ x", "must not hold blanks"),
        ("DASHBOARD_URL", "https://müller.example", "outside ASCII"),
        ("DASHBOARD_URL", "http://monitor.example.com", "ALLOW_HTTP=true"),
        ("DASHBOARD_URL", "http://127.0.0.1.example.com", "ALLOW_HTTP=true"),
        ("DASHBOARD_URL", "http://127.0.0.999", "ALLOW_HTTP=true"),  # a name, for a resolver
        ("API_KEY", "two words", "without blanks"),
        ("API_KEY", "a\nb", "without blanks"),
        ("API_KEY", "schlüssel", "visible ASCII"),
        ("NODE_ID", "a b", "1 to 100"),
        ("NODE_ID", "x" * 101, "1 to 100"),
        ("NODE_ROLE", "x" * 51, "1 to 50 printable characters"),
        ("NODE_ROLE", "two\nlines", "1 to 50 printable characters"),
        ("NODE_ROLE", " ", "1 to 50 printable characters"),
        ("ZONEMTA_URL", "https://127.0.0.1:12080", "http://"),
        ("ZONEMTA_URL", "no", "must be https:// and a host name"),
        ("ZONEMTA_URL", "http://joe:pass@127.0.0.1:12080", "user name or password"),
        ("HEARTBEAT_INTERVAL", "0", "from 1000 to 300000"),
        ("HEARTBEAT_INTERVAL", "15s", "from 1000 to 300000"),
        ("HEARTBEAT_INTERVAL", "-15000", "from 1000 to 300000"),
        ("CHECK_PORTS", "70000", "from 1 to 65535"),
        ("CHECK_PORTS", "25;587", "from 1 to 65535"),
        ("CHECK_PORTS", "smtp", "from 1 to 65535"),
        ("CHECK_HOST", "localhost", "not a name"),
        ("CHECK_MODE", "ping", "connect, listen"),
        ("DISK_PATHS", "var/mail", "absolute paths"),
        ("WATCH_PROCESSES", "postfix", "name=program pairs"),
        ("WATCH_PROCESSES", "Postfix=master", "names in lower case"),
        ("WATCH_PROCESSES", "redis=redis", "redis is reported anyway"),
        ("BUFFER_SIZE", "9", "from 10 to 10000"),
        ("BUFFER_SIZE", "10001", "from 10 to 10000"),
        ("CA_BUNDLE", "ca.pem", "absolute path"),
        ("CA_BUNDLE", "/ca\n.pem", "absolute path"),
        ("ALLOW_HTTP", "maybe", "true, false"),
        ("MEMORY_LIMIT_MB", "10", "from 48 to 72"),
        ("LOG_LEVEL", "loud", "debug, info"),
        ("DASHBOARD_API", "v9", "one of v1"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_setting(name: str, value: str, says: str) -> None:
    [problem] = problems_of({**GOOD, name: value})
    assert problem.startswith(f"{name}: ")
    assert says in problem
    assert "pass" not in problem.replace("password", "")
    assert problem.endswith(f"example: {name}={EXAMPLES[name]})") or "ALLOW_HTTP=true" in problem


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("CHECK_HOST", "localhost", "'localhost'"),
        ("NODE_ROLE", "two\nlines", "'two?lines'"),
        ("NODE_ID", "ü" * 1000, f"'{'ü' * 60}'"),
        ("DASHBOARD_URL", "https://joe:p@ss/w@m.example.com?t=5", "'***@m.example.com?***'"),
        ("NODE_ID", f"a {KEY}", "'a ***'"),
        ("API_KEY", "two words", ""),
    ],
)
def test_a_wrong_value_is_shown_unless_it_is_secret(name: str, value: str, shown: str) -> None:
    [problem] = problems_of({**GOOD, name: value})
    found = f"it is {shown}; " if shown else ""
    assert problem.endswith(f"({found}example: {name}={EXAMPLES[name]})")


def test_a_key_that_slipped_into_another_value_is_not_shown() -> None:
    """API_KEY is missing then, so that nothing tells which part of the value is the key."""
    for name, value in (
        ("DASHBOARD_URL", f"https://m.example.com\nAPI_KEY={KEY}"),
        ("NODE_ID", f"mta-01 API_KEY={KEY}"),
    ):
        problems = problems_of({"DASHBOARD_URL": GOOD["DASHBOARD_URL"], name: value})
        assert any(problem.startswith(f"{name}: ") for problem in problems)
        assert KEY not in str(problems)


@pytest.mark.parametrize("name", ["DASHBOARD_URL", "API_KEY"])
def test_a_required_setting_is_missing(name: str) -> None:
    rest = {n: v for n, v in GOOD.items() if n != name}
    [problem] = problems_of(rest)
    assert problem.startswith(f"{name}: is missing (example: {name}=")
    assert problems_of({**rest, name: ""}) == [problem]


def test_all_problems_come_at_once() -> None:
    bad = {"DASHBOARD_URL": "x", "API_KEY": "a b", "BUFFER_SIZE": "1", "CHECK_PORTS": "70000"}
    names = [problem.split(":")[0] for problem in problems_of(bad)]
    assert names == ["DASHBOARD_URL", "API_KEY", "CHECK_PORTS", "BUFFER_SIZE"]


@pytest.mark.parametrize(
    "url", ["http://localhost:8080", "http://127.1.2.3", "http://[::1]:8080/base/"]
)
def test_http_is_for_loopback(url: str) -> None:
    assert make_config(url).dashboard_url == url.rstrip("/")


def test_a_scheme_in_upper_case_is_the_same() -> None:
    assert make_config("HTTPS://Monitor.Example.com/Base").dashboard_url == (
        "https://Monitor.Example.com/Base"
    )
    assert make_config("HTTP://127.0.0.1:80").dashboard_url == "http://127.0.0.1:80"


def test_http_elsewhere_only_if_allowed() -> None:
    assert make_config("http://10.1.2.3", allow_http="true").dashboard_url == "http://10.1.2.3"


# --- the env file


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "agent.env"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("API_KEY=pa$HOME${USER}x", "pa$HOME${USER}x"),
        ("API_KEY=a#b", "a#b"),
        ("API_KEY=a#b # the comment", "a#b"),
        ("""API_KEY=a"b'c""", """a"b'c"""),
        ("""API_KEY='a"b$c#d'""", 'a"b$c#d'),
        ("API_KEY=a\\nb\\", "a\\nb\\"),
        ("  export API_KEY = abc==  ", "abc=="),
        ("API_KEY=x\r", "x"),
    ],
)
def test_a_key_works_as_it_stands(line: str, key: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"# settings\nDASHBOARD_URL=https://m.example.com\n{line}\n")
    assert agent.load_config({}, path).api_key == key


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1))
def test_any_visible_ascii_is_a_key(key: str) -> None:
    assert make_config(api_key=key).api_key == key


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfDASHBOARD_URL=https://m.example.com\nAPI_KEY=k\n")
    assert agent.load_config({}, path).dashboard_url == "https://m.example.com"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('API_KEY="abc\n', "line 2: is not NAME=value, or a quote is not closed"),
        ("API_KEY='abc\n", "line 2: is not NAME=value, or a quote is not closed"),
        ("\n\nAPI KEY=abc\n", "line 4: is not NAME=value"),
        ("API_KEY\n", "line 2: is not NAME=value"),
        ("DASHBORD_URL=x\n", "line 2: there is no setting DASHBORD_URL; did you mean"),
        ("api_key=x\n", "line 2: unknown setting; did you mean API_KEY?"),
        ("FLAVOUR=x\n", "line 2: there is no setting FLAVOUR; agent.env.example lists"),
        (b"NODE_ID=\xff\xfe\n", "line 2: is not UTF-8"),
        ("NODE_ID=x\n".encode("utf-16"), "line 2: is not UTF-8"),
    ],
)
def test_a_bad_line_is_told_by_its_number(text: str | bytes, says: str, tmp_path: Path) -> None:
    head = b"DASHBOARD_URL=https://m.example.com\n"
    path = write(tmp_path, head + (text if isinstance(text, bytes) else text.encode()))
    problems = problems_of({"API_KEY": KEY}, path)
    assert any(problem.startswith(f"{path}, {says}") for problem in problems), problems


def test_what_may_be_a_piece_of_the_key_is_not_shown(tmp_path: Path) -> None:
    path = write(tmp_path, "API_KEY=abcdef\nGHIjkl0mn==\nSEVENTEEN pieces\nLATER=\n")
    text = "\n".join(problems_of({"DASHBOARD_URL": "https://m.example.com"}, path))
    assert "jkl" not in text and "SEVENTEEN" not in text and "pieces" not in text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_a_file_that_cannot_be_read(make: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.env"
    make(path)  # type: ignore[operator]
    [problem] = problems_of({}, str(path))  # and no word of what is missing because of it
    assert problem.startswith(f"{path}: cannot be read: {says}")


def test_a_file_of_root_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "API_KEY=k\n")
    os.chmod(path, 0)
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        assert problems_of({}, path) == [f"{path}: cannot be read: Permission denied; use sudo"]
    finally:
        os.seteuid(before)


def test_order_environment_then_file_then_default(tmp_path: Path) -> None:
    path = write(tmp_path, "DASHBOARD_URL=https://file.example\nAPI_KEY=f\nNODE_ID=file\n")
    config = agent.load_config({"NODE_ID": "process", "API_KEY": ""}, path)
    assert (config.node_id, config.api_key, config.buffer_size) == ("process", "f", 100)


def test_where_the_file_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "agent.env").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert agent.find_env_file(environ) == str(credentials / "agent.env")
    (tmp_path / ".agent.env").touch()
    assert agent.find_env_file({}) == "./.agent.env"
    (credentials / "agent.env").unlink()
    assert agent.find_env_file(environ) == "./.agent.env"


def test_a_key_that_others_can_read_gets_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, "DASHBOARD_URL=https://m.example.com\nAPI_KEY=k\n")
    assert agent.load_config({}, path).warnings == ()
    Path(path).chmod(0o644)
    [warning] = agent.load_config({}, path).warnings
    assert f"chmod 600 {path}" in warning


# --- as an administrator meets it


def run(*args: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tinomail_agent.py"), *args],
        env={"PATH": os.environ["PATH"], **environ}, cwd=cwd, capture_output=True, text=True,
        timeout=30, check=False,
    )


def test_wrong_settings_end_with_78_and_a_line_each(tmp_path: Path) -> None:
    path = write(tmp_path, 'API_KEY="tops3cret\nBUFER_SIZE=5\nCHECK_PORTS=70000\n')
    done = run("--env-file", path, DASHBOARD_URL="http://m.example.com", HEARTBEAT_INTERVAL="0")
    assert done.returncode == os.EX_CONFIG == 78
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and "tops3cret" not in done.stderr
    lines = done.stderr.splitlines()
    for part in ("line 1: is not", "line 2: there is no setting BUFER_SIZE; did you mean BUFFER_",
                 "CHECK_PORTS: ", "HEARTBEAT_INTERVAL: ", "DASHBOARD_URL: http://"):
        assert len([line for line in lines if part in line]) == 1, (part, lines)
    assert all(" ERROR " in line for line in lines)


def test_wrong_usage_ends_with_2(tmp_path: Path) -> None:
    done = run("--onse")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_help_lists_every_setting() -> None:
    text = run("--help").stdout
    for setting in agent.SETTINGS:
        assert f"  {setting.name} " in text


def test_version() -> None:
    assert run("--version").stdout == f"tinomail-agent {agent.VERSION}\n"


@pytest.mark.parametrize("level", ["debug", "error"])
@pytest.mark.parametrize("fault", ["off", "echo", "401", "hang-up"])
def test_the_key_is_in_no_output(
    level: str, fault: str, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that quotes the key, a crash whose exception holds it: it stays out of the log."""
    if fault == "echo":
        import dashboard as module

        answer = f'{{"error": "bad key {KEY}", "again": {KEY!r}}}'.encode()
        location = {"Location": f"https://elsewhere.invalid/?key={KEY}"}
        monkeypatch.setitem(module.ANSWERS, "400", lambda: (400, location, answer))
        dashboard.fault = "400"
    elif fault == "401":
        dashboard.fault = "401"
    elif fault == "hang-up":
        dashboard.fault = "reset"
    done = run(
        "--check", DASHBOARD_URL=dashboard.url, API_KEY=KEY, LOG_LEVEL=level, NODE_ID="mta-01",
        DASHBOARD_API=dashboard.api,
    )
    assert done.returncode == {"off": 0, "hang-up": 75}.get(fault, 1), done
    for spelling in (KEY, repr(KEY)[1:-1], KEY[:8]):
        assert spelling not in done.stdout + done.stderr
    assert f"set, {len(KEY)} characters" in done.stdout
    if fault == "echo":
        assert "bad key ***" in done.stdout


def test_a_traceback_does_not_hold_the_key(capfd: pytest.CaptureFixture[str]) -> None:
    agent.set_up_logging("debug", KEY, {})
    try:
        raise ValueError(f"Invalid header value {('Bearer ' + KEY).encode()!r}")
    except ValueError:
        agent.log.exception("it failed")
    text = capfd.readouterr().err
    assert "Invalid header value" in text and "***" in text
    assert KEY not in text and KEY[:8] not in text


@pytest.mark.parametrize("args", ["--once", "--check", ""])
def test_output_that_cannot_be_written(args: str, tmp_path: Path) -> None:
    """No traceback, and no complaint of Python's at its exit."""
    command = f"timeout -s INT 12 {sys.executable} {ROOT}/tinomail_agent.py {args}"
    running = {
        end: subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", f"{command} {end}"], cwd=tmp_path, text=True,
            env={"PATH": os.environ["PATH"], **GOOD, "DASHBOARD_URL": "http://127.0.0.1:9",
                 "CHECK_PORTS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for end in ("2>&-", ">/dev/full", "| true")
    }
    for end, one in running.items():
        _, said = one.communicate(timeout=90)
        assert "Traceback" not in said and "ignored" not in said
        once = 0 if end == "2>&-" else 1
        assert one.returncode == {"--once": once, "--check": 75, "": 124}[args], (end, said)


def test_a_reader_that_has_gone_is_not_an_error_of_the_agent(tmp_path: Path) -> None:
    """Unbuffered, as install.sh calls it: the first line already meets a closed pipe."""
    done = subprocess.run(
        ["bash", "-c", "$0 $1 --once | head -c 0; exit ${PIPESTATUS[0]}",
         sys.executable, str(ROOT / "tinomail_agent.py")],
        env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", "CHECK_PORTS": "1",
             "ZONEMTA_URL": "off"},  # one may run on this machine
        capture_output=True, text=True, timeout=90, check=False, cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_check_lists_each_figure_under_its_name() -> None:
    sample = {
        "system": {"cpu_cores": [{"core": 0, "percent": 1.5}, {"core": 1, "percent": 2.0}],
                   "ram_used_bytes": 3 << 20, "load_avg": [0.5, 1.0, 2.0],
                   "disks": [{"mount": "/", "read_only": False},
                             {"mount": "/a", "read_only": True}]},
        "processes": {"redis": {"status": "running", "pid": 7},
                      "haraka": {"status": "not_found", "pid": None}},
        "services": {"port_25": True}, "accept_queue": {"port_25": 4},
        "agent": {"version": "1"},
    }
    assert [re.split(" {2,}", line) for line in agent.describe_sample(sample)] == [
        ["cpu_cores", "core 0, percent 1.5; core 1, percent 2.0"], ["ram_used_bytes", "3 MiB"],
        ["load_avg", "0.5; 1.0; 2.0"],
        ["disks", "mount /, read_only no"], ["disks", "mount /a, read_only yes"],
        ["redis", "status running, pid 7"], ["haraka", "status not_found"],
        ["port_25", "yes"], ["accept_queue port_25", "4"],
    ]


@pytest.mark.parametrize("is_journal", [True, False])
def test_the_journal_gets_a_priority_for_each_line(
    is_journal: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    stderr = os.fstat(2)
    inode = stderr.st_ino if is_journal else stderr.st_ino + 1
    agent.set_up_logging("info", KEY, {"JOURNAL_STREAM": f"{stderr.st_dev}:{inode}"})
    agent.log.warning("one\ntwo")
    agent.log.error("three")
    agent.log.debug("four")
    lines = capfd.readouterr().err.splitlines()
    if is_journal:
        assert lines == ["<4>one", "<4>two", "<3>three"]
    else:
        assert [line.split(" ", 2)[2] for line in lines if " " in line] == [
            "WARNING  one", "ERROR    three"]


def test_how_a_job_ends(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> int:
        def run(*_: object) -> int:
            raise error

        monkeypatch.setattr(agent, "run", run)
        agent.set_up_logging("info", KEY, {})
        return agent.main(["--once"])

    assert fail(KeyboardInterrupt()) == 130
    assert fail(BrokenPipeError()) == 1
    assert capfd.readouterr().err == ""
    assert fail(OSError("on fire")) == 1
    assert "ERROR    the agent failed\nTraceback" in capfd.readouterr().err


def test_once_needs_no_dashboard() -> None:
    done = run("--once")
    assert done.returncode == 0, done.stderr
    assert '"cpu_percent"' in done.stdout


def test_what_does_not_go_together() -> None:
    """10,000 samples and the agent would be over the limit right after each start."""
    with pytest.raises(agent.SettingsError) as error:
        make_config(buffer_size=10_000, memory_limit_mb=48)
    [problem] = error.value.problems
    assert problem.startswith(
        "BUFFER_SIZE: 10000 samples do not fit into MEMORY_LIMIT_MB=48; set BUFFER_SIZE=5734"
    )
    assert make_config(buffer_size=5_734, memory_limit_mb=48).buffer_size == 5_734
    assert make_config(buffer_size=10_000).buffer_size == 10_000


def test_what_is_seldom_meant_is_a_warning() -> None:
    config = make_config(node_id="localhost.localdomain", heartbeat_interval=60_000)
    assert [warning.split(":")[0] for warning in config.warnings] == [
        "NODE_ID", "HEARTBEAT_INTERVAL",
    ]
    assert make_config(heartbeat_interval=45_001).warnings != ()
    assert make_config(heartbeat_interval=45_000).warnings == make_config().warnings == ()


@pytest.mark.parametrize("name", ["", "localhost", "localhost.localdomain", "(none)"])
def test_a_host_name_that_is_not_set_yet_is_no_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    config = make_config(node_id="")
    assert config.node_id == ""
    words = "the host name is not set yet; set the host name or NODE_ID"
    assert config.warnings == (f"NODE_ID: {words}",)
    assert agent.try_dashboard(config, agent.Sample(1, b"")) == (1, f"FAILED: {words}")


def test_the_services_own_settings_are_not_needed_for_a_sample(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An ordinary user cannot read them, and may want to see a sample all the same."""
    path = tmp_path / "agent.env"
    path.write_text("NODE_ID=from-file\n")
    monkeypatch.setattr(agent, "SERVICE_ENV_FILE", str(path))
    monkeypatch.chdir(tmp_path)
    assert agent.load_config({}, need_dashboard=False).node_id == "from-file"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert agent.load_config({"NODE_ID": "x"}, need_dashboard=False).node_id == "x"


def test_the_credential_is_named_as_the_file_that_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "agent.env").write_text("NODE_ROLL=redis\n")
    with pytest.raises(agent.SettingsError) as error:
        agent.load_config({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert error.value.problems[0].startswith("/etc/tinomail-agent/agent.env, line 1: ")
    with pytest.raises(agent.SettingsError) as error:
        agent.load_config({}, str(tmp_path / "agent.env"))
    assert error.value.problems[0].startswith(f"{tmp_path}/agent.env, line 1: ")


@pytest.mark.parametrize(
    ("text", "role"),
    [("AUTO", "auto"), ("Wildduck", "wildduck"), ("zonemta-local", "zonemta-local"),
     ("zonemta", "zonemta"), ("Haraka-inbound", "Haraka-inbound"), ("x" * 50, "x" * 50),
     ("Máy chủ thư 1", "Máy chủ thư 1")],
)
def test_a_role_is_any_name(text: str, role: str) -> None:
    assert make_config(node_role=text).node_role == role


@pytest.mark.parametrize(
    ("role", "services", "ports"),
    [
        ("zonemta-outbound", ("redis",), (587, 12080)), ("zonemta", (), (587, 12080)),
        ("haraka-inbound", ("redis",), (25,)), ("Haraka-2", (), (25,)),
        ("redis-cache", (), (6379,)), ("rspamd1", (), (11334,)), ("mongodb-arbiter", (), (27017,)),
        ("mx", ("haraka", "redis"), (25, 6379)), ("mx", (), agent.MAIL_PORTS),
        ("mx", ("postfix",), agent.MAIL_PORTS), ("wildduck", ("redis",), agent.MAIL_PORTS),
        ("unknown", (), agent.MAIL_PORTS),
    ],
)
def test_ports_of_a_role(role: str, services: tuple[str, ...], ports: tuple[int, ...]) -> None:
    assert agent.ports_of(role, services) == ports


def test_lists_of_paths_and_of_names() -> None:
    config = make_config(disk_paths="/, /var", net_interfaces="eth0, eth1 eth0")
    assert (config.disk_paths, config.net_interfaces) == (("/", "/var"), ("eth0", "eth1"))
    config = make_config(disk_paths="auto", net_interfaces="auto")
    assert (config.disk_paths, config.net_interfaces) == (None, None)


def test_the_credential_goes_before_a_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    for folder, name in ((tmp_path, ".agent.env"), (credentials, "agent.env")):
        (folder / name).write_text("LOG_LEVEL=debug\n")
    monkeypatch.chdir(tmp_path)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert agent.find_env_file(environ) == str(credentials / "agent.env")
    assert agent.find_env_file({}) == "./.agent.env"


def test_the_installed_command_gives_up_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    code = "import os, tinomail_agent as a\na.become_nobody()\n" \
           "print(*os.getresuid(), *os.getresgid(), os.getgroups())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}, timeout=30)
    assert done.stdout.split() == ["65534"] * 6 + ["[]"]


@v1_only
def test_the_watchdogs_sigabrt_leaves_the_stack_of_every_thread(
    dashboard: Dashboard, start_agent: StartAgent
) -> None:
    process = start_agent(dashboard.url)
    eventually(dashboard.stored)
    process.process.send_signal(signal.SIGABRT)
    assert process.process.wait(60) == -signal.SIGABRT
    assert process.lines("Fatal Python error: Aborted")
    assert process.lines("in _collect") and process.lines("in wait")
