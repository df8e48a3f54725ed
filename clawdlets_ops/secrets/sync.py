"""A running host brought to the set of secrets that the repository has for it: encrypted files, swapped in whole.

What the host does is clawdlets-sync's part (docs/reference/secrets-on-the-host.md): one word by sudo, one JSON document in,
one out. A host that is as it should be costs one login and one command, and no sops.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from clawdlets_ops import lockdown, ssh
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import BusyError, ClawdletsError, CommandTimeout, SecretsError, SyncError, UnreachableError
from clawdlets_ops.files import locked
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.install import ADMIN
from clawdlets_ops.layout import HOST_PROGRAMS
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.observe import need_files
from clawdlets_ops.secrets.payload import recorded, set_digest, wiring
from clawdlets_ops.secrets.plan import needs
from clawdlets_ops.secrets.store import LOCK_WAIT_S
from clawdlets_ops.secrets.vault import (
    declared_host,
    host_readers,
    host_ssh_pin,
    identity_in,
    open_all,
    operator_identity,
    operators_of,
    raise_faults,
    read_all,
)
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

PROGRAM = f"sudo -n {HOST_PROGRAMS}/clawdlets-sync"
VERSION = 1
ANSWERS_WITHIN_S = 900.0
"""Longer than activation, restarts, and both once more for going back can take on the host."""

REFUSED, ROLLED_BACK, BROKEN, BUSY = 64, 3, 4, 75
STILL = "the set that was there is still active"


@dataclass(frozen=True)
class SecretSet:
    """What a host is to have: the text of its wiring, and name to text of its encrypted files."""

    host: str
    wiring: str = field(repr=False)
    files: Mapping[str, str] = field(repr=False)

    @property
    def digest(self) -> str:
        """As the host computes it of what lies there."""
        return set_digest(self.wiring, self.files)


@dataclass(frozen=True)
class OnHost:
    """The host's own account: the digest of its set, of each encrypted file, and the fingerprints of its age keys."""

    digest: str
    files: Mapping[str, str]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class SyncPlan:
    """Names of secrets by what happens to their encrypted files on the host; ``rewired``: their owners or modes."""

    host: str
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rewired: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """For people; none when the host is as it should be."""
        by_verb = (("add", self.added), ("replace", self.changed), ("remove", self.removed))
        steps = [f"{verb} {name} on {self.host}" for verb, names in by_verb for name in names]
        if self.rewired and not steps:
            steps.append(f"change who reads the secrets of {self.host}")
        return tuple(steps)

    @property
    def empty(self) -> bool:
        """True when there is nothing to do."""
        return not (self.steps or self.rewired)


@dataclass(frozen=True)
class SyncOutcome:
    """What was done, and the digests of the set in the repository, in the payload last built (empty when none is known),
    and on the host now. ``restarted`` are systemd units."""

    plan: SyncPlan
    repository: str
    payload: str
    on_host: str
    restarted: tuple[str, ...] = ()

    def __str__(self) -> str:
        payload = self.payload[:12] or "not built here"
        if self.payload and self.payload != self.repository:
            payload += " (older; an installation builds it anew)"
        return f"set: repository {self.repository[:12]}, host {self.on_host[:12]}, payload {payload}"


class Link:
    """clawdlets-sync on one host, over one login; made by ``connect``."""

    def __init__(self, shell: ssh.Session, host: str) -> None:
        self._shell = shell
        self.host = host

    @property
    def shell(self) -> ssh.Session:
        """The login itself."""
        return self._shell

    def status(self) -> OnHost:
        """What is there. What an interrupted run left unproved has then been taken back."""
        return parse_status(self.ask("status"), self.host)

    def prove(self) -> dict[str, bool]:
        """Of each key, by fingerprint, whether it opens every file of the set by itself."""
        return {str(key): value is True for key, value in dict(self.ask("prove").get("keys", {})).items()}

    def send(self, verb: str, *, base: str, body: Mapping[str, Any], signer: Identity) -> dict[str, Any]:
        """Send a document, signed with an age key of the host: what counts is who can read the secrets, not who can log
        in. ``base`` is what the host must still have. SyncError, which says what is active there; never sent twice."""
        document = {"version": VERSION, "verb": verb, "host": self.host, "base": base, **body}
        text = json.dumps({**document, "mac": signature(signer, document)})
        return self.ask(verb, Secret(text, f"what {self.host} is sent"))

    def ask(self, verb: str, document: Secret | None = None) -> dict[str, Any]:
        """Run one word of clawdlets-sync; SyncError, BusyError, UnreachableError."""
        try:
            answer = self._shell.run(f"{PROGRAM} {verb}", stdin=document, timeout_s=ANSWERS_WITHIN_S)
        except (UnreachableError, CommandTimeout) as error:
            if document is None:
                raise
            raise SyncError(
                f"the answer did not come: {error.what}; the host has the old set or the new one, whole",
                where=self.host,
                fix="run the same command again",
            ) from error
        if answer.exit_code != 0:
            _explain(self.host, answer)
        try:
            found = json.loads(answer.stdout)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise SyncError(f"clawdlets-sync {verb} did not answer as it should", where=self.host)
        return found


@contextmanager
def connect(project: Project, host: str, *, runner: Runner, cloud: Cloud) -> Iterator[Link]:
    """Log in once, over the tailnet, else (as long as it is open) at a public address; always to the pinned key."""
    declared = project.fleet.host(host)
    base = ssh.Target(host, "", ADMIN, project.ssh_identity_file(host), host_ssh_pin(project, host))
    last = UnreachableError("the host has no address", where=host, fix="is it installed, and on the tailnet?")

    def addresses() -> Iterator[str]:
        yield from lockdown.tailnet_addresses(runner, host, declared).values()
        if (server := cloud.server(host)) is not None:
            yield from server.addresses.values()

    for address in addresses():
        login = ssh.session(base.at(address))
        try:
            shell = login.__enter__()
        except UnreachableError as error:
            last = error
            continue
        try:
            yield Link(shell, host)
        finally:
            login.__exit__(None, None, None)
        return
    raise last


def repository_set(project: Project, host: str) -> SecretSet:
    """What the repository has for ``host``, read under its lock; starts no process.

    SecretsError unless every secret is there and for exactly its declared readers: what a host is sent has no other.
    """
    layout = project.layout
    recipient = declared_host(layout, host)
    if recipient is None:
        where = str(layout.host_age_public_key(host))
        raise SecretsError(f"the host {host!r} has no key yet", where=where, fix="run secrets init first")
    with locked(layout.lock("secrets"), what="the project's secrets", wait_s=LOCK_WAIT_S):
        wanted = need_files(project, host)
        found, faults = read_all(wanted)
        readers = frozenset(operators_of(project).values()) | host_readers(layout, host, recipient)
    for path, need in wanted.items():
        if path not in found:
            if str(path) not in {fault.where for fault in faults}:
                fix = f"clawdlets secrets set {need.name} --host {host}"
                faults.append(SecretsError("is not there", where=str(path), fix=fix))
        elif found[path].recipients != readers:
            fault = "is not for exactly its declared readers"
            faults.append(SecretsError(fault, where=str(path), fix="clawdlets secrets reconcile"))
    raise_faults(faults)
    files = {need.name: found[path].text for path, need in wanted.items()}
    return SecretSet(host, wiring(host, needs(host, project.fleet.host(host))), files)


def plan(wanted: SecretSet, on_host: OnHost) -> SyncPlan:
    """What separates the host from ``wanted``; pure."""
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in wanted.files.items()}
    there = on_host.files
    files_differ = digests != dict(there)
    return SyncPlan(
        wanted.host,
        added=tuple(sorted(digests.keys() - there.keys())),
        changed=tuple(sorted(name for name in digests.keys() & there.keys() if digests[name] != there[name])),
        removed=tuple(sorted(there.keys() - digests.keys())),
        rewired=not files_differ and on_host.digest != wanted.digest,
    )


def sync(project: Project, link: Link, *, runner: Runner, say: Callable[[str], None] = lambda _: None) -> SyncOutcome:
    """Bring the host to the repository's set. SyncError, with what is active there, when it did not come to that."""
    wanted = repository_set(project, link.host)
    record = recorded(project.layout, link.host)
    payload = record.secret_set if record else ""
    on_host = link.status()
    planned = plan(wanted, on_host)
    if planned.empty:
        return SyncOutcome(planned, wanted.digest, payload, on_host.digest)
    for step in planned.steps:
        say(step)
    signer = signer_for(project, link.host, on_host.keys, runner=runner)
    answer = link.send(
        "set", base=on_host.digest, body={"wiring": wanted.wiring, "files": dict(wanted.files)}, signer=signer
    )
    if answer.get("set") != wanted.digest:
        raise SyncError(
            "the host says it has another set than it was sent", where=link.host, fix="run again, and verify"
        )
    restarted = tuple(str(unit) for unit in answer.get("restarted", ()))
    return SyncOutcome(planned, wanted.digest, payload, str(answer["set"]), restarted)


def signer_for(project: Project, host: str, fingerprints: Sequence[str], *, runner: Runner) -> Identity:
    """An age key of the host that the repository holds and that is there now; SyncError when none is."""
    known = host_identities(project, host, runner=runner)
    for identity in known:
        if fingerprint(identity) in fingerprints:
            return identity
    raise SyncError(
        "the host has another age key than the repository; it could open nothing that it is sent",
        where=host,
        fix=f"finish a rotation that was begun elsewhere (clawdlets secrets rotate --host-key {host}), or install it anew",
    )


def host_identities(project: Project, host: str, *, runner: Runner) -> tuple[Identity, ...]:
    """The host's age key out of the repository, and after it the next one while it is being rotated."""
    layout = project.layout
    paths = (layout.host_age_key_file(host), layout.host_next_age_key_file(host))
    found, faults = read_all(paths)
    raise_faults(faults)
    opened, faults = open_all(Sops(runner, find_sops(runner)), found.values(), operator_identity(project))
    raise_faults(faults)
    return tuple(identity_in(found[path], opened[path]) for path in paths if path in opened)


def fingerprint(identity: Identity) -> str:
    """As the host shows it: a digest over 256 random bits, which says nothing about them."""
    return hashlib.sha256(f"clawdlets host key\n{identity.secret.reveal()}".encode()).hexdigest()


def signature(identity: Identity, document: Mapping[str, Any]) -> str:
    """HMAC-SHA256 over the canonical JSON of ``document``, under a key derived from the host's age key."""
    key = hashlib.sha256(b"clawdlets-sync 1\n" + identity.secret.reveal().encode()).digest()
    return hmac.new(key, json.dumps(document, sort_keys=True, separators=(",", ":")).encode(), "sha256").hexdigest()


def parse_status(document: Mapping[str, Any], host: str) -> OnHost:
    """The host's own account; SyncError when it is not understood, or another host's."""
    files, keys = document.get("files"), document.get("keys")
    if not isinstance(files, dict) or not isinstance(keys, list) or document.get("host") != host:
        raise SyncError("the host's account of its secrets is not understood", where=host)
    by_name = {str(name): str(digest) for name, digest in files.items()}
    return OnHost(str(document.get("set")), by_name, tuple(str(key) for key in keys))


def _explain(host: str, answer: ssh.Answer) -> NoReturn:
    said = answer.stderr.strip()[-600:]
    if answer.exit_code == BUSY:
        raise BusyError(f"clawdlets-sync: {said}", where=host, fix="wait for the other one to end, then run again")
    if answer.exit_code == REFUSED:
        raise SyncError(f"{said or 'refused'}; {STILL}", where=host, fix="look at what is there, then run again")
    if answer.exit_code in (ROLLED_BACK, BROKEN):
        raise _failed(host, answer)
    if "sudo" in said:
        fix = "the host's system is older than clawdlets-sync: bring it up to date, or install it anew"
        raise SyncError(f"admin may not run clawdlets-sync there ({said}); {STILL}", where=host, fix=fix)
    raise SyncError(f"clawdlets-sync ended with status {answer.exit_code}: {said}", where=host, fix="run again")


def _failed(host: str, answer: ssh.Answer) -> ClawdletsError:
    try:
        told = dict(json.loads(answer.stdout))
    except (ValueError, TypeError):
        told = {}
    units = f"; restarted: {', '.join(map(str, told['restarted']))}" if told.get("restarted") else ""
    why = str(told.get("why", "activation failed"))
    if answer.exit_code == ROLLED_BACK:
        what = f"{why}\n  the previous set ({str(told.get('set'))[:12]}) is in place and active again{units}"
        return SyncError(what, where=host, fix="mend the cause and run again")
    what = f"{why}\n  THE PREVIOUS SET IS IN PLACE BUT NOT ACTIVE ({told.get('again')}){units}"
    return SyncError(
        what, where=host, fix="look at the host's journal; what services have decrypted may be the new values"
    )
