"""Where a host's OpenTofu state lies, encrypted, and what was kept of it before each apply.

Local state and backups are OpenTofu's own ciphertext. A state of an older version, in clear, is moved over once; from then
on one in clear is refused. A remote backend's state is kept before an apply too, encrypted by sops to the operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from clawdlets_ops.errors import CommandError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.fleet import HttpState, LocalState, PgState, S3State
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import statekey
from clawdlets_ops.secrets.vault import operators_of
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops
from clawdlets_ops.tofu import STATE_FILE, Encryption, Tofu, is_encrypted

BACKUPS_KEPT = 10

# What each backend reads its place and its credentials from; nothing else of the operator's environment reaches tofu.
CREDENTIALS: Mapping[type, tuple[str, ...]] = {
    LocalState: (),
    S3State: ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    PgState: ("PG_CONN_STR", "PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSSLMODE", "PGSSLROOTCERT"),
    HttpState: ("TF_HTTP_USERNAME", "TF_HTTP_PASSWORD", "TF_HTTP_CLIENT_CA_CERTIFICATE_PEM"),
}


def open_tofu(project: Project, host: str, *, runner: Runner, lock_fds: tuple[int, ...] = ()) -> Tofu:
    """The host's working directory with everything that OpenTofu needs; makes the state's key on first use.

    SecretsError, UnreadableError when the key cannot be had.
    """
    folder = ensure_dir(project.layout.tofu_dir(host))
    settle(folder)
    return _tofu(project, host, runner, Encryption(_key(project, runner)), lock_fds)


def migrate(project: Project, host: str, *, runner: Runner, lock_fds: tuple[int, ...] = ()) -> bool:
    """Encrypt a local state that an older version left in clear; whether there was one. The configuration must stand.

    Nothing of it stays on the disk in clear.
    """
    folder = project.layout.tofu_dir(host)
    state = folder / STATE_FILE
    if not _in_clear(state):
        return False
    encryption = Encryption(_key(project, runner), accept_plain=True)
    _tofu(project, host, runner, encryption, lock_fds).encrypt_state()
    if _in_clear(state):
        raise CommandError("OpenTofu left its state in clear", where=str(state), fix="report this; nothing was changed")
    settle(folder)
    return True


def settle(folder: Path) -> None:
    """Remove what older versions or a crash left in clear beside the state: old copies, plans, and errored.tfstate, whose
    content the cloud itself has."""
    for path in [*folder.glob("*.tfstate.backup"), folder / "errored.tfstate", folder / "plan.bin"]:
        if path.exists() and (path.name == "plan.bin" or _in_clear(path)):
            path.unlink()


def keep(project: Project, host: str, tofu: Tofu, *, runner: Runner, now: datetime | None = None) -> Path | None:
    """Copy the state aside before it changes, newest ``BACKUPS_KEPT`` kept; None when there is none yet.

    To restore a local one: put it in the place of terraform.tfstate.
    """
    folder = project.layout.tofu_dir(host)
    stamp = f"{now or datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    if isinstance(project.fleet.state, LocalState):
        state = folder / STATE_FILE
        if not state.exists():
            return None
        content, name = state.read_bytes(), f"{stamp}.tfstate"
        if not is_encrypted(content):
            raise CommandError("the state is not encrypted", where=str(state), fix="run the provision stage")
    else:
        pulled = tofu.pull()
        if not pulled.reveal().strip():
            return None
        name = f"{stamp}.tfstate.sops.yaml"
        sops = Sops(runner, find_sops(runner))
        recipients = frozenset(operators_of(project).values())
        content = sops.encrypt({"state": pulled}, recipients=recipients, filename=name).encode()
    kept = ensure_dir(folder / "backups") / name
    write_atomic(kept, content)
    for old in sorted(kept.parent.glob("*.tfstate*"))[:-BACKUPS_KEPT]:
        old.unlink()
    return kept


def forget(project: Project, host: str) -> None:
    """Remove the host's local state and working files once nothing of it exists any more; the backups stay."""
    folder = project.layout.tofu_dir(host)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file():
            path.unlink()


def credentials(project: Project) -> dict[str, Secret]:
    """The backend's variables out of the operator's environment."""
    names = CREDENTIALS[type(project.fleet.state)]
    return {name: Secret(project.environ[name], name.lower()) for name in names if project.environ.get(name)}


def _tofu(project: Project, host: str, runner: Runner, encryption: Encryption, lock_fds: tuple[int, ...]) -> Tofu:
    return Tofu(
        runner,
        project.layout.tofu_dir(host),
        token=project.token,
        encryption=encryption,
        cli_config=project.environ.get("TF_CLI_CONFIG_FILE"),
        credentials=credentials(project),
        lock_fds=lock_fds,
    )


def _key(project: Project, runner: Runner) -> Secret:
    """The state's key; made only where no state can have been encrypted with another."""
    return statekey.state_key(project, runner=runner, may_make=_first_use(project))


def _first_use(project: Project) -> bool:
    """Whether this checkout never had a state's key: no host's local state is encrypted. A remote state that was encrypted
    with another key cannot be opened with a new one, and says so."""
    folders = project.layout.tofu_dir("any").parent
    return not any(not _in_clear(path) for path in folders.glob(f"*/{STATE_FILE}"))


def _in_clear(path: Path) -> bool:
    return path.is_file() and not is_encrypted(path.read_bytes())
