"""What a host is configured with, as plain files: the NixOS modules embed them, Python reads the same ones.

``nix/`` imports these files by their path in the repository; the lab's host profile, the verification and the documents read
them here, out of the wheel. Nothing that stands in one of them is written in either language a second time.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


def text(name: str) -> str:
    """The file of this name, as text."""
    return (resources.files(__name__) / name).read_text(encoding="utf-8")


@cache
def _json(name: str) -> str:
    return text(name)


def data(name: str) -> Any:
    """The JSON file of this name; every caller gets a value of its own."""
    return json.loads(_json(name))


def sshd_config() -> str:
    """``sshd_config`` as NixOS writes it from ``sshd.json``: lists of algorithms joined by commas, others by spaces."""
    said = data("sshd.json")
    lines = [f"HostKey {said['hostKey']}", f"AuthorizedKeysFile {said['authorizedKeysFile']}"]
    for key, value in said["settings"].items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list):
            value = ("," if key in said["joinedByCommas"] else " ").join(value)
        lines.append(f"{key} {value}")
    return "\n".join([*lines, f"Subsystem sftp {said['sftp']}", ""])
