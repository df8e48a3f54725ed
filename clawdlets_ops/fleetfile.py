"""The fleet file as text: read with bounds, parsed without losing order or ``$comment``, edited in place, migrated.

What the file means is ``fleet.py``'s; here it is a document. An edit adds what it adds and leaves every other byte as it
was, line ends and a person's own line breaks included, so that the change in git is the change that was meant.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # documented by use: the C scanner of one string
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import FleetError

SCHEMA_VERSION = 1
MAX_BYTES = 1024 * 1024
"""A thousand hosts with everything that can be said of a host are about half of that."""
PEER_VERSIONS = range(7, 13)

Document = dict[str, Any]
Step = Callable[[Document], Document]

MIGRATIONS: Mapping[int, Step] = {}
"""From which version, and how: each step takes a document of its version to one of the next, and sets schemaVersion."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_text(path: Path) -> str:
    """The text of a fleet file; FleetError when it is missing, no regular file, too large, or not UTF-8 without a mark."""
    fix = "run this in a project, or name one with --project DIR"
    try:
        # Not blocking: a pipe in its place would keep us waiting for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as handle:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FleetError("is not a regular file", where=str(path), fix=fix)
            data = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise FleetError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    if len(data) > MAX_BYTES:
        raise FleetError(f"is larger than {MAX_BYTES} bytes, which no fleet file is", where=str(path), fix=fix)
    if data.startswith(b"\xef\xbb\xbf"):
        raise FleetError(
            "begins with a byte order mark, which JSON must not have (RFC 8259, section 8.1)",
            where=str(path),
            fix=f"sed -i '1s/^\\xEF\\xBB\\xBF//' {path}",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FleetError(f"is not UTF-8 (byte {error.start})", where=str(path), fix="save it as UTF-8") from error


def parse(text: str, *, where: str) -> Any:
    """The JSON in ``text``, in its order, comments included; FleetError for anything that is not one plain value."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise FleetError("is not valid JSON: it is nested too deeply", where=where) from None
    except ValueError as error:
        raise FleetError(f"is not valid JSON: {error}", where=where) from error


def without_comments(value: Any) -> Any:
    """``value`` without the ``$comment`` of any object in it."""
    if isinstance(value, dict):
        return {key: without_comments(part) for key, part in value.items() if key != "$comment"}
    if isinstance(value, list):
        return [without_comments(part) for part in value]
    return value


def version_problem(found: object) -> str:
    """What is wrong with a ``schemaVersion``, and what to do; empty when it is the one that is read here."""
    if isinstance(found, bool) or not isinstance(found, int):
        return f"must be the number {SCHEMA_VERSION}"
    if found == SCHEMA_VERSION:
        return ""
    if found in MIGRATIONS:
        return f"is {found}, and {SCHEMA_VERSION} is read here: clawdlets fleet migrate brings the file up to date"
    if found in PEER_VERSIONS:
        return f"is {found}, which the other clawdlets (TypeScript) writes: clawdlets fleet import FILE makes a fleet of it"
    if found > SCHEMA_VERSION:
        return f"is {found}, which is newer than {SCHEMA_VERSION}, the newest that is known here: update clawdlets-ops"
    return f"is {found}; no such version was ever written; the current one is {SCHEMA_VERSION}"


@dataclass(frozen=True)
class Migrated:
    """A document of the newest version, and the versions that it went through, the first being what was found."""

    document: Document
    versions: tuple[int, ...]


def migrate(
    document: Document, *, where: str, newest: int = SCHEMA_VERSION, steps: Mapping[int, Step] = MIGRATIONS
) -> Migrated:
    """``document`` brought to ``newest``, step by step; FleetError for a version from which there is no way.

    A version that is not known is never taken for a near one: what its keys mean is not known either.
    """
    versions: list[int] = []
    while True:
        version = document.get("schemaVersion")
        if not isinstance(version, int) or isinstance(version, bool) or version not in {*steps, newest}:
            said = version_problem(version) or "cannot be brought up to date"
            raise FleetError(f"schemaVersion {said}", where=where, fix="nothing was changed")
        if version == newest:
            return Migrated(document, (*versions, newest))
        document = steps[version](dict(document))
        if document.get("schemaVersion") != version + 1:
            raise FleetError(f"the migration from {version} did not lead to {version + 1}", where=where)
        versions.append(version)


def to_text(document: Document) -> str:
    """A document as this project writes it: two spaces, short lists in one line, a line end at the end."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return re.sub(r"\[\n\s+([^][{}]*?)\n\s+\]", _one_line, text) + "\n"


def add_member(text: str, keys: Sequence[str], name: str, value: Any) -> str:
    """``text`` with ``name: value`` as the last member of the object at ``keys``; all the rest byte for byte as it was.

    ``text`` is valid JSON with objects at ``keys`` (``parse`` has seen it). KeyError when there is none.
    """
    at = _skip(text, 0)
    for key in keys:
        at = next((start for found, _, start, _ in _members(text, at)[0] if found == key), -1)
        if at < 0 or text[at] != "{":
            raise KeyError(key)
    members, close = _members(text, at)
    line_end = "\r\n" if "\r\n" in text else "\n"
    own = _indent(text, close if text[at:close].count("\n") else at)
    inner = _indent(text, members[-1][1]) if members else own + "  "
    if members and "\n" not in text[at:close]:  # the whole object stands in one line: stay in it
        return f"{text[: members[-1][3]]}, {json.dumps(name)}: {json.dumps(value)}{text[members[-1][3] :]}"
    shown = to_text({name: value})[2:-3].replace("\n  ", "\n")  # without the braces around it
    lines = [f"{inner}{line}" if line else line for line in shown.strip("\n").removeprefix("  ").split("\n")]
    added = line_end.join(lines)
    if members:
        end = members[-1][3]
        return f"{text[:end]},{line_end}{added}{text[end:]}"
    return f"{text[: at + 1]}{line_end}{added}{line_end}{own}{text[close:]}"


def _members(text: str, at: int) -> tuple[list[tuple[str, int, int, int]], int]:
    """Of the object that begins at ``at``: each key, where it begins, where its value begins and ends; where it closes."""
    found = []
    at = _skip(text, at + 1)
    while text[at] != "}":
        key_at = at
        key, at = scanstring(text, at + 1, True)
        start = _skip(text, _skip(text, at) + 1)
        _, end = _DECODER.raw_decode(text, start)
        found.append((key, key_at, start, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found, at


def _skip(text: str, at: int) -> int:
    matched = _SPACE.match(text, at)
    return matched.end() if matched else at


def _indent(text: str, at: int) -> str:
    """The white space that the line of ``at`` begins with."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip(" \t"))]


def _one_line(found: re.Match[str]) -> str:
    joined = "[" + re.sub(r",\n\s+", ", ", found[1]) + "]"
    return joined if len(joined) <= 100 else found[0]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Document:
    seen: Document = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} appears twice in one object")
        seen[key] = value
    return seen


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON (RFC 8259, section 6)")
