"""Start lb.py with one of its parts replaced by nothing, to see what the part costs; for features.py.

`python without.py PART LB-PY ...` has the arguments of lb.py after it. It is for measuring alone: what is left is not
a load balancer that anybody should run.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(place: str, change: Callable[[Any], Any]) -> None:
    """Put something else at `module:name.name`; exits with a line when there is no such thing."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, change(getattr(owner, name)))
    except (ImportError, AttributeError) as error:
        sys.exit(f"without.py: there is no {place} any more: {error}")


def nothing(original: Any) -> Any:
    return lambda *arguments, **named: None


def parse_anew(reader: str, *, lines_too: bool = False, **blank: object) -> None:
    """Have a reader of `balancer.http1` remember no head: these attributes are blank before and after a `read`."""

    def forgetful(read: Any) -> Any:
        def read_anew(self: Any, *arguments: Any) -> Any:
            for name, value in blank.items():
                setattr(self, name, value)
            if lines_too:
                self._known.__init__()
            found = read(self, *arguments)
            for name, value in blank.items():
                setattr(self, name, value)
            return found

        return read_anew

    for name in (*blank, *(["_known"] if lines_too else [])):
        replace(f"balancer.http1:{reader}.{name}", lambda same: same)  # says so when there is none
    replace(f"balancer.http1:{reader}.read", forgetful)
    replace("balancer.http_session:REMEMBERED", lambda octets: -1)  # or a session would know a head without asking


PARTS: dict[str, Callable[[], None]] = {
    "metrics": lambda: replace("balancer.metrics:Tally.add", nothing),
    "head-memo": lambda: parse_anew("RequestReader", _last=()),
    "line-memos": lambda: parse_anew("RequestReader", lines_too=True, _last=(), _block=b""),
    "answer-memo": lambda: parse_anew("AnswerReader", head=(), whole=-1),
}


def main() -> None:
    part, program, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(program).parent))
    PARTS[part]()
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
