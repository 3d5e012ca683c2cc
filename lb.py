#!/usr/bin/env python3
"""The load balancer, as a program: flags, configuration, signals. The engine is in `balancer/`."""

from __future__ import annotations

import argparse
import gc
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from balancer import __version__
from balancer.balancer import LoadBalancer
from balancer.config import Config, ConfigError, describe, find, from_addresses, load, override
from balancer.pickers import make_picker

HERE = Path(__file__).resolve().parent


class Flags(argparse.ArgumentParser):
    """One line for a mistake, where argparse would print the usage too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    flags = parse_flags(arguments)
    try:
        config = configure(flags)
    except ConfigError as error:
        return fail(str(error), 2)
    if flags.check:
        print(describe(config), end="")
        return 0
    signals = Signals()
    try:
        balancer = LoadBalancer(config)
        balancer.start()
    except OSError as error:
        return fail(str(error), 1)
    print(f"lb: listening on {balancer.url}")
    backends = "1 backend" if len(config.servers) == 1 else f"{len(config.servers)} backends"
    print(f"lb: {backends}, {config.algorithm}, log {config.log.file or 'off'}", flush=True)
    # A request makes no cycles, but the young objects of thousands would be searched for some: 5% of the time.
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    signals.wait()
    stop(balancer, signals, config.timeouts.drain)
    return 0


def stop(balancer: LoadBalancer, signals: Signals, patience: float) -> None:
    """Let what is in hand end, for as long as that is allowed or until a second signal, and cut the rest."""
    balancer.drain(signals.nudge)
    signals.wait(patience)
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
    parser.add_argument("--log-file", metavar="FILE", help="default load_balancer.log")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    parser.add_argument("--check", action="store_true", help="check the configuration, print what would run, and exit")
    parser.add_argument("--version", action="version", version=f"lb {__version__}")
    return parser.parse_args(arguments)


def configure(flags: argparse.Namespace) -> Config:
    """The configuration that file and flags amount to. Raises ConfigError."""
    if flags.backends and flags.config:
        raise ConfigError("--config: backends on the command line need no file; give one or the other")
    config = from_addresses(flags.backends) if flags.backends else load(find(flags.config, HERE))
    config = override(
        config,
        host=flags.host,
        port=flags.port,
        mode=flags.mode,
        algorithm=flags.algorithm,
        interval=flags.interval,
        log_file=flags.log_file,
        log_level=flags.log_level,
    )
    for server in config.servers:
        if (server.host, server.port) == (config.host, config.port):
            raise ConfigError(
                f"{config.source}: backend {server.id} at {server.address} is the balancer itself; "
                "give one of the two another port"
            )
    try:
        make_picker(config.algorithm, config.base, report=lambda text: None)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from None
    return config


def fail(message: str, status: int) -> int:
    print(f"lb: {message}", file=sys.stderr)
    return status


class Signals:
    """SIGINT and SIGTERM as something to wait for. The handlers do nothing: Python writes to the socket by itself."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

    def nudge(self) -> None:
        """End a wait. Any thread may call it."""
        with suppress(BlockingIOError):  # full: the wait ends anyway
            self._sender.send(b"\0")

    def wait(self, seconds: float | None = None) -> None:
        """Wait for a signal or a nudge."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._receiver], [], [], left)
            if ready:
                self._receiver.recv(4096)
            if ready or left == 0.0:
                return


if __name__ == "__main__":
    sys.exit(main())
