"""Canaries: the first hosts of an inventory, whose failure keeps the others from being begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import SettingsError

# pyinfra counts a host as failed only after an operation has been through all of them. By run, that is by its folder.
_FAILED: dict[Path, set[str]] = {}


def note_failure(run: Path, host: str) -> None:
    """This host's stage failed in the run that has this folder."""
    _FAILED.setdefault(run, set()).add(host)


def failed_before(state: Any, host: Any) -> list[str]:
    """The canaries that have failed, when ``host`` is not one of them itself; SettingsError for a number that is none."""
    failed = _FAILED.get(host.data.clawdlets_tools.journal.folder, set())
    names = [one.data.get("clawdlets_host") for one in state.inventory if one.data.get("clawdlets_host")]
    return failed_canaries(names, str(host.data.get("canary") or "0"), host.data.clawdlets_host, failed)


def failed_canaries(names: Sequence[str], count: str, host: str, failed: set[str]) -> list[str]:
    """The same, of plain values: ``names`` in the inventory's order, ``count`` as it was written."""
    if not count.isascii() or not count.isdigit():
        raise SettingsError(f"{count!r} is no number of hosts", where="--data canary", fix="write --data canary=1")
    first = list(names)[: int(count)]
    return [] if host in first else [name for name in first if name in failed]
