"""A runner of the real programs that keeps what it was asked to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from clawdlets_ops.process import Command, LocalRunner, Result


class Recording(LocalRunner):
    """Keeps the commands that it runs, in order."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(environ)
        self.commands: list[Command] = []

    @property
    def lines(self) -> list[str]:
        """The command lines."""
        return [str(command) for command in self.commands]

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """Keep it, and run it."""
        self.commands.append(command)
        return super().run(command, on_line=on_line)

    def taken(self) -> int:
        """How many commands since the last time."""
        count, self.commands = len(self.commands), []
        return count
