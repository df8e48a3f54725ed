"""The encrypted files as they lie in the repository, and the keys that open them. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clawdlets_ops import age, hostkey
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError, UnreadableError
from clawdlets_ops.files import read_private
from clawdlets_ops.layout import Layout
from clawdlets_ops.project import Project
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, recipients

SOPS_AT_ONCE = 2
"""A sops call is its process, 13 ms of one core: two at a time were fastest on two cores, eight no faster."""

AGE_SECRET = "age_secret_key"  # noqa: S105 - the name of a key in a file
AGE_PUBLIC = "age_public_key"
SSH_SECRET = "ssh_host_ed25519_key"  # noqa: S105


Plaintext = Mapping[str, Secret]


@dataclass(frozen=True)
class Sealed:
    """An encrypted file: its text and the recipients that its metadata names."""

    path: Path
    text: str
    recipients: frozenset[str]


def host_recipient_file(layout: Layout, host: str) -> Path:
    """The public half of a host's age key (0644): lets recipients be checked where nothing can be decrypted."""
    return layout.host_age_public_key(host)


def operator_identity(project: Project) -> Identity:
    """The operator's age identity; SecretsError when there is none yet, SettingsError when its file is not private."""
    identity = find_operator_identity(project)
    if identity is None:
        raise SecretsError(
            f"the operator {project.operator!r} has no age key here",
            where=str(project.layout.operator_key(project.operator)),
            fix="put your key there (mode 0600), or make one with secrets init",
        )
    return identity


def find_operator_identity(project: Project) -> Identity | None:
    """The operator's age identity, or None when neither half of it exists.

    SecretsError when only the public half is here, or the halves do not belong together: a new key in its place could
    open nothing that exists.
    """
    path = project.layout.operator_key(project.operator)
    public = project.layout.operator_recipients_dir / f"{project.operator}.age.pub"
    declared = age.parse_recipient(public.read_text(), where=str(public)) if public.exists() else None
    if not path.exists() and not path.is_symlink():
        if declared is None:
            return None
        raise SecretsError(
            f"the private half of {public.name} is not on this machine",
            where=str(path),
            fix="copy it here (mode 0600), or work under another name (CLAWDLETS_OPERATOR)",
        )
    identity = age.from_key_file(Secret(read_private(path), str(path)))
    if declared not in (None, identity.recipient):
        raise SecretsError(
            f"is not the public half of {path}",
            where=str(public),
            fix="restore the one that is wrong; remove the public half to have it written anew from the private one",
        )
    return identity


def declared_operators(layout: Layout) -> frozenset[str]:
    """The recipient of every ``<operator>.age.pub`` in the repository; SecretsError when one is malformed."""
    files = sorted(layout.operator_recipients_dir.glob("*.age.pub"))
    return frozenset(age.parse_recipient(path.read_text(), where=str(path)) for path in files)


def declared_host(layout: Layout, host: str) -> str | None:
    """The host's age recipient as the repository has it, or None; SecretsError when it is malformed."""
    path = host_recipient_file(layout, host)
    return age.parse_recipient(path.read_text(), where=str(path)) if path.exists() else None


def host_ssh_pin(project: Project, host: str) -> str:
    """The host's public SSH host key, ``ssh-ed25519 AAAA…`` without comment; SecretsError when there is none yet."""
    pin = declared_pin(project.layout, host)
    if pin is None:
        where = str(project.layout.host_ssh_public_key(host))
        raise SecretsError(f"the host {host!r} has no SSH host key yet", where=where, fix="run secrets init first")
    return pin


def declared_pin(layout: Layout, host: str) -> str | None:
    """The host's public SSH host key as the repository has it, or None; SecretsError when it is malformed."""
    path = layout.host_ssh_public_key(host)
    return hostkey.parse_public(path.read_text(), where=str(path)) if path.exists() else None


def read_sealed(path: Path) -> Sealed | None:
    """The encrypted file ``path``, or None when it is absent; UnreadableError when it is there and no such file."""
    try:
        text = path.read_bytes().decode()  # read_text would change line ends, and with them what is compared
    except FileNotFoundError:
        if path.is_symlink():
            raise UnreadableError("is a link that leads nowhere", where=str(path)) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"cannot be read ({type(error).__name__})", where=str(path)) from None
    return Sealed(path, text, frozenset(recipients(text, where=str(path))))


def read_all(paths: Iterable[Path]) -> tuple[dict[Path, Sealed], list[SecretsError]]:
    """Those of ``paths`` that exist, and what is wrong with the others that do."""
    found: dict[Path, Sealed] = {}
    faults: list[SecretsError] = []
    for path in paths:
        try:
            sealed = read_sealed(path)
        except SecretsError as error:
            faults.append(error)
        else:
            if sealed is not None:
                found[path] = sealed
    return found, faults


def open_all(
    sops: Sops, files: Iterable[Sealed], identity: Identity
) -> tuple[dict[Path, Plaintext], list[SecretsError]]:
    """Decrypt ``files`` with ``identity``, two at a time: what each holds, and what is wrong with those that fail."""

    def attempt(sealed: Sealed) -> Plaintext | SecretsError:
        if identity.recipient not in sealed.recipients:
            return UnreadableError(
                f"is not encrypted to {identity.recipient}",
                where=str(sealed.path),
                fix="let an operator who can read it run secrets init, or restore the file from git",
            )
        try:
            return sops.decrypt(sealed.text, identity=identity.secret, where=str(sealed.path))
        except SecretsError as error:
            return error

    files = list(files)
    opened: dict[Path, Plaintext] = {}
    faults: list[SecretsError] = []
    with ThreadPoolExecutor(max_workers=SOPS_AT_ONCE) as pool:
        for sealed, outcome in zip(files, pool.map(attempt, files), strict=True):
            if isinstance(outcome, SecretsError):
                faults.append(outcome)
            else:
                opened[sealed.path] = outcome
    return opened, faults


def raise_faults(faults: Iterable[SecretsError]) -> None:
    """Nothing when there are none; one error that names them all otherwise, UnreadableError as soon as one is."""
    faults = list(faults)
    if not faults:
        return
    if len(faults) == 1:
        raise faults[0]
    kind = UnreadableError if any(isinstance(fault, UnreadableError) for fault in faults) else SecretsError
    lines = [f"  {fault.where}: {fault.what}" for fault in faults]
    fixes = dict.fromkeys(fault.fix for fault in faults if fault.fix)
    raise kind("\n".join([f"{len(faults)} secrets cannot be used:", *lines]), fix="; ".join(fixes))


def identity_in(sealed: Sealed, plaintext: Plaintext) -> Identity:
    """The host's age identity out of its opened file; SecretsError unless both halves are there and belong together."""
    if set(plaintext) != {AGE_SECRET, AGE_PUBLIC}:
        raise SecretsError(f"must hold exactly {AGE_PUBLIC} and {AGE_SECRET}", where=str(sealed.path))
    identity = age.from_secret(Secret(plaintext[AGE_SECRET].reveal(), str(sealed.path)))
    if identity.recipient != plaintext[AGE_PUBLIC].reveal():
        raise SecretsError("its two halves do not belong together", where=str(sealed.path))
    return identity


def single(sealed: Sealed, plaintext: Plaintext, name: str) -> Secret:
    """The value under the file's only key ``name``; SecretsError when it holds anything else."""
    if set(plaintext) != {name}:
        raise SecretsError(f"must hold exactly one key, {name!r}", where=str(sealed.path))
    return plaintext[name]
