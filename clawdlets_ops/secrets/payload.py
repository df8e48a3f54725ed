"""The install payload of one host: the tree that nixos-anywhere lays over the new system's root.

nixos-anywhere packs it with tar and unpacks it as root:root, keeping the mode of every entry, folders included: a
``var`` of 0700 here would be a ``/var`` of 0700 there, and nothing repairs ``/etc``. Every mode is therefore exact,
whatever the umask. Nothing of another host is in it.

The tree holds the host's private keys in clear. It is there from just before an installation until the host has been
verified; what it was made from, and came to, is remembered by digests without it (docs/adr/0007).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from clawdlets_ops import hostkey
from clawdlets_ops.errors import SecretsError, SettingsError
from clawdlets_ops.files import (
    PRIVATE_FILE,
    ensure_dir,
    locked,
    read_private,
    swap_dir,
    sweep_temporaries,
    write_atomic,
)
from clawdlets_ops.layout import (
    HOST_AGE_KEY,
    HOST_AGE_KEY_DIR,
    INSTALL_MARKER,
    SECRETS_WIRING,
    SSH_HOST_KEY,
    SSH_HOST_PUBLIC_KEY,
    Layout,
    OnServer,
    secret_file_on_server,
    secrets_dir_on_server,
)
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.disk import remove_tree
from clawdlets_ops.secrets.plan import Need, needs
from clawdlets_ops.secrets.store import LOCK_WAIT_S
from clawdlets_ops.secrets.vault import (
    SSH_SECRET,
    declared_host,
    host_ssh_pin,
    identity_in,
    open_all,
    operator_identity,
    raise_faults,
    read_all,
    single,
)
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

FORMAT = 1
"""Raised when the same inputs make another tree than before, so that no old tree passes as current."""

TRAVERSABLE = 0o755


@dataclass(frozen=True)
class Entry:
    """One thing in the tree: ``path`` relative to its root, ``sha256`` of a file's content (None for a directory)."""

    path: str
    kind: Literal["directory", "file"]
    mode: int
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The whole tree, sorted by path. Equal manifests are equal trees."""

    entries: tuple[Entry, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all entries. Of secrets it covers only keys of 256 bits and ciphertext: safe to show."""
        lines = [f"{entry.path}\t{entry.kind}\t{entry.mode:04o}\t{entry.sha256 or '-'}\n" for entry in self.entries]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class PayloadInputs:
    """What a payload is made of. ``encrypted`` maps a secret's name to its file, as it is in the repository."""

    age_secret: Secret
    ssh_private: Secret
    ssh_public: str
    encrypted: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class PayloadOutcome:
    """``changed`` says whether anything was written; ``digest`` is what install.json on the host will say."""

    manifest: Manifest
    changed: bool
    digest: str


@dataclass(frozen=True)
class Record:
    """What the payload was made from and came to. ``digest`` is that of ``PayloadOutcome``, ``secret_set`` the digest of
    the encrypted files and their wiring; ``verified``: an installation with it has been proved, no tree may be left."""

    inputs: str
    manifest: str
    digest: str
    secret_set: str
    verified: bool = False


def set_digest(wiring_text: str, files: Mapping[str, str]) -> str:
    """One digest over what a host's folder of secrets holds; clawdlets-sync on the host makes the same of what lies there.

    ``files`` maps each name to the encrypted text.
    """
    lines = [f"wiring\t{_sha256(wiring_text)}\n"]
    mode = f"{secret_file_on_server('any', 'any').mode:04o}"
    lines += [f"{name}\t{mode}\t{_sha256(text)}\n" for name, text in sorted(files.items())]
    return _sha256("".join(lines))


def wiring(host: str, needed: tuple[Need, ...]) -> str:
    """The text of ``secrets-wiring.json``: where each secret's file is on the host and who may read what is in it.

    ``group`` null is the owner's own group. ``neededForUsers`` secrets are read before users exist. Holds no values.
    """
    secrets = [
        {
            "name": need.name,
            "sopsFile": str(secret_file_on_server(host, need.name).path),
            "owner": need.wiring.owner,
            "group": need.wiring.group,
            "mode": need.wiring.mode,
            "neededForUsers": need.kind == "password-hash",
        }
        for need in needed
    ]
    return json.dumps({"host": host, "secrets": secrets}, indent=2) + "\n"


def contents(host: str, needed: tuple[Need, ...], inputs: PayloadInputs) -> dict[str, bytes]:
    """Every file of the tree but ``install.json``, by relative path; SecretsError when a needed one is not there."""
    if missing := [need.name for need in needed if need.name not in inputs.encrypted]:
        raise SecretsError(f"the payload of {host} lacks {', '.join(missing)}", fix="run secrets init first")
    files = {
        HOST_AGE_KEY: inputs.age_secret.reveal().strip() + "\n",
        SSH_HOST_KEY: inputs.ssh_private.reveal(),
        SSH_HOST_PUBLIC_KEY: f"{inputs.ssh_public} {host}\n",
        SECRETS_WIRING: wiring(host, needed),
    }
    files |= {secret_file_on_server(host, need.name): inputs.encrypted[need.name] for need in needed}
    return {_relative(where): text.encode() for where, text in files.items()}


def plan_payload(host: str, needed: tuple[Need, ...], inputs: PayloadInputs) -> Manifest:
    """The tree for ``host``. Its ``install.json`` names the digest of all the rest."""
    return _manifest(host, needed, _with_marker(host, needed, contents(host, needed, inputs)))


def materialise(project: Project, host: str, *, runner: Runner) -> PayloadOutcome:
    """Make the tree under ``.clawdlets/extra-files/<host>`` what ``plan_payload`` says; untouched when it already is.

    It is built beside its place and swapped in whole. Nothing is decrypted when neither the encrypted files nor the tree
    have changed since the last time. SecretsError, UnreadableError when a key or secret is not there or not readable.
    """
    layout = project.layout
    tree = layout.extra_files(host)
    with locked(layout.lock("secrets"), what="the project's secrets", wait_s=LOCK_WAIT_S):
        ensure_dir(layout.runtime)
        ensure_dir(tree.parent)
        sweep_temporaries(tree.parent)
        if (current := _current(project, host)) is not None:
            return PayloadOutcome(current, changed=False, digest=_marker_digest(tree))
        record, manifest, files = _make(project, host, runner)
        changed = observe(tree) != manifest
        if changed:
            building = tree.with_name(f".{host}.{token_hex(6)}.tmp")
            _build(building, manifest, files)
            swap_dir(building, tree)
        _write_record(layout, host, record)
    return PayloadOutcome(manifest, changed=changed, digest=record.digest)


def prepare(project: Project, host: str, *, runner: Runner) -> PayloadOutcome:
    """Make sure that the payload can be built, and remember what it would be; a tree that is not that goes.

    Nothing private is written. The outcome's manifest is empty when nothing had to be looked at.
    """
    layout = project.layout
    tree = layout.extra_files(host)
    with locked(layout.lock("secrets"), what="the project's secrets", wait_s=LOCK_WAIT_S):
        record = recorded(layout, host)
        if record is not None and is_prepared(project, host):
            return PayloadOutcome(Manifest(()), changed=False, digest=record.digest)
        made, manifest, _ = _make(project, host, runner)
        if record is not None and record.verified:
            made = replace(made, verified=True)
        ensure_dir(layout.runtime)
        if made.verified or observe(tree) != manifest:
            _remove_tree(tree)
        elif tree.parent.is_dir():
            sweep_temporaries(tree.parent)
        _write_record(layout, host, made)
    return PayloadOutcome(manifest, changed=True, digest=made.digest)


def is_prepared(project: Project, host: str) -> bool:
    """Whether ``prepare`` would change nothing. Reads only, and starts no process."""
    record = recorded(project.layout, host)
    if record is None or record.inputs != _inputs_digest(project, host):
        return False
    tree = project.layout.extra_files(host)
    if any(tree.parent.glob(f".{host}.*")):
        return False  # what a removal that was cut off left
    if not os.path.lexists(tree):
        return True
    manifest = None if record.verified else observe(tree)
    return manifest is not None and manifest.digest == record.manifest


def discard(project: Project, host: str) -> bool:
    """Remove the tree of a host that has been installed and verified; returns whether there was one.

    Cut off after the record has been written, the tree is removed by the next ``prepare`` or ``discard``.
    """
    layout = project.layout
    tree = layout.extra_files(host)
    with locked(layout.lock("secrets"), what="the project's secrets", wait_s=LOCK_WAIT_S):
        record = recorded(layout, host)
        if record is not None and not record.verified:
            _write_record(layout, host, replace(record, verified=True))
        return _remove_tree(tree)


def recorded(layout: Layout, host: str) -> Record | None:
    """What is remembered of the host's payload; None when nothing is, or nothing that can be trusted."""
    try:
        raw = json.loads(read_private(_record_file(layout, host)))
        record = Record(**raw)
        return record if all(isinstance(value, str | bool) for value in asdict(record).values()) else None
    except (SettingsError, ValueError, TypeError):
        return None


def payload_is_current(project: Project, host: str) -> bool:
    """Whether ``materialise`` would leave the tree alone. Reads only, and starts no process."""
    return _current(project, host) is not None


def observe(tree: Path) -> Manifest | None:
    """The tree as it is on disk; None when it is absent or holds anything but plain files and directories."""
    if not tree.is_dir() or tree.is_symlink():
        return None
    entries: list[Entry] = []
    for path in (tree, *tree.rglob("*")):
        info = path.lstat()
        name, mode = path.relative_to(tree).as_posix(), stat.S_IMODE(info.st_mode)
        if stat.S_ISDIR(info.st_mode):
            entries.append(Entry(name, "directory", mode))
        elif stat.S_ISREG(info.st_mode):
            entries.append(Entry(name, "file", mode, hashlib.sha256(path.read_bytes()).hexdigest()))
        else:
            return None
    return Manifest(tuple(sorted(entries, key=lambda entry: entry.path)))


def _relative(where: OnServer) -> str:
    return where.path.relative_to("/").as_posix()


def _with_marker(host: str, needed: tuple[Need, ...], files: Mapping[str, bytes]) -> dict[str, bytes]:
    marker = {"host": host, "payloadDigest": _manifest(host, needed, files).digest}
    return {**files, _relative(INSTALL_MARKER): (json.dumps(marker) + "\n").encode()}


def _manifest(host: str, needed: tuple[Need, ...], files: Mapping[str, bytes]) -> Manifest:
    own = [HOST_AGE_KEY, SSH_HOST_KEY, SSH_HOST_PUBLIC_KEY, INSTALL_MARKER, SECRETS_WIRING]
    modes = {_relative(where): where.mode for where in [*own, *(secret_file_on_server(host, x.name) for x in needed)]}
    private = secrets_dir_on_server(host)
    folders = {
        **dict.fromkeys((".", "etc", "etc/ssh", "var", "var/lib", "var/lib/clawdlets"), TRAVERSABLE),
        **dict.fromkeys((path.relative_to("/").as_posix() for path in list(private.path.parents)[:2]), private.mode),
        _relative(private): private.mode,
        _relative(HOST_AGE_KEY_DIR): HOST_AGE_KEY_DIR.mode,
    }
    entries = [Entry(path, "directory", mode) for path, mode in folders.items()]
    entries += [Entry(path, "file", modes[path], hashlib.sha256(data).hexdigest()) for path, data in files.items()]
    return Manifest(tuple(sorted(entries, key=lambda entry: entry.path)))


def _build(root: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Write the tree below the new folder ``root``. Modes are set one by one: mkdir and open are cut by the umask."""
    for entry in manifest.entries:  # sorted: a folder comes before what is in it
        path = root / entry.path
        if entry.kind == "directory":
            path.mkdir(mode=0o700)
            path.chmod(entry.mode)
        else:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, entry.mode)
            with os.fdopen(fd, "wb") as handle:
                os.fchmod(handle.fileno(), entry.mode)
                handle.write(files[entry.path])
                handle.flush()
                os.fsync(handle.fileno())


def _read_inputs(project: Project, host: str, needed: tuple[Need, ...], runner: Runner) -> PayloadInputs:
    """Decrypt the host's two keys; the secrets stay as they are."""
    layout = project.layout
    operator = operator_identity(project)
    age_file, ssh_file = layout.host_age_key_file(host), layout.host_ssh_key_file(host)
    need_files = {need.name: layout.secret_file(host, need.name) for need in needed}
    found, faults = read_all([age_file, ssh_file, *need_files.values()])
    raise_faults(faults)
    absent = [path for path in (age_file, ssh_file, *need_files.values()) if path not in found]
    raise_faults(SecretsError("is not there", where=str(path), fix="run secrets init first") for path in absent)
    opened, faults = open_all(Sops(runner, find_sops(runner)), [found[age_file], found[ssh_file]], operator)
    raise_faults(faults)
    identity = identity_in(found[age_file], opened[age_file])
    private = single(found[ssh_file], opened[ssh_file], SSH_SECRET)
    pin = host_ssh_pin(project, host)
    for is_ours, path in (
        (identity.recipient == declared_host(layout, host), age_file),
        (hostkey.public_of(private) == pin, ssh_file),
    ):
        if not is_ours:
            raise SecretsError("its public half is not the one in the repository", where=str(path))
    for name, path in need_files.items():
        if identity.recipient not in found[path].recipients:
            raise SecretsError(f"{name} is not encrypted to {host}", where=str(path), fix="run secrets init")
    encrypted = {name: found[path].text for name, path in need_files.items()}
    return PayloadInputs(identity.secret, private, pin, encrypted)


def _inputs_digest(project: Project, host: str) -> str:
    """A digest over everything that the tree is made from, as it lies in the repository; absent files included."""
    layout = project.layout
    needed = needs(host, project.fleet.host(host))
    files = [layout.host_age_key_file(host), layout.host_ssh_key_file(host), layout.host_ssh_public_key(host)]
    files += [layout.secret_file(host, need.name) for need in needed]
    parts: list[Any] = [FORMAT, wiring(host, needed), declared_host(layout, host)]
    parts += [[path.name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None] for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _record_file(layout: Layout, host: str) -> Path:
    return layout.state_file(f"payload-{host}")


def _write_record(layout: Layout, host: str, record: Record) -> None:
    path = _record_file(layout, host)
    ensure_dir(path.parent)
    write_atomic(path, json.dumps(asdict(record)) + "\n", mode=PRIVATE_FILE)


def _make(project: Project, host: str, runner: Runner) -> tuple[Record, Manifest, dict[str, bytes]]:
    """What the payload is now, from what lies in the repository."""
    needed = needs(host, project.fleet.host(host))
    before = _inputs_digest(project, host)
    inputs = _read_inputs(project, host, needed, runner)
    files = _with_marker(host, needed, contents(host, needed, inputs))
    manifest = _manifest(host, needed, files)
    digest = str(json.loads(files[_relative(INSTALL_MARKER)])["payloadDigest"])
    record = Record(before, manifest.digest, digest, set_digest(wiring(host, needed), inputs.encrypted))
    return record, manifest, files


def _remove_tree(tree: Path) -> bool:
    """The tree is gone at once, and then its parts; a link in its place is removed, not followed."""
    if tree.parent.is_dir():
        sweep_temporaries(tree.parent)
    if not os.path.lexists(tree):
        return False
    remove_tree(tree)
    return True


def _current(project: Project, host: str) -> Manifest | None:
    """The tree as it is, if it is what would be built now and may be there; None otherwise."""
    manifest = observe(project.layout.extra_files(host))
    record = recorded(project.layout, host)
    if manifest is None or record is None or record.verified:
        return None
    same = (record.inputs, record.manifest) == (_inputs_digest(project, host), manifest.digest)
    return manifest if same else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _marker_digest(tree: Path) -> str:
    return str(json.loads((tree / _relative(INSTALL_MARKER)).read_text())["payloadDigest"])
