"""Every path of the security model, with the mode and owner it must have.

Source: ``security-model.md``, section "Boundaries". Three places: the public-safe repository, the local runtime dir
(gitignored), the server.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from clawdlets_ops import hostfiles

RUNTIME_DIR = ".clawdlets"


@dataclass(frozen=True)
class Layout:
    """Paths below one project root. Nothing here touches the disk."""

    root: Path

    # --- the public-safe repository ---

    @property
    def fleet_file(self) -> Path:
        """The declared fleet; no secrets."""
        return self.root / "fleet" / "clawdlets.json"

    @property
    def personas_dir(self) -> Path:
        """A folder for each cattle persona: public files, which every machine of that persona gets."""
        return self.root / "fleet" / "personas"

    @property
    def secrets_dir(self) -> Path:
        """sops-encrypted files; safe to commit."""
        return self.root / "secrets"

    @property
    def sops_config(self) -> Path:
        """Which recipients a file of which name gets (0644)."""
        return self.secrets_dir / ".sops.yaml"

    def host_secrets_dir(self, host: str) -> Path:
        """One encrypted file per secret of a host, for the host and the operators."""
        return self.secrets_dir / "hosts" / host

    def secret_file(self, host: str, name: str) -> Path:
        """The encrypted file of one secret: one key, called as the file."""
        return self.host_secrets_dir(host) / f"{name}.yaml"

    def host_age_key_file(self, host: str) -> Path:
        """The host's age key pair, encrypted to the operators only."""
        return self.secrets_dir / "keys" / "hosts" / f"{host}.agekey.yaml"

    def host_age_public_key(self, host: str) -> Path:
        """The public half of the host's age key (0644): recipients can be checked without any private key."""
        return self.secrets_dir / "keys" / "hosts" / f"{host}.age.pub"

    def host_next_age_key_file(self, host: str) -> Path:
        """The age key that a rotation is bringing to the host, encrypted to the operators only."""
        return self.secrets_dir / "keys" / "next" / f"{host}.agekey.yaml"

    def host_next_age_public_key(self, host: str) -> Path:
        """The public half of that (0644): while it is there, the host's secrets are for both keys."""
        return self.secrets_dir / "keys" / "next" / f"{host}.age.pub"

    def host_old_age_public_key(self, host: str) -> Path:
        """The public half of the key that a rotation has replaced and that the host may still hold (0644)."""
        return self.secrets_dir / "keys" / "old" / f"{host}.age.pub"

    def host_ssh_key_file(self, host: str) -> Path:
        """The host's private SSH host key, encrypted to the operators only."""
        return self.secrets_dir / "keys" / "hosts" / f"{host}.ssh_host_ed25519_key.yaml"

    def host_ssh_public_key(self, host: str) -> Path:
        """The pin: the public half of the host's SSH host key (0644)."""
        return self.secrets_dir / "keys" / "hosts" / f"{host}.ssh_host_ed25519_key.pub"

    @property
    def operator_recipients_dir(self) -> Path:
        """``<operator>.age.pub`` (0644): every one of them is a recipient of every file."""
        return self.secrets_dir / "keys" / "operators"

    # --- the local runtime dir: 0700, gitignored ---

    @property
    def runtime(self) -> Path:
        """0700; everything below is private."""
        return self.root / RUNTIME_DIR

    @property
    def env_file(self) -> Path:
        """0600, KEY=VALUE lines: the operator's environment for this project."""
        return self.runtime / "env"

    @property
    def vantages_file(self) -> Path:
        """Where probes may be made from, beyond this machine (JSON)."""
        return self.runtime / "vantages.json"

    def operator_key(self, operator: str) -> Path:
        """0600: an operator's private age key; never committed."""
        return self.runtime / "keys" / "operators" / f"{operator}.agekey"

    def extra_files(self, host: str) -> Path:
        """The install payload, laid out as on the server's root."""
        return self.runtime / "extra-files" / host

    def tofu_dir(self, host: str) -> Path:
        """OpenTofu's working directory and state of one host (0700)."""
        return self.runtime / "infra" / "opentofu" / host

    @property
    def bound_to(self) -> Path:
        """Which cloud endpoint this runtime dir belongs to: state of one is never used against another."""
        return self.runtime / "infra" / "endpoint"

    def lock(self, name: str) -> Path:
        """A lock file."""
        return self.runtime / "locks" / f"{name}.lock"

    def state_file(self, name: str) -> Path:
        """What a no-op is recognised by: keyed digests, nothing secret (0600)."""
        return self.runtime / "state" / f"{name}.json"

    @property
    def runs(self) -> Path:
        """A folder for each run: ``events.jsonl``, a log for each host, ``report.html``."""
        return self.runtime / "runs"

    def lockdown_dir(self, host: str) -> Path:
        """A lockdown or breakglass window under way: the rules to put back, and what its watchdog has seen and done."""
        return self.runtime / "lockdown" / host

    def reports(self, host: str) -> Path:
        """Verification reports and install receipts of one host."""
        return self.runtime / "reports" / host

    @property
    def fleet_reports(self) -> Path:
        """Reports of verifications of the fleet as a whole; no host's name begins with a low line."""
        return self.runtime / "reports" / "_fleet"

    def installer_pin(self, host: str) -> Path:
        """The host key that the fresh server showed when it was first met, until it is installed."""
        return self.runtime / "known_hosts" / f"{host}.installer"

    def install_dir(self, host: str) -> Path:
        """What an installation needs while it is under way: pins, the ssh that enforces them, private folders."""
        return self.runtime / "install" / host

    def install_receipt(self, host: str) -> Path:
        """What was installed, when, from where, with which tools."""
        return self.reports(host) / "install-receipt.json"

    @property
    def lab(self) -> Path:
        """The lab's own state."""
        return self.runtime / "lab"

    @property
    def cache(self) -> Path:
        """Rebuildable things, gitignored: tools, the lab's base system."""
        return self.root / ".cache"


@dataclass(frozen=True)
class OnServer:
    """A path on the server with what it must be. ``mode`` is octal, owner and group by name."""

    path: PurePosixPath
    mode: int
    owner: str
    group: str
    kind: str = "file"


_DECLARED = hostfiles.data("paths.json")


def _on_server(name: str) -> OnServer:
    """As ``hostfiles/paths.json`` has it, which the NixOS modules read too. Of root where it does not say whose."""
    said = _DECLARED[name]
    return OnServer(
        PurePosixPath(said["path"]),
        int(said["mode"], 8),
        said.get("owner", "root"),
        said.get("group", "root"),
        said.get("kind", "file"),
    )


HOST_PROGRAMS = _on_server("hostPrograms").path
HOST_AGE_KEY = _on_server("hostAgeKey")
HOST_AGE_KEY_DIR = _on_server("hostAgeKeyDir")
SSH_HOST_KEY = _on_server("sshHostKey")
SSH_HOST_PUBLIC_KEY = _on_server("sshHostPublicKey")
INSTALL_MARKER = _on_server("installMarker")
INSTALL_RECEIPT = _on_server("installReceipt")
SECRETS_WIRING = _on_server("secretsWiring")
EGRESS_DIR = _on_server("egressDir")
TAILNET_PORTS = _on_server("tailnetPorts")
BOTS_STATE_DIR = _on_server("botsStateDir").path
RUN_SECRETS = _on_server("runSecrets").path
CLF_RUN_DIR = _on_server("clfRunDir")
ORCHESTRATOR_SOCKET = _on_server("orchestratorSocket")
ORCHESTRATOR_STATE_DIR = _on_server("orchestratorStateDir")
ORCHESTRATOR_DATABASE = _on_server("orchestratorDatabase")
ORCHESTRATOR_CONFIG = _on_server("orchestratorConfig")
CATTLE_DECLARED = _on_server("cattleDeclared")
CATTLE_PERSONAS = _on_server("cattlePersonas")

# On a cattle machine. What is secret is below /run, which is in memory.
CATTLE_DIR = _on_server("cattleDir")
CATTLE_RUN_DIR = _on_server("cattleRunDir")
CATTLE_AUTH_KEY = _on_server("cattleAuthKey")
CATTLE_BOOTSTRAP = _on_server("cattleBootstrap")
_SECRETS_DIRS = _on_server("secretsDirs")


def secrets_dir_on_server(host: str) -> OnServer:
    """Where a host's encrypted files lie on the host."""
    return replace(_SECRETS_DIRS, path=_SECRETS_DIRS.path / host)


def secret_file_on_server(host: str, name: str) -> OnServer:
    """One encrypted file on the host."""
    return OnServer(secrets_dir_on_server(host).path / f"{name}.yaml", 0o400, "root", "root")
