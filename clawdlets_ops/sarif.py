"""SARIF 2.1.0 (OASIS), as code hosts read it. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def rule(ident: str, what: str, *, severity: str | None = None, help_text: str | None = None) -> dict[str, Any]:
    """One entry of the rule list. ``severity`` (critical, high, medium, low) becomes GitHub's security-severity number."""
    found: dict[str, Any] = {"id": ident, "shortDescription": {"text": what}}
    if help_text:
        found["help"] = {"text": help_text}
    if severity:
        score = {"critical": "9.5", "high": "8.0", "medium": "5.0", "low": "2.0"}[severity]
        found["properties"] = {"security-severity": score, "tags": ["security"]}
    return found


def notification(text: str) -> dict[str, Any]:
    """What could not be seen: no result, but the run is not a success either."""
    return {"level": "error", "message": {"text": text}}


def document(
    name: str,
    *,
    rules: Iterable[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    notifications: Sequence[Mapping[str, Any]],
    exit_code: int,
) -> str:
    """The whole file for one run of the tool ``name``; rules are sorted by id."""
    run = {
        "tool": {"driver": {"name": name, "rules": sorted(rules, key=lambda one: str(one["id"]))}},
        "results": list(results),
        "invocations": [
            {
                "executionSuccessful": not notifications,
                "exitCode": exit_code,
                "toolExecutionNotifications": list(notifications),
            }
        ],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)
