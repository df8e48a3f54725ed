"""What was seen of a project: values that the checks judge. Nothing here touches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from clawdlets_ops.doctor.store import StoreSearch
from clawdlets_ops.fleet import Fleet
from clawdlets_ops.guard.scan import Leak
from clawdlets_ops.guard.sopsfiles import Fault
from clawdlets_ops.hetzner import Server
from clawdlets_ops.lockdown.drift import Door
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.status import Row


class Scope(StrEnum):
    """What a project is asked to be fit for. Each of the first three includes the one before it."""

    REPO = "repo"
    BOOTSTRAP = "bootstrap"
    DEPLOY = "deploy"
    CATTLE = "cattle"


@dataclass(frozen=True)
class Blind:
    """Why something could not be looked at: one sentence, never a secret."""

    why: str


@dataclass(frozen=True)
class Wrong:
    """What was looked at and cannot be used: one sentence, never a secret."""

    why: str


@dataclass(frozen=True)
class NotHere:
    """Why something does not exist on this machine."""

    why: str


@dataclass(frozen=True)
class Scan:
    """One scan of the guard: what it found that is not allowed; ``needles`` known secrets were looked for."""

    leaks: tuple[Leak, ...]
    contents: int
    size_bytes: int
    needles: int

    def __str__(self) -> str:
        return f"{self.contents} contents, {self.size_bytes} bytes"


@dataclass(frozen=True)
class Hooks:
    """Where git looks for hooks, and which of ours are there and can run."""

    folder: Path
    ours: frozenset[str]


@dataclass(frozen=True)
class Repo:
    """Whatever the clone alone shows. ``scans`` by name: tracked, work tree, history.

    ``sops`` maps a file below ``secrets/`` (``index:`` before what is staged or tracked) to what is wrong with it;
    ``sops_config`` is whether ``.sops.yaml`` is what the declared readers make; ``pins`` and ``host_keys`` map a host to
    its public key, ``operator_keys`` an operator to the key file's. ``decrypts``: an operator's private key is here.
    ``not_opened`` are the encrypted files whose values could not be looked for, none where there is no such key.
    ``texts`` are the tracked files that may refer to others, None for one that is too large.
    """

    ignored: Mapping[str, Any] | Blind
    hooks: Hooks | Blind
    scans: Mapping[str, Scan | Blind]
    sops: Mapping[str, tuple[Fault, ...]] | Blind
    sops_config: bool | Blind | NotHere
    host_keys: Mapping[str, str | Wrong | NotHere]
    pins: Mapping[str, str | Wrong | NotHere]
    operator_keys: Mapping[str, str | Wrong]
    decrypts: bool
    not_opened: tuple[str, ...] | Blind
    texts: Mapping[str, bytes | None] | Blind
    flake_lock: str | Wrong | NotHere


@dataclass(frozen=True)
class PathSeen:
    """A path of the runtime dir, relative to the project; ``link`` is a symbolic link's target."""

    path: str
    kind: str
    mode: int
    owner: int
    link: str = ""


@dataclass(frozen=True)
class ToolSeen:
    """A program on PATH: ``where`` empty when it is not there, ``version`` empty when it does not tell."""

    name: str
    where: str
    version: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Opened:
    """How decryption went: files that open, and those that do not with the reason."""

    good: tuple[str, ...] = ()
    bad: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What a first deployment needs of this machine. ``identity`` is the operator's recipient; ``opened`` are the files
    decrypted with it, ``opened_by_host`` those that each host's own key opens; ``state`` maps a file of OpenTofu's to
    what is wrong with it."""

    runtime: tuple[PathSeen, ...] | Blind | NotHere
    public: tuple[PathSeen, ...] | Blind
    uid: int
    tools: tuple[ToolSeen, ...]
    token: str | Wrong | Blind
    ssh_keys: Mapping[str, str | Wrong | Blind]
    identity: str | Wrong | NotHere
    opened: Opened | Blind
    opened_by_host: Mapping[str, Opened | Blind]
    state: Mapping[str, tuple[str, ...]] | Blind | NotHere
    needles: int
    free_bytes: int | Blind


@dataclass(frozen=True)
class Deployed:
    """What this machine has of one host: digests of its set of secrets in the repository, in the payload that lies here,
    and in the one it was installed with; ``odd`` is what is wrong with the tree; ``verified``: the payload has served."""

    repo_digest: str | Blind
    payload_digest: str | NotHere | Wrong
    installed_digest: str | NotHere
    receipt_key: str | NotHere | Wrong
    pin_fingerprint: str | NotHere
    odd: tuple[str, ...] = ()
    verified: bool = False


@dataclass(frozen=True)
class Field:
    """What is there of hosts that run. ``doors`` are the four accounts of their port 22. ``closure`` and ``store`` are searches for known secrets in store paths."""

    hosts: Mapping[str, Deployed | Blind]
    temporaries: tuple[str, ...] | Blind
    closure: StoreSearch | Blind | NotHere
    store: StoreSearch | Blind | NotHere
    doors: Mapping[str, Door | Blind | NotHere] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """One look at a project. A part that the scope does not ask for is None. ``hosts`` are those that were chosen.

    ``cattle``: every server that carries our cattle label or a name like cattle's. ``static_key_age_days``: since the static
    auth key of cattle was encrypted last.
    """

    root: Path
    hosts: tuple[str, ...]
    fleet: Fleet | Wrong
    project: Project | Wrong
    rows: tuple[Row, ...] | Blind | None = None
    repo: Repo | None = None
    bench: Bench | None = None
    field: Field | None = None
    servers: Mapping[str, Server | None] | Blind | None = None
    cattle: tuple[Server, ...] | Blind | None = None
    static_key_age_days: int | NotHere | None = None
