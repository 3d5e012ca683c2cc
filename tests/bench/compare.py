#!/usr/bin/env python3
"""Compare this load balancer with others: same machine, same run, same origin servers, same load.

    python tests/bench/compare.py --seconds 3 --rounds 3 --rows http-small,tcp-down --peers ours,haproxy,nginx

Every work is done in rounds, and in each round by every peer in turn, each started afresh and warmed up, so that a
drifting machine favours none. The table shows medians and the ratio to the reference, HAProxy where it runs: rate
(more is better), CPU of the balancer's processes per request or MB, latency and resident memory (less is better).
A peer that is missing, or that answers wrongly, is a row that says so. Needs Linux, nginx, and wrk or curl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from peers import PEERS, Origin, Peer, Trouble, cpu_seconds, resident_mb
from works import WORKS, Bulk, HalfLoad, Work

REFERENCE = "haproxy"
WARM_UP = 1  # seconds


@dataclass(frozen=True)
class Sample:
    """One peer, one work, one round; or the medians of several. None is what was not measured."""

    rate: float
    cpu_us: float | None
    p50_ms: float | None
    p99_ms: float | None
    memory_mb: float | None

    @staticmethod
    def median(samples: Sequence[Sample]) -> Sample:
        columns = zip(*(astuple(sample) for sample in samples), strict=True)
        return Sample(*(None if None in column else statistics.median(column) for column in columns))


@dataclass
class Row:
    """What came of one peer at one work: samples, or the trouble that ended it."""

    work: Work
    peer: Peer
    samples: list[Sample]
    trouble: str = ""


def measure(work: Work, peer: Peer, seconds: int, origin: Origin, home: Path) -> Sample:
    """Start the peer, see that it answers rightly, warm it up, load it."""
    home.mkdir()
    with peer.run(work.mode, work.backends(origin), home / "peer") as (pid, port):
        work.check(port, origin)
        work.load(port, WARM_UP, home, origin)
        before = cpu_seconds(pid) if pid else 0
        load = work.load(port, seconds, home, origin)
        cpu_us = 1e6 * (cpu_seconds(pid) - before) / load.amount if pid else None
        memory = resident_mb(pid) if pid else None
        if memory == 0:
            raise Trouble("ended before the load did")
    return Sample(load.rate, cpu_us, load.p50_ms, load.p99_ms, memory)


class Comparison:
    """All rows, measured round by round."""

    def __init__(self, works: Sequence[Work], peers: Sequence[Peer], seconds: int, origin: Origin, home: Path) -> None:
        self.seconds, self.origin, self.home = seconds, origin, home
        self.rows = [Row(work, peer, [], missing(work, peer)) for work in works for peer in peers]
        self._runs = 0

    def run(self, rounds: int) -> None:
        works = list(dict.fromkeys(row.work for row in self.rows))
        for work in works:
            rows = [row for row in self.rows if row.work is work]
            if isinstance(work, HalfLoad):
                self._calibrate(work, rows)
            for number in range(rounds):
                for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
                    self._measure(row, f"round {number + 1} of {rounds}")

    def _measure(self, row: Row, label: str) -> None:
        if row.trouble:
            return
        self._runs += 1
        print(f"{row.work.name}: {row.peer.name}, {label}", file=sys.stderr, flush=True)
        try:
            row.samples.append(measure(row.work, row.peer, self.seconds, self.origin, self.home / str(self._runs)))
        except Trouble as trouble:
            row.trouble = str(trouble)
        finally:
            shutil.rmtree(self.home / str(self._runs), ignore_errors=True)

    def _calibrate(self, work: HalfLoad, rows: Sequence[Row]) -> None:
        """Learn the reference's full rate, from the rows measured already or by a run for the purpose."""
        reference = next((row.peer for row in rows if row.peer.name == REFERENCE and not row.trouble), None)
        peer = reference or next((row.peer for row in rows if not row.trouble), None)
        if not peer:
            return
        full = WORKS["http-small"]
        done = next((row for row in self.rows if row.work is full and row.peer is peer and row.samples), None)
        if not done:
            done = Row(full, peer, [])
            self._measure(done, "to know its full rate")
        if done.samples:
            work.pace(Sample.median(done.samples).rate)
        else:
            for row in rows:
                row.trouble = row.trouble or f"the full rate of {peer.name} is not known: {done.trouble}"


def missing(work: Work, peer: Peer) -> str:
    absent = [program for program in work.needs if not shutil.which(program)]
    return f"needs {', '.join(absent)}, which is not installed" if absent else peer.missing(work.mode)


# What people read -------------------------------------------------------------------------------------------------


def results(rows: Sequence[Row]) -> list[dict[str, object]]:
    """One flat object for each row: medians, and `*_ratio` to the reference; None for what was not measured."""
    medians = {(row.work, row.peer.name): asdict(Sample.median(row.samples)) for row in rows if not row.trouble}
    found: list[dict[str, object]] = []
    for row in rows:
        result: dict[str, object] = {"work": row.work.name, "what": row.work.what, "peer": row.peer.name}
        found.append(result)
        if row.trouble:
            result["trouble"] = row.trouble
            continue
        result.update(unit=row.work.unit, cpu_unit=row.work.cpu_unit, rates=[sample.rate for sample in row.samples])
        reference = medians.get((row.work, REFERENCE), {})
        for name, value in medians[row.work, row.peer.name].items():
            base = reference.get(name)
            result[name] = value
            result[f"{name}_ratio"] = value / base if value is not None and base else None
    return found


def table(found: Sequence[dict[str, object]]) -> str:
    """A Markdown table; x is the ratio to the reference."""
    columns = ("rate", "cpu_us", "p50_ms", "p99_ms", "memory_mb")
    lines = [["work", "peer", "rate", "x", "CPU", "x", "p50 ms", "x", "p99 ms", "x", "RSS MB", "x"]]
    for result in found:
        cells = [str(result["work"]), str(result["peer"])]
        lines.append(cells)
        if "trouble" in result:
            cells.append(str(result["trouble"]))
            continue
        units = {"rate": f" {result['unit']}", "cpu_us": f" {result['cpu_unit']}"}
        for column in columns:
            value, ratio = result[column], result[f"{column}_ratio"]
            cells += [shown(value) + units.get(column, "") if value is not None else "-", shown(ratio, 2)]
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    widths[:2] = [max(len(line[column]) for line in lines) for column in (0, 1)]
    rule = "|".join("-" * (width + 2) if n < 2 else "-" * (width + 1) + ":" for n, width in enumerate(widths))
    text = []
    for line in lines:
        cells = [cell.ljust(widths[n]) if n < 2 else cell.rjust(widths[n]) for n, cell in enumerate(line)]
        text.append("| " + " | ".join(cells if line in whole else [*cells[:2], line[2]]) + " |")
    text.insert(1, f"|{rule}|")
    return "\n".join(text)


def shown(value: object, digits: int | None = None) -> str:
    """Three figures or so: 53,312  812  16.4  0.94; "-" for what was not measured."""
    if not isinstance(value, float):
        return "-"
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


# The command ------------------------------------------------------------------------------------------------------


def names(kind: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument's type: some of the known names, separated by commas."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"no such {kind}: {', '.join(unknown)}; there are {', '.join(known)}")
        return chosen

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some_rows, some_peers = names("row", list(WORKS)), names("peer", list(PEERS))
    usual = ["ours", REFERENCE, "nginx"]
    parser.add_argument("--seconds", type=int, default=3, help="of load for each peer in each round (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--rows", type=some_rows, default=list(WORKS), metavar="NAME,...", help=", ".join(WORKS))
    parser.add_argument("--peers", type=some_peers, default=usual, metavar="NAME,...", help=", ".join(PEERS))
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    if options.seconds < 1 or options.rounds < 1:
        parser.error("--seconds and --rounds are 1 at least")
    return options


def main() -> int:
    options = arguments()
    works = [WORKS[name] for name in options.rows]
    peers = [PEERS[name] for name in options.peers]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lb-bench-")))
            origin = Origin(home, stack, bulk=any(isinstance(work, Bulk) for work in works))
            comparison = Comparison(works, peers, options.seconds, origin, home)
            comparison.run(options.rounds)
    except Trouble as trouble:
        print(f"compare.py: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: stopped", file=sys.stderr)
        return 130
    found = results(comparison.rows)
    python, cores = platform.python_version(), os.cpu_count()
    machine = f"Python {python}, {cores} cores, {options.rounds} x {options.seconds} s"
    if options.json:
        print(json.dumps({"machine": machine, "rows": found}, indent=1))
    else:
        print(f"{table(found)}\n\n{machine}; x is the ratio to {REFERENCE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
