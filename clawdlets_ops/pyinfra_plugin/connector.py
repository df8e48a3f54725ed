"""The connector ``@clawdlets/<host>``: usable before the host exists, strict about its host key always.

``connect()`` opens nothing; a session starts with the first command that needs one, over the tailnet when the host is there,
else over its public address, and only to a host that shows its pinned key.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from io import IOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyinfra.api.exceptions import ConnectError
from pyinfra.connectors.base import BaseConnector, ConnectorData, DataMeta
from pyinfra.connectors.util import CommandOutput, OutputLine, make_unix_command_for_host

from clawdlets_ops import install, lockdown, ssh
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.project import Project
from clawdlets_ops.runs import page
from clawdlets_ops.secrets import store
from clawdlets_ops.workflow import Tools

if TYPE_CHECKING:
    from pyinfra.api.command import StringCommand

DEFAULT_TIMEOUT_S = 600.0


class ClawdletsData(ConnectorData, total=False):
    """Host data that an inventory made by ``fleet_hosts`` carries."""

    clawdlets_project: Any
    clawdlets_tools: Any


class ClawdletsConnector(BaseConnector):
    """Connects to a fleet host by its declared identity."""

    handles_execution = True
    data_cls = ClawdletsData
    data_meta = {  # noqa: RUF012 - pyinfra's own shape
        "clawdlets_project": DataMeta("The project (clawdlets_ops.Project) that the host belongs to"),
        "clawdlets_tools": DataMeta("What its stages act through (clawdlets_ops.workflow.Tools)"),
    }

    def __init__(self, state: Any, host: Any) -> None:
        super().__init__(state, host)
        self._stack = ExitStack()
        self._session: ssh.Session | None = None

    @staticmethod
    def make_names_data(name: str | None = None) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """``@clawdlets/alpha`` is the fleet's host ``alpha``."""
        if not name:
            raise ConnectError("@clawdlets needs a host: @clawdlets/<host>")
        yield f"@clawdlets/{name}", {"clawdlets_host": name}, ["clawdlets"]

    def connect(self) -> None:
        """Nothing yet: the host may not exist before its own deploy has made it."""

    def disconnect(self) -> None:
        """Close the session if there ever was one; the run's page is written, as pyinfra says nothing else at its end."""
        self._session = None
        self._stack.close()
        tools = self.data["clawdlets_tools"]
        if isinstance(tools, Tools):
            page.refresh(tools.journal.folder)

    def run_shell_command(
        self, command: StringCommand, print_output: bool = False, print_input: bool = False, **arguments: Any
    ) -> tuple[bool, CommandOutput]:
        """Run a command on the host as admin."""
        timeout_s = float(arguments.pop("_timeout", None) or DEFAULT_TIMEOUT_S)
        success = tuple(arguments.pop("_success_exit_codes", None) or (0,))
        stdin = arguments.pop("_stdin", None)
        if arguments.pop("_get_pty", False):
            raise NotImplementedError("a clawdlets host is not given a terminal; run the command without _get_pty")
        # The raw value: the printable one has its secrets masked.
        line = make_unix_command_for_host(self.state, self.host, command, **arguments).get_raw_value()
        if print_input:
            self.host.log(f">>> {command}")
        answer = self._open().run(line, timeout_s=timeout_s, stdin=_text(stdin))
        lines = [OutputLine("stdout", text) for text in answer.stdout.splitlines()]
        lines += [OutputLine("stderr", text) for text in answer.stderr.splitlines()]
        if print_output:
            for line_out in lines:
                self.host.log(line_out.line)
        return answer.exit_code in success, CommandOutput(lines)

    def put_file(self, filename_or_io: str | IOBase, remote_filename: str, *_: Any, **__: Any) -> bool:
        """Not offered: files reach a host by its payload and its NixOS configuration."""
        raise NotImplementedError(
            f"{remote_filename}: a clawdlets host gets its files by payload and NixOS configuration, not by upload"
        )

    def get_file(self, remote_filename: str, filename_or_io: str | IOBase, *_: Any, **__: Any) -> bool:
        """Fetch one text file through ``cat``; a local file is made 0600."""
        answer = self._open().run(f"cat -- {shlex.quote(remote_filename)}")
        if not answer.ok:
            return False
        if isinstance(filename_or_io, str):
            write_atomic(Path(filename_or_io), answer.stdout)
        else:
            filename_or_io.write(answer.stdout)
        return True

    def _open(self) -> ssh.Session:
        if self._session is None:
            project, tools, name = (
                self.data["clawdlets_project"],
                self.data["clawdlets_tools"],
                self.host.data.clawdlets_host,
            )
            if not isinstance(project, Project) or not isinstance(tools, Tools):
                raise ConnectError("make the inventory with clawdlets_ops.pyinfra_plugin.inventory.fleet_hosts")
            try:
                self._session = self._stack.enter_context(ssh.session(self._target(project, tools, name)))
            except ClawdletsError as error:
                raise ConnectError(str(error)) from error
        return self._session

    @staticmethod
    def _target(project: Project, tools: Tools, name: str) -> ssh.Target:
        pin = store.host_ssh_pin(project, name)
        addresses = list(lockdown.tailnet_addresses(tools.runner, name, project.fleet.host(name)).values())
        if (server := tools.cloud.server(name)) is not None:
            addresses += server.addresses.values()
        for address in addresses:
            if ssh.presented_key(address, timeout_s=ssh.LOOK_TIMEOUT_S) == pin:
                return ssh.Target(name, address, install.ADMIN, project.ssh_identity_file(name), pin)
        raise ConnectError(f"{name}: no address shows the pinned host key (tried {', '.join(addresses) or 'none'})")


def _text(stdin: str | Iterable[str] | None) -> str | None:
    """pyinfra's ``_stdin``: a string, or lines."""
    if stdin is None or isinstance(stdin, str):
        return stdin
    return "".join(f"{line}\n" for line in stdin)
