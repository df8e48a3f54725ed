"""A scan's outcome as text, JSON or SARIF 2.1.0. Pure; no form holds a secret."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from clawdlets_ops import sarif as sarif_file
from clawdlets_ops.guard.paths import PATH_RULES
from clawdlets_ops.guard.rules import RULES
from clawdlets_ops.guard.scan import Leak, Outcome


def summary(outcome: Outcome) -> str:
    """One line: the verdict, and how much it rests on."""
    counts = Counter("allowed" if leak.allowed else "unknown" if leak.unknown else "leaks" for leak in outcome.leaks)
    verdict = {0: "clean", 1: f"{counts['leaks']} leaks", 2: "unknown"}[outcome.exit_code]
    rest = "".join(f", {counts[word]} {word}" for word in ("allowed", "unknown") if counts[word] and verdict != word)
    return (
        f"guard: {verdict}{rest} ({outcome.scope}: {outcome.items} contents, {outcome.size_bytes} bytes, "
        f"{outcome.rules} rules each proven on a sample, {outcome.needles} known secrets, engine {outcome.engine})"
    )


def text(outcome: Outcome) -> str:
    """For people: each finding with what to do, then notes and the summary."""
    lines: list[str] = []
    for leak in outcome.leaks:
        word = "allowed" if leak.allowed else "unknown" if leak.unknown else "LEAK"
        place = f"{leak.path}:{leak.line}" if leak.line else leak.path
        lines.append(
            f"{word:8}{printable(place)}  {leak.rule}: {printable(leak.what)} {printable(leak.masked)}".rstrip()
        )
        details = [leak.where, f"fingerprint {leak.fingerprint}" if leak.fingerprint else ""]
        lines.append(f"          {printable(', '.join(part for part in details if part))}".rstrip())
        lines.append(f"          → {printable(leak.allowed or leak.fix)}")
    lines += [f"note    {printable(note)}" for note in outcome.notes]
    lines += [
        f"unused  the allow-list's entry for {printable(entry.path)} ({entry.rule}, {entry.fingerprint}) covers nothing: remove it"
        for entry in outcome.unused
    ]
    return "\n".join([*(line for line in lines if line.strip()), summary(outcome)])


def as_json(outcome: Outcome) -> str:
    """For programs."""
    document = {
        "scope": outcome.scope,
        "exitCode": outcome.exit_code,
        "engine": outcome.engine,
        "rules": outcome.rules,
        "knownSecrets": outcome.needles,
        "contents": outcome.items,
        "sizeBytes": outcome.size_bytes,
        "leaks": [asdict(leak) for leak in outcome.leaks],
        "notes": outcome.notes,
        "unusedAllowances": [asdict(entry) for entry in outcome.unused],
    }
    return json.dumps(document, indent=2)


def sarif(outcome: Outcome) -> str:
    """For code hosts. What is allowed is there, suppressed, with its reason; what is unknown is no result but a notification."""
    rules = {rule.id: rule.what for rule in RULES} | {rule.id: rule.what for rule in PATH_RULES}
    rules |= {leak.rule: rules.get(leak.rule, leak.rule) for leak in outcome.leaks}
    return sarif_file.document(
        "clawdlets guard",
        rules=[sarif_file.rule(name, what) for name, what in rules.items()],
        results=[_result(leak) for leak in outcome.leaks if not leak.unknown],
        notifications=[
            sarif_file.notification(f"{leak.path}: {leak.what}; {leak.fix}") for leak in outcome.leaks if leak.unknown
        ],
        exit_code=outcome.exit_code,
    )


def _result(leak: Leak) -> dict[str, Any]:
    place: dict[str, Any] = {"artifactLocation": {"uri": _uri(leak.path)}}
    if leak.line:
        place["region"] = {"startLine": leak.line}
    result: dict[str, Any] = {
        "ruleId": leak.rule,
        "level": "error",
        "message": {"text": f"{leak.what} {leak.masked}".strip() + f" ({leak.where}). {leak.fix}"},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"clawdletsGuard/v1": leak.fingerprint},
    }
    if leak.allowed:
        result["suppressions"] = [{"kind": "external", "status": "accepted", "justification": leak.allowed}]
    return result


def _uri(path: str) -> str:
    return "".join(
        letter
        if letter.isascii() and (letter.isalnum() or letter in "/-._~")
        else "".join(f"%{byte:02X}" for byte in letter.encode())
        for letter in path
    )


def printable(words: str) -> str:
    """``words`` with whatever could move a terminal's cursor written out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)
