"""Draws the comparison: for each row how many times the reference's rate each peer has, as an SVG without any library.

The background is left out and all colours are of middle lightness, so that it can be read on white and on black.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

LABELS = 300  # px, left of the bars
BARS = 480  # px, for ratios from 0 to MOST
MOST = 2.0  # bars of larger ratios are cut there
BAR, GAP, PADDING = 13, 3, 16  # px: a bar, between two of a row, between rows
TOP, RIGHT, BOTTOM = 64, 70, 36

TEXT, FAINT, REFERENCE_LINE = "#7d8590", "#7d859066", "#d9822b"
COLOURS = {"ours": "#2f81f7", "nginx": "#8b949e", "aiohttp": "#a371f7", "proxy.py": "#c06fb0"}
NAMES = {"ours": "this one", "haproxy": "HAProxy"}
OTHERS = "#4f9f6a"
UNDRAWN = ("direct", "http-half")  # no balancer; the same rate for all


def figure(rows: Sequence[dict[str, Any]], reference: str, machine: str) -> str:
    """The SVG for what `--json` writes."""
    works: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("reference") == reference and row["peer"] != reference and row.get("rate_ratio"):
            if row["work"] in UNDRAWN or row["peer"] in UNDRAWN:
                continue
            works.setdefault(row["work"], []).append(row)
    drawn = []
    y = TOP
    for found in works.values():
        height = len(found) * (BAR + GAP) - GAP
        drawn.append(words(LABELS - 12, y + height / 2 + 4.5, found[0]["what"], "end"))
        for row in found:
            ratio = row["rate_ratio"]
            width = BARS * min(ratio, MOST) / MOST
            weight = ' font-weight="600"' if row["peer"] == "ours" else ""
            colour = COLOURS.get(row["peer"], OTHERS)
            drawn.append(f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"/>')
            clear = width if not width < BARS / MOST < width + 34 else BARS / MOST  # of the reference's line
            drawn.append(words(LABELS + clear + 5, y + BAR - 2.5, f"{ratio:.2f}", size=11, more=weight))
            y += BAR + GAP
        y += PADDING - GAP
    bottom = y - PADDING + 6
    grid = []
    for tenths in range(0, int(MOST * 10) + 1, 5):
        x = LABELS + BARS * tenths / 10 / MOST
        stroke = f'stroke="{REFERENCE_LINE}" stroke-width="1.5"' if tenths == 10 else f'stroke="{FAINT}"'
        grid.append(f'<path d="M{x:.1f} {TOP - 6}V{bottom}" {stroke}/>')
        label = NAMES.get(reference, reference) if tenths == 10 else f"{tenths / 10:g}"
        grid.append(words(x, bottom + 16, label, "middle", 11, REFERENCE_LINE if tenths == 10 else TEXT))
    width, height = LABELS + BARS + RIGHT, bottom + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>Rates over {escape(NAMES.get(reference, reference))}'s</title>",
        words(
            LABELS, 18, f"Requests or octets per second, as a multiple of {NAMES.get(reference, reference)}'s", size=14
        ),
        words(LABELS + BARS + RIGHT - 6, height - 4, machine, "end", 10),
        *legend(list(dict.fromkeys(row["peer"] for found in works.values() for row in found))),
        *grid,
        *drawn,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def legend(peers: Sequence[str]) -> list[str]:
    parts = []
    x = float(LABELS)
    for peer in peers:
        parts.append(f'<rect x="{x}" y="32" width="11" height="11" rx="2" fill="{COLOURS.get(peer, OTHERS)}"/>')
        parts.append(words(x + 16, 42, NAMES.get(peer, peer), size=12))
        x += 16 + 7 * len(NAMES.get(peer, peer)) + 24
    return parts


def words(
    x: float, y: float, text: str, anchor: str = "start", size: int = 13, colour: str = TEXT, more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{more}>'
        f"{escape(text)}</text>"
    )
