"""The two key pairs of a host, its age key and its SSH host key: made once, and never made anew while in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from clawdlets_ops import age, hostkey
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.secrets.seen import Entry
from clawdlets_ops.secrets.vault import (
    AGE_PUBLIC,
    AGE_SECRET,
    SSH_SECRET,
    Plaintext,
    Sealed,
    declared_host,
    declared_pin,
    host_recipient_file,
    identity_in,
    next_host,
    single,
)
from clawdlets_ops.secrets.view import PUBLIC_FILE, Target, View
from clawdlets_ops.sensitive import Secret


@dataclass(frozen=True)
class KeyPair:
    """The private half in ``file``, encrypted to the operators, the public one beside it; ``in_use`` says why a private
    half that is gone must not be made anew, should its public half be gone too."""

    file: Path
    public_file: Path
    declared: str | None
    make: Callable[[], Plaintext]
    public_in: Callable[[Sealed, Plaintext], str]
    comment: str = ""
    in_use: str | None = None


def age_pair(view: View, secrets: Iterable[Path]) -> KeyPair:
    """The host's age key; the files ``secrets`` may already be encrypted to it."""

    def make() -> Plaintext:
        identity = age.generate()
        return {AGE_PUBLIC: Secret(identity.recipient, AGE_PUBLIC), AGE_SECRET: identity.secret}

    return KeyPair(
        file=view.layout.host_age_key_file(view.host),
        public_file=host_recipient_file(view.layout, view.host),
        declared=declared_host(view.layout, view.host),
        make=make,
        public_in=lambda sealed, plaintext: identity_in(sealed, plaintext).recipient,
        in_use=_foreign_readers(view, secrets),
    )


def ssh_pair(view: View) -> KeyPair:
    """The host's SSH host key."""
    return KeyPair(
        file=view.layout.host_ssh_key_file(view.host),
        public_file=view.layout.host_ssh_public_key(view.host),
        declared=declared_pin(view.layout, view.host),
        make=lambda: {SSH_SECRET: hostkey.generate(view.host)[0]},
        public_in=lambda sealed, plaintext: hostkey.public_of(single(sealed, plaintext, SSH_SECRET)),
        comment=f" {view.host}",
    )


def made_or_kept(view: View, pair: KeyPair, *, anew: bool = False) -> tuple[str, list[Target]]:
    """The public half and both files; SecretsError when the private half is gone and something relies on it."""
    if pair.file in view.found:
        return kept(view, pair, anew=anew)
    _refuse_if_gone(pair)
    plaintext = pair.make()
    public = pair.public_in(Sealed(pair.file, "", frozenset()), plaintext)
    entry = Entry("", public=public)
    private = Target(pair.file, PRIVATE_FILE, None, plaintext, view.operators, entry, view.host)
    return public, [private, _public_target(pair, public)]


def kept_if_any(view: View, pair: KeyPair, *, anew: bool = False) -> tuple[str | None, list[Target]]:
    """As ``made_or_kept``, but a pair that does not exist yet is left to secrets init."""
    if pair.file in view.found:
        return kept(view, pair, anew=anew)
    _refuse_if_gone(pair)
    return None, []


def kept(view: View, pair: KeyPair, *, anew: bool) -> tuple[str, list[Target]]:
    """The public half and both files of a pair that exists; SecretsError unless its halves belong together."""
    sealed = view.found[pair.file]
    if pair.file in view.opened:
        public = pair.public_in(sealed, view.opened[pair.file])
        entry = Entry("", public=public)
    else:
        entry = known(view, pair.file)
        public = entry.public
    if pair.declared not in (None, public):
        fix = "restore the one that is wrong from git"
        if next_host(view.layout, view.host) == public:
            fix = f"a rotation was cut off here; finish it: clawdlets secrets rotate --host-key {view.host}"
        raise SecretsError(f"is not the public half of {pair.file.name}", where=str(pair.public_file), fix=fix)
    return public, [view.kept(sealed, view.operators, entry, anew=anew), _public_target(pair, public)]


def known(view: View, path: Path) -> Entry:
    """What the record says of a file that was not decrypted; SecretsError when it says nothing."""
    entry = view.entry(path)
    if entry is None:
        raise SecretsError("was neither decrypted nor known", where=str(path))
    return replace(entry, cipher="")


def _public_target(pair: KeyPair, public: str) -> Target:
    return Target(pair.public_file, PUBLIC_FILE, f"{public}{pair.comment}\n")


def _refuse_if_gone(pair: KeyPair) -> None:
    if reason := f"{pair.public_file.name} still names it" if pair.declared else pair.in_use:
        raise SecretsError(
            f"is gone, but {reason}; the host could do nothing with a new one",
            where=str(pair.file),
            fix=f"restore it from git; to give the host a new identity, remove {pair.public_file} and its secrets",
        )


def _foreign_readers(view: View, secrets: Iterable[Path]) -> str | None:
    """Why a host key that is absent must not be made anew: secrets of this host are already encrypted to one."""
    named = [path.name for path in secrets if path in view.found and view.found[path].recipients - view.operators]
    return f"{named[0]} is encrypted to it" if named else None
