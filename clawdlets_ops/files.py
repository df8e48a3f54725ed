"""Private files on the operator's disk: mode at creation, fsync, atomic rename, locks that survive a killed parent."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from clawdlets_ops.errors import BusyError, ClawdletsError, SettingsError

PRIVATE_DIR = 0o700
PRIVATE_FILE = 0o600
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def no_room(error: OSError, *, where: str = "") -> SettingsError | None:
    """What an error of this machine's own disk means, in a sentence; None for one that is about something else."""
    if isinstance(error, ClawdletsError) or error.errno not in NO_ROOM:
        return None
    return SettingsError(
        f"this machine cannot write {error.filename or 'its runtime dir'} ({error.strerror})",
        where=where,
        fix="make room (df), and run again: it goes on from there",
    )


def ensure_dir(path: Path, mode: int = PRIVATE_DIR) -> Path:
    """Make ``path`` and its missing parents; ``path`` itself ends with exactly ``mode``, new parents with the same."""
    missing = [path, *path.parents]
    for part in reversed([part for part in missing if not part.exists()]):
        part.mkdir(mode=mode, exist_ok=True)
        part.chmod(mode)  # mkdir's mode is cut by the umask
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    return path


def write_atomic(path: Path, content: str | bytes, *, mode: int = PRIVATE_FILE) -> bool:
    """Write ``content`` to ``path`` whole or not at all; returns whether anything changed.

    The temporary file is created with its final mode (no window), synced, renamed over ``path``, and the folder synced.
    A file that already has this content and mode is left alone.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
            if stat.S_IMODE(path.stat().st_mode) == mode:
                return False
            path.chmod(mode)
            return True
    except PermissionError:
        pass  # cannot be compared: write it anew
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(fd, "wb") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_dir(path.parent)
    return True


def read_private(path: Path) -> str:
    """The text of a private file; SettingsError when it is a link, not ours, or open to group or others."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise SettingsError(f"cannot be read ({error.strerror})", where=str(path)) from error
    with os.fdopen(fd, "rb") as handle:
        info = os.fstat(handle.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise SettingsError("is not a regular file", where=str(path))
        if stat.S_IMODE(info.st_mode) & 0o077:
            raise SettingsError("is open to group or others", where=str(path), fix=f"chmod 600 {path}")
        if info.st_uid != os.geteuid():
            raise SettingsError("belongs to another user", where=str(path))
        return handle.read().decode()


def swap_dir(new: Path, target: Path) -> None:
    """Put the complete folder ``new`` in the place of ``target``; what was there is removed afterwards."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    _sync_dir(target.parent)
    if old.exists():
        shutil.rmtree(old)


def sweep_temporaries(folder: Path, prefixes: Sequence[str] = ("",)) -> None:
    """Remove what an interrupted write or swap left in ``folder`` (only names that this module makes). ``prefixes``: of the
    files that nobody writes meanwhile; somebody else's temporary file is one that is about to be renamed."""
    for left in [found for prefix in prefixes for end in ("tmp", "old") for found in folder.glob(f".{prefix}*.{end}")]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def locked(
    path: Path,
    *,
    what: str,
    wait_s: float = 0.0,
    holder: str = "",
    refuse_living: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int]:
    """Hold an exclusive lock on ``path`` and yield its file descriptor; BusyError when it is not free within ``wait_s``.

    Give the descriptor to a child (``Command.keep_fds``) and the lock lives as long as the child, even when we are
    killed: whoever comes next waits for what is still running instead of working against it. ``holder`` is written into
    the file, for the one who has to wait. With ``refuse_living`` only what a dead process left running is waited for.
    """
    ensure_dir(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                who, pid = _holder(fd)
                if time.monotonic() >= deadline or (refuse_living and _lives(pid)):
                    raise BusyError(
                        f"{what} is still being worked on by {who or 'another process'}",
                        where=str(path),
                        fix="wait for it to end (a killed run leaves its tofu or nixos-anywhere at work), then run again",
                    ) from None
                sleep(0.2)
        with suppress(OSError):  # a full disk: the lock holds, only its holder has no name
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {holder or f'process {os.getpid()}'}\n".encode(), 0)
        yield fd
    finally:
        os.close(fd)  # not LOCK_UN: a child that inherited the descriptor keeps the lock


def _holder(fd: int) -> tuple[str, int]:
    """Who wrote themselves into a lock file, and their process id; 0 when it cannot be read."""
    pid, _, who = os.pread(fd, 512, 0).decode(errors="replace").strip().partition(" ")
    return who, int(pid) if pid.isascii() and pid.isdigit() else 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


def _sync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
