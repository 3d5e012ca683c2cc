"""A reverse proxy of aiohttp and uvloop, as one would write it for speed: a peer of the comparison.

`python aiohttp_proxy.py PORT BACKEND-PORT...` serves on 127.0.0.1 from two processes that share the port. Each keeps
its connections to the backends, takes these in turn, and streams what is long in both directions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from itertools import cycle

import uvloop
from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web
from yarl import URL

PROCESSES = 2
SHORT = 65536  # octets of an answer that is sent in one piece
HOP_BY_HOP = ("Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade")


class ReverseProxy:
    def __init__(self, backends: list[int]) -> None:
        self.turn = cycle([f"http://127.0.0.1:{port}" for port in backends])
        self.session: ClientSession

    async def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        async with ClientSession(
            connector=TCPConnector(limit=0),
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        ) as self.session:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        fields = request.headers.copy()
        for name in HOP_BY_HOP:
            fields.popall(name, None)
        fields.add("X-Forwarded-For", request.remote or "unknown")
        async with self.session.request(
            request.method,
            URL(next(self.turn) + request.raw_path, encoded=True),
            headers=fields,
            data=request.content if request.can_read_body else None,
            allow_redirects=False,
        ) as answer:
            fields = answer.headers.copy()
            for name in HOP_BY_HOP:
                fields.popall(name, None)
            if answer.content_length is not None and answer.content_length <= SHORT:
                return web.Response(
                    status=answer.status, reason=answer.reason, headers=fields, body=await answer.read()
                )
            reply = web.StreamResponse(status=answer.status, reason=answer.reason, headers=fields)
            await reply.prepare(request)
            async for chunk in answer.content.iter_any():
                await reply.write(chunk)
            await reply.write_eof()
            return reply


def main() -> None:
    port, *backends = map(int, sys.argv[1:])
    for _ in range(PROCESSES - 1):
        if not os.fork():
            break
    uvloop.install()
    proxy = ReverseProxy(backends)
    app = web.Application()
    app.cleanup_ctx.append(proxy.lifetime)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(app, host="127.0.0.1", port=port, reuse_port=True, access_log=None, print=None, backlog=4096)


if __name__ == "__main__":
    main()
