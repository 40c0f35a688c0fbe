"""A dashboard that takes everything and notes each POST in a line: `python sink.py LOG [CERT]`.

Each line is JSON: when (monotonic seconds, the same clock in every process), the path, which
connection it came over, and the body in base64. Prints its port; ends when stdin does.
"""

from __future__ import annotations

import base64
import itertools
import json
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = b'{"success":true,"data":{"id":"mta-01"}}'


class Handler(BaseHTTPRequestHandler):
    server: Sink
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 4096  # the answer leaves in one piece
    timeout = 120

    def setup(self) -> None:
        super().setup()
        self.connection_number = next(self.server.connections)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        line = {
            "at": time.monotonic(), "path": self.path, "connection": self.connection_number,
            "body": base64.b64encode(body).decode(),
        }
        self.server.log.write(json.dumps(line) + "\n")
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Sink(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, log: str, certificate: str | None) -> None:
        self.connections = itertools.count(1)
        self.log = open(log, "w", buffering=1, encoding="ascii")  # noqa: SIM115
        super().__init__(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )


def main() -> None:
    with Sink(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None) as sink:
        print(sink.server_port, flush=True)
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        sys.stdin.read()


if __name__ == "__main__":
    main()
