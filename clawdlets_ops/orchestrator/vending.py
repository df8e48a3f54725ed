"""The variables that a machine may have: its persona's public settings, and the secrets that its persona names.

A secret is read when it is vended, from one file of its own: systemd's credentials (systemd.exec(5), LoadCredential=) or
``/run/secrets``. There is no environment that holds them all.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.orchestrator.tokens import Grant
from clawdlets_ops.sensitive import Secret

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,62}")
SECRET_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
SECRET_BYTES = 65_536


@dataclass(frozen=True)
class Needs:
    """What one machine may have: variable → name of the secret. Of each group in ``any_of`` one variable is enough."""

    secrets: Mapping[str, str]
    any_of: Sequence[Sequence[str]] = field(default_factory=tuple)


Look = Callable[[Grant], Needs]
"""What the persona of a grant's job needs, by the fleet's declaration as it is now."""


class SecretFiles:
    """Secrets by name in ``folders``, the first that has it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def get(self, name: str) -> Secret | None:
        """The secret without its last newline, or None when it is in no folder; OrchestratorError when it cannot be read."""
        if not SECRET_NAME.fullmatch(name):
            raise OrchestratorError(f"{name!r} is not the name of a secret")
        for folder in self._folders:
            try:
                fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise OrchestratorError(f"the secret {name} cannot be read ({error.strerror})") from None
            with os.fdopen(fd, "rb") as handle:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OrchestratorError(f"the secret {name} is not a regular file")
                value = handle.read(SECRET_BYTES + 1)
            if len(value) > SECRET_BYTES:
                raise OrchestratorError(f"the secret {name} is larger than {SECRET_BYTES} bytes")
            try:
                return Secret(value.decode().removesuffix("\n"), name)
            except UnicodeDecodeError:
                raise OrchestratorError(f"the secret {name} is not text") from None
        return None


class Vending:
    """Makes the environment of a grant."""

    def __init__(self, look: Look, secrets: SecretFiles) -> None:
        self._look = look
        self._secrets = secrets

    def environment(self, grant: Grant) -> Mapping[str, Secret]:
        """Variable to value. OrchestratorError when a secret that is needed is missing; the message names the variable."""
        needs = self._look(grant)
        excused = {name for group in needs.any_of for name in group}
        found: dict[str, Secret] = {}
        for variable in grant.env_keys:
            if not VARIABLE.fullmatch(variable):
                raise OrchestratorError(f"{variable!r} is not the name of a variable")
            if variable not in needs.secrets:
                raise OrchestratorError(f"{variable} is not declared for this persona any more")
            secret = self._secrets.get(needs.secrets[variable])
            if secret is not None and secret:
                found[variable] = secret
            elif variable not in excused:
                raise OrchestratorError(f"missing required variable on the host: {variable}")
        for group in needs.any_of:
            if not any(name in found for name in group):
                raise OrchestratorError(f"missing required variable on the host: one of {', '.join(group)}")
        public = {name: Secret(value, name) for name, value in grant.public_env.items() if VARIABLE.fullmatch(name)}
        return public | found
