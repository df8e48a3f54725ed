"""A project that the doctor has nothing to say against, on a real disk, with real git, sops and keys; made to be spoilt."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clawdlets_ops import hostkey, ssh
from clawdlets_ops.doctor.doors import look_at_doors
from clawdlets_ops.doctor.observe import observe
from clawdlets_ops.doctor.run import Diagnosis, judge
from clawdlets_ops.doctor.snapshot import NotHere, Scope, Snapshot, Wrong
from clawdlets_ops.finding import State
from clawdlets_ops.guard import hooks
from clawdlets_ops.guard.gitobjects import Repository
from clawdlets_ops.hetzner import HOST_LABEL, MANAGED_BY, MANAGER, Firewall, Server
from clawdlets_ops.lockdown import HostExposure
from clawdlets_ops.lockdown.drift import Door
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import payload
from clawdlets_ops.secrets.store import init_host
from clawdlets_ops.secrets.vault import declared_pin
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops
from clawdlets_ops.testing import FakeCloud
from clawdlets_ops.verify.exposure import Cell, Exposure

HASH = "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8"
SECRET = "canary-discord-0002"
SETTING = "canary-setting-0003"
VALUES = {"admin_password_hash": HASH, "breakglass_password_hash": HASH, "discord_token": SECRET}
HOST = {
    "provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "~/id_ed25519.pub"},
    "sshExposure": {"mode": "public"},
    "tailnet": {"mode": "none"},
    "secrets": {"discord_token": {"owner": "bot-maren"}},
}
LOCK = {
    "nodes": {
        "nixpkgs": {
            "locked": {"type": "github", "owner": "NixOS", "repo": "nixpkgs", "rev": "1" * 40, "narHash": "sha256-x"}
        },
        "root": {"inputs": {"nixpkgs": "nixpkgs"}},
    },
    "root": "root",
    "version": 7,
}
DEPENDABOT = """version: 2
updates:
  - package-ecosystem: github-actions
    directory: /
    schedule: {interval: weekly}
"""
WORKFLOW = f"jobs:\n  a:\n    steps:\n      - uses: actions/checkout@{'0a' * 20}\n"
STAND_IN = "#!/bin/sh\n# stand-in for {name}: only says which version it would be\necho '{says}'\n"
NIX = """#!/bin/sh
# stand-in for nix: only says which version it would be, or what is in its store
if [ "$1" = --version ]; then echo 'nix (Nix) 2.24.0'; else cat '{listing}'; fi
"""
GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{f"GIT_{who}_{what}": "canary@x.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


LOCKED = Door(
    declared="tailnet",
    edge=Firewall(3, "alpha-edge", {}, ()),
    status="applied",
    host=HostExposure("tailnet", armed=False),
    measured=Exposure((Cell("stranger", "internet", 4, "192.0.2.1", 22, "no"),)),
)


@dataclass
class Patient:
    """The project below ``base`` with its home and programs; what the doctor is given besides; seeds call its methods."""

    base: Path
    cloud: Any = None
    door: Door | NotHere = LOCKED
    closure: Path | None = None
    hosts: Collection[str] = ()
    edit: list[Callable[[Snapshot], Snapshot]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.base / "project"

    @property
    def environ(self) -> dict[str, str]:
        path = f"{self.base / 'bin'}:{os.environ['PATH']}"
        return {"USER": "maren", "PATH": path, "HOME": str(self.base / "home"), "TMPDIR": str(self.base / "tmp")}

    @property
    def project(self) -> Project:
        return load_project(self.root, self.environ)

    @property
    def runner(self) -> LocalRunner:
        return LocalRunner(self.environ)

    def git(self, *words: str) -> str:
        environ = {**self.environ, **GIT}
        return subprocess.run(
            ["git", *words], cwd=self.root, env=environ, check=True, capture_output=True, text=True
        ).stdout

    def write(self, name: str, content: str | bytes, mode: int = 0o644, *, folder: int = 0o700) -> Path:
        path = self.root / name
        for parent in reversed([each for each in path.parents if not each.exists()]):
            parent.mkdir(mode=folder)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return path

    def commit(self, *names: str) -> None:
        self.git("add", "-f", *names)
        self.git("commit", "-q", "--no-verify", "-m", "canary")

    def program(self, name: str, says: str) -> None:
        path = self.base / "bin" / name
        path.write_text(STAND_IN.format(name=name, says=says))
        path.chmod(0o755)

    def nix(self, listing: object) -> None:
        """A stand-in for nix, whatever this machine has: its version, or ``listing`` as the content of its store."""
        listed = self.write("../listing.json", json.dumps(listing))
        self.write("../bin/nix", NIX.format(listing=listed), 0o755)

    def fleet(self, **changes: Any) -> None:
        self.write("fleet/clawdlets.json", json.dumps({"schemaVersion": 1, "hosts": {"alpha": HOST}, **changes}))

    def encrypt(self, name: str, values: dict[str, str], readers: Collection[str]) -> str:
        plaintext = {key: Secret(value, key) for key, value in values.items()}
        text = Sops(self.runner, find_sops(self.runner)).encrypt(plaintext, recipients=readers, filename=name)
        self.write(name, text, 0o600)
        return text

    def recipient(self, name: str) -> str:
        return (self.root / "secrets" / "keys" / f"{name}.age.pub").read_text().strip()

    def receipt(self, **changes: Any) -> None:
        """As if alpha had been installed from here, with the payload that lies here."""
        layout = self.project.layout
        marker = json.loads((layout.extra_files("alpha") / "var/lib/clawdlets/install.json").read_text())
        said = {"host": "alpha", "hostKey": ssh.fingerprint(declared_pin(layout, "alpha") or ""), "installedAs": marker}
        self.write(".clawdlets/reports/alpha/install-receipt.json", json.dumps({**said, **changes}), 0o600)

    def _doors(self, project, hosts, *, runner, cloud_of):
        """A stand-in for a look at real hosts, which there are none of here."""
        if isinstance(project, Wrong):
            return look_at_doors(project, hosts, runner=runner, cloud_of=cloud_of)
        return dict.fromkeys(hosts, self.door)

    def look(self, scope: Scope) -> Snapshot:
        cloud = self.cloud or FakeCloud(servers=[server()])
        snapshot = observe(
            self.root,
            scope,
            self.environ,
            self.hosts,
            closure=self.closure,
            cloud_of=lambda project: cloud,
            doors_of=self._doors,
        )
        for change in self.edit:
            snapshot = change(snapshot)
        return snapshot

    def diagnose(self, scope: Scope) -> Diagnosis:
        return judge(self.look(scope), scope)


def server(**labels: str) -> Server:
    labels = labels or {MANAGED_BY: MANAGER, HOST_LABEL: "alpha"}
    return Server(7, "alpha", "running", labels, "cx23", "nbg1", "192.0.2.9", None, {})


def make(base: Path) -> Patient:
    """The clean project: one host, one operator, everything committed, hooks in place, a payload made."""
    patient = Patient(base)
    for name in ("home", "bin", "tmp", "project"):
        (base / name).mkdir(mode=0o700)
    for name, says in (("tofu", "OpenTofu v1.10.6"), ("nixos-anywhere", "")):
        patient.program(name, says)
    patient.nix({})
    private, public = hostkey.generate("maren")
    (base / "home" / "id_ed25519.pub").write_text(f"{public}\n")
    key = base / "home" / "id_ed25519"
    key.write_text(private.reveal())
    key.chmod(0o600)
    patient.git("init", "-q", "-b", "main")
    patient.write(".gitignore", "/.clawdlets/\n")
    patient.fleet()
    patient.write("flake.nix", "{ outputs = _: { }; }\n")
    patient.write("flake.lock", json.dumps(LOCK))
    patient.write(".github/dependabot.yml", DEPENDABOT)
    patient.write(".github/workflows/ci.yml", WORKFLOW)
    patient.write(".clawdlets/env", f"HCLOUD_TOKEN={'canary7Q' + 'x' * 56}\nPOSTED={SETTING}\n", 0o600)
    patient.write(".clawdlets/infra/opentofu/alpha/terraform.tfstate", '{"resources": []}\n', 0o600)
    project = patient.project
    init_host(project, "alpha", {name: Secret(value, name) for name, value in VALUES.items()}, runner=patient.runner)
    payload.materialise(project, "alpha", runner=patient.runner)
    patient.git("add", ".")
    patient.git("commit", "-q", "-m", "canary")
    hooks.install(Repository(patient.runner, patient.root, {}), ("clawdlets",), ".")
    return patient


def ids(diagnosis: Diagnosis, state: State) -> set[str]:
    return {each.check.id for each in diagnosis.judged if each.finding.state is state}
