#!/usr/bin/env python3
"""Compare this load balancer with others: same machine, same run, same origin servers, same load.

    python tests/bench/compare.py --json results.json --plot figure.svg
    python tests/bench/compare.py --seconds 3 --rounds 3 --rows http-small,tcp-down --peers ours,haproxy,nginx
    python tests/bench/compare.py --from results.json --plot figure.svg

Every work is done in rounds, and in each round by every peer in turn, each started afresh and warmed up, so that a
drifting machine favours none. The tables show medians and the ratio to the reference, HAProxy where it runs: rate
(more is better), CPU of the balancer's processes per request or MB, latency and resident memory (less is better);
memory and threads for connections that rest; and ours before a thousand backends beside ours before three.
A peer that is missing, or that answers wrongly, is a row that says so. All of it takes half an hour.

Needs Linux, nginx, and wrk or curl. The Python peers need packages, which a virtual environment may have:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install aiohttp uvloop proxy.py
    python tests/bench/compare.py --peer-python /tmp/peers/bin/python
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
from typing import Any

import plot
from peers import PEERS, Origin, Peer, PythonPeer, Trouble, raise_descriptor_limit
from works import CROWD, REFERENCE, WORKS, Bulk, Crowd, HalfLoad, Sample, Work

HEADINGS = {
    "rate": "rate",
    "cpu_us": "CPU",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "memory_mb": "RSS MB",
    "each_kb": "KB each",
    "threads_before": "threads before",
    "threads_after": "after",
}
COUNTS = ("threads_before", "threads_after")  # columns without a ratio


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


class Comparison:
    """All rows, measured round by round."""

    def __init__(self, works: Sequence[Work], peers: Sequence[Peer], seconds: int, origin: Origin, home: Path) -> None:
        self.seconds, self.origin, self.home = seconds, origin, home
        self.rows = [Row(work, peer, [], missing(work, peer)) for work in works for peer in work.lineup(peers)]
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
        home = self.home / str(self._runs)
        home.mkdir()
        print(f"{row.work.name}: {row.peer.name}, {label}", file=sys.stderr, flush=True)
        try:
            row.samples.append(row.work.measure(row.peer, self.seconds, home, self.origin))
        except Trouble as trouble:
            row.trouble = str(trouble)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _calibrate(self, work: HalfLoad, rows: Sequence[Row]) -> None:
        """Learn the reference's full rate, from the rows measured already or by a run for the purpose."""
        reference = next((row.peer for row in rows if row.peer.name == work.reference and not row.trouble), None)
        peer = reference or next((row.peer for row in rows if not row.trouble), None)
        if not peer:
            return
        full = WORKS["http-small"]
        done = next((row for row in self.rows if row.work is full and row.peer is peer and row.samples), None)
        if not done:
            done = Row(full, peer, [])
            self._measure(done, "to know its full rate")
        if done.samples:
            work.pace(median(done.samples).rate or 1)
        else:
            for row in rows:
                row.trouble = row.trouble or f"the full rate of {peer.name} is not known: {done.trouble}"


def missing(work: Work, peer: Peer) -> str:
    absent = [program for program in work.needs if not shutil.which(program)]
    if absent:
        return f"needs {', '.join(absent)}, which is not installed"
    return peer.missing(work.mode) or work.beyond(peer)


# What people read -------------------------------------------------------------------------------------------------


def results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat object for each row: medians, and `*_ratio` to the reference; None for what was not measured."""
    medians = {(row.work, row.peer.name): asdict(median(row.samples)) for row in rows if not row.trouble}
    found: list[dict[str, Any]] = []
    for row in rows:
        work = row.work
        result: dict[str, Any] = {"work": work.name, "what": work.what, "peer": row.peer.name, "columns": work.columns}
        found.append(result)
        if row.trouble:
            result["trouble"] = row.trouble
            continue
        result.update(unit=work.unit, cpu_unit=work.cpu_unit, reference=work.reference)
        result["samples"] = [asdict(sample) for sample in row.samples]
        reference = medians.get((work, work.reference), {})
        for name in work.columns:
            value, base = medians[work, row.peer.name][name], reference.get(name)
            result[name] = value
            result[f"{name}_ratio"] = value / base if value is not None and base else None
    return found


def tables(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for each set of columns."""
    sets = dict.fromkeys(tuple(result["columns"]) for result in found)
    return "\n\n".join(table([result for result in found if tuple(result["columns"]) == columns]) for columns in sets)


def table(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of results that have the same columns; x is the ratio to the reference."""
    columns = found[0]["columns"]
    lines = [["work", "peer"]]
    for column in columns:
        lines[0] += [HEADINGS[column]] if column in COUNTS else [HEADINGS[column], "x"]
    for result in found:
        cells = [str(result["work"]), str(result["peer"])]
        lines.append(cells)
        if "trouble" in result:
            cells.append(str(result["trouble"]))
            continue
        units = {"rate": f" {result['unit']}", "cpu_us": f" {result['cpu_unit']}"}
        for column in columns:
            value, ratio = result[column], result[f"{column}_ratio"]
            if column in COUNTS:
                cells.append(shown(value, 0))
            else:
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
    parser.add_argument("--seconds", type=int, default=3, help="of load for each peer in each round (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--rows", type=some_rows, default=list(WORKS), metavar="NAME,...", help=", ".join(WORKS))
    parser.add_argument("--peers", type=some_peers, default=list(PEERS), metavar="NAME,...", help=", ".join(PEERS))
    parser.add_argument("--peer-python", metavar="PATH", help="the interpreter that has the packages of Python peers")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="write one JSON object, or print it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates' ratios as an SVG")
    parser.add_argument("--from", type=Path, dest="saved", metavar="FILE", help="show what --json wrote")
    options = parser.parse_args()
    if options.seconds < 1 or options.rounds < 1:
        parser.error("--seconds and --rounds are 1 at least")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; what is told of it."""
    works = [WORKS[name] for name in options.rows]
    peers = [PEERS[name] for name in options.peers]
    for peer in peers:
        if isinstance(peer, PythonPeer):
            peer.python = options.peer_python or peer.python
    bulk = any(isinstance(work, Bulk) for work in works)
    crowd = CROWD if any(isinstance(work, Crowd) for work in works) else 0
    raise_descriptor_limit()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lb-bench-")))
        origin = Origin(home, stack, bulk=bulk, crowd=crowd)
        comparison = Comparison(works, peers, options.seconds, origin, home)
        comparison.run(options.rounds)
    return {"machine": machine(options), "rows": results(comparison.rows)}


def machine(options: argparse.Namespace) -> str:
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, {options.rounds} x {options.seconds} s"


def saved(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        tables(report["rows"])
        plot.figure(report["rows"], REFERENCE, report["machine"])
    except OSError as error:
        raise Trouble(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise Trouble(f"{path}: not what --json writes") from error
    return report


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise Trouble(f"{path}: {error.strerror}") from error


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        report = saved(options.saved) if options.saved else compare(options)
        text = json.dumps(report, indent=1)
        if options.json == "":
            print(text)
        else:
            print(f"{tables(report['rows'])}\n\n{report['machine']}; x is the ratio to {REFERENCE}, or to 3 backends")
        if options.json:
            write(Path(options.json), text)
        if options.plot:
            write(options.plot, plot.figure(report["rows"], REFERENCE, report["machine"]))
    except Trouble as trouble:
        print(f"compare.py: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
