#!/usr/bin/env python3
"""What each feature costs: one of them switched on or off at a time, beside the default settings.

    python tests/bench/features.py --seconds 2 --rounds 3
    python tests/bench/features.py --rows http-varied --features default,log-off,without-line-memos

As compare.py does it: the same work for each, in turn, round by round; medians, and x is the ratio to the default. A
`without-` is no setting: a part is replaced by nothing (see without.py), which tells what it costs, or gains. What can
be explained costs something only once a request fails, is tried again or is slow: see `slow-1ms`, where many are.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from compare import Comparison, machine, names, results, tables
from peers import ROOT, Origin, Ours, Trouble, raise_descriptor_limit
from without import PARTS
from works import WORKS, Requests

CERTIFICATES = ROOT / "tests" / "data" / "certificates"
LOOPBACK = ["127.0.0.0/8"]

SETTINGS: dict[str, Mapping[str, object]] = {
    "default": {},
    "log-off": {"log": {"level": "error"}},
    "log-haproxy": {"log": {"format": "haproxy"}},
    "log-json": {"log": {"format": "json"}},
    "slow-1ms": {"log": {"slow": 0.001}},
    "page-off": {"admin": {"address": "off"}},
    "tls": {"tls": {"certificates": [{"cert": str(CERTIFICATES / "site.pem"), "key": str(CERTIFICATES / "ec.key")}]}},
    "trusted-proxies": {"trusted_proxies": LOOPBACK},
    "forwarded": {"forwarded": True},
    "allow-deny": {"allow": LOOPBACK, "deny": ["10.0.0.0/8"]},
    "client-rate": {"limits": {"client_rate": 1_000_000}},
    "client-connections": {"limits": {"client_connections": 10_000}},
    "sticky": {"sticky": True},
    "least-connections": {"algorithm": "least_connections"},
    "least-time": {"algorithm": "least_time"},
    "ip-hash": {"algorithm": "ip_hash"},
    "hash": {"algorithm": "hash", "hash_on": "path", "hash_balance": 3},
}


def feature(name: str) -> Ours:
    if name.startswith("without-"):
        starter = [str(Path(__file__).with_name("without.py")), name.removeprefix("without-")]
        return Ours(name, starter=starter)
    return Ours(name, SETTINGS[name])


FEATURES = [*SETTINGS, *(f"without-{part}" for part in PARTS)]
ROWS = [name for name, work in WORKS.items() if type(work) is Requests and work.mode == "http"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some_rows, some = names("row", ROWS), names("feature", FEATURES)
    parser.add_argument("--seconds", type=int, default=2, help="of load for each in each round (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--rows", type=some_rows, default=["http-small"], metavar="NAME,...", help=", ".join(ROWS))
    parser.add_argument("--features", type=some, default=FEATURES, metavar="NAME,...", help=", ".join(FEATURES))
    options = parser.parse_args()
    if options.seconds < 1 or options.rounds < 1:
        parser.error("--seconds and --rounds are 1 at least")
    return options


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    works = [copy.copy(WORKS[name]) for name in options.rows]
    for work in works:
        work.reference = "default"
    peers = [feature(name) for name in dict.fromkeys(["default", *options.features])]
    raise_descriptor_limit()
    try:
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lb-bench-")))
            comparison = Comparison(works, peers, options.seconds, Origin(home, stack, bulk=False), home)
            comparison.run(options.rounds)
    except Trouble as trouble:
        print(f"features.py: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("features.py: stopped", file=sys.stderr)
        return 130
    print(f"{tables(results(comparison.rows))}\n\n{machine(options)}; x is the ratio to the default settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
