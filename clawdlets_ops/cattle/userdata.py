"""A cattle server's user data: a cloud-init document of files and one command, and what it must never hold. Pure.

Whoever has API access to the project can have it, and every process on the machine could ask the metadata service for it.
So it holds by construction, and is looked through again before it is sent (UD-01):

* the auth key for the tailnet, and the one-time bootstrap token with the address where it is good, to memory (``/run``);
* public settings, the operators' public SSH keys, the task and the persona's files.

Limit: 32 KiB, the first line included (docs.hetzner.cloud, create a server). JSON is YAML, so the document is written as JSON;
content that is not plain ASCII goes as base64, which cloud-init's write_files decodes.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from clawdlets_ops.cattle.orders import task_text
from clawdlets_ops.errors import CattleError
from clawdlets_ops.guard.needles import MIN_CHARS, Needle
from clawdlets_ops.layout import CATTLE_AUTH_KEY, CATTLE_BOOTSTRAP, CATTLE_RUN_DIR
from clawdlets_ops.sensitive import Secret

LIMIT_BYTES: Final = 32768
HEADER: Final = "#cloud-config\n"
RUN: Final = str(CATTLE_RUN_DIR.path)
SETTINGS: Final = f"{RUN}/settings.json"
TASK: Final = f"{RUN}/task.json"
AUTHORIZED_KEYS: Final = f"{RUN}/authorized_keys"
PERSONA: Final = f"{RUN}/persona/"
COMMANDS: Final = (("systemctl", "start", "--no-block", "clawdlets-cattle.service"),)

KINDS: Final = {
    str(CATTLE_AUTH_KEY.path): "auth key for the tailnet",
    str(CATTLE_BOOTSTRAP.path): "bootstrap token and baseUrl",
    SETTINGS: "public settings",
    TASK: "task",
    AUTHORIZED_KEYS: "public SSH keys",
    PERSONA: "persona file",
}
_PERSONA_FILE = re.compile(re.escape(PERSONA) + r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PLAIN = re.compile(rb"[\t\n\x20-\x7e]*")


@dataclass(frozen=True)
class PersonaFile:
    """One of a persona's files. ``executable``: by its mode in the repository."""

    name: str
    content: bytes
    executable: bool = False


@dataclass(frozen=True)
class Parts:
    """All that goes into one document. ``token_expires_s``: seconds since the epoch. ``settings``: public, JSON-able."""

    auth_key: Secret
    token: Secret
    base_url: str
    token_expires_s: int
    settings: Mapping[str, Any]
    task: Mapping[str, Any]
    files: tuple[PersonaFile, ...]
    authorized_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One file of a document, as it will be on the machine."""

    path: str
    kind: str
    mode: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.path} {self.mode} {len(self.content)} bytes: {self.kind}"


def render(parts: Parts) -> Secret:
    """The document; CattleError when it is too large."""
    bootstrap = {
        "schemaVersion": 1,
        "baseUrl": parts.base_url,
        "token": parts.token.reveal(),
        "expiresAt": parts.token_expires_s,
        "oneTime": True,
    }
    files = [
        _file(str(CATTLE_AUTH_KEY.path), f"{parts.auth_key.reveal()}\n".encode(), "0400"),
        _file(str(CATTLE_BOOTSTRAP.path), _json(bootstrap), "0400"),
        _file(SETTINGS, _json(parts.settings), "0400"),
        _file(TASK, task_text(parts.task).encode(), "0400"),
        *(
            _file(f"{PERSONA}{file.name}", file.content, "0500" if file.executable else "0400")
            for file in sorted(parts.files, key=lambda file: file.name)
        ),
    ]
    if parts.authorized_keys:
        files.append(_file(AUTHORIZED_KEYS, "".join(f"{key}\n" for key in parts.authorized_keys).encode(), "0400"))
    document = {"write_files": files, "runcmd": [list(command) for command in COMMANDS]}
    text = HEADER + json.dumps(document, ensure_ascii=True, separators=(",", ":")) + "\n"
    size = len(text.encode())
    if size > LIMIT_BYTES:
        raise CattleError(
            f"the user data would be {size} bytes; {LIMIT_BYTES} are the limit",
            where="user_data",
            fix="shorten the task, or the persona's files",
        )
    return Secret(text, "user data")


def entries(user_data: str) -> list[Entry]:
    """The files of a document, decoded; CattleError when it is none of ours."""
    try:
        found = yaml.safe_load(user_data) if user_data.startswith(HEADER) else None
        if not isinstance(found, dict) or set(found) - {"write_files", "runcmd"}:
            raise ValueError("has other parts than write_files and runcmd")
        return [_entry(one) for one in found.get("write_files", ())]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CattleError("is not a document of ours", where="user_data") from error


def judge(user_data: str, *, never: Iterable[Secret], parts: Parts | None = None) -> list[str]:
    """What is wrong with a document: files or commands that are not on the list, its size, and every value of ``never``
    (of 12 characters and more) that is in it, in any form that the guard knows. With ``parts``, what must be there has to be."""
    faults: list[str] = []
    size = len(user_data.encode())
    if size > LIMIT_BYTES:
        faults.append(f"{size} bytes; {LIMIT_BYTES} are the limit")
    try:
        found = entries(user_data)
    except CattleError as error:
        return [*faults, error.what]
    faults += [f"{entry.path} is not on the list" for entry in found if not entry.kind]
    if yaml.safe_load(user_data).get("runcmd") != [list(command) for command in COMMANDS]:
        faults.append("runcmd is not the one command")
    paths = [entry.path for entry in found]
    faults += sorted({f"{path} is there twice" for path in paths if paths.count(path) > 1})
    for secret in never:
        if len(secret.reveal()) < MIN_CHARS:
            continue  # it could not be told from ordinary text
        where = holders(user_data, found, secret)
        faults += [f"{place} holds {secret.name}" for place in where]
    if parts is not None:
        expected = {
            str(CATTLE_AUTH_KEY.path): f"{parts.auth_key.reveal()}\n".encode(),
        }
        content = {entry.path: entry.content for entry in found}
        faults += [f"{path} is not as it was meant" for path, wanted in expected.items() if content.get(path) != wanted]
    return faults


def holders(user_data: str, found: Sequence[Entry], secret: Secret) -> list[str]:
    """Where a secret is in a document, if anywhere. Too short a value cannot be told from ordinary text: ValueError."""
    if len(secret.reveal()) < MIN_CHARS:
        raise ValueError(f"{secret.name} is shorter than {MIN_CHARS} characters, and cannot be looked for")
    forms = Needle(secret.name, secret).forms()
    places = [entry.path for entry in found if any(form in entry.content for form in forms)]
    if not places and any(form in user_data.encode() for form in forms):
        places = ["the document"]
    return places


def _file(path: str, content: bytes, mode: str) -> dict[str, str]:
    entry = {"path": path, "owner": "root:root", "permissions": mode}
    if _PLAIN.fullmatch(content):
        return {**entry, "content": content.decode("ascii")}
    return {**entry, "encoding": "b64", "content": base64.b64encode(content).decode()}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=True, sort_keys=True) + "\n").encode()


def _entry(one: Mapping[str, Any]) -> Entry:
    if set(one) - {"path", "owner", "permissions", "encoding", "content"} or one.get("owner") != "root:root":
        raise ValueError("an entry has other fields")
    content = str(one["content"]).encode()
    encoding = str(one.get("encoding", ""))
    if encoding in ("b64", "base64", "gz+b64", "gz+base64"):
        content = base64.b64decode(content, validate=True)
    elif encoding:
        raise ValueError("an entry has an encoding that is not used here")
    if encoding.startswith("gz"):
        content = gzip.decompress(content)
    path = str(one["path"])
    kind = KINDS.get(path, "") if not path.endswith("/") else ""
    if not kind and _PERSONA_FILE.fullmatch(path):
        kind = KINDS[PERSONA]
    return Entry(path, kind, str(one["permissions"]), content)
