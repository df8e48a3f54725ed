"""The encrypted files as they lie in the repository, and the keys that open them. Reads only."""

from __future__ import annotations

import stat
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
from clawdlets_ops.secrets.plan import MAX_VALUE_BYTES
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, recipients

SOPS_AT_ONCE = 2
"""A sops call is its process, 13 ms of one core: two at a time were fastest on two cores, eight no faster."""

AGE_SECRET = "age_secret_key"  # noqa: S105 - the name of a key in a file
AGE_PUBLIC = "age_public_key"
SSH_SECRET = "ssh_host_ed25519_key"  # noqa: S105
OPERATOR_SUFFIX = ".age.pub"

MAX_FILE_BYTES = 4 * MAX_VALUE_BYTES
"""A value of 1 MiB in base64, with room for its metadata."""


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
    declared, where = declared_operator(project)
    if not path.exists() and not path.is_symlink():
        if declared is None:
            return None
        raise SecretsError(
            f"the private half of {where} is not on this machine",
            where=str(path),
            fix="copy it here (mode 0600), or work under another name (CLAWDLETS_OPERATOR)",
        )
    identity = age.from_key_file(Secret(read_private(path), str(path)))
    if declared not in (None, identity.recipient):
        raise SecretsError(
            f"is not the public half of {path}",
            where=where,
            fix=f"restore the one that is wrong; the private half here belongs to {identity.recipient}",
        )
    return identity


def declared_operator(project: Project) -> tuple[str | None, str]:
    """The recipient that the running operator is declared with, if any, and where that is said."""
    if project.fleet.operators:
        where = f"operators.{project.operator}.ageRecipient"
        return operators_of(project).get(project.operator), where
    public = project.layout.operator_recipients_dir / f"{project.operator}.age.pub"
    return (age.parse_recipient(public.read_text(), where=str(public)) if public.exists() else None), str(public)


def refuse_undeclared(project: Project, identity: Identity | None) -> None:
    """SecretsError when the fleet file says who the operators are and the running one is none of them."""
    if project.fleet.operators and declared_operator(project)[0] is None:
        held = identity.recipient if identity else "age1…"
        raise SecretsError(
            f"the operator {project.operator!r} is not declared",
            where=f"{project.layout.fleet_file}: operators",
            fix=f'run secrets operator add, and add "{project.operator}": {{"ageRecipient": "{held}"}}',
        )


def operators_of(project: Project) -> dict[str, str]:
    """Who reads everything: name and age recipient of each operator; SecretsError when a recipient is malformed.

    The fleet file's ``operators``, when it has them; else every ``<operator>.age.pub`` in the repository.
    """
    if project.fleet.operators:
        return {
            name: age.parse_recipient(operator.age_recipient, where=f"operators.{name}.ageRecipient")
            for name, operator in sorted(project.fleet.operators.items())
        }
    files = sorted(project.layout.operator_recipients_dir.glob(f"*{OPERATOR_SUFFIX}"))
    return {
        path.name.removesuffix(OPERATOR_SUFFIX): age.parse_recipient(path.read_text(), where=str(path))
        for path in files
    }


def declared_host(layout: Layout, host: str) -> str | None:
    """The host's age recipient as the repository has it, or None; SecretsError when it is malformed."""
    path = host_recipient_file(layout, host)
    return age.parse_recipient(path.read_text(), where=str(path)) if path.exists() else None


def next_host(layout: Layout, host: str) -> str | None:
    """The recipient that a rotation is bringing to the host, or None when none is under way."""
    path = layout.host_next_age_public_key(host)
    return age.parse_recipient(path.read_text(), where=str(path)) if path.exists() else None


def host_readers(layout: Layout, host: str, recipient: str) -> frozenset[str]:
    """Every recipient that the host's secrets are for besides the operators: ``recipient``, and the next one while its
    key is being rotated."""
    return frozenset({recipient, next_host(layout, host) or recipient})


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
    """The encrypted file ``path``, or None when it is absent; UnreadableError when it is there and no such file.

    A link, a device or a file of a size that no secret has is not followed, waited for or read.
    """
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            raise UnreadableError("is a link or no regular file", where=str(path), fix="restore the file from git")
        if info.st_size > MAX_FILE_BYTES:
            raise UnreadableError(f"has {info.st_size} bytes, which no secret needs", where=str(path))
        text = path.read_bytes().decode()  # read_text would change line ends, and with them what is compared
    except FileNotFoundError:
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
                fix="let an operator who can read it run secrets reconcile, or restore the file from git",
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
