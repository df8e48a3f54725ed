"""What one reading of the repository shows of a host's files, and a file as it is to be. Writes nothing."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError, UnreadableError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.layout import Layout
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.seen import Entry, Seen
from clawdlets_ops.secrets.vault import Plaintext, Sealed, open_all, operator_identity, raise_faults
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops

PUBLIC_FILE = 0o644

READ_BY_ANOTHER = "let an operator who can read it run secrets reconcile, or restore the file from git"


@dataclass(frozen=True)
class Target:
    """A file as it is to be: either its ``content`` is known, or ``plaintext`` is to be encrypted to ``recipients``.

    ``entry`` is what to remember of an encrypted file of ``host``; its ``cipher`` is filled in once the text exists.
    """

    path: Path
    mode: int
    content: str | Secret | None = field(default=None, repr=False)
    plaintext: Plaintext = field(default_factory=dict)
    recipients: frozenset[str] = frozenset()
    entry: Entry | None = None
    host: str = ""

    def status(self) -> Literal["created", "updated", "unchanged"]:
        """What writing it would be now."""
        if not self.path.exists():
            return "created"
        if self.content is None or stat.S_IMODE(self.path.lstat().st_mode) != self.mode:
            return "updated"
        content = self.content.reveal() if isinstance(self.content, Secret) else self.content
        return "unchanged" if self.path.read_bytes() == content.encode() else "updated"


@dataclass(frozen=True)
class Record:
    """What was remembered of a host's files last time, where, and what of it stays besides what is written now."""

    path: Path
    seen: Seen
    kept: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """``first`` is removed before anything else, then ``targets`` in the order of writing, then ``removals``, the
    folders that are then ``emptied``, and ``trees`` with all that is in them; ``records`` by host come last.

    ``stale`` files are only reported, as are the secrets (host, name) that are ``missing``.
    """

    targets: tuple[Target, ...] = ()
    first: tuple[Path, ...] = ()
    removals: tuple[Path, ...] = ()
    emptied: tuple[Path, ...] = ()
    trees: tuple[Path, ...] = ()
    stale: tuple[Path, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    records: Mapping[str, Record] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """``found`` are the host's files as they lie there; ``opened`` grows as files have to be decrypted."""

    project: Project
    host: str
    sops: Sops
    seen: Seen
    operator: Identity | None
    operators: frozenset[str]
    found: Mapping[Path, Sealed]
    opened: dict[Path, Plaintext] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The project's paths."""
        return self.project.layout

    def name(self, path: Path) -> str:
        """``path`` relative to the project."""
        return path.relative_to(self.layout.root).as_posix()

    def entry(self, path: Path) -> Entry | None:
        """What is known of the file without decrypting it."""
        sealed = self.found.get(path)
        return self.seen.entry(self.name(path), sealed.text) if sealed else None

    def settled(self, path: Path, readers: frozenset[str]) -> bool:
        """Whether nothing of ``path`` has to be decrypted: absent, or as last seen and for the declared readers."""
        sealed = self.found.get(path)
        return sealed is None or (sealed.recipients == readers and self.entry(path) is not None)

    def open(self, paths: Iterable[Path]) -> None:
        """Decrypt ``paths`` into ``opened``; one error for all that cannot be."""
        closed = [self.found[path] for path in paths if path not in self.opened]
        if not closed:
            return
        opened, faults = open_all(self.sops, closed, self.operator or operator_identity(self.project))
        raise_faults(faults)
        self.opened.update(opened)

    def kept(self, sealed: Sealed, readers: frozenset[str], entry: Entry | None, *, anew: bool = False) -> Target:
        """The file with the value it has, encrypted anew when told to or when its readers are not the declared ones."""
        if sealed.recipients == readers and not anew:
            return Target(sealed.path, PRIVATE_FILE, sealed.text, entry=entry, host=self.host)
        plaintext = self.opened[sealed.path]
        return Target(sealed.path, PRIVATE_FILE, None, plaintext, readers, entry, self.host)

    def not_ours(self, paths: Iterable[Path]) -> list[SecretsError]:
        """One UnreadableError for each of ``paths`` that is encrypted to others than the running operator."""
        operator = self.operator
        return [
            UnreadableError(
                f"is not encrypted to the operator {self.project.operator!r}"
                + (f" ({operator.recipient})" if operator else ", who has no age key here"),
                where=str(path),
                fix=READ_BY_ANOTHER,
            )
            for path in paths
            if path in self.found and (operator is None or operator.recipient not in self.found[path].recipients)
        ]
