"""Where a project gets clawdlets-ops from: for Nix as a flake reference, for pip as a requirement."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from clawdlets_ops.errors import SettingsError

UNLOCATED = "git+https://clawdlets-ops.invalid/clawdlets-ops.git"
"""A name that is never resolved (RFC 6761, section 6.4): where nobody has said where clawdlets-ops is, nothing is fetched
from somebody who might have taken the name."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_GITHUB = re.compile(rf"github:({_NAME}/{_NAME})(?:/([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_GIT = re.compile(
    r"git\+(?:https|ssh)://(?:git@)?[A-Za-z0-9.-]+(?::\d+)?/[A-Za-z0-9._~/-]+(?:\?(?:ref|rev)=[A-Za-z0-9._/-]+)?"
)


@dataclass(frozen=True)
class Source:
    """``flake`` as Nix takes it, ``requirement`` as pip takes it; ``located`` is False for UNLOCATED."""

    flake: str
    requirement: str
    located: bool = True


def source(reference: str) -> Source:
    """From a flake reference; SettingsError for one that Nix would copy from a folder, or that carries a password."""
    where = "--source"
    if re.match(r"(?:path:|[./~])", reference) or reference.startswith(("git+file:", "file:")):
        raise SettingsError(
            "names a folder of this machine: others do not have it, and by path Nix copies ignored keys into its store",
            where=where,
            fix="name a repository: github:OWNER/REPO, or git+https://…",
        )
    if hub := _GITHUB.fullmatch(reference):
        return Source(reference, _requirement(f"git+https://github.com/{hub[1]}", hub[2] or ""))
    if _GIT.fullmatch(reference):
        address, _, revision = reference.partition("?")
        return Source(reference, _requirement(address, revision.partition("=")[2]), reference != UNLOCATED)
    raise SettingsError(
        "is not a reference of the form github:OWNER/REPO[/REF] or git+https://HOST/PATH[?ref=REF]",
        where=where,
        fix="a user name or password in it would be public: use a credential helper, or git+ssh://git@…",
    )


def installed_from(direct_url: str | None) -> str:
    """The flake reference for what pip wrote down of this installation (direct_url.json, PEP 610): the commit of a git
    repository, else UNLOCATED."""
    try:
        noted = json.loads(direct_url or "{}")
        address, git = str(noted["url"]), noted["vcs_info"]
        reference = f"git+{address}?rev={git['commit_id']}"
        source(reference)
    except (ValueError, KeyError, TypeError, SettingsError):
        return UNLOCATED
    return reference


def _requirement(address: str, revision: str) -> str:
    return f"clawdlets-ops @ {address}{'@' + revision if revision else ''}"
