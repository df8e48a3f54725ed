"""Every check of the suite has a red test on a real machine; the table of them is made from the seeds themselves."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

from clawdlets_ops.verify import catalogue
from tests.integration import test_doctor
from tests.lab.red import Seed


def seeds(root: Path) -> dict[str, list[Seed]]:
    """Module → its seeds, of every module of red tests."""
    found = {}
    for path in sorted((root / "tests" / "lab").glob("test_*_red*.py")):
        found[path.stem] = list(importlib.import_module(f"tests.lab.{path.stem}").SEEDS)
    return found


def doctors(ids: set[str]) -> dict[str, int]:
    """id → how many seeds the doctor's own red tests have for it, of those that the suite takes over from the doctor."""
    counted = Counter(fault.id for fault in test_doctor.FAULTS)
    return {ident: counted[ident] for ident in sorted(ids) if counted[ident]}


def of_the_repository() -> set[str]:
    return {check.id for check in catalogue.catalogue() if check.vantage == "repository"}


def rendered(root: Path) -> str:
    lines = [
        "# Which seeded fault turns which checks red",
        "",
        "Made from the seeds in `tests/lab/test_*_red*.py` by `tests/unit/test_red_tests.py` (`CLAWDLETS_WRITE_DOCS=1` writes it",
        "anew). Each is put on a real machine of the lab and judged by the whole suite: exactly these ids are red, no other is red",
        "or unknown unless it is named, and when it is mended all are green again.",
        "",
        "| red | seeded fault | unknown meanwhile | test |",
        "|---|---|---|---|",
    ]
    rows = [
        (
            seed.checks,
            f"| {seed.checks.replace(' ', ', ')} | {seed.what} | {seed.unknown.replace(' ', ', ')} | {module} |",
        )
        for module, some in seeds(root).items()
        for seed in some
    ]
    proven = {ident for checks, _ in rows for ident in checks.split()}
    taken = doctors(of_the_repository())
    more = ", ".join(f"{ident} ({number})" for ident, number in taken.items())
    return (
        "\n".join(
            [
                *lines,
                *(line for _, line in sorted(rows)),
                "",
                "What the doctor says of the repository is seeded in a real repository in `tests/integration/test_doctor.py`, judged",
                "by the doctor, exactly one id each; the suite takes over what it says (`tests/unit/test_verify_suite.py`, every id).",
                f"Seeds: {more}.",
                "",
                f"{len(rows) + sum(taken.values())} seeds, {len(proven | taken.keys())} checks.",
            ]
        )
        + "\n"
    )


def test_every_check_has_a_seed_and_every_seed_a_check(root: Path) -> None:
    known = {check.id for check in catalogue.catalogue()}
    proven = {ident for some in seeds(root).values() for seed in some for ident in seed.checks.split()}
    assert known - proven - doctors(of_the_repository()).keys() == set()
    assert proven - known == set()


def test_no_two_seeds_have_one_name(root: Path) -> None:
    names = [str(seed) for some in seeds(root).values() for seed in some]
    assert len(names) == len(set(names))


def test_the_table_is_up_to_date(root: Path) -> None:
    page = root / "docs" / "reference" / "red-tests.md"
    if os.environ.get("CLAWDLETS_WRITE_DOCS"):
        page.write_text(rendered(root), encoding="utf-8")
    if not page.exists():
        pytest.fail(
            "docs/reference/red-tests.md is missing: CLAWDLETS_WRITE_DOCS=1 pytest tests/unit/test_red_tests.py"
        )
    assert page.read_text(encoding="utf-8") == rendered(root)
