"""Every change that the secrets make to the disk goes through one value, so that a test can cut it off anywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from clawdlets_ops.files import ensure_dir, sweep_temporaries, write_atomic


def remove(path: Path) -> None:
    """Remove a file, durably; nothing when it is gone already. What is no file, a folder for one, raises OSError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing; nothing when it is gone, or holds something that is not ours to judge."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it; nothing when it is gone. A link is removed, what it leads to stays.

    It leaves its place first, in one step: cut off, what remains is what ``sweep_temporaries`` removes.
    """
    if folder.is_symlink() or folder.is_file():
        remove(folder)
        return
    aside = folder.with_name(f".{folder.name}.{token_hex(6)}.old")
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)
    parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@dataclass(frozen=True)
class Disk:
    """The file operations there are: each is atomic, and each may be the last before the machine stops."""

    write: Callable[..., bool] = write_atomic
    remove: Callable[[Path], None] = remove
    remove_folder: Callable[[Path], None] = remove_if_empty
    remove_tree: Callable[[Path], None] = remove_tree
    ensure_folder: Callable[[Path, int], Path] = ensure_dir
    sweep: Callable[[Path, Sequence[str]], None] = sweep_temporaries
