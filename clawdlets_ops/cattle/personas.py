"""A persona's files: public, small, and plain files only."""

from __future__ import annotations

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
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or not _NAME.fullmatch(entry.name):
            raise CattleError("is not a plain file with a plain name", where=entry.path)
        if status.st_size > MAX_FILE_BYTES:
            raise CattleError(f"has {status.st_size} bytes; {MAX_FILE_BYTES} are the limit", where=entry.path)
        content = Path(entry.path).read_bytes()
        if len(content) > MAX_FILE_BYTES:
            raise CattleError(f"has more than {MAX_FILE_BYTES} bytes", where=entry.path)
        found.append(PersonaFile(entry.name, content, executable=bool(status.st_mode & 0o100)))
    if len(found) > MAX_FILES:
        raise CattleError(f"has {len(found)} files; {MAX_FILES} are the limit", where=str(place))
    return tuple(found)


def faults(folder: Path, personas: Sequence[str]) -> list[str]:
    """What is wrong with the files of these personas, for the doctor and ``clawdlets cattle persona``."""
    said = []
    for persona in personas:
        try:
            read(folder, persona)
        except (CattleError, OSError) as error:
            said.append(str(error).partition("\n")[0])
    return said
