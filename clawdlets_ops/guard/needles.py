"""The secrets that this project has, as exact needles: found whatever they look like, in the forms they leak in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from clawdlets_ops import age
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import read_private
from clawdlets_ops.layout import INSTALL_MARKER, SECRETS_WIRING, SSH_HOST_PUBLIC_KEY, Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.secrets.vault import AGE_PUBLIC, open_all, read_all
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

MIN_CHARS = 12
"""A shorter value would be found in ordinary text."""
_NEEDLE_CHARS = 160  # of a longer secret its beginning is looked for
_MAX_FILE_BYTES = 1 << 20
_PLAIN_SETTINGS = frozenset(
    {"HCLOUD_ENDPOINT", "CLAWDLETS_OPERATOR", "CLAWDLETS_SECRETS_FILE", "CLAWDLETS_TOOL_PATH", "TF_CLI_CONFIG_FILE"}
)
_COMMON_KEY_LINES = 1  # the first line of an OpenSSH key's body says only which kind it is
_STATE_VALUE = re.compile(r"secret|token|passw|private|user_data|passphrase", re.IGNORECASE)


@dataclass(frozen=True)
class Needle:
    """A known secret. Reports name it and its digest only."""

    name: str
    value: Secret

    @property
    def digest(self) -> str:
        """The first eight hex digits of its SHA-256."""
        return hashlib.sha256(self.value.reveal().encode()).hexdigest()[:8]

    @property
    def size(self) -> int:
        """Its length in characters."""
        return len(self.value.reveal())

    def forms(self) -> list[bytes]:
        """Raw, base64 (three alignments, both alphabets), hex, URL- and JSON-escaped; each once, raw first."""
        value = self.value.reveal()[:_NEEDLE_CHARS]
        raw = value.encode()
        forms = [raw]
        for shift in range(3):
            encoded = base64.b64encode(bytes(shift) + raw)
            fixed = encoded[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
            forms += [fixed, fixed.translate(bytes.maketrans(b"+/", b"-_"))]
        forms += [raw.hex().encode(), raw.hex().upper().encode()]
        forms += [quote(value, safe="").encode(), quote(value, safe="/").encode()]
        forms += [json.dumps(value)[1:-1].encode(), json.dumps(value, ensure_ascii=False)[1:-1].encode()]
        return list(dict.fromkeys(forms))


def known(layouts: Iterable[Layout], secrets_file: Path | None = None) -> tuple[list[Needle], list[str]]:
    """The needles in the runtime directories, and what could not be read: an unreadable file is not an absent one."""
    found: dict[str, Needle] = {}
    faults: list[str] = []
    for layout in layouts:
        sources = [(layout.env_file, _from_env)]
        sources += [(path, _from_key) for path in _files(layout.runtime / "keys", faults)]
        payloads = layout.runtime / "extra-files"
        sources += [
            (path, _from_key) for path in _files(payloads, faults) if not _is_public(path.relative_to(payloads))
        ]
        infra = _files(layout.tofu_dir("any").parent, faults)
        sources += [(path, _from_state) for path in infra if ".tfstate" in path.name]
        values_file = secrets_file or _named_values_file(layout)
        if values_file is not None:
            sources.append((values_file, _from_json))
        for path, read in sources:
            try:
                text = _read(path)
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError, ValueError) as error:
                faults.append(f"{path}: {type(error).__name__}")
                continue
            label = str(path.relative_to(layout.root)) if path.is_relative_to(layout.root) else path.name
            try:
                for name, value in read(text):
                    if len(value) >= MIN_CHARS:
                        found.setdefault(value, Needle(f"{label}{name}", Secret(value, label)))
            except ValueError:
                faults.append(f"{path}: is not valid JSON")
    return list(found.values()), faults


def decrypted(layouts: Iterable[Layout], runner: Runner) -> tuple[list[Needle], list[str]]:
    """Every value under ``secrets/``, opened in memory with the operators' keys that are here, and what could not be.

    One sops process for each file, two at a time; nothing is written.
    """
    found: dict[str, Needle] = {}
    faults: list[str] = []
    for layout in layouts:
        identities: list[age.Identity] = []
        for path in sorted(layout.operator_key("any").parent.glob("*.agekey")):
            try:
                identities.append(age.from_key_file(Secret(read_private(path), str(path))))
            except ClawdletsError as error:
                faults.append(f"{path}: {error.what}")
        files = [path for path in sorted(layout.secrets_dir.rglob("*.yaml")) if not path.name.startswith(".")]
        sealed, unread = read_all(files)
        faults += [f"{fault.where}: {fault.what}" for fault in unread]
        for identity in identities:
            mine = [one for one in sealed.values() if identity.recipient in one.recipients]
            opened, closed = open_all(Sops(runner, find_sops(runner)), mine, identity)
            faults += [f"{fault.where}: {fault.what}" for fault in closed]
            for one in mine:
                sealed.pop(one.path)
                label = one.path.relative_to(layout.root).as_posix()
                for key, value in opened.get(one.path, {}).items():
                    text = value.reveal() if key != AGE_PUBLIC else ""
                    parts = _from_key(text) if "\n" in text else [("", text)]
                    for place, part in parts:
                        if len(part) >= MIN_CHARS:
                            found.setdefault(part, Needle(f"{label}{place}", Secret(part, label)))
        faults += [f"{path}: no key is here that opens it" for path in sealed]
    return list(found.values()), faults


def _is_public(path: Path) -> bool:
    """Whether ``path`` (``<host>/<path on the host>``) is a part of a payload that says nothing the fleet file does not."""
    return PurePosixPath("/", *path.parts[1:]) in (SECRETS_WIRING.path, INSTALL_MARKER.path, SSH_HOST_PUBLIC_KEY.path)


def _named_values_file(layout: Layout) -> Path | None:
    """The file that ``.clawdlets/env`` names for the values of secrets; that it cannot be read is told elsewhere."""
    try:
        lines = _read(layout.env_file).splitlines()
    except (OSError, ValueError):
        return None
    names = [
        value.strip() for key, _, value in (line.partition("=") for line in lines) if key == "CLAWDLETS_SECRETS_FILE"
    ]
    return layout.root / names[-1] if names else None


def _read(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError("is too large for a secret")
    return path.read_text(encoding="utf-8")


def _files(folder: Path, faults: list[str]) -> list[Path]:
    """The regular files below ``folder``, none when it does not exist."""
    found: list[Path] = []

    def complain(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            faults.append(f"{error.filename}: cannot be listed")

    for parent, folders, names in os.walk(folder, onerror=complain):
        folders.sort()
        found += [path for name in sorted(names) if not (path := Path(parent, name)).is_symlink()]
    return found


def _from_env(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.lstrip().startswith("#") and key.strip() not in _PLAIN_SETTINGS:
            yield f":{key.strip()}", value.strip().strip("\"'")


def _from_key(text: str) -> Iterator[tuple[str, str]]:
    """The lines of a key file; what sops has encrypted, and what is public, is no secret."""
    if "ENC[AES256_GCM," in text or text.startswith(("ssh-", "ecdsa-", "age1")):
        return
    lines = [line.strip() for line in text.splitlines()]
    body = [line for line in lines if line and not line.startswith(("#", "-----", "age1"))]
    for number, line in enumerate(body[_COMMON_KEY_LINES:] if "-----BEGIN OPENSSH" in text else body, start=1):
        yield f":{number}", line


def _from_json(text: str) -> Iterator[tuple[str, str]]:
    def leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from leaves(f"{name}.{key}", part)
        elif isinstance(value, list):
            for part in value:
                yield from leaves(name, part)
        elif isinstance(value, str):
            yield name, value

    for name, value in leaves("", json.loads(text)):
        yield f":{name[1:]}", value


def _from_state(text: str) -> Iterator[tuple[str, str]]:
    """What a state in clear holds under the name of a secret; one that OpenTofu has encrypted shows nothing."""
    document = json.loads(text)
    for name, value in _from_json(json.dumps(document.get("resources", []) if isinstance(document, dict) else [])):
        if _STATE_VALUE.search(name.rpartition(".")[2]):
            yield name, value
