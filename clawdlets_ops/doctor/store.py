"""Known secrets in store paths: every file of a closure read once, within a bound on bytes and time.

A search that ended at its bound, met something unreadable, or did not find its own canary says so; it is never taken
for a clean one. Not seen: what is compressed or encrypted inside a file.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandError
from clawdlets_ops.guard.engine import PIECE_BYTES, Engine
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.sensitive import Secret

MAX_HITS = 50
CONTROL = "canary of this search"
PUBLIC_CACHE = "cache.nixos.org-1:"


@dataclass(frozen=True)
class Budget:
    """How much may be read, in bytes, and how long it may take, in seconds."""

    size_bytes: int = 16 * 1024**3
    seconds: float = 120.0


@dataclass(frozen=True)
class Hit:
    """A known secret in a file: its name and the first eight digits of its SHA-256, never its value."""

    path: str
    secret: str


@dataclass(frozen=True)
class StoreSearch:
    """What a search saw. ``gaps`` are the reasons why it did not see everything; ``control`` whether it found the canary
    that was planted for it."""

    hits: tuple[Hit, ...]
    paths: int
    files: int
    size_bytes: int
    needles: int
    control: bool
    gaps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.paths} paths, {self.files} files, {self.size_bytes} bytes, {self.needles} known secrets"


class _Spent(Exception):
    """The budget is used up."""


def search(
    paths: Sequence[Path],
    needles: Sequence[Needle],
    *,
    budget: Budget | None = None,
    clock: Callable[[], float] = time.monotonic,
    matcher: Callable[[Sequence[Needle]], Engine] = lambda needles: Engine(needles, rules=()),
) -> StoreSearch:
    """Look for ``needles`` in the files ``paths`` and in all files below folders. Links are not followed.

    The canary lies in a private temporary folder of its own, and is looked for first by the same reading.
    """
    budget = budget or Budget()
    canary = Needle(CONTROL, Secret(f"canary-{secrets.token_hex(16)}", CONTROL))
    engine = matcher([*needles, canary])
    deadline = clock() + budget.seconds
    hits: list[Hit] = []
    gaps: list[str] = []
    read = [0, 0]  # files, bytes

    def pieces(path: Path) -> Iterator[bytes]:
        with path.open("rb", buffering=0) as handle:
            while piece := handle.read(PIECE_BYTES):
                read[1] += len(piece)
                yield piece
                if path == planted:
                    continue
                if read[1] >= budget.size_bytes:
                    raise _Spent(f"the bound of {budget.size_bytes} bytes was reached")
                if clock() >= deadline:
                    raise _Spent(f"the bound of {budget.seconds:g} s was reached")

    def found_in(path: Path) -> Iterator[str]:
        read[0] += 1
        for hit in engine.scan(pieces(path)):
            yield hit.what

    with tempfile.TemporaryDirectory(prefix="clawdlets-canary-") as folder:
        planted = Path(folder) / "canary"  # the bounds are not about it
        planted.write_text(f"canary {canary.value.reveal()}\n")
        control = any(CONTROL in what for what in found_in(planted))
    read[:] = [0, 0]
    try:
        for path in _files(paths, gaps):
            if clock() >= deadline:
                raise _Spent(f"the bound of {budget.seconds:g} s was reached")
            try:
                for what in found_in(path):
                    if len(hits) < MAX_HITS:
                        hits.append(Hit(str(path), what))
            except OSError as error:
                gaps.append(f"{path}: {error.strerror}")
    except _Spent as spent:
        gaps.append(str(spent))
    return StoreSearch(tuple(hits), len(paths), read[0], read[1], len(needles), control, tuple(gaps))


def _files(paths: Iterable[Path], gaps: list[str]) -> Iterator[Path]:
    """The regular files among and below ``paths``."""

    def complain(error: OSError) -> None:
        gaps.append(f"{error.filename}: {error.strerror}")

    for path in paths:
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            gaps.append(f"{path}: {error.strerror}")
            continue
        if stat.S_ISREG(mode):
            yield path
        elif stat.S_ISDIR(mode):
            for parent, folders, names in os.walk(path, onerror=complain):
                folders.sort()
                for name in sorted(names):
                    found = Path(parent, name)
                    try:
                        regular = stat.S_ISREG(found.lstat().st_mode)
                    except OSError as error:
                        complain(error)
                    else:
                        if regular:
                            yield found


def read_listing(source: Path) -> list[Path]:
    """The store paths that ``source`` names: a folder itself, or the lines of a file as ``nix path-info -r`` prints them.

    CommandError when it cannot be read or names nothing: an empty search would look like a clean one.
    """
    try:
        if source.is_dir():
            return [source]
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"the listing cannot be read ({type(error).__name__})", where=str(source)) from None
    paths = [Path(line) for line in lines if line]
    if not paths or not all(path.is_absolute() for path in paths):
        raise CommandError("is no listing of store paths, one absolute path a line", where=str(source))
    return paths


def made_here(document: Any) -> list[Path]:
    """The store paths that the public binary cache has not signed, out of ``nix path-info --all --json``; CommandError.

    What it has signed was made there, from other files than ours. Both forms are read: a list of objects with a path
    (before Nix 2.19), an object keyed by path.
    """
    if isinstance(document, list):
        entries = {str(entry.get("path")): entry for entry in document if isinstance(entry, dict)}
    elif isinstance(document, dict):
        entries = {str(path): entry for path, entry in document.items()}
    else:
        raise CommandError("nix printed no listing of its store", where="nix")
    return sorted(Path(path) for path, entry in entries.items() if not _is_signed(entry))


def _is_signed(entry: Any) -> bool:
    signatures = entry.get("signatures") if isinstance(entry, dict) else None
    return any(str(signature).startswith(PUBLIC_CACHE) for signature in signatures or ())


def parse_store(text: str) -> list[Path]:
    """``made_here`` of the text that nix printed."""
    try:
        return made_here(json.loads(text))
    except ValueError:
        raise CommandError("nix printed no JSON", where="nix") from None
