"""The house keeps its shape: imports point left only, and each effect lives in one place.

``clawdlets_ops`` has these layers, from left to right; DESIGN calls them base, model, tools, features, surfaces.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clawdlets_ops"

LAYERS: dict[str, frozenset[str]] = {
    "base": frozenset(
        {
            "errors",
            "sensitive",
            "command",
            "process",
            "files",
            "journal",
            "finding",
            "lines",
            "sarif",
            "pages",
            "hostfiles",
        }
    ),
    "model": frozenset(
        {"cloud", "declared", "herd", "bots", "fleet", "fleetfile", "layout", "vantage", "project", "egress"}
    ),
    "tools": frozenset(
        {
            "sops",
            "age",
            "mkpasswd",
            "hostkey",
            "tofu",
            "hetzner",
            "nixos_anywhere",
            "ssh",
            "tailnet",
            "tailscale_api",
        }
    ),
    "features": frozenset(
        {
            "secrets",
            "guard",
            "provision",
            "install",
            "lockdown",
            "verify",
            "runs",
            "doctor",
            "declare",
            "scaffold",
            "peer",
            "denials",
            "orchestrator",
            "cattle",
        }
    ),
    "workflow": frozenset({"workflow", "rollout"}),
    "surfaces": frozenset(
        {"", "deploys", "pyinfra_plugin", "cli", "clf", "clf_orchestrator", "commands", "testing", "lab"}
    ),
}
ORDER = list(LAYERS)

# An effect (a module that brings it) and who alone may have it.
SOLE_IMPORTERS: dict[str, frozenset[str]] = {
    "subprocess": frozenset({"process"}),
    "hcloud": frozenset({"hetzner"}),
    "fabric": frozenset({"ssh"}),
    "paramiko": frozenset({"ssh"}),
    "invoke": frozenset({"ssh"}),
    # verify: only probe.py, the script that is sent to a vantage
    "socket": frozenset({"ssh", "lab", "verify", "orchestrator"}),
    "pyinfra": frozenset({"pyinfra_plugin", "deploys"}),
    "testinfra": frozenset({"verify"}),
    "pytest": frozenset({"verify"}),
    "sqlite3": frozenset(),
    "sqlalchemy": frozenset({"orchestrator"}),
    "starlette": frozenset({"orchestrator"}),
    "uvicorn": frozenset({"orchestrator"}),
}
# The lab's modules that are programs of their own, started with an environment and no caller.
READS_ENVIRONMENT = frozenset(
    {
        "cli.py",
        "clf.py",
        "clf_orchestrator.py",
        "lab/installer.py",
        "lab/real_installer.py",
        "lab/daemon.py",
        "lab/demo.py",
        "lockdown/watchdog.py",
    }
)
# Programs for the lab's guests: they run on the host, without this package.
GUEST_PROGRAMS = PACKAGE / "lab" / "profile"


def room(path: Path, package: Path = PACKAGE) -> str:
    """The room (first name below the package) that a file is in."""
    parts = path.relative_to(package).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(source: str, package_name: str = "clawdlets_ops") -> list[tuple[int, str]]:
    """Line and dotted name of everything that ``source`` imports, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == package_name
                else [node.module]
            )
            found += [(node.lineno, name) for name in names]
    return found


def layer_of(name: str) -> str:
    return next(layer for layer, rooms in LAYERS.items() if name in rooms)


def wrong_direction(importer: str, source: str) -> list[str]:
    """Imports of our own that do not point left (to an earlier layer, or to a sibling where siblings may)."""
    faults = []
    for line, name in imports(source):
        first, _, rest = name.partition(".")
        if first != "clawdlets_ops":
            continue
        target = rest.partition(".")[0]
        if target == importer:
            continue
        here, there = ORDER.index(layer_of(importer)), ORDER.index(layer_of(target))
        siblings_may = layer_of(importer) not in ("tools",)
        if there > here or (there == here and not siblings_may):
            faults.append(f"line {line}: {importer} ({layer_of(importer)}) imports {target} ({layer_of(target)})")
    return faults


def wrong_effect(importer: str, source: str) -> list[str]:
    """Imports of an effect that belongs to another room."""
    return [
        f"line {line}: {importer} imports {name}"
        for line, name in imports(source)
        if importer not in SOLE_IMPORTERS.get(name.partition(".")[0], frozenset({importer}))
    ]


def reads_environment(source: str) -> list[int]:
    """Lines that read os.environ or os.getenv."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    ]


def late_imports(source: str) -> list[int]:
    """Lines that import inside a function."""
    return [
        inner.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if GUEST_PROGRAMS not in path.parents)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_left_only_and_brings_no_effect_of_another_room(path: Path) -> None:
    source = path.read_text()
    assert wrong_direction(room(path), source) == []
    assert wrong_effect(room(path), source) == []
    assert late_imports(source) == []
    if str(path.relative_to(PACKAGE)) not in READS_ENVIRONMENT:
        assert reads_environment(source) == []


def test_every_room_has_a_layer_and_every_layer_its_rooms() -> None:
    built = {room(path) for path in MODULES}
    named = frozenset().union(*LAYERS.values())
    assert built - named == set()
    assert named - built == set()


def test_only_tests_and_surfaces_import_the_lab() -> None:
    importers = {
        room(path) for path in MODULES for _, name in imports(path.read_text()) if name.startswith("clawdlets_ops.lab")
    }
    assert importers <= {"lab", "cli"}


def test_the_shipped_suite_imports_nothing_of_what_it_judges() -> None:
    suite = sorted((PACKAGE / "verify" / "suite").glob("*.py"))
    assert suite
    for path in suite:
        ours = {name for _, name in imports(path.read_text()) if name.startswith("clawdlets_ops")}
        assert {name for name in ours if not name.startswith("clawdlets_ops.verify.suite")} == set(), path


def asks_for_the_lab(source: str) -> list[int]:
    """Lines with a condition that is called after the lab, or a comparison with its name."""
    tree = ast.parse(source)
    conditions = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    names = [node for asked in conditions for node in ast.walk(asked) if isinstance(node, ast.Name)]
    compared = [
        side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    return sorted(
        {node.lineno for node in names if node.id.lower() in ("lab", "is_lab", "in_lab")}
        | {side.lineno for side in compared if isinstance(side, ast.Constant) and side.value == "lab"}
    )


def test_production_code_does_not_know_the_lab_by_name() -> None:
    for path in MODULES:
        if room(path) not in ("lab", "cli", "testing"):
            assert asks_for_the_lab(path.read_text()) == [], path


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("if lab:\n    pass", True),
        ('x = environ.get("CLAWDLETS_ENVIRONMENT") == "lab"', True),
        ('x = environ.get("CLAWDLETS_ENVIRONMENT") == wanted', False),
    ],
)
def test_the_lab_check_catches_what_it_should(source: str, *, caught: bool) -> None:
    assert bool(asks_for_the_lab(source)) is caught


@pytest.mark.parametrize(
    ("importer", "source", "caught"),
    [
        ("files", "from clawdlets_ops import fleet", True),
        ("sops", "import clawdlets_ops.age", True),
        ("provision", "from clawdlets_ops.cli import main", True),
        ("provision", "def f():\n    from clawdlets_ops.lab import cloud", True),
        ("cli", "from clawdlets_ops import provision", False),
        ("lockdown", "from clawdlets_ops.provision import apply", False),
        ("fleet", "from clawdlets_ops.errors import FleetError", False),
    ],
)
def test_the_direction_check_catches_what_it_should(importer: str, source: str, *, caught: bool) -> None:
    assert bool(wrong_direction(importer, source)) is caught


@pytest.mark.parametrize(
    ("importer", "source", "caught"),
    [
        ("tofu", "import subprocess", True),
        ("provision", "from hcloud.servers import domain", True),
        ("cli", "import sqlite3", True),
        ("process", "import subprocess", False),
        ("ssh", "import fabric", False),
    ],
)
def test_the_effect_check_catches_what_it_should(importer: str, source: str, *, caught: bool) -> None:
    assert bool(wrong_effect(importer, source)) is caught


def test_the_environment_and_late_import_checks_catch_what_they_should() -> None:
    source = textwrap.dedent("""
        import os
        def f():
            import json
            return os.environ["X"], os.getenv("Y")
    """)
    assert reads_environment(source) == [5, 5]
    assert late_imports(source) == [4]


def test_no_shallow_module_names_and_no_file_that_nobody_can_read_in_one_sitting() -> None:
    names = {path.stem for path in MODULES}
    assert names & {"utils", "helpers", "constants", "types", "base", "common", "misc"} == set()
    assert {str(path): count for path in MODULES if (count := len(path.read_text().splitlines())) > 500} == {}
