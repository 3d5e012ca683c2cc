"""The house rule: imports run downhill, in no circle, and never outside the standard library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = (
    ("balancer.version", "balancer.checks", "balancer.config", "balancer.http1", "balancer.framing"),
    (
        *("balancer.log_formats", "balancer.journal", "balancer.metrics", "balancer.servers_file", "balancer.clients"),
        *("balancer.proxy_protocol", "balancer.admission", "balancer.certificates", "balancer.sticky", "balancer.keys"),
    ),
    ("balancer.backend", "balancer.pickers", "balancer.hashing"),
    ("balancer.explain", "balancer.pool"),
    (
        *("balancer.reactor", "balancer.stream", "balancer.handshake"),
        *("balancer.pump", "balancer.upstream", "balancer.health"),
    ),
    ("balancer.frontend", "balancer.tunnel", "balancer.tcp_session", "balancer.http_session", "balancer.greeting"),
    ("balancer.listener", "balancer.reload", "balancer.supervisor", "balancer.scaling"),
    ("balancer.status", "balancer.control", "balancer.gate", "balancer.api", "balancer.admin", "balancer.remote"),
    ("balancer.balancer",),
    ("balancer.diversion", "balancer.embedding"),
    ("balancer",),  # the package itself: what it offers to programs
    ("lb", "health_checker", "backend_server", "client"),
)
"""From the ground up. A module imports from its own floor and from those below; it may be named before it is built."""

FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def sources(*patterns: str) -> dict[str, str]:
    """Module name -> source, of the files under the root that match; `balancer/__init__.py` is `balancer`."""
    found = {}
    for path in (path for pattern in patterns for path in sorted(ROOT.glob(pattern))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, source: str, known: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Each module that `source` imports, wherever in it, with its line. `known` tells submodules from names."""
    for node in ast.walk(ast.parse(source, filename=module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                package = ".".join([*parents, package] if package else parents)
            for alias in node.names:
                whole = f"{package}.{alias.name}"
                yield whole if whole in known else package, node.lineno


def product_faults(modules: Mapping[str, str]) -> list[str]:
    """Whatever in the product breaks the rule, one line each."""
    faults = [f"{module}: stands on no floor of tests/test_floors.py" for module in modules.keys() - FLOOR]
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        graph[module] = set()
        for target, line in imports(module, source, FLOOR):
            if target in FLOOR:
                graph[module].add(target)
                if FLOOR[target] > FLOOR.get(module, FLOOR[target]):
                    faults.append(f"{module}:{line}: imports {target} from a floor above")
            elif target not in modules and target.split(".")[0] not in sys.stdlib_module_names:
                faults.append(f"{module}:{line}: imports {target}, which is not in the standard library")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append("imports in a circle: " + " -> ".join(error.args[1]))
    return sorted(faults)


def foreign_imports(modules: Mapping[str, str], allowed: set[str]) -> list[str]:
    """Imports of what is neither in the standard library nor in `allowed`, one line each."""
    return [
        f"{module}:{line}: imports {target}"
        for module, source in modules.items()
        for target, line in imports(module, source, {})
        if target.split(".")[0] not in sys.stdlib_module_names | allowed
    ]


def test_product_imports_downhill_and_from_the_standard_library_only():
    """DESIGN.md, "The house"."""
    assert product_faults(sources("*.py", "balancer/**/*.py")) == []


def test_tests_need_pytest_and_nothing_else():
    """Save for what stands in for other people's balancers in a benchmark, and is run by hand."""
    peers = ("tests.bench.aiohttp_proxy", "tests.bench.proxy_py")
    tests = {module: source for module, source in sources("tests/**/*.py").items() if module not in peers}
    own = {module.rsplit(".", 1)[-1] for module in tests}
    product = {module.split(".")[0] for module in FLOOR}
    assert foreign_imports(tests, own | product | {"pytest"}) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("balancer.config", "from balancer.pool import Pool", "1: imports balancer.pool from a floor above"),
        ("balancer.config", "from balancer import pool", "1: imports balancer.pool from a floor above"),
        ("balancer.config", "from . import pool", "1: imports balancer.pool from a floor above"),
        ("balancer.pool", "def f():\n    import lb", "2: imports lb from a floor above"),
        ("balancer.pool", "import requests.api", "1: imports requests.api, which is not in the standard library"),
        ("balancer.attic", "", " stands on no floor of tests/test_floors.py"),
    ],
    ids=["upward", "upward-submodule", "upward-relative", "inside-a-function", "foreign", "no-floor"],
)
def test_each_breach_is_named(module, source, fault):
    assert product_faults({module: source}) == [f"{module}:{fault}"]


def test_a_circle_on_one_floor_is_named():
    circle = {"balancer.pump": "from balancer import reactor", "balancer.reactor": "from balancer import pump"}
    [fault] = product_faults(circle)
    assert fault.startswith("imports in a circle: balancer.")


def test_imports_within_a_floor_and_downhill_are_fine():
    fine = {
        "balancer.pump": "import os.path\nfrom balancer.reactor import Reactor\nfrom balancer import config, pool",
        "balancer.reactor": "from __future__ import annotations\nfrom . import backend",
    }
    assert product_faults(fine) == []
