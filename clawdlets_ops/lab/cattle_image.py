"""A snapshot for the lab's cattle: Debian with what the NixOS image for cattle has, from the same plain files.

What runs there is ``hostfiles/cattle``, as it is on NixOS. The lab's own are: the programs' place, a tailscaled that trusts the
lab's coordination server, and a user ``admin`` for operators. Made through the lab's API, as anybody makes a snapshot: a server is
ordered, filled, switched off, taken a picture of, and deleted.
"""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any, Final

from clawdlets_ops import hostfiles
from clawdlets_ops.errors import LabError
from clawdlets_ops.lab import control
from clawdlets_ops.lab.client import LabClient
from clawdlets_ops.lab.headscale import REAL, Programs, up_words
from clawdlets_ops.lab.host_tailnet import CERTIFICATE, join_program, tailscaled_unit
from clawdlets_ops.lab.processes import wait_until
from clawdlets_ops.lab.registry import LabRecord, read_record
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, Runner

PROGRAMS: Final = "usr/local/bin"
UNITS: Final = "etc/systemd/system"
LABEL: Final = {"clawdlets-lab": "cattle-image"}

_WAIT_S = 180.0
_SSHD = "PermitRootLogin no\nAuthorizedKeysFile /run/clawdlets/authorized_keys\nPasswordAuthentication no\n"
_SETUP = """set -eu
systemd-sysusers /usr/lib/sysusers.d/clawdlets-cattle.conf
id admin >/dev/null 2>&1 || useradd --create-home --shell /bin/bash --groups systemd-journal admin
[ ! -e /etc/systemd/system/tailscaled.service ] || systemctl enable --quiet tailscaled.service
sync
"""

Files = dict[str, tuple[int, bytes]]


def files(record: LabRecord) -> Files:
    """Path below the root to mode and content; LabError when the tailnet's programs are gone."""
    found: Files = {
        f"{PROGRAMS}/{name}": (0o555, hostfiles.text(f"cattle/{name}").encode())
        for name in ("clawdlets-cattle", "clawdlets-task")
    }
    for name in ("clawdlets-cattle.service", "clawdlets-task.service"):
        unit = hostfiles.text(f"cattle/{name}").replace("@BIN@", f"/{PROGRAMS}")
        found[f"{UNITS}/{name}"] = (0o644, unit.encode())
    found["etc/clawdlets/cattle/egress.nft"] = (0o644, hostfiles.text("cattle/egress.nft").encode())
    found["usr/lib/sysusers.d/clawdlets-cattle.conf"] = (0o644, hostfiles.text("cattle/sysusers.conf").encode())
    found["etc/ssh/sshd_config.d/clawdlets-cattle.conf"] = (0o644, _SSHD.encode())
    if record.tailnet != REAL:
        words = ["/bin/sh", "-c", 'mkdir -p /run/secrets && cp "$1" /run/secrets/tailscale_auth_key && exec "$2" "$3"']
        words += ["join", "@KEY_FILE@", f"/{PROGRAMS}/clawdlets-join", record.tailnet_control]
        found[f"{PROGRAMS}/clawdlets-join"] = (0o555, join_program())
        found["etc/clawdlets/cattle/join.json"] = (0o644, json.dumps(words).encode())
        return found
    built = Programs.find(Layout(record.root).cache / "tools")
    if built is None:
        raise LabError("headscale and tailscaled are gone", where=str(record.root), fix="make tailnet")
    client = f'#!/bin/sh\nTS_BE_CLI=1 exec /{PROGRAMS}/tailscaled "$@"\n'
    words = ["tailscale", *up_words(record.net, "@NAME@", "@KEY_FILE@")]
    return found | {
        f"{PROGRAMS}/tailscaled": (0o555, built.tailscaled.read_bytes()),
        f"{PROGRAMS}/tailscale": (0o555, client.encode()),
        CERTIFICATE.lstrip("/"): (0o644, (record.lab_dir / "tailnet" / "cert.pem").read_bytes()),
        f"{UNITS}/tailscaled.service": (0o644, tailscaled_unit(f"/{PROGRAMS}").encode()),
        "etc/clawdlets/cattle/join.json": (0o644, json.dumps(words).encode()),
    }


def make(layout: Layout, runner: Runner) -> int:
    """The id of a snapshot to order cattle from; the one that is there, if any. LabError, CommandError."""
    record = read_record(layout.lab)
    if record is None:
        raise LabError("there is no lab", where=str(layout.lab), fix="clawdlets lab up")
    client = LabClient(record)
    for image in client.get("/images?type=snapshot")["images"]:
        if image["labels"] == LABEL and image["status"] == "available":
            return int(image["id"])
    name = "cattle-image"
    server = client.send(
        "POST",
        "/servers",
        {"name": name, "server_type": "cx23", "image": "debian-12", "location": "nbg1", "start_after_create": True},
    )["server"]
    ident = int(server["id"])
    try:
        _until(lambda: _status(client, ident) == "running", "does not start")
        _until(lambda: _booted(layout, name, runner), "does not boot")
        archive = _tar(files(record))
        unpack = Command(control.guest_argv(layout, name, ["tar", "-x", "-C", "/"]), "fill the image", stdin=archive)
        runner.run(unpack).check()
        runner.run(Command(control.guest_argv(layout, name, ["sh", "-c", _SETUP]), "set the image up")).check()
        client.send("POST", f"/servers/{ident}/actions/poweroff", {})
        _until(lambda: _status(client, ident) == "off", "does not stop")
        made = client.send(
            "POST", f"/servers/{ident}/actions/create_image", {"description": "clawdlets cattle", "labels": LABEL}
        )["image"]
        image_id = int(made["id"])
        _until(lambda: client.get(f"/images/{image_id}")["image"]["status"] == "available", "is not taken")
    finally:
        client.send("DELETE", f"/servers/{ident}")
    return image_id


def _status(client: LabClient, ident: int) -> str:
    return str(client.get(f"/servers/{ident}")["server"]["status"])


def _booted(layout: Layout, name: str, runner: Runner) -> bool:
    try:
        argv = control.guest_argv(layout, name, ["systemctl", "is-active", "multi-user.target"])
    except LabError:
        return False
    return runner.run(Command(argv, "ask the image's machine")).ok


def _until(ready: Any, what: str) -> None:
    if not wait_until(ready, timeout_s=_WAIT_S):
        raise LabError(f"the image's machine {what}", where="cattle-image")


def _tar(found: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, (mode, content) in sorted(found.items()):
            entry = tarfile.TarInfo(path)
            entry.mode, entry.size = mode, len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
