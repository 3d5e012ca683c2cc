#!/usr/bin/env python3
"""The load balancer, as a program: flags, configuration, signals. The engine is in `balancer/`."""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from balancer.balancer import LoadBalancer
from balancer.config import Config, ConfigError, describe, find, from_addresses, load, override, refuse_contradictions
from balancer.gate import find_token
from balancer.keys import Keys
from balancer.pickers import make_picker
from balancer.reload import difference
from balancer.remote import Unreachable, explanation, running_config
from balancer.version import __version__

HERE = Path(__file__).resolve().parent


class Flags(argparse.ArgumentParser):
    """One line for a mistake, where argparse would print the usage too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    flags = parse_flags(arguments)
    try:
        config = configure(flags)
        token = find_token(config.admin, os.environ)
        Keys(config)  # for what may be wrong with its files
        if flags.check or flags.diff:
            return check(config, flags.diff)
        if flags.explain is not None:
            return explain(config, flags.explain)
    except ConfigError as error:
        return fail(str(error), 2)
    signals = Signals()
    sys.unraisablehook = report_unraisable
    try:
        # The file that it was, even if one in the working directory has gone and there is another beside lb.py.
        again = partial(configure, flags, Path(config.source))
        balancer = LoadBalancer(config, load=again, token=token)
        balancer.start()
    except OSError as error:
        return fail(str(error), 1)
    print(f"lb: listening on {balancer.url}")
    print(f"lb: {balancer.strength}, {config.algorithm}, log {config.log.file or 'off'}")
    print(f"lb: status page {balancer.admin_url or 'off'}", flush=True)
    # A request makes no cycles, but the young objects of thousands would be searched for some: 5% of the time.
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    while not (numbers := signals.wait()) & Signals.ENDING:
        if signal.SIGHUP in numbers:
            balancer.look_at_file()
        if signal.SIGUSR1 in numbers:
            balancer.reopen_log()
    stop(balancer, signals)
    return 0


def stop(balancer: LoadBalancer, signals: Signals) -> None:
    """Let what is in hand end, for as long as that is allowed or until a second signal, and cut the rest."""
    timeouts = balancer.config.timeouts
    balancer.announce_stop()
    if timeouts.drain_delay:
        signals.wait(timeouts.drain_delay, {*Signals.ENDING})
    balancer.drain(signals.nudge)
    signals.wait(timeouts.drain, {*Signals.ENDING, Signals.NUDGE})
    cut = balancer.close()
    if cut:
        print(f"lb: stopped, {cut} connection{'s' if cut > 1 else ''} cut", file=sys.stderr)


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = Flags(prog="lb.py", description="Spread HTTP requests or TCP connections over backends.")
    parser.add_argument("backends", nargs="*", metavar="HOST:PORT", help="backends; no configuration file is read then")
    parser.add_argument("--config", metavar="FILE", help="default: servers.json here, else the one beside lb.py")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default 8080; 0 takes a free one)")
    parser.add_argument("--mode", metavar="http|tcp", help="balance each request, or each connection (default http)")
    parser.add_argument("--algorithm", metavar="NAME", help="a policy's name, or a .py file (default round_robin)")
    parser.add_argument("--interval", metavar="SECONDS", help="between two health checks of a backend (default 2)")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate and chain: clients speak TLS then")
    parser.add_argument("--tls-key", metavar="FILE", help="the key of --tls-cert")
    parser.add_argument("--log-file", metavar="FILE", help="default load_balancer.log")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    parser.add_argument("--log-format", metavar="FORMAT", help="text, haproxy or json (default text)")
    parser.add_argument("--admin", metavar="ADDRESS", help="status page and API (default 127.0.0.1:8404), or off")
    parser.add_argument("--check", action="store_true", help="check the configuration, print what would run, and exit")
    parser.add_argument("--diff", metavar="OLD", help="with --check: print what is different from this other file")
    parser.add_argument("--explain", metavar="ID", help="ask the running balancer what became of a request, and exit")
    parser.add_argument("--version", action="version", version=f"lb {__version__}")
    return parser.parse_args(arguments)


def configure(flags: argparse.Namespace, path: Path | None = None) -> Config:
    """The configuration that file and flags amount to; `path` is the file when that is known. Raises ConfigError."""
    if flags.backends and flags.config:
        raise ConfigError("--config: backends on the command line need no file; give one or the other")
    config = from_addresses(flags.backends) if flags.backends else load(path or find(flags.config, HERE))
    config = override(
        config,
        host=flags.host,
        port=flags.port,
        mode=flags.mode,
        algorithm=flags.algorithm,
        interval=flags.interval,
        log_file=flags.log_file,
        log_level=flags.log_level,
        log_format=flags.log_format,
        admin=flags.admin,
        tls_cert=flags.tls_cert,
        tls_key=flags.tls_key,
    )
    refuse_contradictions(config)
    try:
        make_picker(config.algorithm, config.base, report=lambda text: None)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from None
    return config


def check(config: Config, old: str | None) -> int:
    """Print what would run, and what that would change: of another file, or of the balancer that runs."""
    print(describe(config), end="")
    if old is not None:
        former = load(find(old, HERE))
    else:
        try:
            former = replace(running_config(config), admin=config.admin)
        except Unreachable:
            return 0  # none runs, which is no mistake
    found = difference(former, config)
    print(f"against {former.source}:")
    for line in found.lines or ("no difference",):
        print(f"  {line}")
    return 0


def explain(config: Config, request_id: str) -> int:
    try:
        print(explanation(config.admin, request_id), end="")
    except (Unreachable, LookupError) as error:
        return fail(str(error.args[0]), 1)
    return 0


def report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Keep quiet of a server name that is no ASCII: the ssl module refuses that handshake, and then complains here."""
    error = unraisable.exc_value
    if not (isinstance(error, UnicodeDecodeError) and isinstance(unraisable.object, bytes)):
        sys.__unraisablehook__(unraisable)


def fail(message: str, status: int) -> int:
    print(f"lb: {message}", file=sys.stderr)
    return status


class Signals:
    """Signals as something to wait for. The handlers do nothing: Python itself writes their numbers to the socket."""

    ENDING = frozenset((signal.SIGINT, signal.SIGTERM))
    NUDGE = 0

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in (*self.ENDING, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)

    def nudge(self) -> None:
        """End a wait. Any thread may call it."""
        with suppress(BlockingIOError):  # full: the wait ends anyway
            self._sender.send(bytes((self.NUDGE,)))

    def wait(self, seconds: float | None = None, wanted: Collection[int] = range(256)) -> frozenset[int]:
        """Wait for one of these signals, or a nudge. Returns the numbers that came; none when time is over."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._receiver], [], [], left)
            if ready and not (numbers := frozenset(self._receiver.recv(4096))).isdisjoint(wanted):
                return numbers
            if left == 0.0:
                return frozenset()


if __name__ == "__main__":
    sys.exit(main())
