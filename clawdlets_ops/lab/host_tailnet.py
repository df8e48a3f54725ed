"""What a host's profile holds so that the host joins the lab's tailnet, the real one or the stand-in.

On the real one as NixOS's module ``services.tailscale`` has it: ``tailscaled.service``, whose state outlives a reboot, and
``tailscaled-autoconnect.service``, which logs in with the auth key among the host's secrets unless the state does. What
differs: the login server is the lab's, its certificate is trusted, and the key is named by its file.
"""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

from clawdlets_ops import hostfiles
from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.headscale import REAL, Programs, node_environment, up_words
from clawdlets_ops.lab.registry import read_record
from clawdlets_ops.layout import Layout

AUTH_KEY = "/run/secrets/tailscale_auth_key"
CERTIFICATE = "/etc/clawdlets/tailnet.pem"
UNITS = "etc/systemd/system"

_PROGRAMS = "/nix/var/nix/profiles/system/sw/bin"
_TAILSCALED = """\
[Unit]
Description=Tailscale node
After=clawdlets-firewall.service network.target
[Service]
Type=notify
{environment}
ExecStart={programs}/tailscaled --no-logs-no-support --port=41641 --tun=tailscale0 \
--state=/var/lib/tailscale/tailscaled.state --socket=/run/tailscale/tailscaled.sock
Restart=on-failure
RuntimeDirectory=tailscale
{service}
StateDirectory=tailscale
StateDirectoryMode=0700
[Install]
WantedBy=multi-user.target
"""
_JOIN = f"""\
[Unit]
Description=Join the lab's tailnet
After=sops-install-secrets.service network.target{{after}}
Requires=sops-install-secrets.service
StartLimitIntervalSec=0
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={_PROGRAMS}/clawdlets-join{{words}}
TimeoutStartSec=90
Restart=on-failure
RestartSec=5
[Install]
WantedBy=multi-user.target
"""

Files = dict[str, tuple[int, bytes]]


def tailscaled_unit(programs: str) -> str:
    """``tailscaled.service`` of a guest, whose programs are in this folder."""
    environment = "\n".join(f"Environment={key}={value}" for key, value in node_environment(Path(CERTIFICATE)).items())
    # As NixOS has it: nix/modules/tailscale.nix.
    service = "\n".join(f"{key}={value}" for key, value in hostfiles.data("tailnet.json")["service"].items())
    return _TAILSCALED.format(environment=environment, programs=programs, service=service)


def join_program() -> bytes:
    """The program that joins the stand-in."""
    return (resources.files("clawdlets_ops.lab") / "profile" / "clawdlets-join").read_bytes()


def host_files(lab_dir: Path, host: str, programs: str) -> Files:
    """Path below the root to mode and content, for a host with ``tailnet.mode`` tailscale on the lab of this folder.
    ``programs`` is where its programs go. Nothing secret: the payload brings the key. LabError when there is no lab."""
    record = read_record(lab_dir)
    if record is None:
        raise LabError("there is no lab", where=str(lab_dir), fix="clawdlets lab up")
    shipped = resources.files("clawdlets_ops.lab") / "profile"
    if record.tailnet != REAL:
        return {
            f"{programs}/clawdlets-join": (0o555, (shipped / "clawdlets-join").read_bytes()),
            f"{UNITS}/tailscaled-autoconnect.service": (
                0o644,
                _JOIN.format(after="", words=f" {record.tailnet_control}").encode(),
            ),
        }
    built = Programs.find(Layout(record.root).cache / "tools")
    if built is None:
        raise LabError("headscale and tailscaled are gone", where=str(record.root), fix="make tailnet")
    words = f" {shlex.join(up_words(record.net, host, AUTH_KEY))}"
    return {
        f"{programs}/clawdlets-join": (0o555, (shipped / "clawdlets-join-real").read_bytes()),
        f"{programs}/tailscaled": (0o555, built.tailscaled.read_bytes()),
        f"{programs}/tailscale": (0o555, f'#!/bin/sh\nTS_BE_CLI=1 exec {_PROGRAMS}/tailscaled "$@"\n'.encode()),
        CERTIFICATE.lstrip("/"): (0o644, (record.lab_dir / "tailnet" / "cert.pem").read_bytes()),
        f"{UNITS}/tailscaled.service": (0o644, tailscaled_unit(_PROGRAMS).encode()),
        f"{UNITS}/tailscaled-autoconnect.service": (
            0o644,
            _JOIN.format(after=" tailscaled.service\nWants=tailscaled.service", words=words).encode(),
        ),
    }
