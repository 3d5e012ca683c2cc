#!/usr/bin/env python3
"""Watch instances come and go under a load that goes up and down; not a test, run by hand.

    python tests/scaling_demo.py [--delay SECONDS] [--seconds SECONDS]

lb.py runs between 0 and 4 instances of backend_server.py. First nobody asks, then few clients, many, few, and nobody
again until the last instance is gone. Each client sends its next request when it has the answer to the last. The table
has a row for each second; the last line counts all requests. Exit status 1 when a request failed, or when the instances
did not go from 0 to 4 and back to 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from client import Settings, Stats, play  # noqa: E402 - both directories have to be on the path first
from conftest import eventually  # noqa: E402
from programs import LB, free_ports, started, write_settings  # noqa: E402

MOST = 4
FEW, MANY = 3, 40  # clients
PATIENCE = 60.0  # seconds until the last instance is held to stay
ROW = "{:>6}  {:>7}  {:>6}  {:>9}  {:>8}  {:>8}  {:>6}"


class Demonstration:
    """A balancer, its clients, and the table."""

    def __init__(self, port: int, admin_port: int) -> None:
        self.settings = Settings(port=port)
        self.url = f"http://127.0.0.1:{admin_port}/api/status"
        self.opener = build_opener(ProxyHandler({}))  # no proxy of the environment stands between us and loopback
        self.parts: list[Stats] = []
        self.began = time.monotonic()
        self.instances: list[int] = []  # as many as there were, one number for each row

    def status(self) -> dict[str, Any]:
        with self.opener.open(self.url, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def load(self, clients: int, seconds: float) -> None:
        """Let so many clients ask for that long, and write rows meanwhile."""
        end = time.monotonic() + seconds
        parts = [Stats() for _ in range(clients)]
        self.parts += parts
        threads = [
            threading.Thread(target=play, args=(self.settings, itertools.repeat(0), end, threading.Event(), part))
            for part in parts
        ]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            self.row(clients)
        for thread in threads:
            thread.join()

    def row(self, clients: int) -> None:
        """A second later, write how things are."""
        threading.Event().wait(1 - (time.monotonic() - self.began) % 1)
        found = self.status()
        scaling, total = found["scaling"], Stats.merged(self.parts)
        self.instances.append(scaling["instances"])
        numbers = clients, found["active"], scaling["instances"], scaling["starting"], total.requests, total.failed
        print(ROW.format(f"{time.monotonic() - self.began:.0f} s", *numbers), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch instances come and go with the load.")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that each answer takes (default 0.05)")
    parser.add_argument("--seconds", type=float, default=10.0, help="that each step of the load takes (default 10)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        low, admin_port = free_ports(1)[0], free_ports(1)[0]
        words = ["--host", "{host}", "--port", "{port}", "--id", "{id}", "--delay", str(flags.delay)]
        scaling = {
            "command": ["{python}", str(ROOT / "backend_server.py"), *words],
            "ports": f"{low}-{low + 50}",
            "min": 0,
            "max": MOST,
            "target_active": 8,
            "idle_stop": 4,
            "pause": 1,
        }
        admin = {"address": f"127.0.0.1:{admin_port}"}
        keys = {"listen": {"port": 0}, "admin": admin, "scaling": scaling, "health_check": {"path": "/health"}}
        config = write_settings(directory, keys)
        with started(LB, "--config", config, directory=directory) as balancer:
            it = Demonstration(balancer.port, admin_port)
            eventually(lambda: it.status()["scaling"], "the balancer's status")
            print(ROW.format("time", "clients", "active", "instances", "starting", "requests", "failed"))
            for clients, seconds in ((0, 3), (FEW, flags.seconds), (MANY, flags.seconds), (FEW, 2 * flags.seconds)):
                it.load(clients, seconds)
            end = time.monotonic() + PATIENCE
            while it.instances[-1] and time.monotonic() < end:
                it.row(0)
            steps = [text for text in (directory / "load_balancer.log").read_text().splitlines() if "scaling" in text]
    total = Stats.merged(it.parts)
    shown = [count for count, _ in itertools.groupby(it.instances)]
    print("", *steps, "", sep="\n")
    print(f"instances {' '.join(map(str, shown))}")
    print(f"{total.requests} requests, {total.failed} failed" + (f": {dict(total.errors)}" if total.errors else ""))
    return 0 if not total.failed and (shown[0], max(shown), shown[-1]) == (0, MOST, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
