"""Not one sample lost: real agents, a real server, and whatever can go wrong between them.

Eight scenes play at once, in threads; they mostly wait. lives.py notes each sample that was taken:
all of them must be in the dashboard in the end, each once.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KEY, ROOT, AgentProcess, eventually
from dashboard import Dashboard

import tinomail_agent as agent

pytestmark = pytest.mark.long

BEAT_MS = 100
AT_ONCE = 8
LIMIT_S = 240.0
KILLS = 200


def epoch_s(stamp: str) -> float:
    parsed = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ")
    return parsed.replace(tzinfo=timezone.utc).timestamp()


class Proxy:
    """Stands between agent and dashboard; `fault` is what it does to each connection."""

    def __init__(self, port: int) -> None:
        self._upstream = ("127.0.0.1", port)
        self.fault = "off"
        self.connections = 0
        self._live: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def begin(self, fault: str) -> None:
        """Break what is there, and treat each new connection like this."""
        self.fault, self.connections = fault, 0
        for client in self._live:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                self._live.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.fault == "reset before":
                return self._reset(client)
            if self.fault == "stall":  # not even a TLS hello
                time.sleep(2)
                return None
            with socket.create_connection(self._upstream) as server:
                back = threading.Thread(target=self._carry, args=(server, client), daemon=True)
                back.start()
                while data := client.recv(65536):
                    if self.fault == "reset during":
                        server.sendall(data[:150])
                        return self._reset(client)
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                back.join(5)
        return None

    def _carry(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if self.fault == "reset after":  # the dashboard has it; its answer is lost
                    return self._reset(client)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        return None

    @staticmethod
    def _reset(client: socket.socket) -> None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.shutdown(socket.SHUT_RD)  # a recv() of the other thread would hold it open
        client.close()


class Moody(Dashboard):
    """A dashboard that takes only every third sample, while `mood` is on."""

    mood = False
    count = 0

    def take(self, path: str, headers: Any, body: Any, problem: str) -> tuple[int, Any]:
        self.count += 1
        if self.mood and path.endswith("/system") and self.count % 3:
            return 500, {"success": False}
        return super().take(path, headers, body, problem)


@dataclass
class Scene:
    """One agent (or many lives of one), its dashboard, and what came of it."""

    folder: Path
    server: Dashboard
    url: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # of lives.py
    kills: dict[int, float] = field(default_factory=dict)  # life -> when it was killed
    stored: list[str] = field(default_factory=list)  # in the end
    saved: set[str] = field(default_factory=set)  # what the agent left on disk when it stopped

    def environ(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "API_KEY": KEY,
            "DASHBOARD_URL": self.url or self.server.url, "NODE_ID": "mta-01",
            "NODE_ROLE": "haraka", "CHECK_PORTS": "1", "BUFFER_SIZE": "10000",
            "STATE_DIRECTORY": str(self.folder / "state"), **self.settings,
        }

    @contextlib.contextmanager
    def agent(self, *options: str) -> Iterator[AgentProcess]:
        """Run one agent until the end of the block, where it must stop in good order."""
        command = [str(ROOT / "tests/lives.py"), str(self.folder / "taken"), str(BEAT_MS)]
        command += [*self.options, *options]
        process = AgentProcess(self.folder / "log", self.environ(), command)
        try:
            yield process
            assert process.stop() == 0, process.output
            self.saved = {agent.unpack(sample.packed)["timestamp"]
                          for sample in agent.State(str(self.folder / "state")).load()}
            assert len(self.saved) >= process.counters()["waiting"]
        finally:
            if process.process.poll() is None:
                process.process.kill()
                process.process.wait(10)

    def many_lives(self, seed: int) -> None:
        command = [sys.executable, str(ROOT / "tests/lives.py"), str(self.folder / "taken"),
                   str(BEAT_MS), "--lives", str(KILLS), "--seed", str(seed)]
        with (self.folder / "lives.log").open("wb") as log:
            done = subprocess.run(command, env=self.environ(), stdout=subprocess.PIPE, stderr=log,
                                  text=True, timeout=900)
        assert done.returncode == 0, (self.folder / "lives.log").read_text()
        for line in done.stdout.splitlines():
            life, when = line.split()
            self.kills[int(life)] = float(when)

    def taken(self) -> dict[str, int]:
        """Return timestamp -> life of all samples that were taken."""
        path = self.folder / "taken"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return {stamp: int(life) for life, stamp in (line.split() for line in lines)}

    def wait_until_drained(self, limit_s: float = LIMIT_S) -> None:
        """Wait until all that was taken so far has come to the dashboard."""
        wanted = set(self.taken())
        eventually(lambda: wanted <= set(self.server.stored()), limit_s, "all delivered", 0.2)

    def arrivals(self) -> Counter[str]:
        """Return timestamp -> how often the dashboard took it (201, or 409 the next time)."""
        return Counter(
            post.body["timestamp"] for post in self.server.posts
            if post.path.endswith("/system") and post.status in (201, 409)
        )

    def tell(self, name: str) -> None:
        """Print the figures of a scene (pytest -s)."""
        taken, arrived = set(self.taken()), self.arrivals()
        print(f"\n{name}: {len(taken)} taken, {len(taken - set(arrived))} missing, "
              f"{sum(arrived.values()) - len(arrived)} twice, {len(self.kills)} kills, "
              f"{len(self.server.posts)} requests")

    def check(self, lost_answers: float) -> None:
        """All that was taken is there, and twice only where an answer was lost on the way.

        On a loaded machine, some of the last ones wait on disk for the next start.
        """
        taken, arrived = set(self.taken()), self.arrivals()
        assert len(taken) > 10
        assert taken - set(arrived) <= self.saved, "missing"
        assert set(arrived) == set(self.stored)
        assert sum(times - 1 for times in arrived.values()) <= lost_answers


# --- the scenes


def through_a_fault(scene: Scene, begin: Callable[[], None], end: Callable[[], None],
                    seconds: float = 4.0) -> None:
    with scene.agent():
        eventually(lambda: len(scene.server.stored()) > 3, LIMIT_S)
        begin()
        time.sleep(seconds)
        end()
        time.sleep(1)
        scene.wait_until_drained()


def dashboard_fault(mode: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        def set_to(value: str) -> None:
            scene.server.fault = value

        through_a_fault(scene, lambda: set_to(mode), lambda: set_to("off"))

    return play


def proxy_fault(fault: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        proxy = Proxy(scene.server.server_address[1])
        scene.url = scene.server.url.rpartition(":")[0] + f":{proxy.port}"

        def end() -> None:
            assert proxy.connections >= 3
            proxy.begin("off")

        try:
            through_a_fault(scene, lambda: proxy.begin(fault), end)
        finally:
            proxy.close()

    return play


@contextlib.contextmanager
def own_disk(scene: Scene) -> Iterator[Callable[[str], None]]:
    """Put STATE_DIRECTORY on a file system of its own; yield what freezes (-f) and thaws (-u) it.

    What writes to it meanwhile is stuck in the kernel, and cannot even be killed.
    """
    mount = scene.folder / "state"
    mount.mkdir()
    image = str(scene.folder / "image")
    for command in (["truncate", "-s", "16M", image], ["mkfs.ext4", "-q", image],
                    ["mount", "-o", "loop", image, str(mount)]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"needs root and loop devices: {' '.join(command)} failed")

    def freeze(option: str) -> None:
        subprocess.run(["fsfreeze", option, str(mount)], check=True, timeout=30)

    try:
        yield freeze
    finally:
        subprocess.run(["fsfreeze", "-u", str(mount)], capture_output=True, timeout=30)
        subprocess.run(["umount", "-l", str(mount)], check=True, timeout=30)


def frozen_disk(scene: Scene) -> None:
    """STATE_DIRECTORY hangs in an outage: samples go on, and come when the dashboard is back."""
    with own_disk(scene) as freeze, scene.agent() as process:
        eventually(lambda: len(scene.server.stored()) > 3, LIMIT_S)
        scene.server.fault = "503"
        eventually(lambda: process.lines("cannot deliver"), LIMIT_S)
        freeze("-f")
        try:
            count = len(scene.taken())
            eventually(lambda: len(scene.taken()) > count + 30, LIMIT_S, "samples go on")
            eventually(lambda: process.lines("STATE_DIRECTORY hangs"), LIMIT_S)
            scene.server.fault = "off"
            scene.wait_until_drained()
        finally:
            freeze("-u")
        eventually(lambda: process.lines("no longer hangs"), LIMIT_S)
        scene.wait_until_drained()


def stopped_with_a_frozen_disk(scene: Scene) -> None:
    """The agent says goodbye in time. The kernel keeps the process until the disk moves again."""
    with own_disk(scene) as freeze, scene.agent() as process:
        eventually(lambda: len(scene.server.stored()) > 3, LIMIT_S)
        scene.server.fault = "503"
        eventually(lambda: process.lines("cannot deliver"), LIMIT_S)
        freeze("-f")
        try:
            count = len(scene.taken())
            eventually(lambda: process.lines("STATE_DIRECTORY hangs"), LIMIT_S)
            eventually(lambda: len(scene.taken()) > count + 10, LIMIT_S, "samples go on")
            scene.server.fault = "off"
            scene.wait_until_drained()
            asked = time.monotonic()
            process.process.send_signal(signal.SIGTERM)
            eventually(lambda: process.lines("stopped: "), LIMIT_S)
            assert time.monotonic() - asked < 10
        finally:
            freeze("-u")
        assert process.process.wait(40) == 0


def every_third_request(scene: Scene) -> None:
    def set_to(mood: bool) -> None:
        assert isinstance(scene.server, Moody)
        scene.server.mood = mood

    through_a_fault(scene, lambda: set_to(True), lambda: set_to(False), 8)


def storm_of_500(scene: Scene) -> None:
    with scene.agent():
        for _ in range(10):
            eventually(lambda: scene.server.fault == "off" and scene.server.stored(), LIMIT_S)
            scene.server.fault = "500"
            time.sleep(0.4)
            scene.server.fault = "off"
            time.sleep(0.2)
        scene.wait_until_drained()


def retry_after_30(scene: Scene) -> None:
    """The dashboard says 429 once, with Retry-After: 30: nothing is posted for so long."""
    with scene.agent():
        eventually(lambda: len(scene.server.stored()) > 3, LIMIT_S)
        scene.server.fault = "429-long"
        eventually(lambda: any(post.status == 429 for post in scene.server.posts), 10)
        scene.server.fault = "off"
        asked = next(post.at for post in scene.server.posts if post.status == 429)
        count = len(scene.server.posts)
        eventually(lambda: len(scene.server.posts) > count, LIMIT_S, "the next post")
        assert scene.server.posts[count].at - asked >= 30
        scene.wait_until_drained()


def clock_steps(scene: Scene) -> None:
    clock = scene.folder / "clock"
    clock.write_text("0")
    with scene.agent("--clock", str(clock)):
        for offset in ("86400", "0", "-86400", "0"):
            count = len(scene.taken())
            eventually(lambda wanted=count + 8: len(scene.taken()) > wanted, LIMIT_S)  # type: ignore[misc]
            new = scene.folder / "clock.new"
            new.write_text(offset)
            new.replace(clock)
        scene.wait_until_drained()


def stopped_for_60_s(scene: Scene) -> None:
    with scene.agent() as process:
        eventually(lambda: len(scene.server.stored()) > 3, LIMIT_S)
        process.process.send_signal(signal.SIGSTOP)
        time.sleep(60)
        process.process.send_signal(signal.SIGCONT)
        count = len(scene.server.stored())
        eventually(lambda: len(scene.server.stored()) > count + 10, LIMIT_S)
        scene.wait_until_drained()


def killed_in_an_outage(scene: Scene) -> None:
    scene.server.fault = "refuse"
    with scene.agent():  # until a sample waits on disk; from then on each is saved when it is taken
        eventually(scene.taken, LIMIT_S)
    scene.many_lives(seed=11)
    scene.server.fault = "off"
    with scene.agent():
        eventually(lambda: len(scene.server.stored()) > 10, LIMIT_S)
        scene.wait_until_drained()


def killed_while_healthy(scene: Scene) -> None:
    scene.many_lives(seed=12)
    before = len(scene.server.stored())
    with scene.agent():  # what waited on disk goes out
        eventually(lambda: len(scene.server.stored()) > before + 10, LIMIT_S, "the last life", 0.1)


# Answers that are no acceptance: of somebody else, or the dashboard's own.
ANSWERED = ("400", "401", "403", "404", "422", "500", "503", "html", "redirect", "unsuccessful")
PROXY_FAULTS = ("reset before", "reset during", "reset after", "stall")
SCENES: dict[str, Callable[[Scene], None]] = {  # the long ones first
    "429, Retry-After: 30": retry_after_30,
    "SIGSTOP for 60 s": stopped_for_60_s,
    "kill -9 while healthy": killed_while_healthy,
    "kill -9 in an outage": killed_in_an_outage,
    **{mode: dashboard_fault(mode) for mode in ("refuse", "hang", "half", "reset", "drip")},
    **{mode: dashboard_fault(mode) for mode in ANSWERED},
    **{fault: proxy_fault(fault) for fault in PROXY_FAULTS},
    "stall in the TLS handshake": proxy_fault("stall"),
    "every third request": every_third_request,
    "storm of 500": storm_of_500,
    "clock steps of a day": clock_steps,
    "frozen STATE_DIRECTORY": frozen_disk,
    "stop with a frozen STATE_DIRECTORY": stopped_with_a_frozen_disk,
}
# Where answers may be lost on the way: one in a connection that was cut when the fault began, or
# while the process was stopped; those that come too late; any number.
IMPATIENT = ("hang", "drip", "stall", "stall in the TLS handshake")
LOST_ANSWERS = {"refuse": 1, "SIGSTOP for 60 s": 1, **dict.fromkeys(PROXY_FAULTS, 1),
                **dict.fromkeys(IMPATIENT, 3), "reset after": math.inf}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Scene]]]:
    authority = trustme.CA()
    folder = tmp_path_factory.mktemp("faults")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    pem = str(folder / "server.pem")

    def play(name: str, perform: Callable[[Scene], None]) -> Scene:
        own = folder / name.replace(" ", "-").replace("/", "-")
        own.mkdir()
        tls = (pem, pem) if "TLS" in name else None
        with Moody(KEY, tls=tls) as server:
            ca = {"CA_BUNDLE": str(folder / "ca.pem")} if tls else {}
            options = ("--impatient",) if name in IMPATIENT else ()
            scene = Scene(own, server, settings=ca, options=options)
            perform(scene)
            scene.stored = server.stored()
            return scene

    # Not all at once: an agent whose answers come late for want of CPU posts samples twice.
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(play, name, perform) for name, perform in SCENES.items()}


@pytest.mark.parametrize("name", [name for name in SCENES if name != "kill -9 while healthy"])
def test_every_sample_is_delivered(name: str, scenes: dict[str, Future[Scene]]) -> None:
    scene = scenes[name].result(1200)
    scene.tell(name)
    scene.check(LOST_ANSWERS.get(name, 0))


def test_a_kill_of_a_healthy_agent_costs_what_was_under_way_at_most(
    scenes: dict[str, Future[Scene]],
) -> None:
    scene = scenes["kill -9 while healthy"].result(1200)
    scene.tell("kill -9 while healthy")
    taken, arrived = scene.taken(), scene.arrivals()
    assert len(scene.kills) == KILLS
    last = {life: stamp for stamp, life in taken.items()}
    for stamp in set(taken) - set(arrived):
        life = taken[stamp]
        assert stamp == last[life], "an older one is missing"
        assert scene.kills[life] - epoch_s(stamp) < 1
    twice = sum(times - 1 for times in arrived.values())
    assert twice <= KILLS  # the answer was lost with the process
