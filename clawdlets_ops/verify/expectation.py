"""What must hold on a host, as one JSON document: all that the suite knows. Pure; holds no secret, only names of secrets.

``mode`` says what the exposure should be now; the two families are always two entries. Modes are octal strings.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from clawdlets_ops import hostfiles
from clawdlets_ops.bots import bot_user
from clawdlets_ops.egress import DROPPED_TCP_PORTS, Policy, policy_of
from clawdlets_ops.errors import VerifyError
from clawdlets_ops.fleet import Host, world_open
from clawdlets_ops.layout import (
    CLF_RUN_DIR,
    HOST_AGE_KEY,
    HOST_AGE_KEY_DIR,
    HOST_PROGRAMS,
    ORCHESTRATOR_DATABASE,
    ORCHESTRATOR_SOCKET,
    ORCHESTRATOR_STATE_DIR,
    RUN_SECRETS,
    SSH_HOST_KEY,
    SSH_HOST_PUBLIC_KEY,
    OnServer,
    secret_file_on_server,
    secrets_dir_on_server,
)
from clawdlets_ops.secrets.plan import Need, needs
from clawdlets_ops.tailnet import MIN_KEY_LIFE, Peer
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify import EXPECTATION_VERSION

REFUSALS = 12  # how many requests clawdlets-egress makes for what is on nobody's list
ADMIN = "admin"
OPERATOR_VANTAGE = "operator"
SYSTEM_PROGRAMS = str(HOST_PROGRAMS)
TAILSCALE_INTERFACE: str = hostfiles.data("tailnet.json")["interface"]
TAILSCALE_UDP_PORT: int = hostfiles.data("tailnet.json")["udpPort"]
# Looked at from outside whatever the host says: web servers, proxies, and where a second SSH server would be.
OFTEN_OPEN = (80, 443, 2222, 8022, 8080)
PASSWORD_HASH_SUFFIX = "_password_hash"  # noqa: S105 - the end of a name
# What clawdlets-facts asks sshd about: users that exist and one that does not; loopback, tailnet, internet on both families.
SSHD_USERS = (ADMIN, "breakglass", "nobody-such", "root")
SSHD_SOURCES = ("100.64.0.1", "127.0.0.1", "2001:db8::9", "203.0.113.9")


def build_expectation(
    *,
    host: str,
    declared: Host,
    mode: Literal["tailnet", "bootstrap", "public"],
    public: Mapping[int, str],
    tailnet: Mapping[int, str],
    tailnet_ports: Sequence[int] = (),
    ssh_port: int = 22,
    pin: str,
    admin_keys: tuple[str, ...],
    identity_file: str,
    vantages: Sequence[Vantage],
    cloud: Mapping[str, Any] | None,
    node: Peer | None = None,
) -> dict[str, Any]:
    """The document for one host.

    ``public`` and ``tailnet`` map a family (4, 6) to an address; ``tailnet_ports`` are open to the tailnet besides SSH;
    ``pin`` and ``admin_keys`` are public key lines; ``cloud`` is what the API shows: ``{"server": {name, status, labels},
    "firewalls": [{name, status, "rules": [{direction, protocol, port, sourceIps}]}]}``, None when it could not be asked;
    ``node`` is the host as the operator's tailscale sees it. VerifyError when there is no address to log in at.
    """
    network = "tailnet" if mode == "tailnet" else "public"
    addresses = tailnet if mode == "tailnet" else public
    if not addresses:
        raise VerifyError(
            f"sshExposure.mode is {mode}, and no {network} address of the host is known",
            where=host,
            fix="is the host up, and on the tailnet? declare targetHost if the tailnet cannot be asked",
        )
    world = bool(world_open(declared.provisioning.networks))
    return {
        "expectationVersion": EXPECTATION_VERSION,
        "host": host,
        "mode": mode,
        "ssh": {
            "network": network,
            "address": addresses[min(addresses)],
            "port": ssh_port,
            "user": ADMIN,
            "identityFile": identity_file,
            "pin": " ".join(pin.split()[:2]),
            "pinFingerprint": fingerprint(pin),
        },
        "addresses": {"public": _by_family(public), "tailnet": _by_family(tailnet)},
        "vantages": [_vantage(vantage, mode, world=world) for vantage in vantages],
        "adminKeys": [{"type": key.split()[0], "fingerprint": fingerprint(key)} for key in admin_keys],
        "adminCidrs": list(declared.provisioning.admin_cidrs),
        "worldOpen": world,
        "closedPorts": [port for port in OFTEN_OPEN if port != ssh_port],
        "sshdUsers": list(SSHD_USERS),
        "sshdSources": list(SSHD_SOURCES),
        "passwordUsers": sorted(
            need.name.removesuffix(PASSWORD_HASH_SUFFIX)
            for need in needs(host, declared)
            if need.name.endswith(PASSWORD_HASH_SUFFIX)
        ),
        "sudo": {"ownPrograms": f"{SYSTEM_PROGRAMS}/clawdlets-"},
        "factsProgram": f"{SYSTEM_PROGRAMS}/clawdlets-facts",
        "tailnet": {
            "mode": declared.tailnet.mode,
            "allowUdpIngress": declared.tailnet.allow_udp_ingress,
            "interface": TAILSCALE_INTERFACE,
            "udpPort": TAILSCALE_UDP_PORT,
            "ports": list(tailnet_ports),
            "minKeyLifeDays": MIN_KEY_LIFE.days,
            "node": {"keyExpiry": node.key_expiry.isoformat() if node.key_expiry else None} if node else None,
        },
        "egress": _egress(policy_of(declared)),
        "orchestrator": _orchestrator(declared),
        "hostKeys": [_path(one) for one in (HOST_AGE_KEY_DIR, HOST_AGE_KEY, SSH_HOST_KEY, SSH_HOST_PUBLIC_KEY)],
        "secretsDir": _path(secrets_dir_on_server(host)),
        "secrets": _secrets(host, declared),
        "cloud": dict(cloud) if cloud is not None else None,
    }


def _egress(policy: Policy) -> dict[str, Any]:
    """What may go out; ``mayMail``: the users of bots that are declared to be free although their host drops mail."""
    return {
        "mode": policy.host.mode,
        "droppedTcpPorts": list(DROPPED_TCP_PORTS),
        "mayMail": [line.name for line in policy.bots if line.mode == "none"],
        "proxyPorts": [line.port for line in policy.lines if line.proxied],
        "bots": [
            {
                "name": line.name.removeprefix("bot-"),
                "user": line.name,
                "unit": f"clawdlets-{line.name}.service",
                "mode": line.mode,
                "port": line.port,
                "domains": list(line.domains),
                "refusals": REFUSALS,
            }
            for line in policy.bots
        ],
    }


def _orchestrator(declared: Host) -> dict[str, Any] | None:
    """The bots' socket and the orchestrator's state; None where it is not declared. An operator may be in the bots' group too:
    the socket is the group's."""
    if not declared.orchestrator.enable:
        return None
    return {
        "store": declared.orchestrator.store,
        "port": declared.orchestrator.bootstrap_port,
        "bots": [bot_user(name) for name in sorted(declared.bots)],
        "botsGroup": ORCHESTRATOR_SOCKET.group,
        "operatorsGroup": declared.orchestrator.operators_group,
        "runDir": _path(CLF_RUN_DIR),
        "socket": _path(ORCHESTRATOR_SOCKET),
        "stateDir": _path(ORCHESTRATOR_STATE_DIR),
        "database": _path(ORCHESTRATOR_DATABASE),
    }


def fingerprint(public_key: str) -> str:
    """The SHA256 fingerprint of a public key line as OpenSSH prints it; VerifyError when it is none."""
    try:
        body = base64.b64decode(public_key.split()[1], validate=True)
    except (IndexError, ValueError):
        raise VerifyError("is not a public key", where=public_key[:40]) from None
    return "SHA256:" + base64.b64encode(hashlib.sha256(body).digest()).decode().rstrip("=")


def _by_family(addresses: Mapping[int, str]) -> dict[str, str]:
    return {str(family): address for family, address in sorted(addresses.items())}


def _path(one: OnServer) -> dict[str, Any]:
    return {"path": str(one.path), "mode": f"{one.mode:04o}", "owner": one.owner, "group": one.group, "kind": one.kind}


def _vantage(vantage: Vantage, mode: str, *, world: bool) -> dict[str, Any]:
    """A vantage, and whether it should reach port 22. On the internet only a host that is declared public is reached:
    by the operator, by others when the whole world is declared."""
    reached = vantage.side == "tailnet" or (mode == "public" and (world or vantage.name == OPERATOR_VANTAGE))
    return {
        "name": vantage.name,
        "side": vantage.side,
        "via": list(vantage.via),
        "controls": {str(family): list(target) for family, target in sorted(vantage.controls.items())},
        "expect": "yes" if reached else "no",
        "bash": vantage.bash,
    }


def _secrets(host: str, declared: Host) -> list[dict[str, Any]]:
    """Every secret that the host holds. ``runtime`` is None for those of the system itself, which are root's alone."""

    def runtime(need: Need) -> dict[str, Any] | None:
        if need.name not in declared.secrets:
            return None
        wired = need.wiring
        return {"path": str(RUN_SECRETS / need.name), "owner": wired.owner, "group": wired.group, "mode": wired.mode}

    return [
        {"name": need.name, "file": _path(secret_file_on_server(host, need.name)), "runtime": runtime(need)}
        for need in sorted(needs(host, declared), key=lambda need: need.name)
    ]
