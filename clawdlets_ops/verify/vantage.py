"""Places to look from besides the declared ones: another machine by SSH, and the fleet's own other hosts. Pure.

A machine that is reached by SSH looks with bash alone: a NixOS host has no Python. It needs a positive control on each family
like every other vantage; without one, what is closed is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from clawdlets_ops.errors import VerifyError
from clawdlets_ops.vantage import Vantage

Controls = Mapping[int, tuple[str, int]]
CONNECT_TIMEOUT_S = 10
_DESTINATION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:%-]*")


def by_ssh(destination: str, controls: Controls, *, config: Path | None = None, name: str = "") -> Vantage:
    """The machine that ``ssh destination`` leads to, without asking anybody anything; VerifyError for what is no destination.

    ``config`` is an ssh_config that pins its key; without one it is the user's own, and a key that is not known is refused.
    """
    if not _DESTINATION.fullmatch(destination):
        raise VerifyError("is no SSH destination", where=destination, fix="name it as user@host, or by its alias")
    options = ("BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={CONNECT_TIMEOUT_S}")
    words = [word for option in options for word in ("-o", option)]
    file = ["-F", str(config)] if config else []
    return Vantage(name or destination, "internet", ("ssh", *file, *words, destination), controls, bash=True)


def parse_control(text: str) -> tuple[int, tuple[str, int]]:
    """``192.0.2.1:443`` or ``[2001:db8::1]:443`` as family, (address, port); VerifyError."""
    found = re.fullmatch(r"\[([0-9a-fA-F:]+)\]:(\d{1,5})|([0-9.]+):(\d{1,5})", text)
    if found is None or not 0 < int(found[2] or found[4]) < 65536:
        raise VerifyError("is no control", where=text, fix="write ADDRESS:PORT, an IPv6 address in brackets")
    return (6, (found[1], int(found[2]))) if found[1] else (4, (found[3], int(found[4])))
