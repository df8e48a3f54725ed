"""The scan: what is to be looked at, in one stream, and what was found there."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.finding import Finding, State
from clawdlets_ops.guard import allow, sopsfiles
from clawdlets_ops.guard.engine import PIECE_BYTES, Engine
from clawdlets_ops.guard.gitobjects import LINK, REGULAR, SUBMODULE, Entry, Object, Repository
from clawdlets_ops.guard.paths import HEAD_BYTES, PATH_RULES, may_be_forbidden

MAX_PER_RULE = 20
"""How many hits of one rule in one file are listed; the rest is counted."""
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Item:
    """Something to look at. ``paths``: every path it has, as the repository's root sees it; empty for a message.

    ``label`` says where it is; ``pieces`` is its content, a link's target for a link.
    """

    label: str
    pieces: Iterable[bytes]
    paths: tuple[str, ...] = ()
    kind: str = REGULAR


@dataclass(frozen=True)
class Leak:
    """One finding. ``allowed`` is the reason it may stay, from the allow-list."""

    rule: str
    path: str
    line: int
    what: str
    fix: str
    masked: str = ""
    fingerprint: str = ""
    where: str = ""
    unknown: bool = False
    allowed: str = ""

    def as_finding(self) -> Finding:
        """As the other checks report."""
        state = State.UNKNOWN if self.unknown else State.PASS if self.allowed else State.FAIL
        place = f"{self.path}:{self.line}" if self.line else self.path
        return Finding(self.rule, state, self.what, "", f"{place} {self.masked}".strip(), self.where, self.fix)


@dataclass
class Outcome:
    """What a scan saw. ``leaks`` in the order of the scan; ``unused`` are allow-list entries that covered nothing."""

    scope: str
    engine: str
    rules: int
    needles: int
    leaks: list[Leak] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unused: list[allow.Entry] = field(default_factory=list)
    items: int = 0
    size_bytes: int = 0

    @property
    def exit_code(self) -> int:
        """0 clean, 1 something was found, 2 nothing was found and something could not be looked at."""
        open_leaks = [leak for leak in self.leaks if not leak.allowed]
        return 1 if any(not leak.unknown for leak in open_leaks) else 2 if open_leaks else 0


@dataclass(frozen=True)
class Ground:
    """What a scan judges by: the engine, where ``secrets/`` is, who may read there, and what may stay.

    ``secrets_prefix`` is like ``secrets/``; ``declared`` None leaves recipients unjudged (history had others).
    """

    engine: Engine
    secrets_prefix: str = "secrets/"
    declared: sopsfiles.Declared | None = None
    allowed: tuple[allow.Entry, ...] = ()


def scan(items: Iterable[Item], ground: Ground, scope: str, *, report_unused: bool = True) -> Outcome:
    """Look at every item. Whatever cannot be read becomes an unknown finding, never a clean one."""
    outcome = Outcome(scope, ground.engine.name, ground.engine.rule_count, len(ground.engine.needles))
    used: set[allow.Entry] = set()
    seen: set[tuple[str, str, str, str]] = set()
    for leak in _leaks(iter(items), ground, outcome):
        entry = next(
            (
                entry
                for entry in ground.allowed
                if entry.covers(path=leak.path, rule=leak.rule, fingerprint=leak.fingerprint)
            ),
            None,
        )
        if entry is not None and not leak.unknown:
            used.add(entry)
            leak = replace(leak, allowed=entry.reason)
        # one line that is in a hundred versions of a file is one leak
        key = (leak.rule, leak.path, leak.fingerprint or leak.what, "" if leak.path else leak.where)
        if scope != "history" or key not in seen:
            seen.add(key)
            outcome.leaks.append(leak)
    if report_unused:
        outcome.unused = [entry for entry in ground.allowed if entry not in used]
    return outcome


def _leaks(stream: Iterator[Item], ground: Ground, outcome: Outcome) -> Iterator[Leak]:
    """Everything found, in the order of the items. Small contents are put to the engine many at a time."""
    waiting: list[tuple[Item, bytes]] = []
    waiting_bytes = 0
    while True:
        try:
            item = next(stream, None)
        except (OSError, ClawdletsError) as error:
            yield from _look_together(waiting, ground, outcome)
            yield unknown(outcome.scope, f"the scan ended early: {_why(error)}", fix="see the message, then scan again")
            return
        if item is None:
            yield from _look_together(waiting, ground, outcome)
            return
        outcome.items += 1
        try:
            pieces = iter(item.pieces)
            content, more = next(pieces, b""), next(pieces, None)
        except (OSError, ClawdletsError) as error:
            yield from _look_together(waiting, ground, outcome)
            waiting, waiting_bytes = [], 0
            yield _unread(item, error)
            continue
        waiting_bytes += len(content)
        if more is None and waiting_bytes <= PIECE_BYTES:
            waiting.append((item, content))
            continue
        yield from _look_together(waiting, ground, outcome)
        if more is None:
            waiting, waiting_bytes = [(item, content)], len(content)
            continue
        waiting, waiting_bytes = [], 0
        try:
            yield from _look(item, chain((content, more), pieces), ground, outcome)
        except (OSError, ClawdletsError) as error:
            yield _unread(item, error)


def _look_together(waiting: list[tuple[Item, bytes]], ground: Ground, outcome: Outcome) -> Iterator[Leak]:
    if not waiting:
        return
    silent = ground.engine.is_silent([content for _, content in waiting])
    for item, content in waiting:
        if (silent or ground.engine.is_silent((content,))) and not _by_path(item, ground):
            outcome.size_bytes += len(content)
        else:
            yield from _look(item, (content,), ground, outcome)


def _by_path(item: Item, ground: Ground) -> bool:
    """Whether an item must be looked at for the sake of a path that it has."""
    return any(path.startswith(ground.secrets_prefix) or may_be_forbidden(path) for path in item.paths)


def _unread(item: Item, error: OSError | ClawdletsError) -> Leak:
    return unknown(item.paths[0] if item.paths else item.label, f"could not be read: {_why(error)}", where=item.label)


def _why(error: OSError | ClawdletsError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else error.what


def unknown(path: str, what: str, *, where: str = "", fix: str = "make it readable, then scan again") -> Leak:
    """A finding that says that nothing is known."""
    return Leak(UNREADABLE, path, 0, what, fix, where=where, unknown=True)


class _Tap:
    """Lets pieces through to the engine, and keeps what path rules and the sops check need of them."""

    def __init__(self, pieces: Iterable[bytes], keep_bytes: int, *, digest: bool) -> None:
        self._pieces = pieces
        self._keep_bytes = keep_bytes
        self.kept = bytearray()
        self.size_bytes = 0
        self.digest = hashlib.sha256() if digest else None

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self.size_bytes += len(piece)
            if len(self.kept) < self._keep_bytes:
                self.kept += piece[: self._keep_bytes - len(self.kept)]
            if self.digest is not None:
                self.digest.update(piece)
            yield piece


def _look(item: Item, pieces: Iterable[bytes], ground: Ground, outcome: Outcome) -> list[Leak]:
    in_secrets = [path for path in item.paths if path.startswith(ground.secrets_prefix)]
    suspect = [path for path in item.paths if may_be_forbidden(path)]
    keep = sopsfiles.MAX_BYTES + 1 if in_secrets else HEAD_BYTES if suspect else 0
    tap = _Tap(pieces, keep, digest=bool(in_secrets or suspect))
    path = item.paths[0] if item.paths else item.label
    found: list[Leak] = []
    counts: dict[str, int] = {}
    for hit in ground.engine.scan(tap):
        counts[hit.rule] = counts.get(hit.rule, 0) + 1
        if counts[hit.rule] <= MAX_PER_RULE:
            found.append(Leak(hit.rule, path, hit.line, hit.what, hit.fix, hit.masked, hit.fingerprint, item.label))
    for rule, count in counts.items():
        if count > MAX_PER_RULE:
            what = f"{count - MAX_PER_RULE} more of the same"
            found.append(Leak(rule, path, 0, what, "see the first ones", where=item.label))
    outcome.size_bytes += tap.size_bytes
    mark = tap.digest.hexdigest()[:16] if tap.digest else ""
    for name in suspect:
        for path_rule in PATH_RULES:
            if path_rule.matches(name, bytes(tap.kept[:HEAD_BYTES])):
                found.append(Leak(path_rule.id, name, 0, path_rule.what, path_rule.fix, "", mark, item.label))
    for name in in_secrets:
        found += _secrets_leaks(name, item, tap, ground, mark)
    return found


def _secrets_leaks(name: str, item: Item, tap: _Tap, ground: Ground, mark: str) -> Iterator[Leak]:
    below = name.removeprefix(ground.secrets_prefix)
    if item.kind == LINK:
        fix = "put the file itself there, encrypted"
        yield Leak("secrets-not-encrypted", name, 0, "is a symbolic link", fix, "", mark, item.label)
        return
    if tap.size_bytes > sopsfiles.MAX_BYTES:
        yield unknown(name, f"is larger than {sopsfiles.MAX_BYTES} bytes, too large to be judged", where=item.label)
        return
    for fault in sopsfiles.judge(below, bytes(tap.kept), ground.declared):
        yield Leak(fault.rule, name, 0, fault.what, fault.fix, "", mark, item.label)


# --- what there is to look at ---


def index_items(
    repository: Repository, entries: Iterable[Entry], label: str, outcome_notes: list[str]
) -> Iterator[Item]:
    """The contents that the index has for ``entries``; each content once, under all its paths."""
    by_oid: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == SUBMODULE:
            outcome_notes.append(
                f"{entry.path} is a submodule at {entry.oid[:12]}: a repository of its own, not scanned"
            )
        else:
            by_oid.setdefault(entry.oid, []).append(entry)
    for found in repository.objects(by_oid):
        entries_here = by_oid[found.oid]
        kind = LINK if all(entry.kind == LINK for entry in entries_here) else REGULAR
        yield Item(label, _pieces(found), tuple(entry.path for entry in entries_here), kind)


def push_items(repository: Repository, entries: Iterable[Entry]) -> Iterator[Item]:
    """The objects of a push: contents with a path, commits and tags with their messages."""
    paths = {entry.oid: entry.path for entry in entries}
    for found in repository.objects(paths):
        if found.kind != "tree":
            named = (paths[found.oid],) if paths[found.oid] and found.kind == "blob" else ()
            yield Item(f"{found.kind} {found.oid[:12]}", _pieces(found), named)


def history_items(repository: Repository) -> Iterator[Item]:
    """Every object that git stores, reachable or not, then git's own files."""
    history = repository.history()
    for found in repository.objects(history.oids):
        named = tuple(dict.fromkeys(history.paths.get(found.oid, ()))) if found.kind == "blob" else ()
        yield Item(f"{found.kind} {found.oid[:12]}", _pieces(found), named)
    for path in repository.loose_ends():
        base = repository.common_dir
        shown = f".git/{path.relative_to(base)}" if path.is_relative_to(base) else str(path)
        yield Item(shown, _file_pieces(path))


def file_items(paths: Iterable[Path], root: Path, listing: Callable[[Path], Iterable[bytes] | None]) -> Iterator[Item]:
    """The files ``paths`` and those below folders, which ``listing`` names when git knows them; links are not followed."""
    base = f"{os.path.abspath(root).rstrip('/')}/"
    for path in paths:
        absolute = os.path.abspath(path)
        if os.path.islink(path) or not os.path.isdir(path):
            yield _file_item(absolute, base, is_link=os.path.islink(path))
        elif (names := listing(path)) is None:
            for each, is_link in _walk(absolute):
                yield _file_item(each, base, is_link=is_link)
        else:
            for each in (os.path.join(absolute, os.fsdecode(name)) for name in names):
                try:
                    mode = os.lstat(each).st_mode
                except FileNotFoundError:  # removed, and still in the index
                    continue
                except OSError:  # opening it will tell
                    mode = 0
                if not stat.S_ISDIR(mode):  # a folder here is a submodule
                    yield _file_item(each, base, is_link=stat.S_ISLNK(mode))


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Files and links below ``folder``, with whether each is a link; and the folders that could not be listed."""
    todo = [folder]
    while todo:
        here = todo.pop()
        try:
            with os.scandir(here) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError:
            yield here, False  # reading it will fail, and that is told
            continue
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.path, entry.is_symlink()
            elif entry.name != ".git":
                todo.append(entry.path)


def _file_item(path: str, base: str, *, is_link: bool) -> Item:
    name = path.removeprefix(base)
    shown = name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
    return Item("work tree", _file_pieces(path), (shown,), LINK if is_link else REGULAR)


def _file_pieces(path: str | Path) -> Iterator[bytes]:
    """The bytes of a file, a link's target for a link. Opened before it is looked at: what is judged is what is read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(path):
            raise
        yield os.fsencode(os.readlink(path))
        return
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise ClawdletsError("is neither a file nor a link", where=str(path))
        while piece := os.read(handle, PIECE_BYTES):
            yield piece
            if len(piece) == info.st_size:
                break
    finally:
        os.close(handle)


def _pieces(found: Object) -> Iterator[bytes]:
    if found.pieces is None:
        raise ClawdletsError("git does not have the object", where=found.oid, fix="fetch it, then scan again")
    yield from found.pieces


def declared_in(repository: Repository, prefix: str, entries: Iterable[Entry]) -> sopsfiles.Declared:
    """Who may read the secrets, as the index has it."""
    keys = {entry.path.removeprefix(prefix): entry.oid for entry in entries if _is_recipient(entry.path, prefix)}
    contents: Mapping[str, bytes] = {
        found.oid: b"".join(found.pieces or ()) for found in repository.objects(dict.fromkeys(keys.values()))
    }
    return sopsfiles.Declared.from_files({path: contents.get(oid, b"") for path, oid in keys.items()})


def _is_recipient(path: str, prefix: str) -> bool:
    return path.startswith(f"{prefix}keys/") and path.endswith(".age.pub")
