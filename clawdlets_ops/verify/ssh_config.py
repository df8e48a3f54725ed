"""The OpenSSH client's configuration for one verification: one pinned key, one identity, nothing of the user's. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import VerifyError

# A socket's path is at most 103 bytes on some systems (unix(7): 108 with the final zero), and ssh appends 17 while it
# sets the socket up.
CONTROL_PATH_MAX_BYTES = 103 - 17


def control_path(folder: Path) -> Path:
    """Where the shared connection's socket lies; VerifyError when the folder's name is too long for one."""
    path = folder / "s"
    if len(str(path).encode()) > CONTROL_PATH_MAX_BYTES:
        raise VerifyError("is too long for a socket", where=str(folder), fix="set TMPDIR to a shorter path")
    return path


def known_hosts(expected: Mapping[str, Any]) -> str:
    """The pin under the host's own name: addresses may change, the key may not."""
    return f"{expected['host']} {expected['ssh']['pin']}\n"


def ssh_config(expected: Mapping[str, Any], folder: Path) -> str:
    """ssh_config(5) for the host, with its files below ``folder``."""
    ssh = expected["ssh"]
    options = {
        "HostName": ssh["address"],
        "Port": ssh["port"],
        "User": ssh["user"],
        "IdentityFile": _quoted(ssh["identityFile"]),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "HostKeyAlias": expected["host"],
        "UserKnownHostsFile": _quoted(str(folder / "known_hosts")),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "CheckHostIP": "no",
        "BatchMode": "yes",
        "ControlMaster": "auto",
        "ControlPath": _quoted(str(control_path(folder))),
        "ControlPersist": 30,
        "ConnectTimeout": 10,
        "ServerAliveInterval": 5,
        "ServerAliveCountMax": 3,
        "ForwardAgent": "no",
        "ClearAllForwardings": "yes",
        "LogLevel": "ERROR",
    }
    return "\n".join([f"Host {expected['host']}", *(f"  {key} {value}" for key, value in options.items()), ""])


def _quoted(path: str) -> str:
    if any(sign in path for sign in '"\n\r\\'):
        raise VerifyError("has a sign in its name that ssh_config cannot hold", where=path)
    return '"' + path.replace("%", "%%") + '"'
