"""What plain ways cost, each in a process of its own: `python baseline.py NAME RUNS [URL CA]`.

Prints, as JSON, the CPU time of this process from its start to the end of its imports, that of
each run, and its memory at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

from . import procfs


def imports() -> Callable[[], object]:
    """The agent's four dependencies, and nothing done with them."""
    import dotenv.parser  # noqa: F401
    import psutil  # noqa: F401
    import requests  # noqa: F401
    import sdnotify  # noqa: F401

    return lambda: None


def net_connections() -> Callable[[], object]:
    import psutil

    return lambda: psutil.net_connections("tcp")


def process_iter() -> Callable[[], object]:
    import psutil

    return lambda: [p.info for p in psutil.process_iter(["pid", "name", "cmdline"])]


def post() -> Callable[[], object]:
    """A new session and connection for each POST."""
    import requests

    url, ca = sys.argv[3:5]
    body = os.urandom(700)
    return lambda: requests.post(f"{url}/baseline", data=body, verify=ca, timeout=10)


def session() -> Callable[[], object]:
    """One session, one connection, an empty POST: the floor of what requests takes."""
    import requests

    url, ca = sys.argv[3:5]
    one = requests.Session()
    one.trust_env = False
    one.verify = ca
    return lambda: one.post(f"{url}/baseline", data=b"", timeout=10).content


def bare_post() -> Callable[[], object]:
    """The same by http.client alone: the floor of Python."""
    import http.client
    import ssl
    import urllib.parse

    url, ca = sys.argv[3:5]
    context = ssl.create_default_context(cafile=ca)
    netloc = urllib.parse.urlsplit(url).netloc
    connection = http.client.HTTPSConnection(netloc, context=context, timeout=10)

    def run() -> object:
        connection.request("POST", "/baseline", body=b"")
        return connection.getresponse().read()

    return run


NAMES = {
    one.__name__: one for one in (imports, net_connections, process_iter, post, session, bare_post)
}


def main() -> None:
    run = NAMES[sys.argv[1]]()
    since_start_s = time.process_time()
    cpu_ms = []
    for _ in range(int(sys.argv[2])):
        before = time.process_time()
        run()
        cpu_ms.append(1000 * (time.process_time() - before))
    rss, pss = procfs.memory_mib(os.getpid())
    result = {"cpu_ms": cpu_ms, "since_start_s": since_start_s, "rss_mib": rss, "pss_mib": pss}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
