"""A new age key for a running host, which can decrypt its secrets at every moment on the way.

Where a rotation stands is read from the repository: ``keys/next`` holds the key that is coming, ``keys/old`` names the one
that is to go. Each step is done if it is not done yet, so that a rotation that was cut off is finished by running it again,
by any operator who has these files. The order:

1. the next key, for the operators; its private half before its public one
2. the host's secrets for the present key, the next one and the operators
3. on the host: the next key beside the present one; then the files of step 2; then the proof that the next key opens each
4. in the repository: the next key takes the place of the present one, of which the public half stays as a mark
5. the host's secrets for the new key and the operators; on the host: these files, the proof again, the old key gone
6. the mark goes
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from clawdlets_ops import age
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError, SyncError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.reconcile import plan_reconcile
from clawdlets_ops.secrets.store import Outcome, change
from clawdlets_ops.secrets.sync import Link, fingerprint, host_identities, signer_for, sync
from clawdlets_ops.secrets.vault import (
    AGE_PUBLIC,
    AGE_SECRET,
    declared_host,
    identity_in,
    next_host,
    open_all,
    operator_identity,
    operators_of,
    raise_faults,
    read_sealed,
)
from clawdlets_ops.secrets.view import PUBLIC_FILE, Plan, Target
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops


@dataclass(frozen=True)
class Rotated:
    """``recipient`` is the public half of the key that the host has now; ``resumed``: it was begun by an earlier run.
    The names are files of the repository; ``restarted`` units of the host, none unless a value changed as well."""

    recipient: str
    resumed: bool
    created: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()


def rotate(
    project: Project,
    link: Link,
    *,
    runner: Runner,
    say: Callable[[str], None] = lambda _: None,
    disk: Disk | None = None,
) -> Rotated:
    """Give the host of ``link`` a new age key; finish the rotation that was begun, if one was.

    SyncError when the host did not do its part: the key that it has still opens what it has. SecretsError,
    UnreadableError when the repository's part cannot be done.
    """
    host, layout = link.host, project.layout
    steps = _Steps(project, host, runner, disk, say)
    begun = (layout.host_next_age_key_file(host), layout.host_next_age_public_key(host))
    mark = layout.host_old_age_public_key(host)
    resumed = mark.exists() or any(path.exists() for path in begun)
    restarted: tuple[str, ...] = ()
    if not mark.exists():
        steps.change("make the next key", partial(plan_next, project, host, runner=runner))
        steps.change("encrypt for both keys", partial(plan_reconcile, project, [host], runner=runner))
        old, new = _pair(project, host, runner)
        say("give the host both keys")
        _install(project, link, (new, old), runner=runner)
        restarted += sync(project, link, runner=runner, say=say).restarted
        _prove(link, new, say)
        steps.change("put the next key in the place of the present one", partial(plan_promote, project, host))
    elif any(path.exists() for path in begun):
        steps.change("put the next key in the place of the present one", partial(plan_promote, project, host))
    steps.change("encrypt for the new key alone", partial(plan_reconcile, project, [host], runner=runner))
    restarted += sync(project, link, runner=runner, say=say).restarted
    new = host_identities(project, host, runner=runner)[0]
    _prove(link, new, say)
    say("take the old key from the host")
    _install(project, link, (new,), runner=runner)
    folders = (mark.parent, layout.host_next_age_key_file(host).parent)
    steps.change("the rotation is done", lambda: Plan(removals=(mark,), emptied=folders))
    return replace(steps.done(), recipient=new.recipient, resumed=resumed, restarted=restarted)


def plan_next(project: Project, host: str, *, runner: Runner) -> Plan:
    """The host's next key: made, or as it was made by a run that was cut off. SecretsError when it has none yet."""
    layout = project.layout
    if declared_host(layout, host) is None:
        where = str(layout.host_age_key_file(host))
        raise SecretsError(f"the host {host!r} has no key yet", where=where, fix="run secrets init first")
    file, public = layout.host_next_age_key_file(host), layout.host_next_age_public_key(host)
    sealed = read_sealed(file)
    if sealed is not None:
        opened, faults = open_all(Sops(runner, find_sops(runner)), [sealed], operator_identity(project))
        raise_faults(faults)
        identity = identity_in(sealed, opened[file])
        return Plan((Target(public, PUBLIC_FILE, f"{identity.recipient}\n"),))
    if public.exists():
        fix = f"restore it from git, or remove {public} to begin anew"
        raise SecretsError("is gone, but its public half is there", where=str(file), fix=fix)
    identity = age.generate()
    plaintext = {AGE_PUBLIC: Secret(identity.recipient, AGE_PUBLIC), AGE_SECRET: identity.secret}
    readers = frozenset(operators_of(project).values())
    return Plan(
        (
            Target(file, PRIVATE_FILE, None, plaintext, readers),
            Target(public, PUBLIC_FILE, f"{identity.recipient}\n"),
        )
    )


def plan_promote(project: Project, host: str) -> Plan:
    """The next key becomes the present one. First the mark, so that whoever goes on knows how far it came."""
    layout = project.layout
    file, public = layout.host_next_age_key_file(host), layout.host_next_age_public_key(host)
    mark = layout.host_old_age_public_key(host)
    sealed, recipient = read_sealed(file), next_host(layout, host)
    targets: tuple[Target, ...] = ()
    if sealed is not None and recipient is not None:  # else this has been done, up to the removals
        replaced = mark.read_text() if mark.exists() else f"{declared_host(layout, host)}\n"
        targets = (
            Target(mark, PUBLIC_FILE, replaced),
            Target(layout.host_age_key_file(host), PRIVATE_FILE, sealed.text),
            Target(layout.host_age_public_key(host), PUBLIC_FILE, f"{recipient}\n"),
        )
    return Plan(targets, removals=tuple(path for path in (file, public) if path.exists()))


class _Steps:
    """Carries out changes of the repository, and adds up what they did."""

    def __init__(
        self, project: Project, host: str, runner: Runner, disk: Disk | None, say: Callable[[str], None]
    ) -> None:
        self._project, self._host, self._runner, self._disk, self._say = project, host, runner, disk, say
        self._outcomes: list[Outcome] = []

    def change(self, what: str, make_plan: Callable[[], Plan]) -> None:
        self._say(what)
        self._outcomes.append(change(self._project, make_plan, runner=self._runner, disk=self._disk))

    def done(self) -> Rotated:
        """Files that came and went on the way are not named."""
        created = {name for made in self._outcomes for name in made.created}
        removed = {name for made in self._outcomes for name in made.removed}
        updated = {name for made in self._outcomes for name in made.updated} - created
        return Rotated(
            "", False, tuple(sorted(created - removed)), tuple(sorted(updated)), tuple(sorted(removed - created))
        )


def _pair(project: Project, host: str, runner: Runner) -> tuple[Identity, Identity]:
    """The present key and the next one, each with its declared public half."""
    layout = project.layout
    found = host_identities(project, host, runner=runner)
    if tuple(identity.recipient for identity in found) != (declared_host(layout, host), next_host(layout, host)):
        raise SecretsError(
            "the public halves of the present and the next key are not theirs",
            where=str(layout.host_next_age_key_file(host)),
            fix="restore the files of this host below secrets/keys from git",
        )
    return found[0], found[1]


def _install(project: Project, link: Link, wanted: tuple[Identity, ...], *, runner: Runner) -> None:
    """Exactly ``wanted`` on the host. It takes no key that does not open every file it has."""
    fingerprints = tuple(fingerprint(identity) for identity in wanted)
    there = link.status().keys
    if there == fingerprints:
        return
    signer = signer_for(project, link.host, there, runner=runner)
    if len(wanted) > 1 and (strangers := set(there) - set(fingerprints)):
        raise SyncError(
            f"the host has {len(strangers)} age key(s) that the repository does not know; nothing was changed there",
            where=link.host,
            fix="another operator may be rotating its key: get their commit, and run again",
        )
    base = hashlib.sha256("\n".join(there).encode()).hexdigest()
    body = {"identities": [identity.secret.reveal() for identity in wanted]}
    answer = link.send("keys", base=base, body=body, signer=signer)
    if tuple(answer.get("keys", ())) != fingerprints:
        raise SyncError("the host says it has other keys than it was sent", where=link.host, fix="run again")


def _prove(link: Link, identity: Identity, say: Callable[[str], None]) -> None:
    """SyncError unless the host opens every one of its files with ``identity`` alone."""
    if not link.prove().get(fingerprint(identity), False):
        raise SyncError(
            "the host does not open all its files with the new key; the old one stays",
            where=link.host,
            fix="run again; look at the host's journal if it stays so",
        )
    say("the host opens every file with the new key")
