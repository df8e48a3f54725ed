"""What has to be written so that a host's keys and secrets in the repository are what the fleet declares.

Reads the repository and decides; writes nothing. Every fault is found here, before the first write.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clawdlets_ops import age, hostkey
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError, UnreadableError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.layout import Layout
from clawdlets_ops.mkpasswd import Mkpasswd, check_password, is_crypt_hash
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.plan import Need, is_placeholder, needs, sops_config, value_faults
from clawdlets_ops.secrets.seen import Entry, Seen, load_seen
from clawdlets_ops.secrets.vault import (
    AGE_PUBLIC,
    AGE_SECRET,
    SSH_SECRET,
    Plaintext,
    Sealed,
    declared_host,
    declared_operators,
    declared_pin,
    find_operator_identity,
    host_recipient_file,
    identity_in,
    open_all,
    raise_faults,
    read_all,
    single,
)
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

PUBLIC_FILE = 0o644


@dataclass(frozen=True)
class Target:
    """A file as it is to be: either its ``content`` is known, or ``plaintext`` is to be encrypted to ``recipients``.

    ``entry`` is what to remember of an encrypted file; its ``cipher`` is filled in once the file's text exists.
    """

    path: Path
    mode: int
    content: str | Secret | None = field(default=None, repr=False)
    plaintext: Plaintext = field(default_factory=dict)
    recipients: frozenset[str] = frozenset()
    entry: Entry | None = None

    def status(self) -> Literal["created", "updated", "unchanged"]:
        """What writing it would be now."""
        if not self.path.exists():
            return "created"
        if self.content is None or stat.S_IMODE(self.path.lstat().st_mode) != self.mode:
            return "updated"
        content = self.content.reveal() if isinstance(self.content, Secret) else self.content
        return "unchanged" if self.path.read_bytes() == content.encode() else "updated"


@dataclass(frozen=True)
class InitPlan:
    """``targets`` in the order of writing: private halves before public ones. ``stale`` files are only reported."""

    targets: tuple[Target, ...]
    stale: tuple[Path, ...]
    seen: Seen
    state_file: Path


@dataclass(frozen=True)
class _View:
    """What one reading of the repository has shown. ``opened`` grows as files have to be decrypted."""

    layout: Layout
    host: str
    sops: Sops
    seen: Seen
    operator: Identity
    operators: frozenset[str]
    found: Mapping[Path, Sealed]
    opened: dict[Path, Plaintext] = field(default_factory=dict)

    def entry(self, path: Path) -> Entry | None:
        """What is known of the file without decrypting it."""
        sealed = self.found.get(path)
        return self.seen.entry(self.layout_name(path), sealed.text) if sealed else None

    def layout_name(self, path: Path) -> str:
        """``path`` relative to the project."""
        return path.relative_to(self.layout.root).as_posix()

    def settled(self, path: Path, readers: frozenset[str]) -> bool:
        """Whether nothing of ``path`` has to be decrypted: absent, or as last seen and for the declared readers."""
        sealed = self.found.get(path)
        return sealed is None or (sealed.recipients == readers and self.entry(path) is not None)

    def open(self, paths: list[Path]) -> None:
        """Decrypt ``paths`` into ``opened``; one error for all that cannot be."""
        opened, faults = open_all(self.sops, [self.found[path] for path in paths], self.operator)
        raise_faults(faults)
        self.opened.update(opened)

    def kept(self, sealed: Sealed, readers: frozenset[str], entry: Entry) -> Target:
        """The file with the value it has, encrypted anew when its readers are not the declared ones."""
        if sealed.recipients == readers:
            return Target(sealed.path, PRIVATE_FILE, sealed.text, entry=entry)
        return Target(sealed.path, PRIVATE_FILE, plaintext=self.opened[sealed.path], recipients=readers, entry=entry)


@dataclass(frozen=True)
class _KeyPair:
    """A key pair of the host: the private half in ``file``, encrypted to the operators, the public one beside it."""

    file: Path
    public_file: Path
    declared: str | None
    make: Callable[[], Plaintext]
    public_in: Callable[[Sealed, Plaintext], str]
    comment: str = ""


def reconcile(project: Project, host: str, values: Mapping[str, Secret], *, runner: Runner) -> InitPlan:
    """Compare what is there with what is declared and given; SecretsError, UnreadableError, ToolMissingError.

    sops runs only for files of which the record of last time says nothing, two processes at a time.
    """
    layout = project.layout
    needed = needs(host, project.fleet.host(host))
    _check_values(needed, values, host)
    state_file = layout.state_file(f"secrets-{host}")
    existing = find_operator_identity(project)
    operator = existing or age.generate()
    need_files = {layout.secret_file(host, need.name): need for need in needed}
    key_files = [layout.host_age_key_file(host), layout.host_ssh_key_file(host)]
    found, faults = read_all([*key_files, *need_files])
    raise_faults([*faults, *_not_ours(project, operator, found)])
    view = _View(
        layout,
        host,
        Sops(runner, find_sops(runner)),
        load_seen(state_file),
        operator,
        declared_operators(layout) | {operator.recipient},
        found,
    )
    view.open([path for path in key_files if not view.settled(path, view.operators)])
    host_recipient, age_targets = _key_pair(view, _age_pair(view), _foreign_readers(view, need_files))
    _, ssh_targets = _key_pair(view, _ssh_pair(view), None)
    readers = view.operators | {host_recipient}
    view.open([path for path, need in need_files.items() if not _decided(view, path, need, values, readers)])
    secret_targets = _secrets(view, need_files, values, readers, Mkpasswd(runner))

    others = {name: declared_host(layout, name) for name in project.fleet.hosts if name != host}
    hosts = {name: recipient for name, recipient in others.items() if recipient} | {host: host_recipient}
    public = layout.operator_recipients_dir / f"{project.operator}.age.pub"
    targets = [
        Target(public, PUBLIC_FILE, f"{operator.recipient}\n"),
        *age_targets,
        *ssh_targets,
        Target(layout.sops_config, PUBLIC_FILE, sops_config(hosts, view.operators)),
        *secret_targets,
    ]
    if existing is None:
        targets.insert(0, Target(layout.operator_key(project.operator), PRIVATE_FILE, age.to_key_file(operator)))
    stale = sorted(set(layout.host_secrets_dir(host).glob("*.yaml")) - set(need_files))
    return InitPlan(tuple(targets), tuple(stale), view.seen, state_file)


def _check_values(needed: tuple[Need, ...], values: Mapping[str, Secret], host: str) -> None:
    faults = value_faults(needed, values)
    for need in needed:
        given = values.get(need.name)
        if need.password_name and given and not is_placeholder(given.reveal()) and not is_crypt_hash(given.reveal()):
            faults.append(f"{need.name}: is no password hash ($y$, $gy$, $7$, $6$ or $2b$); is it the password itself?")
        password = values.get(need.password_name) if need.password_name else None
        if password:
            try:
                check_password(password)
            except SecretsError as error:
                faults.append(f"{need.password_name}: {error.what}")
    if faults:
        raise SecretsError(
            "\n".join([f"the values for {host} are not acceptable; nothing was written:", *(f"  {x}" for x in faults)]),
            fix="correct the values and run again",
        )


def _not_ours(project: Project, operator: Identity, found: Mapping[Path, Sealed]) -> list[SecretsError]:
    return [
        UnreadableError(
            f"is not encrypted to the operator {project.operator!r} ({operator.recipient})",
            where=str(path),
            fix="let an operator who can read it run secrets init, or restore the file from git",
        )
        for path, sealed in found.items()
        if operator.recipient not in sealed.recipients
    ]


def _foreign_readers(view: _View, need_files: Mapping[Path, Need]) -> str | None:
    """Why a host key that is absent must not be made anew: secrets of this host are already encrypted to one."""
    named = [path.name for path in need_files if path in view.found and view.found[path].recipients - view.operators]
    return f"{named[0]} is encrypted to it" if named else None


def _age_pair(view: _View) -> _KeyPair:
    def make() -> Plaintext:
        identity = age.generate()
        return {AGE_PUBLIC: Secret(identity.recipient, AGE_PUBLIC), AGE_SECRET: identity.secret}

    return _KeyPair(
        file=view.layout.host_age_key_file(view.host),
        public_file=host_recipient_file(view.layout, view.host),
        declared=declared_host(view.layout, view.host),
        make=make,
        public_in=lambda sealed, plaintext: identity_in(sealed, plaintext).recipient,
    )


def _ssh_pair(view: _View) -> _KeyPair:
    return _KeyPair(
        file=view.layout.host_ssh_key_file(view.host),
        public_file=view.layout.host_ssh_public_key(view.host),
        declared=declared_pin(view.layout, view.host),
        make=lambda: {SSH_SECRET: hostkey.generate(view.host)[0]},
        public_in=lambda sealed, plaintext: hostkey.public_of(single(sealed, plaintext, SSH_SECRET)),
        comment=f" {view.host}",
    )


def _key_pair(view: _View, pair: _KeyPair, in_use: str | None) -> tuple[str, list[Target]]:
    """The public half and both files. A private half that is gone while something still relies on it is an error."""
    sealed = view.found.get(pair.file)
    plaintext = view.opened.get(pair.file)
    if sealed is None:
        if reason := f"{pair.public_file.name} still names it" if pair.declared else in_use:
            raise SecretsError(
                f"is gone, but {reason}; the host could do nothing with a new one",
                where=str(pair.file),
                fix=f"restore it from git; to give the host a new identity, remove {pair.public_file} and its secrets",
            )
        plaintext = pair.make()
        sealed = Sealed(pair.file, "", frozenset())
    if plaintext is not None:
        public = pair.public_in(sealed, plaintext)
        entry = Entry("", "", public=public)
    else:
        entry = _known(view, pair.file)
        public = entry.public
    if pair.declared not in (None, public):
        raise SecretsError(
            f"is not the public half of {pair.file.name}",
            where=str(pair.public_file),
            fix="restore the one that is wrong from git",
        )
    if pair.file in view.found:
        private = view.kept(sealed, view.operators, entry)
    else:
        private = Target(pair.file, PRIVATE_FILE, plaintext=plaintext or {}, recipients=view.operators, entry=entry)
    return public, [private, Target(pair.public_file, PUBLIC_FILE, f"{public}{pair.comment}\n")]


def _decided(view: _View, path: Path, need: Need, values: Mapping[str, Secret], readers: frozenset[str]) -> bool:
    """Whether the record answers all there is to ask of ``path``; it cannot compare a password it never saw."""
    entry = view.entry(path)
    unknown_password = entry is not None and need.password_name in values and not entry.password
    return view.settled(path, readers) and not unknown_password


def _secrets(
    view: _View,
    need_files: Mapping[Path, Need],
    values: Mapping[str, Secret],
    readers: frozenset[str],
    mkpasswd: Mkpasswd,
) -> list[Target]:
    targets: list[Target] = []
    missing: list[Need] = []
    faults: list[SecretsError] = []
    for path, need in need_files.items():
        given = values.get(need.name)
        password = values.get(need.password_name) if need.password_name else None
        if path in view.found:
            try:
                entry = _current(view, path, need, password, mkpasswd)
            except SecretsError as error:
                faults.append(error)
                continue
            if entry is not None and _keeps(view.seen, entry, given, password):
                targets.append(view.kept(view.found[path], readers, entry))
                continue
        value = mkpasswd.hash(password) if password else given
        if value is None:
            missing.append(need)
            continue
        entry = Entry("", view.seen.digest(value), password=view.seen.digest(password) if password else "")
        targets.append(Target(path, PRIVATE_FILE, plaintext={need.name: value}, recipients=readers, entry=entry))
    raise_faults(faults)
    if missing:
        raise _missing(missing, view.host)
    return targets


def _current(view: _View, path: Path, need: Need, password: Secret | None, mkpasswd: Mkpasswd) -> Entry | None:
    """What is in the file now; None when it is nothing that could be used (a placeholder, no hash)."""
    if path not in view.opened:
        return _known(view, path)
    value = single(view.found[path], view.opened[path], need.name)
    if value_fault(need, value):
        return None
    before = view.entry(path)
    made_of = before.password if before else ""
    if password and not made_of and mkpasswd.matches(password, value):
        made_of = view.seen.digest(password)
    return Entry("", view.seen.digest(value), password=made_of)


def _keeps(seen: Seen, entry: Entry, given: Secret | None, password: Secret | None) -> bool:
    if given is not None:
        return seen.digest(given) == entry.plain
    return password is None or seen.digest(password) == entry.password


def value_fault(need: Need, value: Secret) -> str | None:
    """Why ``value`` cannot be used for ``need``, or None."""
    if is_placeholder(value.reveal()):
        return "is empty or still a placeholder"
    if need.kind == "password-hash" and not is_crypt_hash(value.reveal()):
        return "is no password hash"
    return None


def _known(view: _View, path: Path) -> Entry:
    entry = view.entry(path)
    if entry is None:
        raise SecretsError("was neither decrypted nor known", where=str(path))
    return replace(entry, cipher="")


def _missing(missing: list[Need], host: str) -> SecretsError:
    lines = [
        f"  {need.name} ({need.why})"
        + (f"; or {need.password_name}, which is then hashed" if need.password_name else "")
        for need in missing
    ]
    return SecretsError(
        "\n".join([f"values are missing for {host}; nothing was written:", *lines]),
        fix='give them as JSON, {"name": "value", …}, in a file of mode 0600 or on standard input',
    )
