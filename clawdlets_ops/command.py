"""Commands as data, and how they ended. ``process`` runs them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandError
from clawdlets_ops.sensitive import Redactor, Secret

DEFAULT_TIMEOUT_S = 120.0
TAIL_LINES = 15


@dataclass(frozen=True)
class Command:
    """A program to run, as data.

    ``argv`` never holds a Secret (TypeError). ``env`` is added to the inherited few; Secret values are allowed there
    and in ``stdin``. ``timeout_s`` in seconds. ``secrets`` are scrubbed from output besides those of env and stdin.
    ``keep_fds`` are inherited, which lets a lock outlive a killed parent for as long as this child runs.
    ``log_file`` (made 0600) takes both outputs instead of a pipe: should we be killed, the program is not, and can
    finish what it began; ``Result.stdout`` is then the last ``LOG_KEPT_BYTES`` of both. A file of more than
    ``LOG_LIMIT_BYTES`` is cut down to those, and written on.
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
