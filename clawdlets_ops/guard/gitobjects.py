"""What git holds: the index, the objects that a push would send, every object there is. Read as bytes, streamed.

Sources: git-cat-file(1), git-diff(1) "raw output format", git-ls-files(1), git-rev-list(1), githooks(5).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from clawdlets_ops.errors import CommandError
from clawdlets_ops.process import Command, Result

TIMEOUT_S = 3600.0
_READ_BYTES = 131_072
_MAX_FOLDERS = 5_000_000
GIT_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
)
"""What git tells its hooks: a commit of named files has an index of its own."""
# Nothing that a repository's configuration names may run, ask or fetch because we look at it.
_ENVIRONMENT = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "LC_ALL": "C",
}
_OPTIONS = ("-c", "core.fsmonitor=false", "-c", "core.quotePath=false", "-c", "core.bigFileThreshold=1m")

REGULAR, LINK, SUBMODULE = "file", "link", "submodule"


class Streamer(Protocol):
    """What this module needs of ``process.LocalRunner``."""

    def run(self, command: Command) -> Result:
        """Run to the end."""
        ...

    def stream(self, command: Command) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Its output while it is written."""
        ...


@dataclass(frozen=True)
class Entry:
    """A path with the object that stands there. ``kind`` is REGULAR, LINK or SUBMODULE."""

    path: str
    oid: str
    kind: str = REGULAR


@dataclass(frozen=True)
class Object:
    """An object on its way: ``pieces`` must be used up before the next one; None when git does not have it."""

    oid: str
    kind: str
    size: int
    pieces: Iterator[bytes] | None


@dataclass
class History:
    """Every object but trees, and the paths that each content had in any of them."""

    oids: list[str] = field(default_factory=list)
    paths: dict[str, list[str]] = field(default_factory=dict)

    def walk(self, trees: Mapping[str, bytes], roots: Iterable[str]) -> None:
        """Note the paths below ``roots``; CommandError when there are more than any honest repository has."""
        seen: set[tuple[str, str]] = set()
        todo = [(root, "") for root in roots]
        while todo:
            here = todo.pop()
            if here in seen:
                continue
            seen.add(here)
            if len(seen) > _MAX_FOLDERS:
                raise CommandError(
                    "its folders unfold without end", where="git", fix="look for a tree that holds itself"
                )
            oid, folder = here
            for name, child in _tree_entries(trees.get(oid, b""), len(oid) // 2):
                path = f"{folder}{name}"
                if child in trees:
                    todo.append((child, f"{path}/"))
                else:
                    self.paths.setdefault(child, []).append(path)


class Repository:
    """The repository that ``folder`` is in. CommandError when git says it is none, ToolMissingError without git."""

    def __init__(self, runner: Streamer, folder: Path, environ: Mapping[str, str]) -> None:
        self._runner = runner
        self._folder = folder
        self._environment = {**_ENVIRONMENT, **{name: environ[name] for name in GIT_VARIABLES if name in environ}}
        names = self._line("rev-parse", "--absolute-git-dir", "--git-common-dir", "--show-toplevel").splitlines()
        if len(names) != 3:
            raise CommandError("git did not say where the repository is", where=str(folder))
        self.git_dir, self.common_dir, self.top = (folder / name for name in names)
        self.common_dir = self.common_dir.resolve()

    def _command(self, *words: str, why: str, stdin: bytes | None = None) -> Command:
        return Command(
            ["git", *_OPTIONS, *words],
            why=why,
            env=self._environment,
            cwd=self._folder,
            stdin=stdin,
            timeout_s=TIMEOUT_S,
        )

    def _line(self, *words: str) -> str:
        return self._runner.run(self._command(*words, why=f"git {words[0]}")).check().stdout.rstrip("\n")

    def config(self, name: str) -> tuple[str, str] | None:
        """The value of a setting with the scope that it comes from, or None."""
        result = self._runner.run(
            self._command("config", "--show-scope", "--get", name, why="read git's configuration")
        )
        if result.exit_code == 1:
            return None
        scope, _, value = result.check().stdout.rstrip("\n").partition("\t")
        return scope, value

    def hooks_dir(self) -> Path:
        """Where git looks for hooks here: ``core.hooksPath``, else the hooks folder that all worktrees share."""
        return self._folder / self._line("rev-parse", "--git-path", "hooks")

    @property
    def is_shallow(self) -> bool:
        """True when older commits were left where this was cloned from."""
        return self._line("rev-parse", "--is-shallow-repository") == "true"

    @property
    def is_partial(self) -> bool:
        """True when contents were left where this was cloned from."""
        return self.config("extensions.partialClone") is not None

    def _records(self, *words: str, why: str, stdin: bytes | None = None, end: bytes = b"\0") -> Iterator[bytes]:
        with self._runner.stream(self._command(*words, why=why, stdin=stdin)) as output:
            rest = b""
            while data := output.read1(_READ_BYTES) if hasattr(output, "read1") else output.read(_READ_BYTES):
                *whole, rest = (rest + data).split(end)
                yield from whole
            if rest:
                yield rest

    def staged(self) -> list[Entry]:
        """What the next commit adds or changes."""
        words = ("diff", "--cached", "--raw", "-z", "--no-renames", "--no-abbrev", "--no-ext-diff", "--no-textconv")
        fields = list(self._records(*words, "--ignore-submodules=none", why="list what is staged"))
        found = []
        for head, path in zip(fields[0::2], fields[1::2], strict=True):
            _, mode, _, oid, status = head.decode("ascii").split(" ")
            if status != "D":
                found.append(Entry(_text(path), oid, _kind(mode)))
        return found

    def staged_away(self) -> list[str]:
        """The paths that the next commit removes."""
        words = ("diff", "--cached", "--name-only", "-z", "--no-renames", "--diff-filter=D", "--no-ext-diff")
        return [_text(path) for path in self._records(*words, why="list what is removed")]

    def tracked(self) -> list[Entry]:
        """Everything in the index, all sides of a conflict among it."""
        found = []
        for record in self._records("ls-files", "-s", "-z", "--full-name", ":/", why="list the index"):
            head, _, path = record.partition(b"\t")
            mode, oid, _ = head.decode("ascii").split(" ")
            found.append(Entry(_text(path), oid, _kind(mode)))
        return found

    def unignored(self, folder: Path) -> list[bytes]:
        """The files below ``folder``, relative to it: tracked or not, but not ignored."""
        words = ("-C", str(folder), "ls-files", "-c", "-o", "--exclude-standard", "-z", "--deduplicate", ".")
        return list(self._records(*words, why="list files"))

    def pushed(self, updates: Iterable[str], remote: str) -> list[Entry]:
        """The objects that pre-push's lines (``local-ref oid remote-ref oid``) would send to ``remote``."""
        tips = [fields[1] for line in updates if len(fields := line.split()) == 4 and set(fields[1]) != {"0"}]
        if not tips:
            return []
        # without a name (a push to an address) everything that the tips reach counts as new
        known = ["--not", f"--remotes={remote}"] if re.fullmatch(r"[\w./-]+", remote) else []
        given = "".join(f"{tip}\n" for tip in tips).encode()
        words = (
            ("rev-list", "--objects", *tips, *known)
            if len(tips) < 100
            else ("rev-list", "--objects", "--stdin", *known)
        )
        stdin = None if len(tips) < 100 else given
        found = []
        for record in self._records(*words, why="list what is pushed", end=b"\n", stdin=stdin):
            oid, _, path = record.partition(b" ")
            found.append(Entry(_text(path), oid.decode("ascii")))
        return found

    def history(self) -> History:
        """Every object of the store, whether anything reaches it or not, with the paths of contents."""
        history, listed, commits = History(), [], []
        for record in self._records(
            *("cat-file", "--batch-all-objects", "--unordered", "--batch-check=%(objectname) %(objecttype)"),
            why="list all objects",
            end=b"\n",
        ):
            oid, _, kind = record.decode("ascii").partition(" ")
            if kind == "tree":
                listed.append(oid)
            else:
                history.oids.append(oid)
                commits += [oid] if kind == "commit" else []
        roots: dict[str, None] = {}
        for commit in self.objects(commits):
            head = b"".join(commit.pieces or ())
            if head.startswith(b"tree "):
                roots[head[5:].partition(b"\n")[0].decode("ascii")] = None
        trees = {tree.oid: b"".join(tree.pieces or ()) for tree in self.objects(listed)}
        below = {child for tree in trees.values() for _, child in _tree_entries(tree, len(listed[0]) // 2)}
        # a tree that nothing holds, such as git add and reset leave behind, is read as if it were a whole work tree
        history.walk(trees, [*roots, *(oid for oid in trees if oid not in below and oid not in roots)])
        return history

    def objects(self, oids: Iterable[str]) -> Iterator[Object]:
        """The objects ``oids`` in their order, streamed."""
        given = "".join(f"{oid}\n" for oid in oids).encode()
        if not given:
            return
        with self._runner.stream(
            self._command("cat-file", "--batch", "--buffer", why="read objects", stdin=given)
        ) as output:
            while head := output.readline():
                fields = head.decode("ascii", "replace").split()
                if len(fields) != 3:
                    yield Object(fields[0] if fields else "?", "missing", 0, None)
                    continue
                size = int(fields[2])
                pieces = _exactly(output, size)
                yield Object(fields[0], fields[1], size, pieces)
                for _ in pieces:  # whoever did not read to the end
                    pass
                if output.read(1) != b"\n":
                    raise CommandError("git's output ended in the middle of an object", where=fields[0])

    def blob(self, oid: str) -> bytes:
        """The whole of one small object; CommandError when git does not have it."""
        for found in self.objects([oid]):
            if found.pieces is not None:
                return b"".join(found.pieces)
        raise CommandError("git does not have the object", where=oid)

    def loose_ends(self) -> list[Path]:
        """Files in git's own folder that may hold a password and are no objects: configuration, logs, messages."""
        found = [
            path
            for folder in dict.fromkeys((self.git_dir, self.common_dir))
            for name in (
                "config",
                "config.worktree",
                "FETCH_HEAD",
                "COMMIT_EDITMSG",
                "MERGE_MSG",
                "SQUASH_MSG",
                "packed-refs",
                "description",
            )
            if (path := folder / name).is_file()
        ]
        for folder in dict.fromkeys((self.git_dir / "logs", self.common_dir / "logs")):
            found += sorted(path for path in folder.rglob("*") if path.is_file())
        found += sorted(path for path in self.common_dir.glob("modules/**/config") if path.is_file())
        return list(dict.fromkeys(found))


def _exactly(output: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        piece = output.read(min(size, _READ_BYTES))
        if not piece:
            raise CommandError("git's output ended in the middle of an object", where="git")
        size -= len(piece)
        yield piece


def _tree_entries(tree: bytes, oid_bytes: int) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(tree):
        space, zero = tree.index(b" ", at), tree.index(b"\0", at)
        yield _text(tree[space + 1 : zero]), tree[zero + 1 : zero + 1 + oid_bytes].hex()
        at = zero + 1 + oid_bytes


def _kind(mode: str) -> str:
    return {"120000": LINK, "160000": SUBMODULE}.get(mode, REGULAR)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
