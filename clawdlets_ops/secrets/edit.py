"""A secret in the operator's own editor: in clear in one private folder in memory, which is gone whatever happens.

The folder is locked, by us and by the editor, for as long as either lives. One that nobody holds was left by a run that
was killed; the next one removes it and says so.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from clawdlets_ops.errors import BusyError, SecretsError, SettingsError
from clawdlets_ops.files import PRIVATE_FILE, ensure_dir, locked
from clawdlets_ops.process import Runner, foreground
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.init import check_values
from clawdlets_ops.secrets.plan import MAX_VALUE_BYTES, input_names, needs, read_value, value_faults
from clawdlets_ops.secrets.reconcile import plan_set
from clawdlets_ops.secrets.store import Outcome, change
from clawdlets_ops.secrets.vault import (
    find_operator_identity,
    open_all,
    operator_identity,
    raise_faults,
    read_sealed,
    refuse_undeclared,
    single,
)
from clawdlets_ops.secrets.view import Plan
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

PREFIX = "clawdlets-edit."
MOUNTS = Path("/proc/self/mounts")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
# What an editor may need of our environment; nothing that carries an identity.
_FOR_EDITORS = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TERM", "TERMINFO", "COLORTERM"),
    *("DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "SSH_TTY"),
)


@dataclass(frozen=True)
class Draft:
    """What an edit begins with: the encrypted file's text (None: there is no file) and the value in it."""

    host: str
    name: str
    path: Path
    sealed: str | None = field(repr=False)
    value: Secret | None

    @property
    def shown(self) -> bytes:
        """What the editor gets: a value of one line with the newline that editors want at the end."""
        value = self.value.reveal() if self.value else ""
        return (value if "\n" in value or not value else f"{value}\n").encode()

    def unchanged(self, typed: bytes) -> bool:
        """Whether ``typed`` is what the editor got; a newline that it put at the end is not a change."""
        return typed == self.shown or (self.value is not None and typed == self.shown + b"\n")


def begin(project: Project, host: str, name: str, *, runner: Runner) -> Draft:
    """Decrypt one secret of ``host``; SecretsError when it has no such secret or the operator is not declared,
    UnreadableError when it is there and cannot be opened. At most one sops process."""
    refuse_undeclared(project, find_operator_identity(project))
    needed = needs(host, project.fleet.host(host))
    need = input_names(needed).get(name)
    if need is None:
        raise SecretsError(value_faults(needed, {name: Secret("-")})[0], where=host)
    if need.name != name:
        raise SecretsError(
            "a password is not kept, only its hash, which shows nothing",
            where=name,
            fix=f"clawdlets secrets set {name} --host {host}",
        )
    path = project.layout.secret_file(host, name)
    sealed = read_sealed(path)
    if sealed is None:
        return Draft(host, name, path, None, None)
    opened, faults = open_all(Sops(runner, find_sops(runner)), [sealed], operator_identity(project))
    raise_faults(faults)
    return Draft(host, name, path, sealed.text, single(sealed, opened[path], name))


def save(project: Project, draft: Draft, value: Secret, *, runner: Runner, disk: Disk | None = None) -> Outcome:
    """Encrypt the new value; SecretsError when the file is another than the one that the edit began with."""

    def plan() -> Plan:
        now = read_sealed(draft.path)
        if (now.text if now else None) != draft.sealed:
            raise SecretsError(
                "was changed by somebody else while you edited it; theirs is kept, and what you typed is discarded",
                where=str(draft.path),
                fix="look at what they changed, then edit it again",
            )
        return plan_set(project, draft.host, draft.name, value, runner=runner)

    return change(project, plan, runner=runner, disk=disk)


def edit_secret(
    project: Project,
    host: str,
    name: str,
    *,
    runner: Runner,
    environ: Mapping[str, str],
    again: Callable[[str], bool],
    say: Callable[[str], None],
) -> Outcome:
    """Show one secret in the operator's editor and encrypt what they make of it; unchanged, nothing is written.

    A value that cannot be used is told to ``again``, which says whether the editor shall be opened once more; otherwise
    what was typed is discarded and SecretsError raised. BusyError while another edit of it runs on this machine.
    """
    editor = editor_argv(environ)
    with _alone(project, host, name):
        folders = folders_in_memory(environ)
        for left in sweep([*folders, project.layout.runtime]):
            say(f"removed {left}, left by an edit that was killed")
        draft = begin(project, host, name, runner=runner)
        if not folders:
            say(f"no tmpfs is there: while you edit, the value lies on disk, in {project.layout.runtime}")
        base = folders[0] if folders else ensure_dir(project.layout.runtime)
        with _terminated_cleanly(), _private_folder(base) as (folder, lock):
            path = folder / name
            _write(path, draft.shown)
            child = {key: environ[key] for key in _FOR_EDITORS if key in environ} | {"TMPDIR": str(folder)}
            while True:
                if status := foreground([*editor, path], env=child, keep_fds=(lock,)):
                    raise SecretsError(
                        f"the editor ended with status {status}; nothing was changed", where=name, fix="run it again"
                    )
                typed = _read(path)
                if draft.unchanged(typed):
                    return Outcome(unchanged=(draft.path.relative_to(project.layout.root).as_posix(),))
                try:
                    value = read_value(typed, name)
                    check_values(needs(host, project.fleet.host(host)), {name: value}, host)
                except SecretsError as error:
                    if again(error.what):
                        continue
                    what = f"{error.what}\nnothing was changed, and what was typed is discarded"
                    raise SecretsError(what, where=error.where, fix=error.fix) from None
                return save(project, draft, value, runner=runner)


def editor_argv(environ: Mapping[str, str]) -> list[str]:
    """The words of $VISUAL, else of $EDITOR; SettingsError when neither is set or they are no words."""
    for variable in ("VISUAL", "EDITOR"):
        try:
            if words := shlex.split(environ.get(variable, "")):
                return words
        except ValueError as error:
            raise SettingsError(f"is no command ({error})", where=f"${variable}") from None
    raise SettingsError(
        "says which editor to open, and is not set", where="$EDITOR", fix="export EDITOR=…, or use secrets set"
    )


def folders_in_memory(environ: Mapping[str, str], mounts: Path = MOUNTS) -> list[Path]:
    """Folders on a tmpfs or ramfs in which we may make one of our own; the operator's own one first."""
    try:
        table = mounts.read_text(errors="surrogateescape")
    except OSError:
        return []
    own = environ.get("XDG_RUNTIME_DIR", "")
    candidates = [*([Path(own)] if own.startswith("/") else []), Path(f"/run/user/{os.geteuid()}"), Path("/dev/shm")]  # noqa: S108
    return [
        folder
        for folder in dict.fromkeys(candidates)
        if folder.is_dir()
        and os.access(folder, os.W_OK | os.X_OK)
        and file_system(folder.resolve(), table) in _IN_MEMORY
    ]


def file_system(folder: Path, table: str) -> str:
    """The type of the file system that ``folder`` is on, by the lines of /proc/self/mounts (proc(5)); the last wins."""
    best, kind = -1, ""
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(
            fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        )
        if (folder == point or point in folder.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


def sweep(folders: list[Path]) -> list[Path]:
    """Remove the folders of ours that nobody holds any more: what an edit that was killed has left."""
    removed: list[Path] = []
    for folder in folders:
        for left in sorted(folder.glob(f"{PREFIX}*")):
            handle = _held(left)
            if handle is not None:
                shutil.rmtree(left)
                os.close(handle)
                removed.append(left)
    return removed


@contextmanager
def _alone(project: Project, host: str, name: str) -> Iterator[None]:
    """The only edit of this secret on this machine."""
    project.fleet.host(host)
    if name not in input_names(needs(host, project.fleet.host(host))):
        yield  # the name is refused in a moment, and makes no lock file
        return
    with ExitStack() as stack:
        try:
            lock = project.layout.lock(f"edit-{host}-{name}")
            stack.enter_context(locked(lock, what=f"{name} of {host}", holder=project.operator))
        except BusyError as error:
            raise BusyError(error.what, where=error.where, fix="let them end their edit, then begin yours") from None
        except OSError as error:
            raise SecretsError(f"cannot be edited: {error.strerror}", where=str(error.filename)) from error
        yield


def _held(folder: Path) -> int | None:
    """A handle that holds the lock of a folder of ours, or None: not a folder, not ours, or held by a living edit."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    except BlockingIOError:
        pass
    os.close(handle)
    return None


@contextmanager
def _private_folder(base: Path) -> Iterator[tuple[Path, int]]:
    """A locked folder (0700) below ``base``, and the handle that holds its lock; removed at the end."""
    handle = None
    while handle is None:  # another run may have swept it before it was locked
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        handle = _held(folder)
        if handle is not None and os.fstat(handle).st_nlink == 0:
            os.close(handle)
            handle = None
    try:
        yield folder, handle
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
        if folder.exists():
            raise SecretsError("could not be removed, and holds the value in clear", where=str(folder), fix="remove it")


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Being told to end (TERM, or HUP when the terminal goes) unwinds as an error does, so that nothing stays."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(path: Path, content: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE_FILE)
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
    except OSError as error:
        raise SecretsError(f"cannot be written: {error.strerror}; nothing was changed", where=str(path)) from error


def _read(path: Path) -> bytes:
    """What the editor left; SecretsError when that is no file, or too large to be a secret."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as opened:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise SecretsError("the editor left no file; nothing was changed", where=path.name)
            return opened.read(MAX_VALUE_BYTES + 2)  # one that is larger is refused as a value
    except OSError as error:
        raise SecretsError(
            f"what the editor left cannot be read ({error.strerror}); nothing was changed", where=path.name
        ) from error
