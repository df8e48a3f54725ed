"""What a running lab puts into the operator's runtime dir, so that every other command simply finds a cloud.

All private (0600, wrappers 0755): the settings in ``.clawdlets/env``, the vantage points, the lab's token, auth key and
secrets, tofu's settings, and the programs that the lab plays. The operator's SSH key pair is made once and stays.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path

import clawdlets_ops
from clawdlets_ops.errors import LabError
from clawdlets_ops.files import ensure_dir, read_private, write_atomic
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.lab import real_installer
from clawdlets_ops.lab.headscale import REAL, STAND_IN
from clawdlets_ops.lab.registry import LabRecord
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, Runner

MARK = "CLAWDLETS_ENVIRONMENT=lab"
TOKEN_CHARS = 64
POLL_INTERVAL_S = 0.05


def source_root() -> str:
    """The folder that this package is imported from: what the lab starts is this code, not another installation."""
    return str(Path(clawdlets_ops.__file__).resolve().parent.parent)


def refuse_foreign(layout: Layout) -> None:
    """LabError when the runtime dir's settings are not a lab's: they lead to a real cloud."""
    foreign = layout.env_file.exists() and not _is_labs(layout)
    if foreign or (layout.vantages_file.exists() and not layout.env_file.exists() and not _vantages_are_labs(layout)):
        raise LabError(
            "this runtime dir belongs to another environment",
            where=str(layout.env_file if foreign else layout.vantages_file),
            fix="use another checkout for the lab",
        )


def prepare(layout: Layout, record: LabRecord) -> None:
    """What the lab's process needs before it starts; nothing that exists is changed but the record."""
    for folder in (layout.runtime, layout.lab):
        ensure_dir(folder)
    record.write()
    alphabet = string.ascii_letters + string.digits
    _once(layout.lab / "token", lambda: "".join(secrets.choice(alphabet) for _ in range(TOKEN_CHARS)))
    if record.tailnet == STAND_IN:
        _once(layout.lab / "tailnet_auth_key", lambda: f"tskey-auth-lab-{secrets.token_hex(20)}")


def write(layout: Layout, record: LabRecord, runner: Runner) -> None:
    """What the operator's commands need, of a lab that answers; FleetError, LabError, CommandError."""
    lab = layout.lab
    tools = layout.cache / "tools"
    ensure_dir(lab / "bin", 0o755)
    for program, module in (("tailscale", "stand_in_tailscale"), ("nixos-anywhere", "installer")):
        words = [sys.executable, "-m", f"clawdlets_ops.lab.{module}", "--lab-dir", str(lab)]
        script = f'#!/bin/sh\nPYTHONPATH={shlex.quote(source_root())} exec {shlex.join(words)} "$@"\n'
        write_atomic(lab / "bin" / program, script, mode=0o755)
    words = [sys.executable, "-m", "clawdlets_ops.lab.real_installer", "--lab-dir", str(lab)]
    nix = f'#!/bin/sh\nPYTHONPATH={shlex.quote(source_root())} exec {shlex.join(words)} "$@"\n'
    real_installer.write(lab / "real", nix)
    write_nix(lab, shutil.which("nix", path=record.path))
    if record.tailnet == REAL:
        words = [str(tools / "tailnet" / "tailscale"), f"--socket={lab / 'tailnet' / 'operator.sock'}"]
        write_atomic(lab / "bin" / "tailscale", f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', mode=0o755)
    # Only from the mirror: tofu asks nobody else.
    mirror = json.dumps(str(tools / "mirror"))
    write_atomic(lab / "tofurc", f"provider_installation {{\n  filesystem_mirror {{\n    path = {mirror}\n  }}\n}}\n")
    _write_secrets(layout)
    _make_ssh_key(layout, runner)
    write_atomic(layout.vantages_file, json.dumps(record.net.vantages(nodes=record.tailnet == REAL), indent=1) + "\n")
    settings = {
        "HCLOUD_TOKEN": read_private(lab / "token").strip(),
        "HCLOUD_ENDPOINT": record.endpoint,
        "CLAWDLETS_TOOL_PATH": f"{lab / 'bin'}:{tools / 'bin'}",
        "TF_CLI_CONFIG_FILE": str(lab / "tofurc"),
        "CLAWDLETS_SECRETS_FILE": str((lab / "secrets.json").relative_to(layout.root)),
        "CLAWDLETS_POLL_INTERVAL_S": str(POLL_INTERVAL_S),
    }
    write_atomic(layout.env_file, "\n".join([MARK, *(f"{key}={value}" for key, value in settings.items())]) + "\n")


def remove(layout: Layout) -> None:
    """Take the lab's settings and vantage points out of the runtime dir, and leave those of others alone."""
    if layout.vantages_file.exists() and _vantages_are_labs(layout):
        layout.vantages_file.unlink()
    if layout.env_file.exists() and _is_labs(layout):
        layout.env_file.unlink()


def _is_labs(layout: Layout) -> bool:
    return MARK in read_private(layout.env_file).splitlines()


def _vantages_are_labs(layout: Layout) -> bool:
    """By the lab's namespaces in it."""
    try:
        entries = json.loads(layout.vantages_file.read_text())
        return any(word.startswith("clf") and word.endswith("-out") for entry in entries for word in entry["via"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def write_nix(lab: Path, own: str | None) -> None:
    """Where this machine has a Nix, the lab's stand-in answers what is asked of this project's flake (there is none: the
    lab's installer reads the fleet file), and everything else goes to ``own``. Without one there is none in the lab."""
    program = lab / "bin" / "nix"
    if own is None:
        program.unlink(missing_ok=True)
        return
    script = f"""#!/bin/sh
for word; do
  case $word in
    git+file://*"#nixosConfigurations") exec {shlex.quote(str(lab / "real" / "nix"))} "$@" ;;
  esac
done
exec {shlex.quote(own)} "$@"
"""
    write_atomic(program, script, mode=0o755)


def _once(file: Path, make: Callable[[], str]) -> None:
    if not file.exists():
        write_atomic(file, make() + "\n")


def _write_secrets(layout: Layout) -> None:
    """A value for every secret that the fleet's hosts are to have, by host; those that there are stay."""
    file = layout.lab / "secrets.json"
    values: dict[str, dict[str, str]] = json.loads(read_private(file)) if file.exists() else {}
    auth_key = read_private(layout.lab / "tailnet_auth_key").strip()
    for name, host in load_fleet(layout.fleet_file).hosts.items():
        wanted = values.setdefault(name, {})
        for secret in ("admin_password", "breakglass_password", *host.secrets):
            wanted.setdefault(secret, f"canary-{secret}-{secrets.token_hex(12)}")
        wanted["tailscale_auth_key"] = auth_key
    write_atomic(file, json.dumps(values, indent=1) + "\n")


def _make_ssh_key(layout: Layout, runner: Runner) -> None:
    private = layout.operator_key("operator").with_name("ssh_ed25519")
    if private.exists():
        return
    ensure_dir(private.parent)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "operator@clawdlets-lab", "-f", str(private)]
    runner.run(Command(argv, "make the operator's SSH key pair")).check()
