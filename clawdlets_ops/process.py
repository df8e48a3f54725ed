"""The one door to other programs: commands as data, results as data, secrets only by environment or standard input.

No other module imports ``subprocess``; ``tests/test_architecture.py`` holds that.
"""

from __future__ import annotations

import contextlib
import json
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from clawdlets_ops.errors import CommandError, CommandTimeout, ToolMissingError
from clawdlets_ops.sensitive import Redactor, Secret

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 120.0
KILL_GRACE_S = 5.0
FOLLOW_POLL_S = 0.1
TAIL_LINES = 15

# What a child gets of our environment when nothing else is said: enough to find programs and speak a language,
# nothing that carries an identity (no SSH_AUTH_SOCK, no SOPS_*, no *_TOKEN).
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "NIX_PATH", "NIX_SSL_CERT_FILE")


@dataclass(frozen=True)
class Command:
    """A program to run, as data.

    ``argv`` never holds a Secret (TypeError). ``env`` is added to the inherited few; Secret values are allowed there
    and in ``stdin``. ``timeout_s`` in seconds. ``secrets`` are scrubbed from output besides those of env and stdin.
    ``keep_fds`` are inherited, which lets a lock outlive a killed parent for as long as this child runs.
    ``log_file`` (made 0600) takes both outputs instead of a pipe: should we be killed, the program is not, and can
    finish what it began; ``Result.stdout`` is then both streams.
    """

    argv: tuple[str, ...]
    why: str
    env: Mapping[str, str | Secret] = field(default_factory=dict)
    stdin: str | bytes | Secret | None = None
    cwd: Path | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    secrets: tuple[Secret, ...] = ()
    keep_fds: tuple[int, ...] = ()
    log_file: Path | None = None

    def __init__(
        self,
        argv: Sequence[str | Path],
        why: str,
        *,
        env: Mapping[str, str | Secret] | None = None,
        stdin: str | bytes | Secret | None = None,
        cwd: Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        secrets: Sequence[Secret] = (),
        keep_fds: Sequence[int] = (),
        log_file: Path | None = None,
    ) -> None:
        for word in argv:
            if not isinstance(word, str | Path):
                raise TypeError(f"{why}: a command line takes strings and paths, not {type(word).__name__}")
        put = object.__setattr__
        put(self, "argv", tuple(str(word) for word in argv))
        put(self, "why", why)
        put(self, "env", dict(env or {}))
        put(self, "stdin", stdin)
        put(self, "cwd", cwd)
        put(self, "timeout_s", timeout_s)
        put(self, "secrets", tuple(secrets))
        put(self, "keep_fds", tuple(keep_fds))
        put(self, "log_file", log_file)

    @property
    def program(self) -> str:
        """The program's base name."""
        return Path(self.argv[0]).name

    def __str__(self) -> str:
        return shlex.join(self.argv)

    def redactor(self) -> Redactor:
        """A redactor that knows every secret this command carries."""
        known = [value for value in self.env.values() if isinstance(value, Secret)]
        if isinstance(self.stdin, Secret):
            known.append(self.stdin)
        return Redactor([*known, *self.secrets])


@dataclass(frozen=True)
class Result:
    """How a command ended. ``stdout`` is as the program wrote it, ``stderr`` is scrubbed."""

    command: Command
    exit_code: int
    stdout: str
    stderr: str
    duration_s: float

    @property
    def ok(self) -> bool:
        """True for exit status 0."""
        return self.exit_code == 0

    def tail(self) -> str:
        """The last lines of stderr, else of stdout, scrubbed: what an error message shows."""
        text = self.stderr.strip() or self.command.redactor().scrub(self.stdout).strip()
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def check(self) -> Result:
        """Self, or CommandError when the exit status is not 0."""
        if self.ok:
            return self
        raise CommandError(
            f"{self.command.why}: {self.command.program} ended with status {self.exit_code}\n{self.tail()}".rstrip(),
            where=self.command.program,
            exit_code=self.exit_code,
        )

    def json(self) -> Any:
        """Standard output parsed as JSON; CommandError when it is none."""
        try:
            return json.loads(self.stdout)
        except ValueError as error:
            raise CommandError(
                f"{self.command.why}: {self.command.program} printed no JSON", where=self.command.program
            ) from error


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
    that the inherited few are taken from; nothing else of it reaches a child.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {key: environ[key] for key in INHERITED if key in environ}

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
                stdout, stderr = _follow(process, command, command.log_file, redactor, on_line, deadline=deadline), b""
            else:
                stdout, stderr = _converse(process, command, redactor, on_line, deadline=deadline)
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


def require_program(runner: Runner, program: str, fix: str) -> Path:
    """Where ``program`` is; ToolMissingError with ``fix`` when it is nowhere on PATH."""
    if (found := runner.which(program)) is None:
        raise ToolMissingError("the program is not on PATH", where=program, fix=fix)
    return found


def _private_log(path: Path) -> IO[bytes]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    return os.fdopen(fd, "wb")


def _follow(
    process: subprocess.Popen[bytes],
    command: Command,
    log_file: Path,
    redactor: Redactor,
    on_line: Callable[[str], None] | None,
    *,
    deadline: float,
) -> bytes:
    """Feed stdin, then read the log as it grows until the process ends; returns all of it."""
    if process.stdin is not None:
        try:
            process.stdin.write(_stdin_bytes(command.stdin))
            process.stdin.close()
        except BrokenPipeError:
            process.stdin = None  # it stopped listening; its exit status says whether that matters
    buffer, shown = bytearray(), 0
    with log_file.open("rb") as log_handle:
        ended = False
        while not ended:
            try:
                process.wait(timeout=FOLLOW_POLL_S)
                ended = True
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    _kill_group(process)
                    raise _too_late(command, redactor, bytes(buffer)) from None
            buffer += log_handle.read()
            if on_line is not None:
                shown = _lines(buffer, shown, redactor, on_line, last=ended)
    return bytes(buffer)


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
    *,
    deadline: float,
) -> tuple[bytes, bytes]:
    """Feed stdin and collect both outputs until they close and the process has ended, or the deadline passes."""
    if process.stdout is None or process.stderr is None:
        raise CommandError(f"{command.why}: no pipes", where=command.program)
    chunks: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    shown = dict.fromkeys(chunks, 0)
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
                if on_line is not None:
                    shown[key.fd] = _lines(chunks[key.fd], shown[key.fd], redactor, on_line, last=not data)
                if not data:
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


def _lines(buffer: bytearray, start: int, redactor: Redactor, on_line: Callable[[str], None], *, last: bool) -> int:
    """Hand every complete new line of ``buffer`` to ``on_line``; returns where the next one starts."""
    while (end := buffer.find(b"\n", start)) >= 0:
        on_line(redactor.scrub(buffer[start:end].decode(errors="replace").rstrip("\r")))
        start = end + 1
    if last and start < len(buffer):
        on_line(redactor.scrub(buffer[start:].decode(errors="replace")))
        start = len(buffer)
    return start


def _stdin_bytes(stdin: str | bytes | Secret | None) -> bytes:
    if isinstance(stdin, Secret):
        return stdin.reveal().encode()
    if isinstance(stdin, str):
        return stdin.encode()
    return stdin or b""


def _kill_group(process: subprocess.Popen[bytes], *, close: bool = True) -> None:
    """End the process and all it started in its session: TERM, a grace, KILL."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):  # KILL always: the group may outlive its leader
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_GRACE_S)
    for pipe in (process.stdin, process.stdout, process.stderr) if close else ():
        if pipe is not None:
            pipe.close()
