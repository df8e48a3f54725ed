"""What a lockdown has to do, what a host says of itself, and what is not good enough to go on. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from clawdlets_ops import tailnet
from clawdlets_ops.errors import LockdownError
from clawdlets_ops.fleet import Host

MAX_CLOCK_SKEW_S = 120.0
WINDOW = "window"
_STATUS = re.compile(r"^mode=(bootstrap|tailnet|public|window) armed=(yes|no)$")
_ACCOUNT = ("mode", "armed", "kept", "owner", "left_s", "now", "tailnet")


@dataclass(frozen=True)
class HostExposure:
    """What the host's own firewall does: ``mode`` in force, and whether it is on trial (will revert by itself)."""

    mode: str
    armed: bool


@dataclass(frozen=True)
class HostAccount:
    """The host's whole account: besides that, what it goes back to (``kept``), whose trial it is and for how long yet, what
    its clock shows (seconds of the epoch), and which run of its tailnet's unit this is ("" when it has none)."""

    mode: str
    armed: bool
    kept: str
    owner: str
    left_s: int | None
    now: int
    tailnet: str

    @property
    def closed_for_good(self) -> bool:
        """Whether it lets nobody in but by the tailnet, and will stay so."""
        return self.mode == self.kept == "tailnet" and not self.armed


@dataclass(frozen=True)
class Timing:
    """How long each part may take, in seconds; short ones are for rehearsals.

    ``trial_s``: the host reverts by itself after so long. ``watchdog_s``: so does the edge. ``edge_s``: OpenTofu's apply, and
    then the API until it shows the rules as applied. ``tailnet_s``: until the host is on the tailnet, and again after its
    restart. ``restore_s``: how long opening the edge again is tried.
    """

    trial_s: int = 300
    watchdog_s: float = 240.0
    edge_s: float = 120.0
    tailnet_s: float = 120.0
    restore_s: float = 600.0


@dataclass(frozen=True)
class LockdownPlan:
    """What to do, for people; empty when edge and host are as declared."""

    host: str
    steps: tuple[str, ...]
    installed: bool = True
    """False when the host was not met as an installed one."""

    @property
    def empty(self) -> bool:
        """True when there is nothing to do."""
        return not self.steps

    def __str__(self) -> str:
        return "\n".join(self.steps) or "nothing to do"


def plan(host: str, declared: Host, *, edge_open: bool, on_host: HostExposure | None) -> LockdownPlan:
    """What separates the host from its declared exposure; pure. ``on_host`` is None when the host is not installed yet."""
    mode = declared.ssh_exposure.mode
    later = "" if on_host else "after the installation: "
    steps = []
    if mode == "tailnet":
        if on_host is None or on_host.mode != "tailnet" or on_host.armed:
            steps.append(f"{later}put the host's firewall to SSH on tailscale0 only, on trial")
        if edge_open:
            steps.append(f"{later}close tcp/22 at the edge, under a watchdog")
    elif on_host is not None and (on_host.mode != mode or on_host.armed):
        steps.append(f"put the host's firewall to {mode}")
    if steps and mode == "tailnet":
        steps.insert(0, f"{later}log in over the tailnet, twice and after its restart, with the pinned key")
        steps.append(f"{later}probe from outside on IPv4 and IPv6, and over the tailnet; else open again")
    return LockdownPlan(host, tuple(steps), installed=on_host is not None)


def parse_status(text: str) -> HostExposure:
    """The host's own account in one line; LockdownError when it is not understood."""
    if not (found := _STATUS.match(text.strip())):
        raise LockdownError(f"the host's exposure status is not understood: {text.strip()[:200]!r}")
    return HostExposure(found[1], found[2] == "yes")


def parse_account(text: str) -> HostAccount:
    """The host's whole account, a ``key=value`` a line; LockdownError when it is not understood."""
    said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    try:
        exposure = parse_status(f"mode={said['mode']} armed={said['armed']}")
        if set(said) != set(_ACCOUNT):
            raise ValueError(f"keys {sorted(said)}")
        return HostAccount(
            mode=exposure.mode,
            armed=exposure.armed,
            kept=said["kept"],
            owner=said["owner"],
            left_s=int(said["left_s"]) if said["left_s"] else None,
            now=int(said["now"]),
            tailnet=said["tailnet"],
        )
    except (KeyError, ValueError):
        raise LockdownError(f"the host's account of its exposure is not understood: {text.strip()[:200]!r}") from None


def refuse_short_lived(host: str, peer: tailnet.Peer | None, *, now: datetime) -> None:
    """LockdownError when the node's key is about to run out: the tailnet would then be no way in. Pure."""
    if peer is not None and peer.key_expiry is not None and peer.key_expiry - now < tailnet.MIN_KEY_LIFE:
        raise LockdownError(
            f"its key on the tailnet runs out at {peer.key_expiry:%Y-%m-%d %H:%M} UTC; nothing was closed",
            where=host,
            fix="disable the node's key expiry in the admin console, or give it a tag, and run again",
        )


def refuse_wrong_clock(host: str, account: HostAccount, *, now: datetime) -> None:
    """LockdownError when the host's clock and ours differ by minutes: deadlines and expiries could then not be judged."""
    apart_s = account.now - now.timestamp()
    if abs(apart_s) > MAX_CLOCK_SKEW_S:
        raise LockdownError(
            f"its clock is {abs(apart_s):.0f} s {'ahead of' if apart_s > 0 else 'behind'} this machine's; nothing was changed",
            where=host,
            fix="find out which of the two is wrong (timedatectl on both), put it right, and run again",
        )
