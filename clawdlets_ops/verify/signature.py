"""Signs a report with the operator's SSH key, so that somebody else can tell who made it (ssh-keygen(1), -Y sign)."""

from __future__ import annotations

from pathlib import Path

from clawdlets_ops.errors import CommandTimeout, ToolMissingError
from clawdlets_ops.process import Command, Runner

NAMESPACE = "clawdlets-report"
TIMEOUT_S = 20.0


def sign(path: Path, identity: Path, *, runner: Runner) -> tuple[Path | None, str]:
    """Write ``<path>.sig`` (armored SSHSIG, namespace ``clawdlets-report``). Returns it, or None and why there is none.

    A key with a passphrase, or on a token that wants to be touched, does not sign: nobody is asked anything.
    """
    signature = path.with_name(path.name + ".sig")
    signature.unlink(missing_ok=True)
    command = Command(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", identity, "-n", NAMESPACE, path],
        "sign the report",
        env={"SSH_ASKPASS_REQUIRE": "never"},
        stdin="",
        timeout_s=TIMEOUT_S,
    )
    try:
        done = runner.run(command)
    except (ToolMissingError, CommandTimeout) as error:
        return None, error.what
    if not done.ok or not signature.is_file():
        return (
            None,
            f"ssh-keygen could not sign with {identity}: {(done.tail() or f'status {done.exit_code}').splitlines()[-1]}",
        )
    signature.chmod(0o600)
    return signature, ""
