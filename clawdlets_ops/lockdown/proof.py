"""That there is another way in before a door is closed: fresh logins over the tailnet, and the console's password."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_fixed

from clawdlets_ops import ssh, tailnet
from clawdlets_ops.errors import ClawdletsError, LockdownError, SecretsError, UnreachableError
from clawdlets_ops.fleet import Host
from clawdlets_ops.lockdown.host import EXPOSURE, TELL_TIMEOUT_S, read_account, tailnet_addresses
from clawdlets_ops.lockdown.plan import HostAccount, Timing, refuse_short_lived, refuse_wrong_clock
from clawdlets_ops.mkpasswd import is_crypt_hash
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import vault
from clawdlets_ops.sops import Sops, find_sops

BREAKGLASS = "breakglass_password_hash"
POLL_TIMEOUT_S = 4.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Proof:
    """What was shown: the last account of the host, how many fresh logins, whether the tailnet's unit was restarted between
    two of them (``restart`` says how that went), and until when the node's key is good."""

    account: HostAccount
    logins: int
    restart: str
    key_expiry: str
    breakglass: str


def wait_for_tailnet(
    project: Project, runner: Runner, host: str, declared: Host, *, within_s: float, say: Say
) -> dict[int, str]:
    """The host's addresses there, by family; LockdownError when it does not appear."""
    say("wait for the host on the tailnet")

    def give_up(_: RetryCallState) -> dict[int, str]:
        raise LockdownError(
            f"the host did not appear on the tailnet within {within_s:g} s; nothing was closed",
            where=host,
            fix="is its tailscale_auth_key valid? (journalctl -u tailscaled-autoconnect on the host); "
            "put the secret right, or declare targetHost, and run again",
        )

    return Retrying(
        stop=stop_after_delay(within_s),
        wait=wait_fixed(project.poll_interval_s),
        retry=retry_if_result(lambda found: not found),
        retry_error_callback=give_up,
    )(lambda: tailnet_addresses(runner, host, declared))


def prove(
    project: Project,
    host: str,
    inside: ssh.Target,
    *,
    peer: tailnet.Peer | None,
    runner: Runner,
    timing: Timing,
    say: Say,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Proof:
    """Log in twice, restart the tailnet's unit on the host, log in again; LockdownError when one of it does not hold.

    Changes nothing but that restart, which would be needed sooner or later and had better fail while the other door is open.
    """
    refuse_short_lived(host, peer, now=now())
    console = check_breakglass(project, host, runner=runner)
    say(f"the breakglass password is {console}")
    account = read_account(inside)
    refuse_wrong_clock(host, account, now=now())
    account = read_account(inside)
    say(f"logged in twice over the tailnet ({inside.address}), host is {account.mode}")
    restart = "the host has no unit for its tailnet"
    logins = 2
    if account.tailnet:
        began = clock()
        account = _restart(host, inside, account, timing=timing, clock=clock, sleep=sleep)
        logins += 1
        restart = f"a fresh login came through {clock() - began:.1f} s after the tailnet's restart"
        say(restart)
    expiry = peer.key_expiry.isoformat() if peer and peer.key_expiry else "never"
    return Proof(account, logins, restart, expiry, console)


def check_breakglass(project: Project, host: str, *, runner: Runner) -> str:
    """That the way in by the console is good: the secret decrypts here and is a whole crypt(5) hash. LockdownError."""
    path = project.layout.secret_file(host, BREAKGLASS)
    fix = f"clawdlets secrets set {BREAKGLASS} --host {host}, sync the host, and run again"
    try:
        sealed = vault.read_sealed(path)
        if sealed is None:
            raise SecretsError("there is none", where=str(path))
        opened, faults = vault.open_all(Sops(runner, find_sops(runner)), [sealed], vault.operator_identity(project))
        vault.raise_faults(faults)
        value = vault.single(sealed, opened[path], BREAKGLASS)
    except ClawdletsError as error:
        raise LockdownError(
            f"its {BREAKGLASS} cannot be used ({error.what}), and it is the last way in; nothing was closed",
            where=host,
            fix=fix,
        ) from None
    if not is_crypt_hash(value.reveal()):
        raise LockdownError(
            f"its {BREAKGLASS} is no whole crypt(5) hash, and it is the last way in; nothing was closed",
            where=host,
            fix=fix,
        )
    return "decrypted, and a whole hash"


def _restart(
    host: str,
    inside: ssh.Target,
    before: HostAccount,
    *,
    timing: Timing,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> HostAccount:
    with ssh.session(inside) as shell:
        shell.check(f"{EXPOSURE} restart-tailnet", timeout_s=TELL_TIMEOUT_S)
    deadline = clock() + timing.tailnet_s
    last = "no login came through"
    while True:
        try:
            account = read_account(inside, timeout_s=POLL_TIMEOUT_S)
            if account.tailnet not in ("", before.tailnet):
                return account
            last = "its unit was not restarted"
        except UnreachableError as error:
            last = error.what
        if clock() > deadline:
            raise LockdownError(
                f"the tailnet did not come back within {timing.tailnet_s:g} s of its restart ({last}); nothing was closed",
                where=host,
                fix="the host is open as before: log in and look (journalctl -u tailscaled -u tailscaled-autoconnect)",
            )
        sleep(0.3)
