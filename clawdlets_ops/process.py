"""The one door to other programs: commands as data, results as data, secrets only by environment or standard input.

No other module imports ``subprocess``; ``tests/test_architecture.py`` holds that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from clawdlets_ops.command import TAIL_LINES, Command, Result
from clawdlets_ops.errors import CommandError, CommandTimeout, ToolMissingError
from clawdlets_ops.lines import Lines
from clawdlets_ops.sensitive import Redactor, Secret

__all__ = [
    "LOG_KEPT_BYTES",
    "LOG_LIMIT_BYTES",
    "Background",
    "Command",
    "LocalRunner",
    "Result",
    "Runner",
    "foreground",
    "require_program",
    "spawn",
]

log = logging.getLogger(__name__)

KILL_GRACE_S = 5.0
FOLLOW_POLL_S = 0.1
_KEYS = (signal.SIGINT, signal.SIGQUIT)  # what ^C and ^\\ send
LOG_LIMIT_BYTES = 16 * 1024 * 1024
LOG_KEPT_BYTES = 256 * 1024

# What a child gets of our environment when nothing else is said: enough to find programs and speak a language,
# nothing that carries an identity (no SSH_AUTH_SOCK, no SOPS_*, no *_TOKEN).
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "NIX_PATH", "NIX_SSL_CERT_FILE")


class Runner(Protocol):
    """Runs commands. ``LocalRunner`` is the real one, ``clawdlets_ops.testing.FakeRunner`` the scripted one."""

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """Run to the end and return the result whatever the exit status; CommandTimeout, ToolMissingError."""
        ...

    def which(self, program: str) -> Path | None:
        """Where ``program`` is, or None."""
        ...


class LocalRunner:
    """Runs commands on this machine: own process group, killed whole on timeout or interruption.

    ``path`` is the search path for programs (default: the PATH given in ``environ``). ``environ`` is the environment
    that the inherited few are taken from; nothing else of it reaches a child. Once ``stop`` is set, from any thread,
    what runs is ended and nothing else is begun: both raise KeyboardInterrupt.
    """

    def __init__(self, environ: Mapping[str, str], *, stop: threading.Event | None = None) -> None:
        self._environ = {key: environ[key] for key in INHERITED if key in environ}
        self._stop = stop or threading.Event()

    def which(self, program: str) -> Path | None:
        """Where ``program`` is on the search path, or None."""
        found = shutil.which(program, path=self._environ.get("PATH"))
        return Path(found) if found else None

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """Run to the end. ``on_line`` gets each line of stdout and stderr as it comes, scrubbed."""
        program = self.which(command.argv[0])
        if program is None:
            raise ToolMissingError(
                f"{command.why}: the program {command.argv[0]!r} is not on PATH",
                where=command.argv[0],
                fix=f"install {command.argv[0]}, or name the folder that holds it in PATH",
            )
        self._go_on()
        redactor = command.redactor()
        log.debug("run %s (%s)", redactor.scrub(str(command)), command.why)
        started = time.monotonic()
        deadline = started + command.timeout_s
        output: IO[bytes] | int = _private_log(command.log_file) if command.log_file else subprocess.PIPE
        try:
            process = subprocess.Popen(
                [str(program), *command.argv[1:]],
                env=self._child_environ(command),
                cwd=command.cwd,
                stdin=subprocess.DEVNULL if command.stdin is None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT if command.log_file else subprocess.PIPE,
                start_new_session=True,
                pass_fds=command.keep_fds,
            )
        finally:
            if not isinstance(output, int):
                output.close()
        try:
            if command.log_file:
                stdout = _follow(process, command, command.log_file, redactor, on_line, self._go_on, deadline=deadline)
                stderr = b""
            else:
                stdout, stderr = _converse(process, command, redactor, on_line, self._go_on, deadline=deadline)
        except BaseException:
            _kill_group(process)
            raise
        return Result(
            command=command,
            exit_code=process.wait(),
            stdout=stdout.decode(errors="replace"),
            stderr=redactor.scrub(stderr.decode(errors="replace")),
            duration_s=time.monotonic() - started,
        )

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt

    def _child_environ(self, command: Command) -> dict[str, str]:
        """The inherited few and what the command adds, secrets in clear."""
        added = {key: value.reveal() if isinstance(value, Secret) else value for key, value in command.env.items()}
        return {**self._environ, **added}

    @contextlib.contextmanager
    def stream(self, command: Command) -> Iterator[IO[bytes]]:
        """Standard output as bytes while it is written: for what is no text, or more than memory should hold.

        Whoever reads stops at its end or closes early by leaving the block. Then CommandTimeout, or CommandError when it
        was read to the end and the exit status is not 0. Standard input comes from an unnamed file, so neither side
        can wait for the other.
        """
        program = require_program(self, command.argv[0], f"install {command.argv[0]}")
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaints:
            given.write(_stdin_bytes(command.stdin))
            given.seek(0)
            process = subprocess.Popen(
                [str(program), *command.argv[1:]],
                env=self._child_environ(command),
                cwd=command.cwd,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
            late = threading.Event()

            def stop() -> None:
                late.set()
                _kill_group(process, close=False)

            alarm = threading.Timer(command.timeout_s, stop)
            alarm.daemon = True
            alarm.start()
            try:
                if process.stdout is None:
                    raise CommandError(f"{command.why}: no pipe", where=command.program)
                yield process.stdout
                at_end = not process.stdout.read(1)
                if not at_end:
                    _kill_group(process)
                exit_code = process.wait()
            except BaseException:
                _kill_group(process)
                raise
            finally:
                alarm.cancel()
                if process.stdout is not None:
                    process.stdout.close()
            complaints.seek(0)
            said = command.redactor().scrub(complaints.read().decode(errors="replace"))
            if late.is_set():
                raise _too_late(command, command.redactor(), said.encode())
            if at_end:
                Result(command, exit_code, "", said, duration_s=0.0).check()


class Background:
    """A program that runs on while we do other things; see ``spawn``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's too."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit status as soon as it has one; None when it still runs after ``timeout_s``."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self) -> None:
        """End it with its process group: TERM, a grace, KILL."""
        _kill_group(self._process)

    def leave(self) -> Background:
        """It may outlive whoever started it: kept for as long as it runs, so that its end is still collected."""
        _LEFT[:] = [one for one in _LEFT if one.poll() is None]
        _LEFT.append(self)
        return self


_LEFT: list[Background] = []


def spawn(argv: Sequence[str | Path], *, env: Mapping[str, str], log_file: Path) -> Background:
    """Start a program in a session of its own and return at once; it outlives us. ToolMissingError.

    ``env`` is its whole environment, its PATH is searched. It reads nothing; both outputs are appended to ``log_file``
    (made 0600).
    """
    words = [str(word) for word in argv]
    program = shutil.which(words[0], path=env.get("PATH"))
    if program is None:
        raise ToolMissingError(f"the program {words[0]!r} is not on PATH", where=words[0], fix=f"install {words[0]}")
    log.debug("spawn %s", shlex.join(words))
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        return Background(
            subprocess.Popen(
                [program, *words[1:]],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    finally:
        os.close(fd)


def foreground(argv: Sequence[str | Path], *, env: Mapping[str, str], keep_fds: Sequence[int] = ()) -> int:
    """Run a program on our own terminal, until it ends, and return its exit status; ToolMissingError.

    ``env`` is its whole environment, its PATH is searched. While it runs, ^C is for it and not for us. When we are told
    to end (an exception in this call), it is ended first. ``keep_fds`` are inherited.
    """
    words = [str(word) for word in argv]
    program = shutil.which(words[0], path=env.get("PATH"))
    if program is None:
        raise ToolMissingError(f"the program {words[0]!r} is not on PATH", where=words[0], fix=f"install {words[0]}")
    log.debug("run %s", shlex.join(words))
    main = threading.current_thread() is threading.main_thread()
    # a handler that does nothing, and not SIG_IGN, which the program would inherit
    before = {number: signal.signal(number, _for_the_child) for number in _KEYS} if main else {}
    process = None
    try:
        process = subprocess.Popen([program, *words[1:]], env=dict(env), pass_fds=tuple(keep_fds))
        return process.wait()
    except BaseException:
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=KILL_GRACE_S)
            process.kill()
            process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _for_the_child(_: int, __: FrameType | None) -> None:
    pass


def require_program(runner: Runner, program: str, fix: str) -> Path:
    """Where ``program`` is; ToolMissingError with ``fix`` when it is nowhere on PATH."""
    if (found := runner.which(program)) is None:
        raise ToolMissingError("the program is not on PATH", where=program, fix=fix)
    return found


def _private_log(path: Path) -> IO[bytes]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    return os.fdopen(fd, "wb")


def _follow(
    process: subprocess.Popen[bytes],
    command: Command,
    log_file: Path,
    redactor: Redactor,
    on_line: Callable[[str], None] | None,
    go_on: Callable[[], None],
    *,
    deadline: float,
) -> bytes:
    """Feed stdin, then read the log as it grows until the process ends; returns the last of it."""
    if process.stdin is not None:
        try:
            process.stdin.write(_stdin_bytes(command.stdin))
            process.stdin.close()
        except BrokenPipeError:
            process.stdin = None  # it stopped listening; its exit status says whether that matters
    lines, kept = Lines(redactor, on_line), bytearray()

    def take(read: IO[bytes]) -> None:
        while data := read.read(LOG_KEPT_BYTES):
            lines.feed(data)
            kept.extend(data)
            del kept[:-LOG_KEPT_BYTES]
        if read.tell() > LOG_LIMIT_BYTES:
            os.truncate(log_file, 0)  # its writers append: they go on at the new end
            with log_file.open("ab") as again:
                again.write(kept)
            read.seek(len(kept))

    with log_file.open("rb") as log_handle:
        ended = False
        while not ended:
            try:
                process.wait(timeout=FOLLOW_POLL_S)
                ended = True
            except subprocess.TimeoutExpired:
                go_on()
                if time.monotonic() >= deadline:
                    _kill_group(process)
                    raise _too_late(command, redactor, bytes(kept)) from None
            take(log_handle)
        lines.end()
    return bytes(kept)


def _too_late(command: Command, redactor: Redactor, said: bytes) -> CommandTimeout:
    tail = "\n".join(redactor.scrub(said.decode(errors="replace")).splitlines()[-TAIL_LINES:])
    return CommandTimeout(
        f"{command.why}: {command.program} did not end within {command.timeout_s:g} s\n{tail}".rstrip(),
        where=command.program,
    )


def _converse(
    process: subprocess.Popen[bytes],
    command: Command,
    redactor: Redactor,
    on_line: Callable[[str], None] | None,
    go_on: Callable[[], None],
    *,
    deadline: float,
) -> tuple[bytes, bytes]:
    """Feed stdin and collect both outputs until they close and the process has ended, or the deadline passes."""
    if process.stdout is None or process.stderr is None:
        raise CommandError(f"{command.why}: no pipes", where=command.program)
    chunks: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    lines = {fd: Lines(redactor, on_line) for fd in chunks}
    pending = memoryview(_stdin_bytes(command.stdin))
    with selectors.DefaultSelector() as selector:
        for fd in chunks:
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        stdin_fd = process.stdin.fileno() if process.stdin is not None else -1
        if stdin_fd >= 0:
            os.set_blocking(stdin_fd, False)
            selector.register(stdin_fd, selectors.EVENT_WRITE)
        while selector.get_map():
            go_on()
            left = deadline - time.monotonic()
            if left <= 0:
                _kill_group(process)
                raise _too_late(command, redactor, b"".join(bytes(part) for part in chunks.values()))
            for key, _ in selector.select(timeout=min(left, 0.5)):
                if process.stdin is not None and key.fd == stdin_fd:
                    try:
                        pending = pending[os.write(key.fd, pending[:65536]) :]
                    except BrokenPipeError:  # it stopped listening; its exit status says whether that matters
                        pending = pending[len(pending) :]
                    if not pending:
                        selector.unregister(key.fd)
                        process.stdin.close()
                    continue
                data = os.read(key.fd, 65536)
                chunks[key.fd] += data
                lines[key.fd].feed(data)
                if not data:
                    lines[key.fd].end()
                    selector.unregister(key.fd)
            if process.poll() is not None and not _readable(selector):
                # A grandchild may still hold the pipes open: the program itself has ended, and that is what counts.
                break
    out, err = process.stdout.fileno(), process.stderr.fileno()
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise _too_late(command, redactor, b"") from None
    stdout, stderr = bytes(chunks[out]), bytes(chunks[err])
    process.stdout.close()
    process.stderr.close()
    return stdout, stderr


def _readable(selector: selectors.BaseSelector) -> bool:
    return bool(selector.select(timeout=0))


def _stdin_bytes(stdin: str | bytes | Secret | None) -> bytes:
    if isinstance(stdin, Secret):
        return stdin.reveal().encode()
    if isinstance(stdin, str):
        return stdin.encode()
    return stdin or b""


def _kill_group(process: subprocess.Popen[bytes], *, close: bool = True) -> None:
    """End the process and all it started in its session: TERM, a grace for every one of them, KILL."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):  # the group may outlive its leader
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
            deadline = time.monotonic() + KILL_GRACE_S
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=KILL_GRACE_S)
    for pipe in (process.stdin, process.stdout, process.stderr) if close else ():
        if pipe is not None:
            pipe.close()
