"""How the doctor looks: every outside program within a bound of time, and what could not be looked at as a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TypeVar

from clawdlets_ops.doctor.snapshot import Blind
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.process import Command, LocalRunner, Result

CALL_TIMEOUT_S = 120.0
"""No single program that the doctor starts runs longer; what it was to show is then unknown."""

T = TypeVar("T")


class BoundedRunner(LocalRunner):
    """A ``LocalRunner`` that gives no command more than ``CALL_TIMEOUT_S``."""

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """As ``LocalRunner.run``."""
        return super().run(_bounded(command), on_line=on_line)

    @contextmanager
    def stream(self, command: Command) -> Iterator[IO[bytes]]:
        """As ``LocalRunner.stream``."""
        with super().stream(_bounded(command)) as output:
            yield output


def attempt(look: Callable[[], T]) -> T | Blind:
    """What ``look`` returns, or why it could not: one line, as our errors say it, without the content of any file."""
    try:
        return look()
    except ClawdletsError as error:
        return Blind(first_line(error))
    except OSError as error:
        return Blind(f"{error.filename or 'a file'}: {error.strerror or type(error).__name__}")
    except (ValueError, RecursionError) as error:
        return Blind(f"cannot be read ({type(error).__name__})")


def first_line(error: ClawdletsError) -> str:
    """The place and the first line of an error; of a program that failed, its own last line too."""
    lines = [line for line in error.what.splitlines() if line.strip()]
    said = f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 else lines[0] if lines else "no reason was given"
    return f"{error.where}: {said}" if error.where and error.where not in said else said


def _bounded(command: Command) -> Command:
    return replace(command, timeout_s=min(command.timeout_s, CALL_TIMEOUT_S))
