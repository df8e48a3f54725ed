"""Every sentence of the security model has a check that looks, or says openly that it has none yet."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.doctor import catalogue as doctor
from clawdlets_ops.verify import catalogue as suite

HEADING = re.compile(r"^\*\*.*\*\*$")
LEADS = ("Therefore:",)


def sentences(text: str) -> list[str]:
    """The lines of the security model that claim something: not its headings."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    return [
        line for line in lines if line and not line.startswith("#") and not HEADING.match(line) and line not in LEADS
    ]


def claims() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        resources.files("clawdlets_ops.verify").joinpath("claims.json").read_text(encoding="utf-8")
    )
    return found


def known_checks() -> dict[str, str]:
    """id → who makes it."""
    made = {check.id: "verify" for check in suite.catalogue()}
    for check in doctor.CATALOGUE:
        made[check.id] = "doctor" if check.id not in made else "verify, doctor"
    return made


def rendered() -> str:
    made = known_checks()
    lines = [
        "# Each sentence of the security model, and what looks at it",
        "",
        "Made from `clawdlets_ops/verify/claims.json` by `tests/unit/test_claims.py` (`CLAWDLETS_WRITE_DOCS=1` writes it anew).",
        "`clawdlets verify --explain ID` and [doctor.md](doctor.md) say what a check looks at. An open sentence has no check yet.",
        "",
        "| sentence | checks |",
        "|---|---|",
    ]
    for claim in claims():
        by = [f"{ident} ({made[ident]})" for ident in claim.get("checks", ())] + list(claim.get("tests", ()))
        told = ", ".join(by) + (f"; {claim['note']}" if "note" in claim else "")
        lines.append(f"| {claim['says']} | {told or '**open**: ' + claim['open']} |")
    return "\n".join(lines) + "\n"


def test_every_sentence_is_mapped_once_and_nothing_else_is(root: Path) -> None:
    said = sentences((root / "docs" / "security-model.md").read_text(encoding="utf-8"))
    assert [claim["says"] for claim in claims()] == said


def test_a_sentence_more_would_be_missed(root: Path) -> None:
    text = (root / "docs" / "security-model.md").read_text(encoding="utf-8")
    assert sentences(text + "\n- A new promise.\n")[-1] == "A new promise."


def test_every_check_that_is_named_exists(root: Path) -> None:
    made = known_checks()
    for claim in claims():
        assert not [ident for ident in claim.get("checks", ()) if ident not in made], claim
        assert not [path for path in claim.get("tests", ()) if not (root / path).is_file()], claim
        assert bool(claim.get("checks") or claim.get("tests")) is not bool(claim.get("open")), claim


def test_every_check_of_the_suite_stands_for_a_sentence() -> None:
    named = {ident for claim in claims() for ident in claim.get("checks", ())}
    assert {check.id for check in suite.catalogue()} - named == set()


def test_the_page_is_up_to_date(root: Path) -> None:
    page = root / "docs" / "reference" / "claims.md"
    if os.environ.get("CLAWDLETS_WRITE_DOCS"):
        page.write_text(rendered(), encoding="utf-8")
    if not page.exists():
        pytest.fail("docs/reference/claims.md is missing: CLAWDLETS_WRITE_DOCS=1 pytest tests/unit/test_claims.py")
    assert page.read_text(encoding="utf-8") == rendered()
