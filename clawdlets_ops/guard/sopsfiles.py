"""Files below ``secrets/``: wholly encrypted by sops, to nobody but whom the repository declares. Pure.

sops itself calls a file encrypted that has values in clear or one recipient too many; this looks at every leaf.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.sops import leaves

MAX_BYTES = 16 * 1024 * 1024
"""A larger file is not judged, which is not the same as clean."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ENCRYPTED = re.compile(r"ENC\[AES256_GCM,data:[A-Za-z0-9+/=]*,iv:[A-Za-z0-9+/=]+,tag:[A-Za-z0-9+/=]+,type:[a-z]+\]")
_CLEAR_COMMENT = re.compile(r"^[ \t]*#(?!ENC\[)[^\n]*\S|\][ \t]+#(?!ENC\[)", re.MULTILINE)
_METADATA = frozenset({"age", "lastmodified", "mac", "version", "unencrypted_suffix"})
_SUFFIX = "_unencrypted"
_PUBLIC_LINE = re.compile(
    r"(?:ssh-ed25519|ssh-rsa|ecdsa-sha2-[a-z0-9-]+|sk-[a-z0-9@.-]+) [A-Za-z0-9+/]+={0,2}(?: [^\n]*)?"
)
MISSING = "secrets-missing-recipient"
_TEXTS = frozenset({".sops.yaml", ".gitignore", ".gitattributes", ".gitkeep"})


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file, and what to do; never a value."""

    rule: str
    what: str
    fix: str


@dataclass(frozen=True)
class Declared:
    """Who may read what: the operators read everything, a host its own files."""

    operators: frozenset[str] = frozenset()
    hosts: Mapping[str, str] = field(default_factory=dict)
    next_keys: Mapping[str, str] = field(default_factory=dict)
    """Of hosts whose key is being rotated: their secrets are for both."""

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Declared:
        """From the public keys among ``files`` (paths below ``secrets/``); a malformed one declares nobody."""
        operators: set[str] = set()
        hosts: dict[str, str] = {}
        next_keys: dict[str, str] = {}
        for path, content in files.items():
            folder, _, name = path.rpartition("/")
            if not name.endswith(".age.pub"):
                continue
            try:
                recipient = age.parse_recipient(content.decode("ascii", "replace"))
            except SecretsError:
                continue
            if folder == "keys/operators":
                operators.add(recipient)
            elif folder == "keys/hosts":
                hosts[name.removesuffix(".age.pub")] = recipient
            elif folder == "keys/next":
                next_keys[name.removesuffix(".age.pub")] = recipient
        return cls(frozenset(operators), hosts, next_keys)

    def readers(self, path: str) -> frozenset[str]:
        """The recipients that the file ``path`` (below ``secrets/``) may have."""
        parts = path.split("/")
        if len(parts) != 3 or parts[0] != "hosts":
            return self.operators
        keys = (self.hosts.get(parts[1]), self.next_keys.get(parts[1]))
        return self.operators | {key for key in keys if key}


def judge(path: str, content: bytes, declared: Declared | None) -> list[Fault]:
    """What is wrong with the file ``path`` (below ``secrets/``). Without ``declared``, recipients are not judged."""
    name = PurePosixPath(path).name
    if name in _TEXTS or name.endswith(".md"):
        return []
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return [_plain("is not text, so it is not encrypted by sops as ours are")]
    if name.endswith(".pub"):
        return [] if _is_public(text) else [_plain("is named as a public key and is none")]
    try:
        document = yaml.load(text, Loader=_LOADER)  # noqa: S506 - both are safe loaders
    except (yaml.YAMLError, RecursionError, ValueError):
        return [_plain("is neither YAML nor JSON, so it is not encrypted by sops")]
    metadata = document.get("sops") if isinstance(document, dict) else None
    if not isinstance(metadata, dict) or not metadata.get("mac") or not metadata.get("version"):
        return [_plain("is not encrypted by sops")]
    return [*_in_clear(document, text), *_rules(metadata), *_readers(path, metadata, declared)]


def _plain(what: str) -> Fault:
    return Fault(
        "secrets-not-encrypted", what, "unstage it and give the value to secrets init; treat it as leaked if pushed"
    )


def _is_public(text: str) -> bool:
    if _PUBLIC_LINE.fullmatch(text.strip()):
        return True
    try:
        return bool(age.parse_recipient(text))
    except SecretsError:
        return False


def _in_clear(document: dict[Any, Any], text: str) -> Iterator[Fault]:
    paths = [path for path, value in leaves(document) if value not in ("", None) and not _is_encrypted(value)]
    if paths:
        shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
        yield Fault(
            "secrets-partly-encrypted",
            f"holds values in clear at {shown}",
            "restore it from git, or edit it with sops only; treat the value as leaked if pushed",
        )
    head = re.split(r"^(?:sops:|\"?sops\"?:)", text, maxsplit=1, flags=re.MULTILINE)[0]
    if _CLEAR_COMMENT.search(head):
        yield Fault(
            "secrets-partly-encrypted", "holds a comment in clear", "remove the comment: secrets/ is no place for notes"
        )


def _rules(metadata: Mapping[str, Any]) -> Iterator[Fault]:
    foreign = sorted(
        str(key) for key in metadata if key not in _METADATA and metadata[key] not in ([], None, False, "")
    )
    if metadata.get("unencrypted_suffix", _SUFFIX) != _SUFFIX:
        foreign.append("unencrypted_suffix")
    if foreign:
        yield Fault(
            "secrets-foreign-rules",
            f"was encrypted by other rules than ours ({', '.join(foreign)}), which leave values in clear or ask others for keys",
            "give the value anew with secrets init",
        )


def _readers(path: str, metadata: Mapping[str, Any], declared: Declared | None) -> Iterator[Fault]:
    entries = metadata.get("age")
    readers = (
        {str(entry.get("recipient")) for entry in entries if isinstance(entry, dict)}
        if isinstance(entries, list)
        else set()
    )
    if not readers:
        yield Fault("secrets-foreign-recipient", "is encrypted to no age recipient", "run secrets init")
        return
    if declared is None:
        return
    names = {recipient: f"host {name}" for name, recipient in declared.hosts.items()}

    def named(recipients: Iterable[str]) -> str:
        return ", ".join(f"{each} ({names[each]})" if each in names else each for each in sorted(recipients))

    if missing := declared.readers(path) - readers:
        yield Fault(
            MISSING,
            f"cannot be read by {named(missing)}, who is declared for it",
            "let an operator who can read it run secrets reconcile, and commit what that changes",
        )
    if foreign := readers - declared.readers(path):
        shown = named(foreign)
        yield Fault(
            "secrets-foreign-recipient",
            f"can be read by {shown}, who is declared for it nowhere under secrets/keys",
            "run secrets reconcile, then replace the value: what was pushed stays readable to them",
        )


def _is_encrypted(value: Any) -> bool:
    return isinstance(value, str) and _ENCRYPTED.fullmatch(value) is not None
