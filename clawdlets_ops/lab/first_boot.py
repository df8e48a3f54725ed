"""cloud-init's part with user data: a shell script for the first boot of an instance, and the unit that runs it once.

Taken are a ``#!`` script and, of a ``#cloud-config``, ``write_files`` and ``runcmd``; anything else is named in the output
and not carried out. As at Hetzner the whole may be base64. What the script says goes to
``/var/log/cloud-init-output.log``. Pure.

Sources: cloud-init's documentation of cc_write_files and cc_runcmd; Hetzner's data source for base64.
"""

from __future__ import annotations

import base64
import binascii
import shlex
import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

UNIT: Final = "clawdlets-lab-first-boot.service"
SEED: Final = "/var/lib/cloud/seed/nocloud"
OUTPUT: Final = "/var/log/cloud-init-output.log"

_FILE_LIMIT_BYTES = 8 * 1024 * 1024
_TAKEN = ("write_files", "runcmd")


def instance_dir(instance_id: int) -> str:
    """What belongs to one instance: a disk that becomes another server begins anew."""
    return f"/var/lib/cloud/instances/{instance_id}"


def meta_data(instance_id: int, name: str) -> str:
    """NoCloud's second file."""
    return f"instance-id: {instance_id}\nlocal-hostname: {name}\n"


def unit(instance_id: int) -> str:
    """A oneshot unit that is done for good when the script has come to its end, with or without failures."""
    folder = instance_dir(instance_id)
    return f"""[Unit]
Description=User data of the first boot
After=network.target ssh.service
ConditionPathExists=!{folder}/boot-finished

[Service]
Type=oneshot
ExecStart=/bin/sh {folder}/first-boot.sh
ExecStopPost=/bin/touch {folder}/boot-finished
StandardOutput=append:{OUTPUT}
StandardError=inherit

[Install]
WantedBy=multi-user.target
"""


def script(user_data: str, instance_id: int) -> str:
    """What the first boot runs; it fails, with the reason, where cloud-init would."""
    text = _plain(user_data)
    first = text.partition("\n")[0].rstrip()
    if first.startswith("#!"):
        target = f"{instance_dir(instance_id)}/user-data.script"
        return "\n".join([*_write(target, text.encode(), "0700", "root:root", append=False), f"exec {target}", ""])
    if first != "#cloud-config":
        return _refusal("the lab takes user data that begins with #! or #cloud-config")
    try:
        found = yaml.safe_load(text)
        if found is None:
            return ":\n"
        if not isinstance(found, dict):
            raise ValueError("is not a mapping")
        return _cloud_config(found, instance_id)
    except (yaml.YAMLError, ValueError) as error:
        return _refusal(f"#cloud-config: {error}")


def _plain(user_data: str) -> str:
    if user_data.startswith("#"):
        return user_data
    try:
        decoded = base64.b64decode("".join(user_data.split()), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return user_data
    return decoded if decoded.startswith("#") else user_data


def _refusal(reason: str) -> str:
    return f"printf '%s\\n' {shlex.quote(reason)} >&2\nexit 1\n"


def _cloud_config(found: Mapping[str, Any], instance_id: int) -> str:
    lines = ["failed=0"]
    if left := sorted(str(key) for key in found if key not in _TAKEN):
        lines.append(f"printf '%s\\n' {shlex.quote('the lab does not carry out: ' + ', '.join(left))}")
    for entry in _list(found, "write_files"):
        lines += _file(entry)
    commands = [_command(entry) for entry in _list(found, "runcmd")]
    if commands:
        target = f"{instance_dir(instance_id)}/runcmd"
        body = "\n".join(["#!/bin/sh", *commands, ""])
        lines += _write(target, body.encode(), "0700", "root:root", append=False)
        lines.append(f"{target} || failed=1")
    return "\n".join([*lines, 'exit "$failed"', ""])


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


def _file(entry: object) -> list[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError("an entry of write_files has no path")
    path = entry["path"]
    if not PurePosixPath(path).is_absolute() or "\0" in path:
        raise ValueError(f"write_files: {path!r} is not absolute")
    content = entry.get("content", "")
    data = content if isinstance(content, bytes) else str(content).encode()
    for step in _decoding(str(entry.get("encoding") or "")):
        data = step(data)
    permissions = entry.get("permissions", "0644")
    # YAML reads an unquoted 0644 as the number 420, which is what was meant.
    mode = f"{permissions:o}" if isinstance(permissions, int) else str(permissions)
    if not mode or set(mode) - set("01234567"):
        raise ValueError(f"write_files: {path}: permissions {permissions!r}")
    return _write(path, data, mode, str(entry.get("owner", "root:root")), append=entry.get("append") is True)


def _decoding(encoding: str) -> list[Any]:
    match encoding.lower():
        case "" | "text/plain":
            return []
        case "b64" | "base64":
            return [_unbase64]
        case "gz" | "gzip":
            return [_gunzip]
        case "gz+b64" | "gz+base64" | "gzip+b64" | "gzip+base64":
            return [_unbase64, _gunzip]
    raise ValueError(f"write_files: encoding {encoding!r}")


def _unbase64(data: bytes) -> bytes:
    try:
        return base64.b64decode(data)
    except binascii.Error as error:
        raise ValueError(f"write_files: {error}") from error


def _gunzip(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        found = unpacker.decompress(data, _FILE_LIMIT_BYTES)
    except zlib.error as error:
        raise ValueError(f"write_files: {error}") from error
    if unpacker.unconsumed_tail:
        raise ValueError("write_files: a file is too large")
    return found


def _write(path: str, data: bytes, mode: str, owner: str, *, append: bool) -> list[str]:
    """Shell lines; the content goes through a here-document, so that no argument holds it."""
    target = shlex.quote(path)
    return [
        f"mkdir -p {shlex.quote(str(PurePosixPath(path).parent))} || failed=1",
        f"umask 077; base64 -d {'>>' if append else '>'} {target} <<'END-OF-CONTENT' || failed=1",
        base64.encodebytes(data).decode().rstrip("\n"),
        "END-OF-CONTENT",
        f"umask 022; chown {shlex.quote(owner)} {target} || failed=1; chmod {mode} {target} || failed=1",
    ]


def _command(entry: object) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        return shlex.join(str(word) for word in entry)
    raise ValueError("an entry of runcmd is neither text nor a list")
