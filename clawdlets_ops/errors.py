"""The exceptions of clawdlets-ops. Every one says what went wrong, where, and what to do.

ClawdletsError
├── FleetError            the declared fleet is not acceptable        (where: key path in fleet/clawdlets.json)
├── SettingsError         the operator's environment lacks something  (where: variable or file)
├── ToolMissingError      an outside program is not there             (where: program)
├── CommandError          an outside program failed                   (where: program, on which hop)
│   └── CommandTimeout    … or did not end in time
├── SecretsError          a secret is absent, wrong or a placeholder  (where: file)
│   └── UnreadableError   it is there and cannot be decrypted: never the same as absent
├── SyncError             a host did not take what it was sent; says which set is active there
├── CloudError            the Hetzner API said no, or something else than expected
│   └── OutcomeUnknown    … a change was asked for, and whether it was made is not known
├── CattleError           a cattle server cannot be had as it was asked for
├── PlanRefused           an OpenTofu plan would do more than its stage is about
├── InstallRefused        the target must not be installed as it is
├── UnreachableError      a host did not answer in time
├── HostKeyError          a host answered with another key than the pinned one
├── LockdownError         lockdown stopped; says what is open and what is closed now
├── EgressError           what a host held back could not be asked, or its answer not understood
├── VerifyError           the verification did not pass, or could not run
├── OrchestratorError     clf-orchestrator refused, or cannot run as it is set up
│   └── StoreError        … its database is locked, full, damaged, too new, or open to others (reason)
├── BusyError             somebody else holds the lock
└── LabError              the lab could not do what it was asked
"""

from __future__ import annotations


class ClawdletsError(Exception):
    """Root of the tree.

    ``what`` is one sentence; ``where`` a key path, file, host or program; ``fix`` what the operator can do.
    None of the three ever holds a secret.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.fix}" if self.fix else text


class FleetError(ClawdletsError, ValueError):
    """The declared fleet is not acceptable."""


class SettingsError(ClawdletsError):
    """The operator's environment lacks something, or holds something unusable."""


class ToolMissingError(ClawdletsError, FileNotFoundError):
    """An outside program is not there."""


class CommandError(ClawdletsError):
    """An outside program failed; ``exit_code`` is its own, output is redacted before it gets here."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", exit_code: int | None = None) -> None:
        self.exit_code = exit_code
        super().__init__(what, where=where, fix=fix)


class CommandTimeout(CommandError, TimeoutError):
    """An outside program did not end in time and was killed with its process group."""


class SecretsError(ClawdletsError):
    """A secret is absent, wrong, or still a placeholder."""


class UnreadableError(SecretsError):
    """A secret is there and cannot be decrypted. Never treated as absent, never overwritten."""


class SyncError(ClawdletsError):
    """A host did not take the secrets or keys it was sent. The message says which set is active there now."""


class CloudError(ClawdletsError):
    """The Hetzner API refused, or its answer is not what was asked for. ``code`` is the API's word for it, if it had one."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", code: str = "") -> None:
        self.code = code
        super().__init__(what, where=where, fix=fix)


class OutcomeUnknown(CloudError):
    """A change was asked for, and whether it was made is not known: look before anything is asked for again."""


class CattleError(ClawdletsError):
    """A cattle server cannot be had as it was asked for."""


class PlanRefused(ClawdletsError):
    """An OpenTofu plan would change more than its stage is about."""


class InstallRefused(ClawdletsError):
    """The target must not be installed as it is now."""


class UnreachableError(ClawdletsError, TimeoutError):
    """A host did not answer in time."""


class HostKeyError(ClawdletsError):
    """A host answered with another key than the pinned one."""


class LockdownError(ClawdletsError):
    """Lockdown stopped. The message says what is open and what is closed now."""


class EgressError(ClawdletsError):
    """What a host held back could not be asked, or its answer not be understood."""


class VerifyError(ClawdletsError):
    """The verification did not pass, or could not run."""


class OrchestratorError(ClawdletsError):
    """clf-orchestrator refused, or cannot run as it is set up."""


class StoreError(OrchestratorError):
    """The orchestrator's database cannot be used. ``reason`` is one word: busy, full, readonly, io, corrupt, unknown,
    modes, unreachable, refused, closed."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", reason: str) -> None:
        self.reason = reason
        super().__init__(what, where=where, fix=fix)


class BusyError(ClawdletsError):
    """Somebody else holds the lock."""


class LabError(ClawdletsError):
    """The lab could not do what it was asked."""
