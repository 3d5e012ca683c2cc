"""One client connection in HTTP mode: a sequence of exchanges, each balanced by itself.

All of this runs on the reactor's thread, save for the pumps that it starts. An exchange goes

    IDLE -> SEEKING -> WAITING -> ANSWERING -> IDLE again, or LINGERING, or closed
            a backend  its answer's  the answer's
                       head          body

and a granted Upgrade goes from WAITING to TUNNEL. The request's body goes its own way beside this: it is `_up_body`
while some of it is missing, however far the answer is.

A body takes turns on the reactor as long as it is short and neither side makes the other wait; beyond TURNS octets, or
when the receiver does not take what it is offered, the direction is handed to a pump, which gives it back at the end of
the body or when the source falls silent. While `_up_pump` or `_down_pump` is set, that thread owns the direction, and
nothing here receives from its source or sends to its sink; the sockets are closed when both have reported back.

A request is sent again, to the same or another backend, only while nothing of an answer has come and all of the
request is in `_up_first`; see `_may_repeat`.

Nearly all exchanges are *plain*: the request was sent whole, nothing else has happened until the answer comes, and that
comes whole. `_plain` says that it is so up to now, and whatever else happens clears it; the second half are `_pass_on`
and `on_sent`, which do what the general case would do, and between them the answer is PASSING, in the reactor's outbox.
What it leaves behind, `_begin_head` clears, or the next one that is known overwrites.

A client mostly asks for the same again. `_known` is `_request` as it came, where nothing has to be thought of when that
comes again, else b""; of one with a body, `_known_octets` is the length, else -1, and `_known_head` the head.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from balancer.backend import Backend
from balancer.config import format_address
from balancer.explain import Trail
from balancer.framing import LAST_CHUNK, Body, CloseBody, Encoder, FramingError, LengthBody, as_chunk, as_is, body_of
from balancer.frontend import Frontend, own_end
from balancer.hashing import key_of
from balancer.http1 import (
    CHUNKED,
    REMEMBERED,
    Answer,
    BadAnswer,
    HttpError,
    Request,
    answer_head,
    interim_head,
    own_answer,
)
from balancer.proxy_protocol import Address
from balancer.pump import RESET, End, Flow, relay_body
from balancer.reactor import DONTWAIT, NEVER, READ, Reactor, Sink, send_now
from balancer.stream import Stream, TlsTruncated
from balancer.tunnel import Tunnel
from balancer.upstream import NONE_AVAILABLE, Attempt, Refusal, Upstream

RECEIVE: Final = 65536  # octets asked for at once
TURNS: Final = 65536  # octets of one body that the reactor moves itself
REST_AFTER: Final = 1.0  # seconds of silence after which a pump gives its thread back
LARGE: Final = 16384  # octets that are worth not being copied
PIPELINED: Final = 65536  # octets of further requests that are taken in while one is being answered
LINGER: Final = 2.0  # seconds that a client is given to read the last answer and close
LONGEST_LOGGED: Final = 1024  # octets of a request line that could not be parsed

IDLE: Final = "idle"  # no request, or the beginning of one
SEEKING: Final = "seeking"  # no connection to a backend yet
WAITING: Final = "waiting"  # for the head of the answer
PASSING: Final = "passing"  # all of the answer is about to be sent
ANSWERING: Final = "answering"  # the answer's body is on its way
ANSWERED: Final = "answered"  # but the request's body is not through
TUNNEL: Final = "tunnel"
LINGERING: Final = "lingering"  # half-closed; what still comes is dropped
CUT: Final = "cut"  # in the middle of an answer, which must not look complete
ENDING: Final = "ending"  # over, but for the pumps, which have not reported back yet
CLOSED: Final = "closed"

_REQUEST_ID = re.compile(rb"\n(?i:x-request-id):[ \t]*([!-~]{1,64})[ \t]*\r")  # of an answer's fields
_HOST_ALONE = re.compile(rb"\[[^\]]*\]|[^:\r]*")


class HttpSession:
    """Accepted by the listener, and closed here."""

    __slots__ = (
        "_address",
        "_answer",
        "_answer_buffer",
        "_answered_after",
        "_began",
        "_buffer",
        "_client",
        "_close_framed",
        "_code",
        "_connected_after",
        "_counted",
        "_down_body",
        "_down_encode",
        "_down_pump",
        "_down_turns",
        "_extra",
        "_fd",
        "_front",
        "_head_after",
        "_known",
        "_known_head",
        "_known_octets",
        "_number",
        "_octets_in",
        "_octets_out",
        "_peer",
        "_persistent",
        "_plain",
        "_reactor",
        "_reader",
        "_reading",
        "_request",
        "_request_id",
        "_seen",
        "_sock",
        "_source",
        "_state",
        "_status",
        "_told",
        "_told_reason",
        "_tunnel",
        "_up_body",
        "_up_encode",
        "_up_failed",
        "_up_first",
        "_up_pump",
        "_up_replayable",
        "_up_turns",
        "_upstream",
        "attempt",
        "deadline",
        "key",
        "refusal",
        "trail",
        "tried",
        "wanted",
    )

    def __init__(self, front: Frontend, sock: Stream, address: tuple[str, int], number: int) -> None:
        self._front = front
        self._reactor = front.reactor
        self._sock = sock
        self._fd = sock.fileno()
        self._number = number
        self._peer = self.key = address[0]
        self._address = self._source = address  # the peer's, and the client's
        self._client = format_address(address[0], address[1])
        self._counted = False  # among the connections of its client
        self._reader = front.reader(self._peer)
        self._reading = False  # is the client's descriptor registered?
        self._state = IDLE
        self._buffer = b""  # what came from the client and is not consumed: a head begun, or pipelined requests
        self._seen = 0  # octets of it that hold no whole head
        self.deadline = NEVER
        self.attempt: Attempt | None = None
        self.tried: list[Backend] = []
        self.refusal = NONE_AVAILABLE
        self.wanted: Backend | None = None
        self._upstream: Upstream | None = None
        self._tunnel: Tunnel | None = None
        self._up_pump: Flow | None = None
        self._down_pump: Flow | None = None
        self._begin_exchange()
        self._begin_head()

    def _begin_exchange(self) -> None:
        """Forget the last exchange, save for what was asked."""
        if self.tried:
            self.tried = []
        self._plain = True
        self._connected_after = -1.0
        self._answered_after = -1.0
        self._octets_in = 0
        self._octets_out = 0
        self._status = 0
        self._code = "--"
        self._request_id = ""
        self.trail: Trail | None = None
        self._answer: Answer | None = None
        self._answer_buffer = b""
        self._extra = b""  # fields of ours for the answer, each with its end
        self._up_body: Body | None = None  # while octets of the request's body are missing
        self._up_first = b""  # of the body, framed: goes with the head
        self._up_replayable = True  # is all that was sent of the body in `_up_first`?
        self._up_failed = False  # the backend takes no more of the body
        self._down_body: Body | None = None  # of the answer, unless it came whole with its head
        self._told = False  # did we answer ourselves?
        self._close_framed = False  # does only the close tell the client where the answer's body ends?

    def _begin_head(self) -> None:
        """Forget what was asked: something else begins."""
        self._request: Request | None = None
        self._known, self._known_octets = b"", -1
        self._began = self._reactor.now  # when the request's first octet was there
        self._head_after = -1.0
        self.key = self._peer
        self.wanted = None
        if self._source is not self._address:
            self._source = self._address
            self._client = format_address(*self._address)

    # ---- what the listener asks -------------------------------------------------------------------------------

    def start(self) -> None:
        reactor = self._reactor
        self.deadline = reactor.now + self._front.timeouts.client_idle
        reactor.timed.add(self)
        self._resume_reading()
        admission = self._front.admission
        if not admission.lets_in(self._peer):
            self._refuse(HttpError(403, "this address is not let in"), "PR")
        elif admission.counts(self._peer):
            self._counted = admission.connected(self._peer)
            if not self._counted:
                self._refuse(HttpError(429, "too many connections from this address"), "PR")

    def drain(self) -> None:
        """Answer one more request at most, and say with its answer that it was the last."""
        self._known, self._known_octets = b"", -1
        if self._state is not IDLE:
            self._persistent = False
        elif not self._head_begun:
            self.deadline = min(self.deadline, self._reactor.now + self._front.drain_grace)

    def configured(self) -> None:
        """Read and judge the next request by the settings as they are now."""
        self._reader = self._front.reader(self._peer)
        self._known, self._known_octets = b"", -1

    def kill(self) -> None:
        if self._tunnel is not None:
            self._tunnel.kill()
        elif self._state is IDLE or self._state is LINGERING:
            self._close()
        elif self._state is not CLOSED:
            self._cut("K")

    # ---- the reactor's calls ----------------------------------------------------------------------------------

    def on_client(self, mask: int) -> None:
        """The client's socket is readable: requests, the body of one, or its end."""
        try:
            data = self._sock.recv(RECEIVE, DONTWAIT)
        except BlockingIOError:
            return
        except TlsTruncated:
            data = b""  # many clients leave without TLS's goodbye; a request says by itself whether it is whole
        except OSError:
            self._client_lost()
            return
        if self._state is IDLE and not self._buffer and data:
            if data == self._known:
                self._began = self._reactor.now
                if not self._front.guarded or self._let_in():
                    self._ask()
            elif len(data) == self._known_octets and data.startswith(self._known_head):
                self._began = self._reactor.now
                if not self._front.guarded or self._let_in():
                    self._up_first = data[len(self._known_head) :]
                    self._octets_in = len(self._up_first)
                    self._ask()
            else:
                self._buffer = data
                self._begin_head()
                self._next_request()
        elif not data:
            self._client_ended()
        elif self._state is IDLE:
            self._buffer += data
            self._next_request()
        elif self._up_body is not None:
            self._upload(data)
        elif self._state is not LINGERING:
            self._plain = False
            self._buffer += data
            if len(self._buffer) > PIPELINED:
                self._stop_reading()

    def on_backend(self, mask: int) -> None:
        """The backend's socket is readable: the answer's head, its body, or the end of both."""
        upstream = self._upstream
        assert upstream is not None
        try:
            data = upstream.sock.recv(RECEIVE, DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            if self._state is ANSWERING:
                self._cut("S")
                return
            data = b""
        answers = upstream.backend.answers
        if self._plain and len(data) == answers.whole and data.startswith(head := answers.head):
            assert answers.answer is not None
            self._pass_on(upstream, answers.answer, data[len(head) :])
            return
        if len(data) < RECEIVE:
            self._reactor.ready.discard(upstream.fd)  # that was all: who is given this connection next need not look
        if self._state is WAITING:
            if data:
                self._read_answer(data)
            else:
                self._no_answer()
        elif self._state is ANSWERING:
            self._download(data)
        else:
            # The answer is complete, only the request's body is not: a backend that closes wants no more of it.
            self._up_failed = True
            self._reactor.remove(upstream.fd)
            if self._up_pump is not None:
                _shut(upstream.sock, socket.SHUT_WR)
            else:
                self._finish_exchange()

    def expired(self, now: float) -> None:
        state = self._state
        if state is IDLE:
            if self._head_begun:
                self._refuse(HttpError(408, "the request's head did not end in time"), "cR")
            else:
                self._close()
        elif state is SEEKING:
            self._front.upstreams.cancel(self)
            self.unserved(*self.refusal)
        elif state is WAITING:
            if self._up_body is not None and not self._waits_for_continue:
                self._fail(408, "cD", "the request's body did not come in time")
            else:
                self._repeat_or_fail((504, "sH", f"backend {self._backend_id} did not answer in time"))
        elif state is ANSWERING:
            self._cut("s")
        elif state is ANSWERED:
            self._up_failed = True
            self._finish_exchange()
        else:
            self._close()

    def backend_hung(self, backend: Backend) -> None:
        """Its probes time out: what it has not answered is not waited for any longer."""
        if self._state is WAITING and self._upstream is not None and self._upstream.backend is backend:
            self._repeat_or_fail((504, "DH", f"backend {backend.id} hangs and was taken out"))

    def crashed(self, error: Exception) -> None:
        """A bug: this exchange is lost, and nothing else is."""
        if self._state is CLOSED:
            return
        if self._state is IDLE and not self._buffer:
            self._begin_exchange()
            self._begin_head()
        if self._tunnel is not None:
            self._tunnel.kill()
        elif self._state in (SEEKING, WAITING) and not self._octets_out:
            self._fail(500, "IH", "an error within the balancer")
        else:
            self._cut("I")

    # ---- the request ------------------------------------------------------------------------------------------

    def _next_request(self) -> None:
        """Begin the exchange that the buffer begins with, if the head is whole."""
        if self._state is not IDLE:
            return
        try:
            found = self._reader.read(self._buffer, self._seen)
        except HttpError as error:
            self._refuse(error, "LR" if error.status == 200 else "PR")
            return
        if found is None:
            self._seen = len(self._buffer)
            self.deadline = self._began + self._front.timeouts.request_head
            return
        request, length = found
        rest = self._buffer[length:]  # which is empty for nearly all, and costs nothing then
        self._seen = 0
        self._request = request
        front = self._front
        self._persistent = request.persistent and not front.draining
        if front.guarded and not self._let_in():
            return
        if request.length == 0:
            self._buffer = rest
        elif request.length == len(rest):
            self._buffer = b""
            self._up_first = rest
            self._octets_in = request.length
        elif not self._begin_body(request, rest):
            return
        if front.keyed and not front.guarded:
            self._find_key(request)
        self._plain = request.plain and not self._buffer
        if self._plain and self._persistent and length <= REMEMBERED:
            if request.length == 0:
                self._known = request.received
            elif request.length > 0:
                self._known_head = request.received
                self._known_octets = len(request.received) + request.length
        self._ask()

    def _ask(self) -> None:
        """The request is there, with what had come of its body: find a backend for it."""
        self._head_after = self._reactor.now - self._began
        self._state = SEEKING
        upstream = self._front.upstreams.obtain(self)
        if upstream is not None:
            self.connected(upstream)

    def _let_in(self) -> bool:
        """Find out who the client is, and whether it may ask for this. False where it was refused."""
        front, request = self._front, self._request
        assert request is not None
        admission = front.admission
        client = admission.client(self._peer, request)
        source = self._address if client == self._peer else (client, 0)  # of its port the proxy says nothing
        if source != self._source:
            self._source = source
            self._client = format_address(*source)
        self.key = client
        refusal = admission.refusal(client, self._reactor.now) or admission.body_refusal(request)
        if refusal is not None:
            self._refuse(refusal, "PR")
        elif front.redirects_to is not None:
            self._refuse(_redirection(request, front.redirects_to), "LR")
        else:
            if front.keyed:
                self._find_key(request)
            return True
        return False

    def _find_key(self, request: Request) -> None:
        """What the policy goes by, and which backend this client had before."""
        front = self._front
        self.key = self._source[0]
        if front.hash_on:
            self.key = key_of(front.hash_on, request.target, request.head) or self.key
        if front.sticky is not None:
            value = front.sticky.find(request.head)
            self.wanted = front.sticks.get(value) if value is not None else None

    def _begin_body(self, request: Request, data: bytes) -> bool:
        """Take what is already there of the body. False when it broke its framing and was refused."""
        self._buffer = b""
        body = body_of(request.length, self._front.limits.body_bytes)
        self._up_body = body
        self._up_turns = TURNS  # octets at which the reactor has had its turns
        self._up_encode: Encoder = as_chunk if request.length == CHUNKED else as_is
        if data:
            try:
                content = body.feed(data)
            except FramingError as error:
                self._refuse(HttpError(error.status, str(error)), "PR")
                return False
            self._octets_in = len(content)
            self._up_first = self._up_encode(content)
            if body.done:
                self._body_complete(body)
                if request.length == CHUNKED:
                    self._up_first += LAST_CHUNK
        return True

    def _body_complete(self, body: Body) -> None:
        self._up_body = None
        self._buffer += body.rest

    @property
    def _waits_for_continue(self) -> bool:
        return self._request is not None and self._request.expect and self._octets_in == 0

    def connected(self, upstream: Upstream) -> None:
        """There is a connection: send the head and what there is of the body."""
        request, front, reactor = self._request, self._front, self._reactor
        assert request is not None
        now = reactor.now
        self._upstream = upstream
        # Once octets of it have left it may not be sent again, so look before.
        sink = upstream.sock if request.idempotent or not upstream.reused else upstream
        if front.sticky is not None:
            self._extra = b"" if upstream.backend is self.wanted else front.sticky.set_cookie(upstream.backend)
        self._connected_after = now - self._began
        data = request.head + self._up_first if self._up_first else request.head
        self._state = WAITING
        if self._up_body is None:
            self.deadline = now + front.timeouts.server
            if self.trail is not None:
                self._plain = False
            reactor.outbox.append((sink, data, self, False))
            return
        self._plain = False
        self.deadline = now + (front.timeouts.server if self._waits_for_continue else front.timeouts.client)
        self._resume_reading()
        rest = send_now(sink, data)
        if rest != b"":
            self.on_unsent(sink, rest)

    def on_unsent(self, sink: Sink, rest: bytes | None) -> None:
        """A request, or a plain exchange's answer, was not sent whole; None: nothing was, or will be."""
        if self._state is PASSING:
            if rest is None:
                self._client_lost()
            else:
                self._pass_on_slowly(rest)
        elif self._upstream is not None and sink in (self._upstream, self._upstream.sock):
            if rest is not None:
                self._pump_up(rest)
            elif self._upstream.reused:
                self._renew(self._upstream)
            else:
                self._no_answer()

    def ends(self) -> tuple[Address, Address]:
        return self._source, own_end(self._sock)

    def unserved(self, status: int, code: str, reason: str) -> None:
        """No backend for this request."""
        self._fail(status, code, reason)

    # ---- the request's body -----------------------------------------------------------------------------------

    def _upload(self, data: bytes) -> None:
        """A turn of the request's body on the reactor."""
        body = self._up_body
        assert body is not None
        try:
            content = body.feed(data)
        except FramingError as error:
            self._fail(error.status, "PD", str(error))
            return
        self._octets_in += len(content)
        framed = self._up_encode(content)
        if body.done:
            self._body_complete(body)
            if self._up_encode is as_chunk:
                framed += LAST_CHUNK
        upstream = self._upstream
        if upstream is None:
            # Still connecting: it goes with the head, and the client is not listened to for a while.
            self._up_first += framed
            if len(self._up_first) > TURNS:
                self._stop_reading()
            return
        self._up_replayable = False
        sent = len(framed)
        if not self._up_failed:
            try:
                sent = upstream.sock.send(framed, DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                # The backend takes no more, but may still answer; the client is read on, so that it can hear that.
                self._up_failed = True
        wants_more = self._up_body is not None and not self._up_failed
        if sent < len(framed) or (wants_more and self._octets_in > self._up_turns):
            self._pump_up(framed[sent:])
        elif not wants_more:
            self._upload_complete()
        elif self._state is WAITING:
            self.deadline = self._reactor.now + self._front.timeouts.client

    def _pump_up(self, first: bytes) -> None:
        """Hand the rest of the request to a pump: what could not be sent, then what still comes from the client."""
        upstream = self._upstream
        assert upstream is not None
        self._up_replayable = False
        self._stop_reading()
        self.deadline = NEVER
        flow = Flow(self._sock, upstream.sock)
        body = self._up_body or LengthBody(0)
        last = LAST_CHUNK if self._up_body is not None and self._up_encode is as_chunk else b""
        timeouts = self._front.timeouts
        flow.wait_at_most(min(REST_AFTER, timeouts.client), timeouts.server)
        encode = self._up_encode if self._up_body is not None else as_is
        work = partial(relay_body, flow, body, encode, first, last)
        self._up_pump = flow
        if not self._run_pump("up", work, self._up_pump_ended):
            self._up_pump = None
            self._fail(503, "RH", "no thread for the request's body")

    def _up_pump_ended(self) -> None:
        flow = self._up_pump
        assert flow is not None
        self._up_pump = None
        self._octets_in += flow.octets
        if self._state is ENDING:
            self._close_exchange()
            return
        end = flow.end
        if end is End.DONE:
            if self._up_body is not None:
                self._body_complete(self._up_body)
            self._resume_reading()
            self._upload_complete()
        elif end is End.SINK_LOST:
            # The backend takes no more. Its answer may be on its way, and the client may still be sending.
            self._up_failed = True
            self._resume_reading()
            self._upload_complete()
        elif end is End.SINK_STUCK:
            self._fail(504, "sD", f"backend {self._backend_id} does not take the request's body")
        elif end is End.BAD:
            self._fail(flow.status, "PD", flow.problem)
        elif end is End.FAILED:
            self._fail(500, "ID", "an error within the balancer")
        elif end is End.SILENT and self._front.timeouts.client > REST_AFTER:
            self._up_turns = self._octets_in + TURNS
            self._resume_reading()
            if self._state is not ANSWERING:
                self.deadline = self._reactor.now + self._front.timeouts.client - REST_AFTER
        elif end is End.SILENT:
            self._fail(408, "cD", "the request's body did not come in time")
        else:
            self._fail(400, "CD", "the request's body ended before its end")

    def _upload_complete(self) -> None:
        """Nothing more of the request will be sent to the backend."""
        if self._state is ANSWERED:
            self._finish_exchange()
        elif self._state is WAITING:
            self.deadline = min(self.deadline, self._reactor.now + self._front.timeouts.server)

    # ---- the answer -------------------------------------------------------------------------------------------

    def _read_answer(self, data: bytes) -> None:
        upstream, request = self._upstream, self._request
        assert upstream is not None
        assert request is not None
        buffer = self._answer_buffer
        seen = len(buffer)
        buffer = buffer + data if seen else data
        try:
            found = upstream.backend.answers.read(buffer, seen)
            while found is not None and found[0].status < 200:
                answer, length = found
                if answer.status == 101:
                    self._begin_tunnel(answer, buffer[length:])
                    return
                if request.minor and not self._send_interim(answer):
                    return
                buffer = buffer[length:]
                found = upstream.backend.answers.read(buffer) if buffer else None
        except BadAnswer as error:
            self._fail(502, "PH", error.reason)
            return
        if found is None:
            self._plain = False
            self._answer_buffer = buffer
            return
        answer, length = found
        if self._plain and len(buffer) - length == answer.length and answer.plain:
            self._pass_on(upstream, answer, buffer[length:])
            return
        now = self._reactor.now
        self._answered_after = after = now - self._began
        upstream.backend.answered_in(after - self._connected_after, now)
        self._begin_answer(answer, request, buffer, length)

    def _pass_on(self, upstream: Upstream, answer: Answer, body: bytes) -> None:
        """The answer of a plain exchange, all of which is here."""
        reactor = self._reactor
        now = reactor.now
        after = now - self._began
        upstream.backend.answered_in(after - self._connected_after, now)
        self._answer = answer
        if after >= self._front.slow:
            assert self._request is not None
            self._answered_after = after
            self._begin_answer(answer, self._request, body, 0)
            return
        self._state = PASSING
        head = answer.plain if self._persistent else answer.closing
        if self._extra:
            head = b"%b%b\r\n" % (head[:-2], self._extra)
            self._extra = b""
        reactor.outbox.append((self._sock, head + body, self, True))

    def on_sent(self) -> None:
        """A plain exchange has ended: count it, log it, and be as before it. What `_complete` does, in less time."""
        front, reactor = self._front, self._reactor
        upstream, answer, request = self._upstream, self._answer, self._request
        assert upstream is not None
        assert answer is not None
        assert request is not None
        backend, now, head, octets_in = upstream.backend, reactor.now, self._head_after, self._octets_in
        after = now - self._began
        backend.tally.add(answer.status, octets_in, answer.length, after)
        front.record(
            (
                reactor.wall,
                self._client,
                request.line,
                answer.status,
                answer.length,
                backend.id,
                head,
                head,
                self._connected_after,
                after,
                after,
                "--",
                1,
                "",
                octets_in,
                len(front.sessions),
                front.pool.in_hand,
                backend.active,
                0,
            )
        )
        self._upstream = None
        if answer.reusable:
            front.upstreams.keep(upstream)
        else:
            front.upstreams.discard(upstream)
        if self._plain and self._persistent:
            self._state = IDLE
            self._connected_after = -1.0
            self.deadline = now + front.timeouts.client_idle
            if octets_in:
                self._octets_in = 0
                self._up_first = b""
        else:
            self._plain = False
            self._go_on(hasty=not self._buffer)

    def _pass_on_slowly(self, rest: bytes) -> None:
        """The client does not take all of a plain answer at once."""
        self._leave_plain()
        assert self._answer is not None
        self._octets_out = self._answer.length
        self._state = ANSWERING
        self._down_body = LengthBody(0)
        self._down_encode = as_is
        self._pump_down(rest, b"")

    def _leave_plain(self) -> None:
        """What was passed on as a plain exchange's answer is none: note what is noted of others."""
        assert self._answer is not None
        self._plain = False
        self._status = self._answer.status
        self._answered_after = self._reactor.now - self._began

    def _begin_answer(self, answer: Answer, request: Request, buffer: bytes, start: int) -> None:
        """The general case: work out both framings, and send the head and the body's beginning, `buffer[start:]`."""
        bodiless = request.method == b"HEAD" or answer.status in (204, 304)
        length = 0 if bodiless else answer.length
        framing: int | None = length
        encode = as_is
        if bodiless:
            framing = None if answer.length < 0 or answer.status == 204 else answer.length
        elif length < 0:
            if request.minor:
                framing = CHUNKED
                encode = as_chunk
            else:
                framing = None
                self._close_framed = True
        if self._up_body is not None or self._up_pump is not None or self._up_failed or self._close_framed:
            self._persistent = False
        body = body_of(length)
        framed: bytes | memoryview
        try:
            if isinstance(body, LengthBody) and LARGE <= len(buffer) - start < length:
                framed = memoryview(buffer)[start:]
                self._octets_out = len(framed)
                body.skipped(len(framed))
            else:
                content = body.feed(buffer[start:])
                self._octets_out = len(content)
                framed = encode(content)
        except FramingError as error:
            self._fail(502, "PH", f"in the answer of backend {self._backend_id}: {error}")
            return
        self._plain = False
        self._answer = answer
        self._status = answer.status
        self._state = ANSWERING
        if self.trail is not None or self._answered_after >= self._front.slow:
            # It can be explained, so it gets a name; unless the backend gave it one.
            named = _REQUEST_ID.search(b"\n" + answer.fields)
            self._request_id = named[1].decode() if named else self._front.request_id()
        self._down_body = body
        self._down_turns = TURNS
        self._down_encode = encode
        now, name = self._reactor.wall, self._request_id
        head = answer_head(answer, framing, request.minor, self._persistent, now, name, self._extra)
        self._send_down(b"".join((head, framed)))

    def _download(self, data: bytes) -> None:
        """A turn of the answer's body on the reactor. No data means that the backend has closed."""
        body = self._down_body
        assert body is not None
        content = b""
        try:
            if data:
                content = body.feed(data)
            else:
                body.eof()
        except FramingError:
            self._cut("P" if data else "S")
            return
        self._octets_out += len(content)
        self._send_down(self._down_encode(content))

    def _send_down(self, out: bytes) -> None:
        """Send the client a piece of the answer, and go on as that and the body's state demand."""
        body = self._down_body
        assert body is not None
        last = LAST_CHUNK if self._down_encode is as_chunk else b""
        if body.done and last:
            out += last
            last = b""
        sent = 0
        if out:
            try:
                sent = self._sock.send(out, DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._client_lost()
                return
        if sent < len(out) or (not body.done and self._octets_out > self._down_turns):
            self._pump_down(out[sent:], last)
        elif body.done:
            self._finish_exchange()
        else:
            self.deadline = self._reactor.now + self._front.timeouts.server

    def _pump_down(self, first: bytes, last: bytes) -> None:
        """Hand the rest of the answer to a pump."""
        upstream, body = self._upstream, self._down_body
        assert upstream is not None
        assert body is not None
        self.deadline = NEVER
        self._reactor.remove(upstream.fd)
        flow = Flow(upstream.sock, self._sock)
        timeouts = self._front.timeouts
        flow.wait_at_most(min(REST_AFTER, timeouts.server), timeouts.client)
        work = partial(relay_body, flow, body, self._down_encode, first, last)
        self._down_pump = flow
        if not self._run_pump("down", work, self._down_pump_ended):
            self._down_pump = None
            self._cut("R")

    def _down_pump_ended(self) -> None:
        flow, upstream = self._down_pump, self._upstream
        assert flow is not None
        assert upstream is not None
        self._down_pump = None
        self._octets_out += flow.octets
        if self._state is ENDING:
            self._close_exchange()
            return
        end = flow.end
        if end is End.DONE:
            self._reactor.add(upstream.fd, READ, self.on_backend)
            self._finish_exchange()
        elif end is End.SILENT and self._front.timeouts.server > REST_AFTER:
            self._down_turns = self._octets_out + TURNS
            self._reactor.add(upstream.fd, READ, self.on_backend)
            self.deadline = self._reactor.now + self._front.timeouts.server - REST_AFTER
        else:
            self._cut(_CUT_BY[end])

    def _send_interim(self, answer: Answer) -> bool:
        """Pass a 1xx on. False when the client could not be told."""
        self._plain = self._up_replayable = False  # the client has seen something of this answer
        head = interim_head(answer, self._extra if answer.status == 101 else b"")
        try:
            if self._sock.send(head, DONTWAIT) == len(head):
                return True
        except BlockingIOError:
            self._cut("c")
        except OSError:
            self._client_lost()
        else:
            self._cut("c")
        return False

    def _no_answer(self) -> None:
        """The backend closed, and no head came."""
        upstream = self._upstream
        assert upstream is not None
        if upstream.reused and self._may_repeat:
            # It may have been closed before the request was there.
            self._renew(upstream)
        else:
            self._repeat_or_fail((502, "SH", f"backend {self._backend_id} closed the connection without an answer"))

    def _renew(self, upstream: Upstream) -> None:
        """A kept connection was closed: its backend has another chance."""
        self._seek_again()
        self._front.upstreams.renew(self, upstream)

    @property
    def _may_repeat(self) -> bool:
        """May the request be sent again? If that changes nothing (RFC 9110 section 9.2.2), and if it is still here."""
        request = self._request
        assert request is not None
        return (
            request.idempotent
            and self._up_replayable
            and self._up_body is None
            and self._up_pump is None
            and not self._answer_buffer
        )

    def _repeat_or_fail(self, refusal: Refusal) -> None:
        upstream = self._upstream
        assert upstream is not None
        if self._may_repeat:
            self._seek_again()
            self._front.upstreams.seek_another(self, upstream, refusal)
        else:
            self._fail(*refusal)

    def _seek_again(self) -> None:
        self._plain = False
        self._upstream = None
        self._state = SEEKING
        self._connected_after = -1.0
        self.deadline = NEVER

    # ---- the end of an exchange -------------------------------------------------------------------------------

    def _finish_exchange(self) -> None:
        """The answer is complete. When the request is too, log, and turn to the next one."""
        if self._up_pump is not None or (self._up_body is not None and not self._up_failed):
            self._state = ANSWERED
            self.deadline = NEVER if self._up_pump is not None else self._reactor.now + self._front.timeouts.client
            return
        upstream, answer, body = self._upstream, self._answer, self._down_body
        assert upstream is not None
        assert answer is not None
        whole = self._up_body is None and not self._up_failed
        # Octets behind the answer, or a body that only a close could end, leave nothing to be used again.
        clean = body is None or (body.done and not body.rest and not isinstance(body, CloseBody))
        self._complete(upstream, answer.reusable and whole and clean)

    def _complete(self, upstream: Upstream, reusable: bool) -> None:
        """Both messages are through: log, give the backend's connection back, and turn to what comes next."""
        self._log()
        self._upstream = None
        if reusable:
            self._front.upstreams.keep(upstream)
        else:
            self._front.upstreams.discard(upstream)
        if self._persistent:
            self._rest()
        else:
            self._go_on(hasty=self._up_body is None and not self._up_failed and not self._buffer)

    def _fail(self, status: int, code: str, reason: str) -> None:
        """Answer the request ourselves, or, if an answer has begun, cut it."""
        if self._state in (ANSWERING, ANSWERED):
            self._cut(code[0])
            return
        self._front.upstreams.cancel(self)
        if self._up_body is not None or self._up_pump is not None or status < 500:
            self._persistent = False
        self._code = code
        self._answer_ourselves(status, reason)
        self._end_exchange()

    def _refuse(self, error: HttpError, code: str) -> None:
        """Refuse what is no request. Nothing of it has reached a backend."""
        self._persistent = False
        self._code = code
        self._answer_ourselves(error.status, error.reason, error.fields)
        self._end_exchange()

    def _answer_ourselves(self, status: int, reason: str, fields: Sequence[str] = ()) -> None:
        request = self._request
        self._status = status
        self._request_id = self._front.request_id()
        answer = own_answer(
            status,
            reason,
            self._code,
            self._request_id,
            self._reactor.wall,
            persistent=self._persistent,
            minor=request.minor if request else 1,
            body=request is None or request.method != b"HEAD",
            fields=fields,
        )
        self._told = True
        self._told_reason = reason
        self._octets_out = len(answer) - answer.index(b"\r\n\r\n") - 4
        try:
            if self._sock.send(answer, DONTWAIT) < len(answer):
                self._persistent = False
        except OSError:
            self._persistent = False  # it does not listen any more, so there is nobody to tell

    def _cut(self, who: str) -> None:
        """End the exchange in the middle. `who` is the first letter of its termination code."""
        if self._state is ENDING:
            return
        if self._state is PASSING:
            self._leave_plain()
        self._front.upstreams.cancel(self)
        self._code = who + _PHASES.get(self._state, "D")
        self._persistent = False
        if self._close_framed or who == "c":
            # A close is all that tells this client where the body ends, so it must not look like one; or the client
            # takes nothing, and what waits for it would fill the kernel's memory long after we have forgotten it.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._state = CUT
        self._end_exchange()

    def _end_exchange(self) -> None:
        """Whatever still runs for this exchange ends; then it is closed."""
        if self._up_pump is None and self._down_pump is None:
            self._close_exchange()
            return
        cut = self._state is CUT
        self._state = ENDING
        self.deadline = NEVER
        if self._upstream is not None:
            _shut(self._upstream.sock, socket.SHUT_RDWR)
        # One that was answered is still read, by the pump and then by `_linger`, or a reset would take the answer away.
        _shut(self._sock, socket.SHUT_RDWR if cut else socket.SHUT_WR)

    def _close_exchange(self) -> None:
        """Log it, close the backend's side, and turn to whatever is left to say to the client."""
        if self._up_pump is not None or self._down_pump is not None:
            return  # the other one has not reported back yet
        self._log()
        if self._upstream is not None:
            self._front.upstreams.discard(self._upstream)
            self._upstream = None
        if self._told:
            self._go_on(hasty=False)
        else:
            self._close()

    def _go_on(self, *, hasty: bool) -> None:
        """The exchange is over: rest, or close. `hasty`: the client has said nothing that was not answered."""
        if self._persistent:
            self._rest()
        elif hasty and self._request is not None and not self._request.persistent:
            self._close()  # the client knows that this was the last, and a close loses nothing
        else:
            self._linger()

    def _rest(self) -> None:
        """Wait for the next request, or begin with the one that is there already."""
        self._state = IDLE
        self._begin_exchange()
        if not self._reading:
            self._resume_reading()
        if self._buffer:
            self._begin_head()
            # Not from here: a client may have sent thousands of requests at once, each a level of recursion.
            self._reactor.defer(self._next_request)
        else:
            self.deadline = self._reactor.now + self._front.timeouts.client_idle
            if self._front.draining:
                self.drain()

    def _linger(self) -> None:
        """A staged close (RFC 9112 section 9.6): a reset would destroy what the client has not read yet."""
        self._state = LINGERING
        self._buffer = b""
        self._up_body = None  # whatever still comes of it is dropped
        self.deadline = self._reactor.now + LINGER
        _shut(self._sock, socket.SHUT_WR)
        if not self._reading:
            self._resume_reading()

    def _close(self) -> None:
        self._state = CLOSED
        if self._reading:
            self._reading = False
            self._reactor.forget(self._fd)
        self._reactor.timed.discard(self)
        self._sock.close()
        if self._counted:
            self._front.admission.disconnected(self._peer)
        self._front.on_closed(self)

    def _client_lost(self) -> None:
        """The client reset the connection."""
        if self._state is LINGERING or (self._state is IDLE and not self._head_begun):
            self._close()
        elif self._state is not ENDING:
            self._cut("C")

    def _client_ended(self) -> None:
        """The client sends no more. That cancels nothing that it asked for whole (RFC 9112 section 9.6)."""
        if self._state is LINGERING or (self._state is IDLE and not self._head_begun):
            self._close()
        elif self._state is IDLE:
            self._next_request()  # which may be there whole, and only put off
            if self._state is IDLE:
                self._refuse(HttpError(400, "the connection ended within the head"), "CR")
        elif self._up_body is not None:
            self._fail(400, "CD", "the request's body ended before its end")
        else:
            self._stop_reading()

    # ---- a granted Upgrade ------------------------------------------------------------------------------------

    def _begin_tunnel(self, answer: Answer, first: bytes) -> None:
        upstream, request = self._upstream, self._request
        assert upstream is not None
        assert request is not None
        if not request.upgrade or self._up_body is not None or self._up_pump is not None:
            self._fail(502, "PH", f"backend {self._backend_id} switched to a protocol that nobody asked for")
            return
        self._answered_after = self._reactor.now - self._began
        self._status = 101
        if not self._send_interim(answer):
            return
        self._state = TUNNEL
        self.deadline = NEVER
        self._stop_reading()
        self._reactor.remove(upstream.fd)
        self._tunnel = Tunnel(
            self._reactor,
            self._front.pumps,
            self._sock,
            upstream.sock,
            name=f"conn-{self._number}",
            idle=self._front.timeouts.tunnel,
            on_end=self._tunnel_ended,
        )
        self._tunnel.start(up_first=self._buffer, down_first=first)

    def _tunnel_ended(self, tunnel: Tunnel) -> None:
        self._tunnel = None
        self._octets_in = tunnel.up.flow.octets
        self._octets_out = tunnel.down.flow.octets
        self._code = tunnel.code
        self._state = CUT
        self._close_exchange()

    # ---- small things -----------------------------------------------------------------------------------------

    @property
    def _head_begun(self) -> bool:
        """Is there more than an empty line, which is the beginning of nothing (RFC 9112 section 2.2)?"""
        return self._buffer not in (b"", b"\r", b"\r\n")

    @property
    def _backend_id(self) -> str:
        if self._upstream is not None:
            return self._upstream.backend.id
        return self.tried[-1].id if self.tried else "-"

    def _run_pump(self, way: str, work: Callable[[], None], ended: Callable[[], None]) -> bool:
        """Start a pump that reports back to `ended`. False when there is no thread for it."""
        try:
            self._front.pumps.run(f"conn-{self._number}-{way}", partial(_pump, work, self._reactor, ended))
        except RuntimeError:
            return False
        return True

    def _stop_reading(self) -> None:
        self._plain = False
        if self._reading:
            self._reading = False
            self._reactor.remove(self._fd)

    def _resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._reactor.add(self._fd, READ, self.on_client)

    def _log(self) -> None:
        """Count the exchange, log it, and keep what there is to explain."""
        front, reactor, request, upstream, trail = self._front, self._reactor, self._request, self._upstream, self.trail
        total = reactor.now - self._began
        odd = self._code != "--" or trail is not None or self._answered_after >= front.slow
        if odd and not self._request_id:
            self._request_id = front.request_id()
        if upstream is not None:
            backend = upstream.backend
            name, active, tally = backend.id, backend.active, backend.tally
        else:
            name, active, tally = self._backend_id, 0, front.tally
        tally.add(self._status, self._octets_in, self._octets_out, total, self._code)
        leased_after = self._head_after if self._connected_after >= 0.0 or self.tried else -1.0
        if trail is not None and trail.leased_at is not None:
            leased_after = trail.leased_at - self._began
        record = (
            reactor.wall,
            self._client,
            request.line if request is not None else self._buffer.partition(b"\r\n")[0][:LONGEST_LOGGED],
            self._status,
            self._octets_out,
            name,
            self._head_after,
            leased_after,
            self._connected_after,
            self._answered_after,
            total,
            self._code,
            len(self.tried) + (upstream is not None),
            self._request_id,
            self._octets_in,
            len(front.sessions),
            front.pool.in_hand,
            active,
            trail.queued if trail is not None else 0,
        )
        front.record(record)
        if odd:
            front.explain(record, self._told_reason if self._told else "", self._began, trail)


class PlainHttpSession(HttpSession):
    """A client that speaks HTTP where TLS is spoken, and is told so."""

    __slots__ = ()

    def start(self) -> None:
        super().start()
        if self._state is IDLE:
            self._refuse(HttpError(400, "plain HTTP was sent to a port that speaks HTTPS; use https://"), "PR")


def _redirection(request: Request, port: bytes) -> HttpError:
    """Where it is to be asked for: the same at https://, at this port as it is written behind the host."""
    host = _HOST_ALONE.match(request.head.partition(b"\r\nHost: ")[2])
    assert host is not None
    location = b"https://%b%b%b" % (host[0], port, request.target)
    return HttpError(308, "this is served over HTTPS", f"Location: {location.decode('ascii', 'backslashreplace')}")


def _pump(work: Callable[[], None], reactor: Reactor, ended: Callable[[], None]) -> None:
    """The body of a pump's thread: whatever happens, the session hears that it is over."""
    try:
        work()
    finally:
        reactor.call_soon(ended)


def _shut(sock: Stream, how: int) -> None:
    with suppress(OSError):  # it is gone already
        sock.shutdown(how)


# How the end of a pump that moved an answer is told: by the first letter of the code.
_CUT_BY: Final = {
    End.CUT: "S",
    End.SOURCE_LOST: "S",
    End.SILENT: "s",
    End.BAD: "P",
    End.SINK_LOST: "C",
    End.SINK_STUCK: "c",
    End.FAILED: "I",
}
# Where it ended: the second letter.
_PHASES: Final = {IDLE: "R", SEEKING: "C", WAITING: "H", ANSWERING: "D", ANSWERED: "D", TUNNEL: "D"}
