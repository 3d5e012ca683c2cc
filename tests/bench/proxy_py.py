"""proxy.py as a reverse proxy: a peer of the comparison.

`python proxy_py.py PORT BACKEND-PORT...` serves on 127.0.0.1 from two processes. Its own static routes open a
connection to the backend for each request and lose the last one, which ends the process that serves the second
request of a client; so this plugin keeps one connection to a backend for each client's.
"""

from __future__ import annotations

import os
import sys
from itertools import cycle

from proxy import main
from proxy.core.connection import TcpServerConnection
from proxy.http.parser import HttpParser
from proxy.http.server import ReverseProxyBasePlugin

BACKENDS = "PROXY_PY_BACKENDS"  # the plugin is imported again by each process, which inherits the environment

turn = cycle(os.environ.get(BACKENDS, "").split())


class Spread(ReverseProxyBasePlugin):
    upstream: TcpServerConnection | None = None

    def routes(self) -> list[str]:
        return ["/"]

    def handle_route(self, request: HttpParser, pattern: object) -> TcpServerConnection:
        if self.upstream is None:
            self.upstream = TcpServerConnection("127.0.0.1", int(next(turn)))
            self.upstream.connect()
        request.add_header(b"X-Forwarded-For", (self.client.addr or ("unknown",))[0].encode())
        self.upstream.queue(memoryview(request.build()))
        return self.upstream


if __name__ == "__main__":
    port, *backends = sys.argv[1:]
    os.environ[BACKENDS] = " ".join(backends)
    serve = ["--hostname", "127.0.0.1", "--port", port, "--num-workers", "2", "--backlog", "4096"]
    sys.argv[1:] = [*serve, "--log-level", "ERROR", "--enable-reverse-proxy", "--plugins", "proxy_py.Spread"]
    main()
