"""A project as one value: its fleet, its paths, and what the operator's environment says.

The environment comes in as an argument; only the surfaces read ``os.environ``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from clawdlets_ops.errors import SettingsError
from clawdlets_ops.files import read_private
from clawdlets_ops.fleet import Fleet, Host, check_public_key, load_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.vantage import Vantage

HETZNER_ENDPOINT = "https://api.hetzner.cloud/v1"
TOKEN_CHARS = 64


@dataclass(frozen=True)
class Project:
    """Everything a stage needs to know. Frozen; copies with ``dataclasses.replace``."""

    layout: Layout
    fleet: Fleet
    operator: str
    environ: Mapping[str, str] = field(repr=False)
    hcloud_endpoint: str = HETZNER_ENDPOINT
    hcloud_token: Secret | None = None
    secrets_file: Path | None = None
    vantages: tuple[Vantage, ...] = ()
    poll_interval_s: float = 1.0
    reinstall: frozenset[str] = frozenset()
    """Hosts that may be wiped and installed anew in this run: named by the operator, each time."""
    allow_replace: frozenset[str] = frozenset()
    """Hosts whose server, addresses and volumes a plan may delete or replace in this run: named likewise."""
    refresh: bool = False
    """Compare everything with OpenTofu's state, also where nothing seems to have changed."""
    environment: str = ""
    """The name that this runtime dir's settings give to their environment; empty for a Hetzner account."""

    @property
    def binding(self) -> str:
        """What the runtime dir's state belongs to: the named environment, wherever it answers now, or the endpoint."""
        return f"the {self.environment}" if self.environment else self.hcloud_endpoint

    @property
    def token(self) -> Secret:
        """The Hetzner token; SettingsError when there is none or it cannot be one."""
        fix = f"put HCLOUD_TOKEN=… into {self.layout.env_file} (mode 0600), or export it"
        if self.hcloud_token is None or not self.hcloud_token:
            raise SettingsError("no Hetzner token", where="HCLOUD_TOKEN", fix=fix)
        if not re.fullmatch(rf"[A-Za-z0-9]{{{TOKEN_CHARS}}}", self.hcloud_token.reveal()):
            raise SettingsError(
                f"is not a Hetzner token ({TOKEN_CHARS} letters and digits expected, "
                f"{len(self.hcloud_token.reveal())} characters found)",
                where="HCLOUD_TOKEN",
                fix=fix,
            )
        return self.hcloud_token

    def ssh_public_key_file(self, host: str) -> Path:
        """The operator's public SSH key for ``host``; SettingsError when the fleet names none."""
        name = self.fleet.host(host).provisioning.ssh_pubkey_file
        if not name:
            raise SettingsError(
                "names no key to log in with",
                where=f"hosts.{host}.provisioning.sshPubkeyFile",
                fix="name your public key",
            )
        return _expand(self.layout, name, home=self.environ.get("HOME", "/"))

    def admin_keys(self, host: str) -> tuple[str, ...]:
        """Every public key line that may log in as admin: those declared, and the operator's own. SettingsError."""
        return admin_keys(self.layout, self.fleet.host(host), home=self.environ.get("HOME", "/"))

    def ssh_identity_file(self, host: str) -> Path:
        """The private half, beside the public one; SettingsError when it is not there."""
        public = self.ssh_public_key_file(host)
        private = public.with_suffix("") if public.suffix == ".pub" else public
        if public.suffix != ".pub" or not private.is_file():
            raise SettingsError(
                "there is no private key beside this public key",
                where=str(public),
                fix=f"ssh-keygen -t ed25519 -f {private}, or name another provisioning.sshPubkeyFile",
            )
        return private


def load_project(root: Path, environ: Mapping[str, str]) -> Project:
    """Read fleet and runtime settings below ``root``; FleetError, SettingsError.

    ``.clawdlets/env`` wins over ``environ``: what belongs to this project is nearer than what a shell happens to carry,
    such as another account's token.
    """
    layout = Layout(root.resolve())
    fleet = load_fleet(layout.fleet_file)
    merged = {**environ, **_read_env_file(layout)}
    if extra := merged.get("CLAWDLETS_TOOL_PATH"):
        merged["PATH"] = f"{extra}:{merged.get('PATH', '')}"
    token = merged.get("HCLOUD_TOKEN")
    endpoint = merged.get("HCLOUD_ENDPOINT", HETZNER_ENDPOINT).rstrip("/")
    secrets_file = merged.get("CLAWDLETS_SECRETS_FILE")
    return Project(
        layout=layout,
        fleet=fleet,
        operator=_operator_name(merged),
        environ=merged,
        hcloud_endpoint=endpoint,
        hcloud_token=Secret(token, "hcloud_token") if token else None,
        secrets_file=layout.root / secrets_file if secrets_file else None,
        vantages=_read_vantages(layout, endpoint),
        poll_interval_s=float(merged.get("CLAWDLETS_POLL_INTERVAL_S", "1.0")),
        environment=merged.get("CLAWDLETS_ENVIRONMENT", ""),
    )


def admin_keys(layout: Layout, declared: Host, *, home: str) -> tuple[str, ...]:
    """The keys that a host's admin accepts: ``sshAuthorizedKeys``, and the key in ``sshPubkeyFile`` when it is not among
    them. SettingsError when that file cannot be read or is no public key."""
    keys = list(declared.ssh_authorized_keys)
    if declared.provisioning.ssh_pubkey_file:
        line = read_public_key(_expand(layout, declared.provisioning.ssh_pubkey_file, home=home))
        if line.split()[:2] not in [key.split()[:2] for key in keys]:
            keys.append(line)
    return tuple(keys)


def read_public_key(path: Path) -> str:
    """The one public key line in ``path``; SettingsError when it is missing or is none."""
    try:
        line = path.read_text().strip()
        check_public_key(line)
    except OSError as error:
        raise SettingsError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            fix="it is named by provisioning.sshPubkeyFile; make it with ssh-keygen -t ed25519, or name another",
        ) from error
    except ValueError as error:
        raise SettingsError(str(error), where=str(path)) from error
    return line


def _expand(layout: Layout, name: str, *, home: str) -> Path:
    return Path(home) / name[2:] if name.startswith("~/") else layout.root / name


def _read_env_file(layout: Layout) -> dict[str, str]:
    if not layout.env_file.exists():
        return {}
    values: dict[str, str] = {}
    for number, line in enumerate(read_private(layout.env_file).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, value = line.partition("=")
        if not separator or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key.strip()):
            raise SettingsError("is not of the form KEY=VALUE", where=f"{layout.env_file}:{number}")
        values[key.strip()] = value.strip()
    return values


def _operator_name(environ: Mapping[str, str]) -> str:
    raw = environ.get("CLAWDLETS_OPERATOR") or environ.get("USER") or "operator"
    return re.sub(r"[^a-z0-9_-]", "-", raw.lower()).strip("-") or "operator"


def _read_vantages(layout: Layout, endpoint: str) -> tuple[Vantage, ...]:
    """The declared vantages, else this machine alone, whose control is the cloud's API itself."""
    if not layout.vantages_file.exists():
        parts = urlsplit(endpoint)
        target = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        return (Vantage("operator", "internet", controls={4: target, 6: target}),)
    try:
        raw = json.loads(layout.vantages_file.read_text())
        return tuple(
            Vantage(
                name=entry["name"],
                side=entry["side"],
                via=tuple(entry.get("via", ())),
                controls={
                    int(family): (target[0], int(target[1])) for family, target in entry.get("controls", {}).items()
                },
                bash=bool(entry.get("bash", False)),
            )
            for entry in raw
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SettingsError(f"is not a list of vantages: {error!r}", where=str(layout.vantages_file)) from error
