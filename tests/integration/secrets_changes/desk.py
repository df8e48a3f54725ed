"""What the tests of changes to existing secrets share: a project, its files, who can open them."""

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

from clawdlets_ops.errors import UnreadableError
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.store import operator_identity
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops, recipients

HASH = "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8"
GIVEN = {"admin_password_hash": HASH, "breakglass_password_hash": HASH, "discord_token": "canary-discord-0002"}
VALUES = {name: Secret(value, name) for name, value in GIVEN.items()}
FILES = 5
HOST = {
    "provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"},
    "sshExposure": {"mode": "public"},
    "tailnet": {"mode": "none"},
    "secrets": {"discord_token": {"owner": "bot-maren"}},
}


def a_project(root: Path, *, hosts=("alpha",), operator="maren", operators=None, wired=None) -> Project:
    host = {**HOST, "secrets": HOST["secrets"] if wired is None else wired}
    fleet = {"schemaVersion": 1, "hosts": dict.fromkeys(hosts, host)}
    if operators:
        fleet["operators"] = {name: {"ageRecipient": recipient} for name, recipient in operators.items()}
    (root / "fleet").mkdir(parents=True, exist_ok=True)
    (root / "fleet" / "clawdlets.json").write_text(json.dumps(fleet))
    return load_project(root, {"USER": operator, "PATH": os.environ["PATH"]})


def snapshot(root: Path) -> dict[str, tuple]:
    """Every file below ``root`` but locks: mode, content, inode and time of change."""
    return {
        path.relative_to(root).as_posix(): (
            stat.S_IMODE(path.stat().st_mode),
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_ino,
            path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file() and "locks" not in path.parts
    }


def sealed_files(project) -> list[Path]:
    return sorted(path for path in project.layout.secrets_dir.rglob("*.yaml") if path.name != ".sops.yaml")


def opens(path: Path, identity, runner) -> bool:
    try:
        Sops(runner, find_sops(runner)).decrypt(path, identity=identity.secret)
    except UnreadableError:
        return False
    return True


def value_in(project, runner, name, host="alpha") -> str:
    path = project.layout.secret_file(host, name)
    return Sops(runner, find_sops(runner)).decrypt(path, identity=operator_identity(project).secret)[name].reveal()


def put(project, runner, name, value, *, to):
    text = Sops(runner, find_sops(runner)).encrypt({name: Secret(value)}, recipients=to, filename=name)
    project.layout.secret_file("alpha", name).write_text(text)


def readers_of(project, name, host="alpha") -> set[str]:
    return recipients(project.layout.secret_file(host, name).read_text())


def states(project, runner, hosts=()) -> dict[str, str]:
    return {row.name: ", ".join(row.states) for row in status(project, hosts, runner=runner)}


def as_operator(project, name) -> Project:
    """The same repository on another machine: only ``secrets/`` and ``fleet/`` come along, as with git."""
    root = project.layout.root.with_name(f"of-{name}")
    shutil.copytree(project.layout.secrets_dir, root / "secrets")
    shutil.copytree(project.layout.fleet_file.parent, root / "fleet")
    return load_project(root, {"USER": name, "PATH": os.environ["PATH"]})


def carry(source: Project, target: Project) -> None:
    """What git does between two machines."""
    shutil.rmtree(target.layout.secrets_dir)
    shutil.copytree(source.layout.secrets_dir, target.layout.secrets_dir)


def data_of(text: str) -> str:
    return next(line for line in text.splitlines() if "ENC[AES256_GCM" in line and "mac:" not in line)
