"""The operator-side watchdog: a process of its own that puts the edge back unless it is told that all went well.

It is armed before the edge is touched, survives the operator's command (also ``kill -9``) and ends by itself. What makes it
act: the operator's command is gone without a decision (its lock is free), the deadline, or being told to end (SIGTERM). Before
it opens a locked edge it looks whether the host has been confirmed: that is the point of no return, and then the edge
stays closed. It writes one line to the run's journal, and ``watchdog.json``.

    python -m clawdlets_ops.lockdown.watchdog PROJECT HOST        (the token in HCLOUD_TOKEN)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from clawdlets_ops import process, ssh
from clawdlets_ops.errors import BusyError, ClawdletsError, LockdownError
from clawdlets_ops.files import ensure_dir, locked, read_private, write_atomic
from clawdlets_ops.hetzner import Cloud, HetznerCloud
from clawdlets_ops.journal import Journal
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import edge
from clawdlets_ops.lockdown.host import read_account, tell_by_any
from clawdlets_ops.lockdown.plan import HostAccount
from clawdlets_ops.sensitive import Redactor, Secret

ARMED_WITHIN_S = 60.0
END_WITHIN_S = 45.0
LOOK_S = 0.2
TOFU_ENDS_WITHIN_S = 180.0
LOGIN_TIMEOUT_S = 5.0
CONFIRMED, UNDONE, CLOSED = "confirmed", "undone", "closed"


@dataclass(frozen=True)
class Guard:
    """An armed watchdog, as the command sees it that armed it."""

    layout: Layout
    order: edge.Order
    background: process.Background

    def check(self) -> None:
        """LockdownError when it is not on guard any more."""
        if self.background.poll() is not None:
            told = state_of(self.layout, self.order)
            raise LockdownError(
                f"the watchdog has ended ({told.get('did') or 'without a word: it was killed'})", where=self.order.host
            )

    def dismiss(self, decision: str) -> None:
        """Tell it how it ended, and see it go. LockdownError when it had acted before, or does not end."""
        acted = self.background.poll() is not None and bool(state_of(self.layout, self.order).get("did"))
        edge.decide(self.layout, self.order, decision)
        if self.background.wait(END_WITHIN_S) is None:
            self.background.terminate()
            raise LockdownError(
                f"the watchdog did not end within {END_WITHIN_S:g} s and was ended", where=self.order.host
            )
        did = str(state_of(self.layout, self.order).get("did", ""))
        if decision == CONFIRMED and (acted or did.startswith("opened")):
            raise LockdownError(f"the watchdog was faster: it has {did}", where=self.order.host, fix="run again")


def arm(
    layout: Layout,
    order: edge.Order,
    *,
    token: Secret,
    environ: Mapping[str, str],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Guard:
    """Start the watchdog of ``order``, and return once it says that it is armed; LockdownError. Nothing was changed then, and
    an earlier order that nobody has decided stands again; its watchdog may be gone (``lives``)."""
    earlier = edge.unfinished(layout, order.host)
    edge.write_order(layout, order)  # first: at no time is an earlier order decided with none in its place
    try:
        dismiss_earlier(layout, order.host, earlier, clock=clock, sleep=sleep)
        return _start(layout, order, token=token, environ=environ, clock=clock, sleep=sleep)
    except Exception:
        if earlier is None:
            edge.decide(layout, order, UNDONE)
        else:
            edge.keep_again(layout, earlier, take_back=CLOSED)
        raise


def _start(
    layout: Layout,
    order: edge.Order,
    *,
    token: Secret,
    environ: Mapping[str, str],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Guard:
    env = {key: environ[key] for key in process.INHERITED if key in environ}
    env["HCLOUD_TOKEN"] = token.reveal()
    env["PYTHONPATH"] = str(Path(__file__).parents[2])  # the same code as this, wherever the command was started
    folder = layout.lockdown_dir(order.host)
    words = [sys.executable, "-P", "-m", "clawdlets_ops.lockdown.watchdog", str(layout.root), order.host]
    background = process.spawn(words, env={"PATH": os.defpath, **env}, log_file=folder / edge.LOG).leave()
    guard = Guard(layout, order, background)
    deadline = clock() + ARMED_WITHIN_S
    while state_of(layout, order).get("state") != "armed":
        if background.poll() is not None or clock() > deadline:
            background.terminate()
            raise LockdownError(
                "the watchdog could not be armed; nothing was changed", where=order.host, fix=f"see {folder / edge.LOG}"
            )
        sleep(0.05)
    return guard


def dismiss_earlier(
    layout: Layout,
    host: str,
    earlier: edge.Order | None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """See off the watchdog of what came before (a window that is to be closed now), whose order is ``earlier``; LockdownError
    when it does not go."""
    if not lives(layout, host):
        return
    if earlier is not None and not edge.decision_of(layout, earlier):
        edge.decide(layout, earlier, CLOSED)
    deadline = clock() + END_WITHIN_S
    while lives(layout, host):
        if clock() > deadline:
            pid = state_of(layout, earlier).get("pid") if earlier else None
            raise LockdownError(
                f"the watchdog of an earlier lockdown or window does not end (process {pid or 'unknown'})",
                where=host,
                fix="look at what it does, end it, and run again; nothing was changed by this",
            )
        sleep(0.1)


def lives(layout: Layout, host: str) -> bool:
    """Whether a watchdog of this host is on guard: it holds its lock for as long as it lives."""
    try:
        with locked(_lock(layout, host), what="the watchdog"):
            return False
    except BusyError:
        return True


def state_of(layout: Layout, order: edge.Order) -> dict[str, Any]:
    """What the watchdog of this order wrote last: pid, state (armed, ended), saw, did; {} when nothing."""
    path = layout.lockdown_dir(order.host) / edge.WATCHDOG
    try:
        raw = json.loads(read_private(path)) if path.exists() else {}
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) and raw.get("id") == order.id else {}


@dataclass
class Watch:
    """One watchdog at work. ``operator_is_gone`` takes the operator's lock when it can; ``look`` asks the host."""

    layout: Layout
    order: edge.Order
    cloud: Cloud
    operator_is_gone: Callable[[], bool]
    look: Callable[[], HostAccount | None]
    revert_host: Callable[[], str]
    stopped: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> tuple[str, str]:
        """Until something is decided; what was seen, and what was done about it, in words."""
        saw = self._wait()
        if saw in (CONFIRMED, UNDONE, CLOSED):
            return f"the operator's command said {saw}", "nothing to do"
        if self.order.kind == "window":
            return saw, self._restore()
        if not edge.may_be_closed(self.layout, self.order):
            return saw, f"left the edge alone, which was not touched yet; {self.revert_host()}"
        account = self.look()
        # Begun over a window, it has to close that whatever the host says: the edge is not closed by a host that is.
        over_window = self.order.closing and not self.order.opens
        if account is not None and account.closed_for_good and not over_window:
            edge.decide(self.layout, self.order, CONFIRMED)
            return f"{saw}; the host, over the tailnet, is closed for good", "left the edge closed"
        if account is None:
            told = "could not be asked over the tailnet"
        else:
            told = f"says {account.mode}, {'on trial' if account.armed else 'for good'}"
        did = self._restore()
        return f"{saw}; the host {told}", f"{did}; {self.revert_host()}"

    def _wait(self) -> str:
        deadline = self.clock() + self.order.deadline_s
        while True:
            if decision := edge.decision_of(self.layout, self.order):
                return decision
            if self.stopped():
                return "was told to end"
            if self.order.kind == "lockdown" and self.operator_is_gone():
                # It may have decided just before it went.
                return edge.decision_of(self.layout, self.order) or "the operator's command is gone without a word"
            if self.clock() >= deadline:
                return f"no word within {self.order.deadline_s:g} s"
            self.sleep(LOOK_S)

    def _restore(self) -> str:
        word = "opened" if self.order.opens else "closed"
        done, failed = f"{word} the edge again", f"THE EDGE COULD NOT BE {word.upper()} AGAIN"
        with ExitStack() as stack:
            try:  # an OpenTofu that outlived its command would close it once more
                lock = self.layout.lock(f"provision-{self.order.host}")
                what = f"{self.order.host} in the cloud"
                stack.enter_context(locked(lock, what=what, wait_s=TOFU_ENDS_WITHIN_S, holder="the watchdog"))
                busy = ""
            except BusyError as error:
                busy = f" ({error.what})"
            try:
                changed = edge.put_back(
                    self.cloud, self.order, within_s=self.order.restore_s, clock=self.clock, sleep=self.sleep
                )
            except ClawdletsError as error:
                return f"{failed}: {error.what}{busy}"
        edge.decide(self.layout, self.order, UNDONE)
        return f"{done if changed else 'found the edge as it was'}{busy}"


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    root, host = argv
    layout = Layout(Path(root))
    token = Secret(os.environ.pop("HCLOUD_TOKEN", ""), "hcloud_token")
    stop: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        stop.append(number)

    signal.signal(signal.SIGTERM, note)
    for ignored in (signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    order = edge.read_order(layout, host)
    if order is None or edge.decision_of(layout, order):
        return 2
    with locked(_lock(layout, host), what=f"the watchdog of {host}"), _operators_lock(layout, host) as gone:
        watch = Watch(
            layout=layout,
            order=order,
            cloud=HetznerCloud(token, order.endpoint, poll_interval_s=order.poll_s),
            operator_is_gone=gone,
            look=lambda: _look(order),
            revert_host=lambda: _revert(order),
            stopped=lambda: bool(stop),
            clock=_clock,
        )
        _write(layout, order, state="armed", saw="", did="")
        saw, did = watch.run()
        _write(layout, order, state="ended", saw=saw, did="" if did == "nothing to do" else did)
        _tell_journal(order, f"watchdog: {saw}; {did}", token)
    return 0


@contextmanager
def _operators_lock(layout: Layout, host: str) -> Iterator[Callable[[], bool]]:
    """Yields a question: is the operator's command gone? Once it is, its lock is held here until the end, so that the next
    command waits for what is put back."""
    with ExitStack() as stack:
        held: list[bool] = []

        def gone() -> bool:
            if not held:
                try:
                    what = f"the lockdown of {host}"
                    stack.enter_context(locked(layout.lock(host), what=what, holder=f"the watchdog of {host}"))
                    held.append(True)
                except BusyError:
                    return False
            return True

        yield gone


def _look(order: edge.Order) -> HostAccount | None:
    for address in order.ways:
        try:
            return read_account(_target(order, address), timeout_s=LOGIN_TIMEOUT_S)
        except ClawdletsError:
            continue
    return None


def _revert(order: edge.Order) -> str:
    try:
        tell_by_any([_target(order, address) for address in (*order.ways, *order.public)], f"revert {order.owner}")
    except ClawdletsError as error:
        return f"the host could not be told to revert ({error.what.splitlines()[0]}), and does it by itself"
    return "the host's firewall is as before"


def _target(order: edge.Order, address: str) -> ssh.Target:
    return ssh.Target(order.host, address, order.user, Path(order.identity_file), order.pin)


def _write(layout: Layout, order: edge.Order, **told: str) -> None:
    folder = ensure_dir(layout.lockdown_dir(order.host))
    document = {"id": order.id, "pid": os.getpid(), "at": time.time(), **told}
    write_atomic(folder / edge.WATCHDOG, json.dumps(document) + "\n")


def _tell_journal(order: edge.Order, text: str, token: Secret) -> None:
    if order.journal:
        Journal(Path(order.journal), redactor=Redactor([token])).say(order.host, order.kind, "step", text)


def _lock(layout: Layout, host: str) -> Path:
    return layout.lock(f"watchdog-{host}")


def _clock() -> float:
    """Seconds that go on while the machine is suspended, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
