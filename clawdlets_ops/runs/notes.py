"""Which programs a stage ran on a host, and what they said, in the host's log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clawdlets_ops.journal import Journal
from clawdlets_ops.process import Command, Result, Runner

LINES_NOTED: Final = 5_000


@dataclass(frozen=True)
class NotingRunner:
    """Runs as ``runner`` does, and notes each command line, how it ended and how long it took.

    Output is noted of those commands alone whose output goes to a file anyway (``Command.log_file``): any other may print
    what is secret, such as a decrypted value.
    """

    runner: Runner
    journal: Journal
    host: str

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """Run to the end, as the runner inside."""
        note = self.journal.note
        note(self.host, f"$ {command.redactor().scrub(str(command))}")
        noted = 0

        def line(text: str) -> None:
            nonlocal noted
            noted += 1
            if noted <= LINES_NOTED:
                note(self.host, f"  {text}")
            if on_line is not None:
                on_line(text)

        try:
            result = self.runner.run(command, on_line=line if command.log_file else on_line)
        except BaseException as error:
            note(self.host, f"= {type(error).__name__}")
            raise
        note(self.host, f"= status {result.exit_code}, {result.duration_s:.2f} s")
        return result

    def which(self, program: str) -> Path | None:
        """As the runner inside."""
        return self.runner.which(program)
