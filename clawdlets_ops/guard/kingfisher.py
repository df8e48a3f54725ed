"""A second opinion by a packaged scanner (PyPI kingfisher-bin), offline, with our rules added to its own.

It would by itself try what it finds against the providers and look for updates; both are switched off, and it runs in a
network namespace without a way out. Source: kingfisher's own help, version 2.14.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import yaml

from clawdlets_ops.errors import CommandError, ToolMissingError
from clawdlets_ops.guard import allow
from clawdlets_ops.guard.engine import fingerprint_of_line
from clawdlets_ops.guard.rules import RULES
from clawdlets_ops.guard.scan import Item, Leak, unknown
from clawdlets_ops.process import Command, LocalRunner

TIMEOUT_S = 1800.0
_FOUND, _CLEAN = 200, 0
# Rules whose confirmation is code (another rule inside, neighbouring lines) would only make noise there.
_NOT_PORTABLE = frozenset(
    {"encoded-secret", "hetzner-api-token", "password-in-url", "private-key", "named-hex-secret", "named-base64-secret"}
)


def rule_pack() -> str:
    """Our rules in kingfisher's form (YAML), for which a pattern and an entropy are all there is."""
    rules = [
        {
            "name": rule.what,
            "id": f"clawdlets.{rule.id}.1",
            "pattern": rule.pattern.decode("ascii"),
            "min_entropy": 3.0,
            "confidence": "medium",
            "examples": [rule.sample.decode("ascii")],
        }
        for rule in RULES
        if rule.id not in _NOT_PORTABLE
    ]
    rules.append(
        {
            "name": "a Hetzner Cloud API token",
            "id": "clawdlets.hetzner-api-token.1",
            "pattern": r"(?:^|[^A-Za-z0-9+/_.-])([A-Za-z0-9]{64})(?:[^A-Za-z0-9+/=_-]|$)",
            "min_entropy": 4.6,
            "confidence": "medium",
            "examples": [],
        }
    )
    return yaml.safe_dump({"rules": rules}, sort_keys=False)


@dataclass
class SecondOpinion:
    """Copies what is scanned into a private folder, then has kingfisher look at it."""

    runner: LocalRunner
    folder: Path
    said: str = "did not run"
    _items: list[tuple[Item, int]] = field(default_factory=list)

    def copying(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``, each written down while it is read."""
        (self.folder / "blobs").mkdir(mode=0o700)
        for number, item in enumerate(items):
            with (self.folder / "blobs" / f"{number}.txt").open("wb") as copy:
                yield replace(item, pieces=_copied(item.pieces, copy))
            self._items.append((item, (self.folder / "blobs" / f"{number}.txt").stat().st_size))

    def leaks(self, allowed: Iterable[allow.Entry]) -> list[Leak]:
        """What kingfisher found; an unknown finding when it did not look at all that it was given."""
        rules = self.folder / "rules.yml"
        rules.write_text(rule_pack())
        offline = ["unshare", "-n"] if self._may(["unshare", "-n", "true"]) else ["unshare", "-rn"]
        if not self._may([*offline, "true"]):
            raise CommandError(
                "there is no network namespace to be had, and it must not run with a network", where="unshare"
            )
        output = self.folder / "report.jsonl"
        result = self.runner.run(
            Command(
                [
                    *offline,
                    *(find(self.runner), "scan", self.folder / "blobs", "--rules-path", rules),
                    *("--no-validate", "--no-update-check", "--redact", "--no-dedup", "--no-ignore", "--quiet"),
                    *("--confidence", "low", "--max-file-size", "1024", "--git-history", "none"),
                    *("--rule-cache-dir", self.folder / "cache", "--format", "jsonl", "--output", output),
                ],
                why="scan with kingfisher",
                env={"HOME": str(self.folder)},
                timeout_s=TIMEOUT_S,
            )
        )
        if result.exit_code not in (_FOUND, _CLEAN) or not output.exists():
            return [unknown("kingfisher", f"ended with status {result.exit_code}", fix=result.tail())]
        found, scanned = [], 0
        for line in output.read_text(errors="replace").splitlines():
            record = json.loads(line)
            if "audit" in record:
                scanned = sum(entry["stats"]["blobs_scanned"] for entry in record["audit"]["repositories"])
            elif "finding" in record:
                found.append(self._leak(record["rule"], record["finding"]))
        wanted = sum(1 for _, size in self._items if size)
        self.said = f"kingfisher looked at {scanned} of {wanted} contents and found {len(found)}"
        listed = list(allowed)
        judged = [
            replace(leak, allowed=entry.reason)
            if (
                entry := next(
                    (one for one in listed if one.covers(path=leak.path, rule=leak.rule, fingerprint=leak.fingerprint)),
                    None,
                )
            )
            else leak
            for leak in found
        ]
        if scanned < wanted:
            judged.append(unknown("kingfisher", f"looked at {scanned} of {wanted} contents"))
        return judged

    def _leak(self, rule: dict[str, str], finding: dict[str, object]) -> Leak:
        name = str(finding["path"]).rpartition("/")[2]
        item, _ = self._items[int(name.partition(".")[0])]
        line = int(str(finding["line"]))
        path = item.paths[0] if item.paths else item.label
        mark = fingerprint_of_line(self.folder / "blobs" / name, line)
        what = f"{rule['description']} (second opinion)"
        return Leak(
            str(rule["id"]), path, line, what, "look at it; allow it with a reason if it is none", "", mark, item.label
        )

    def _may(self, argv: list[str]) -> bool:
        return self.runner.run(Command(argv, why="try a network namespace")).ok


@contextlib.contextmanager
def aside(runner: LocalRunner) -> Iterator[SecondOpinion]:
    """A second opinion with a private folder of its own, removed at the end; ToolMissingError without kingfisher."""
    find(runner)
    with tempfile.TemporaryDirectory(prefix="clawdlets-guard-") as folder:  # 0700 by itself
        yield SecondOpinion(runner, Path(folder))


def find(runner: LocalRunner) -> Path:
    """kingfisher on PATH, or where pip put it beside this Python; ToolMissingError."""
    beside = Path(sys.executable).with_name("kingfisher")
    if (found := runner.which("kingfisher") or (beside if beside.is_file() else None)) is None:
        raise ToolMissingError("the program is not on PATH", where="kingfisher", fix="pip install kingfisher-bin")
    return found


def _copied(pieces: Iterable[bytes], copy: BinaryIO) -> Iterator[bytes]:
    for piece in pieces:
        copy.write(piece)
        yield piece
