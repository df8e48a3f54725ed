"""That the host which came back is the one that was installed: its key, its state, its secrets, its payload."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from pathlib import Path
from typing import Any, Final

from clawdlets_ops import ssh
from clawdlets_ops.errors import InstallRefused
from clawdlets_ops.layout import INSTALL_MARKER, INSTALL_RECEIPT, RUN_SECRETS
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.plan import needs

ACTIVATED_WITHIN_S: Final = 120.0
ADMIN_LET_IN_WITHIN_S: Final = 120.0


def payload_digest(tree: Path) -> str:
    """What install.json on the host will say of the payload."""
    return str(json.loads((tree / INSTALL_MARKER.path.relative_to("/")).read_text())["payloadDigest"])


def prove(project: Project, host: str, target: ssh.Target, digest: str) -> dict[str, Any]:
    """What the installed host says of itself, once it runs with its secrets in place; InstallRefused unless it is ours."""
    wait = int(ACTIVATED_WITHIN_S)
    fix = "journalctl on the host says why; when a secret is at fault, put it right and run again"
    started = time.monotonic()
    names = [need.name for need in needs(host, project.fleet.host(host)) if need.kind != "password-hash"]
    with ssh.session(target, booting_s=ADMIN_LET_IN_WITHIN_S) as shell:
        state = shell.run(f"timeout {wait} systemctl is-system-running --wait", timeout_s=wait + 10)
        if not state.ok:
            failed = shell.run("systemctl list-units --failed --no-legend --plain").stdout.strip()
            said = state.stdout.strip() or "not running"
            raise InstallRefused(f"is installed, but its system is {said}: {failed}", where=str(target), fix=fix)
        there = shell.run(f"cd {RUN_SECRETS} && ls -d -- {shlex.join(names) or '.'}").stdout.split()
        if missing := [name for name in names if name not in there]:
            raise InstallRefused(
                f"is installed, but these secrets were not decrypted: {', '.join(missing)}", where=str(target), fix=fix
            )
        marker = json.loads(shell.check(f"cat {shlex.quote(str(INSTALL_MARKER.path))}"))
        on_host = shell.run(f"cat {shlex.quote(str(INSTALL_RECEIPT.path))}")
    if marker.get("payloadDigest") != digest:
        raise InstallRefused(
            f"runs another payload ({str(marker.get('payloadDigest'))[:12]}) than the one here ({digest[:12]})",
            where=str(target),
            fix=f"sync the secrets, or install it anew by name: --data reinstall={host}",
        )
    return {
        "installedAs": marker,
        "systemState": state.stdout.strip(),
        "secretsActivated": sorted(there),
        "provenInS": round(time.monotonic() - started, 3),
        "onHost": hashlib.sha256(on_host.stdout.encode()).hexdigest() if on_host.ok else None,
    }
