"""The host's side of a door: what it says, and telling it, each time by a fresh login with the pinned key."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from clawdlets_ops import ssh, tailnet
from clawdlets_ops.errors import BusyError, ClawdletsError, LockdownError, UnreachableError
from clawdlets_ops.files import ensure_dir, read_private, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Server
from clawdlets_ops.install import ADMIN
from clawdlets_ops.layout import HOST_PROGRAMS, Layout
from clawdlets_ops.lockdown.plan import HostAccount, HostExposure, parse_account, parse_status
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project

EXPOSURE = f"sudo -n {HOST_PROGRAMS}/clawdlets-exposure"
TELL_TIMEOUT_S = 60.0
BY_ANY_TIMEOUT_S = 4.0
_NO_TRIAL, _SOMEBODY_ELSES = 65, 75


def read_status(target: ssh.Target) -> HostExposure:
    """Ask the host; one login."""
    with ssh.session(target) as shell:
        return parse_status(shell.check(f"{EXPOSURE} status"))


def read_account(target: ssh.Target, *, timeout_s: float = ssh.CONNECT_TIMEOUT_S) -> HostAccount:
    """Ask the host for all of it; one login."""
    with ssh.session(target, timeout_s=timeout_s) as shell:
        return parse_account(shell.check(f"{EXPOSURE} account", timeout_s=TELL_TIMEOUT_S))


def tell(target: ssh.Target, words: str, *, stdin: str | None = None, timeout_s: float = ssh.CONNECT_TIMEOUT_S) -> None:
    """Have the host do something; one login. BusyError when somebody else's trial stands there, LockdownError when it
    refuses."""
    with ssh.session(target, timeout_s=timeout_s) as shell:
        answer = shell.run(f"{EXPOSURE} {words}", timeout_s=TELL_TIMEOUT_S, stdin=stdin)
    said = (answer.stderr or answer.stdout).strip()[-400:].removeprefix("clawdlets-exposure: ")
    if answer.exit_code == _SOMEBODY_ELSES:
        raise BusyError(
            f"somebody else is changing its exposure: {said}",
            where=str(target),
            fix="wait until that trial is confirmed or over, then run again; nothing was changed by this one",
        )
    if answer.exit_code == _NO_TRIAL:
        raise LockdownError(f"its trial does not stand any more: {said}", where=str(target))
    if not answer.ok:
        raise LockdownError(f"{words.split()[0]} ended with status {answer.exit_code}: {said}", where=str(target))


def tell_by_any(
    targets: Iterable[ssh.Target], words: str, *, stdin: str | None = None, timeout_s: float = BY_ANY_TIMEOUT_S
) -> ssh.Target:
    """The same by the first way in that works, which is returned; the last UnreachableError when none does."""
    last: ClawdletsError = UnreachableError("the host has no address", where=EXPOSURE)
    for target in targets:
        try:
            tell(target, words, stdin=stdin, timeout_s=timeout_s)
        except UnreachableError as error:
            last = error
        else:
            return target
    raise last


def base_target(project: Project, host: str, pin: str) -> ssh.Target:
    """The host as admin, with no address yet."""
    return ssh.Target(host, "", ADMIN, project.ssh_identity_file(host), pin)


def ways_in(base: ssh.Target, addresses: dict[int, str], server: Server) -> list[ssh.Target]:
    """Over the tailnet first, then by the public addresses."""
    return [base.at(address) for address in (*addresses.values(), *server.addresses.values())]


def tailnet_addresses(runner: Runner, host: str, declared: Host) -> dict[int, str]:
    """Where the host is on the tailnet, by family: ``targetHost`` if declared, else what tailscale says; {} if unknown."""
    if declared.target_host:
        address = declared.target_host.rpartition("@")[2]
        return {6 if ":" in address else 4: address}
    peer = tailnet_peer(runner, host, declared)
    return peer.addresses if peer else {}


def tailnet_peer(runner: Runner, host: str, declared: Host) -> tailnet.Peer | None:
    """The host as this machine's tailscale sees it; None when it is not seen, or cannot be asked."""
    if declared.tailnet.mode == "none" or runner.which("tailscale") is None:
        return None
    return tailnet.find_peer(runner, host)


def owner_of(layout: Layout) -> str:
    """This checkout's name on hosts: 16 hex digits, made once. Whoever has another is somebody else."""
    path = layout.runtime / "lockdown" / "owner"
    if path.exists() and not path.is_symlink():
        text = read_private(path).strip()
        if len(text) == 16 and set(text) <= set("0123456789abcdef"):
            return text
    ensure_dir(path.parent)
    write_atomic(path, secrets.token_hex(8) + "\n")
    return read_private(path).strip()


def words_of(verb: str, *words: object) -> str:
    """A command of ours: no word needs quoting."""
    return " ".join([verb, *(str(word) for word in words)])


def first(addresses: dict[int, str]) -> str:
    """The address to begin with."""
    found: Sequence[str] = list(addresses.values())
    return found[0]
