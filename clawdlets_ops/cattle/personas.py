"""A persona's files: public, small, and plain files only."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from clawdlets_ops.cattle.userdata import PersonaFile
from clawdlets_ops.errors import CattleError

MAX_FILE_BYTES: Final = 16384
MAX_FILES: Final = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read(folder: Path, persona: str) -> tuple[PersonaFile, ...]:
    """The files in ``folder/persona``, by name; none when there is no such folder. CattleError for anything but a few
    small regular files: a link could lead to a secret."""
    place = folder / persona
    if not place.is_dir():
        return ()
    if place.is_symlink():
        raise CattleError("is a link", where=str(place))
    found = []
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
        if not _NAME.fullmatch(entry.name):
            raise CattleError("is not a plain file with a plain name", where=entry.path)
        found.append(_read(Path(entry.path)))
    if len(found) > MAX_FILES:
        raise CattleError(f"has {len(found)} files; {MAX_FILES} are the limit", where=str(place))
    return tuple(found)


def _read(path: Path) -> PersonaFile:
    """What is looked at is what is read: a link, or a pipe, that takes the file's place meanwhile is refused or not opened."""
    plain = CattleError("is not a plain file with a plain name", where=str(path))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise plain from None
        raise
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise plain
        content = b""
        while len(content) <= MAX_FILE_BYTES and (part := os.read(fd, MAX_FILE_BYTES + 1 - len(content))):
            content += part
    finally:
        os.close(fd)
    if len(content) > MAX_FILE_BYTES:
        raise CattleError(f"is too large: {MAX_FILE_BYTES} are the limit, in bytes", where=str(path))
    return PersonaFile(path.name, content, executable=bool(mode & 0o100))


def faults(folder: Path, personas: Sequence[str]) -> list[str]:
    """What is wrong with the files of these personas, for the doctor and ``clawdlets cattle persona``."""
    said = []
    for persona in personas:
        try:
            read(folder, persona)
        except (CattleError, OSError) as error:
            said.append(str(error).partition("\n")[0])
    return said
