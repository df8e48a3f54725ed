"""The point of no return, where its answer is lost: the host is asked, and only what it says counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.errors import BusyError, ClawdletsError, CommandTimeout, LockdownError, UnreachableError
from clawdlets_ops.lockdown import HostAccount
from clawdlets_ops.lockdown import host as on_host
from clawdlets_ops.lockdown.transaction import confirm

OWNER = "0123456789abcdef"
TARGET = ssh.Target("alpha", "100.64.0.7", "admin", Path("/k"), "ssh-ed25519 A")
LOCKED = HostAccount("tailnet", armed=False, kept="tailnet", owner="", left_s=None, now=0, tailnet="x")
ON_TRIAL = replace(LOCKED, armed=True, kept="bootstrap", owner=OWNER, left_s=40)
OPEN = replace(LOCKED, mode="bootstrap", kept="bootstrap")
LOST = UnreachableError("the connection broke", where="alpha")


def answering(
    error: ClawdletsError | None, account: HostAccount | None
) -> tuple[Callable[..., None], Callable[..., HostAccount]]:
    def tell(target: ssh.Target, words: str) -> None:
        assert (target, words) == (TARGET, f"confirm tailnet {OWNER}")
        if error is not None:
            raise error

    def read_account(target: ssh.Target) -> HostAccount:
        if account is None:
            raise UnreachableError("no answer", where=str(target))
        return account

    return tell, read_account


@pytest.mark.parametrize(
    ("error", "account", "confirmed"),
    [
        (None, None, True),
        (LOST, LOCKED, True),
        (CommandTimeout("did not end", where="alpha"), LOCKED, True),
        (LockdownError("confirm ended with status -1", where="alpha"), LOCKED, True),
        (LOST, ON_TRIAL, False),
        (LOST, OPEN, False),
        (LOST, None, False),
        (BusyError("somebody else's", where="alpha"), replace(ON_TRIAL, owner="f" * 16), False),
        (LockdownError("its trial does not stand any more", where="alpha"), OPEN, False),
    ],
)
def test_a_lost_answer_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, error: ClawdletsError | None, account: HostAccount | None, confirmed: bool
) -> None:
    tell, read_account = answering(error, account)
    monkeypatch.setattr(on_host, "tell", tell)
    monkeypatch.setattr(on_host, "read_account", read_account)
    if confirmed:
        confirm(TARGET, OWNER)
        return
    assert error is not None
    with pytest.raises(type(error)) as caught:
        confirm(TARGET, OWNER)
    assert caught.value is error
