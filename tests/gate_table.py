"""Each forbidden plan and each failing preflight as data: what it is, and the call that refuses it.

``python -m tests.gate_table`` prints docs/reference/gates.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.fleet import Host, parse_fleet
from clawdlets_ops.hetzner import (
    HOST_LABEL,
    MANAGED_BY,
    MANAGER,
    Firewall,
    FirewallRule,
    Offer,
    PlacementGroup,
    PrimaryIp,
    Server,
    SshKey,
    Volume,
)
from clawdlets_ops.provision import Observed, plan
from clawdlets_ops.provision.gate import DESTROY, EXPOSURE, PROVISION, UNPROTECT, Stage, gate
from clawdlets_ops.provision.preflight import preflight, require_writable
from clawdlets_ops.testing import FakeCloud

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
OURS = {MANAGED_BY: MANAGER, HOST_LABEL: "alpha"}
PROVIDER = "registry.example/hetznercloud/hcloud"


@dataclass(frozen=True)
class Row:
    """``what`` for people; ``act`` raises the refusal."""

    group: str
    what: str
    act: Callable[[], object]

    def refusal(self) -> ClawdletsError:
        try:
            self.act()
        except ClawdletsError as error:
            return error
        raise AssertionError(f"{self.what}: was not refused")


def declared(**host: Any) -> Host:
    base = {"provisioning": {"adminCidrs": ["203.0.113.0/24"]}, "sshAuthorizedKeys": [KEY_LINE]}
    return parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": {**base, **host}}})).host("alpha")


def entry(address: str, *actions: str, before: Any = None, after: Any = None, **more: Any) -> dict[str, Any]:
    """One of ``resource_changes``."""
    change = {"actions": list(actions), "before": before, "after": after, **more.pop("change", {})}
    made = {"address": address, "type": address.split(".")[0], "mode": "managed", "provider_name": PROVIDER}
    return {**made, "change": change, **more}


def plan_of(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format_version": "1.2", "resource_changes": list(entries), **more}


def _gate(stage: Stage, what: str, *entries: dict[str, Any], **more: Any) -> Row:
    exists = more.pop("exists", ())
    return Row(
        f"The plan of OpenTofu, {stage.name} stage",
        what,
        lambda: gate(plan_of(*entries, **more), stage=stage, host="alpha", exists=exists),
    )


def server(**changes: Any) -> Server:
    made = Server(
        44, "alpha", "running", OURS, "cx23", "nbg1", "198.51.100.7", "2001:db8::1", {38: "applied"}, protected=True
    )
    return dataclasses.replace(made, **changes)


FIREWALL = Firewall(38, "alpha-edge", OURS, (FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0")),))
KEY = SshKey(7, "k", OURS, "aa:bb")


def _plan(what: str, hetzner: dict[str, Any] | None = None, **seen: Any) -> Row:
    observed = Observed(seen.pop("server", server()), seen.pop("firewall", FIREWALL), KEY, host="alpha", **seen)
    return Row(
        "The fleet file against what the API shows",
        what,
        lambda: plan("alpha", declared(hetzner=hetzner or {}), observed, public_key=KEY_LINE, endpoint="http://h/v1"),
    )


def _preflight(what: str, hetzner: dict[str, Any] | None = None, **cloud: Any) -> Row:
    offers = [
        Offer("cx23", "x86", frozenset({"fsn1", "hel1"})),
        Offer("cx33", "x86", frozenset({"nbg1"})),
        Offer("cax11", "arm", frozenset({"nbg1"})),
    ]
    made = FakeCloud(offer_list=offers, **cloud)
    return Row(
        "Preflight of a new server",
        what,
        lambda: (require_writable(made), preflight("alpha", declared(hetzner=hetzner or {}), made)),
    )


_RULE = [{"direction": "in", "port": "22"}]
_FOREIGN = {MANAGED_BY: "somebody"}

ROWS: tuple[Row, ...] = (
    _gate(PROVISION, "deletes the server", entry("hcloud_server.host", "delete")),
    _gate(PROVISION, "replaces the server", entry("hcloud_server.host", "delete", "create")),
    _gate(PROVISION, "replaces the server, the new one first", entry("hcloud_server.host", "create", "delete")),
    _gate(PROVISION, "deletes a reserved address", entry("hcloud_primary_ip.ipv4", "delete")),
    _gate(PROVISION, "replaces a reserved address", entry("hcloud_primary_ip.ipv4", "delete", "create")),
    _gate(PROVISION, "deletes a volume", entry("hcloud_volume.data", "delete")),
    _gate(PROVISION, "replaces a volume", entry("hcloud_volume.data", "create", "delete")),
    _gate(PROVISION, "deletes the firewall", entry("hcloud_firewall.edge", "delete")),
    _gate(
        PROVISION, "makes a server that exists", entry("hcloud_server.host", "create"), exists=("hcloud_server.host",)
    ),
    _gate(
        PROVISION,
        "changes the server's type, which stops it",
        entry("hcloud_server.host", "update", before={"server_type": "cx23"}, after={"server_type": "cx33"}),
    ),
    _gate(
        PROVISION,
        "changes the server's addresses, which stops it",
        entry(
            "hcloud_server.host", "update", before={"public_net": []}, after={"public_net": [{"ipv4_enabled": False}]}
        ),
    ),
    _gate(
        PROVISION,
        "changes something whose new value is not known yet",
        entry("hcloud_server.host", "update", change={"after_unknown": {"placement_group_id": True}}),
    ),
    _gate(
        PROVISION,
        "leaves a firewall without a rule",
        entry("hcloud_firewall.edge", "update", before={"rule": _RULE}, after={"rule": []}),
    ),
    _gate(
        PROVISION,
        "makes a volume smaller",
        entry("hcloud_volume.data", "update", before={"size": 20}, after={"size": 10}),
    ),
    _gate(PROVISION, "forgets a resource", entry("hcloud_server.host", "forget")),
    _gate(PROVISION, "makes a resource that is no part of a host", entry("hcloud_load_balancer.x", "create")),
    _gate(PROVISION, "touches another provider's resource", entry("aws_instance.x", "create", provider_name="x/y/aws")),
    _gate(
        PROVISION, "has a left-over of an interrupted replacement", entry("hcloud_server.host", "delete", deposed="0f3")
    ),
    _gate(PROVISION, "has a format that is not known", format_version="2.0"),
    _gate(PROVISION, "is incomplete", errored=True),
    _gate(
        EXPOSURE,
        "changes labels",
        entry("hcloud_server.host", "update", before={"labels": {}}, after={"labels": {"team": "bots"}}),
    ),
    _gate(EXPOSURE, "makes a server", entry("hcloud_server.host", "create")),
    _gate(EXPOSURE, "deletes a volume", entry("hcloud_volume.data", "delete")),
    _gate(
        UNPROTECT,
        "protects instead",
        entry("hcloud_server.host", "update", before={"delete_protection": False}, after={"delete_protection": True}),
    ),
    _gate(UNPROTECT, "deletes something", entry("hcloud_firewall.edge", "delete")),
    _gate(
        DESTROY,
        "changes something instead of deleting it",
        entry("hcloud_server.host", "update", before={"labels": {}}, after={"labels": {"a": "b"}}),
    ),
    _plan("another server type", server=server(server_type="cx33")),
    _plan("another location", server=server(location="fsn1")),
    _plan("no IPv4 declared, and the server has one", {"ipv4": False}),
    _plan("reserved addresses declared, and the server's are its own", {"reservedIps": True}),
    _plan(
        "another placement group",
        {"placementGroup": "apart"},
        placement_group=PlacementGroup(9, "apart", OURS, frozenset()),
    ),
    _plan("a volume no longer declared", volumes=(Volume(6, "alpha-data", OURS, 10, 44),)),
    _plan(
        "a volume declared smaller than it is",
        {"volumes": {"data": {"sizeGb": 10}}},
        volumes=(Volume(6, "alpha-data", OURS, 20, 44, protected=True),),
    ),
    _plan("a reserved address no longer declared", primary_ips=(PrimaryIp(5, "alpha-ipv4", OURS, "ipv4", 44),)),
    _plan("a server of that name that is not ours", server=server(labels=_FOREIGN)),
    _plan("a firewall of that name that is not ours", firewall=dataclasses.replace(FIREWALL, labels=_FOREIGN)),
    _plan(
        "a volume of that name that is not ours",
        {"volumes": {"data": {}}},
        volumes=(Volume(6, "alpha-data", _FOREIGN, 10, None),),
    ),
    _plan("a server that is off", server=server(status="off")),
    _preflight("a token that may only read", writable=False),
    _preflight("a type that is not to be had there"),
    _preflight("a type that does not exist", {"serverType": "cx99"}),
    _preflight("a type of the other architecture", {"serverType": "cax11"}),
    _preflight("none of type and fallbacks", {"serverType": "cx23", "serverTypeFallbacks": ["cax11", "cx99"]}),
    _preflight("an image that does not exist", {"serverType": "cx33", "image": "plan9-4"}),
)

_HEAD = """\
# What is refused, and how it is said

Before anything is changed, three things have to agree: the fleet file with what the API shows, the order with what can be
had, and the plan that OpenTofu saved with what the stage is about. Each row was refused by the code that a deploy runs;
`tests/unit/test_gate_table.py` holds this page against it (`python -m tests.gate_table` prints it).

The exit code is that of `clawdlets`. With pyinfra the host fails with the same message, the other hosts go on, and
pyinfra ends with 1.

`--allow-replace HOST` (pyinfra: `--data allow_replace=HOST`) lets a plan delete or replace the server, the reserved
addresses and the volumes of that host. Their delete protection is then taken off first, by a plan of its own.
"""


def page(exit_code: Callable[[ClawdletsError], int]) -> str:
    """The whole page; ``exit_code`` says how the command line ends with an error."""
    parts = [_HEAD]
    for group in dict.fromkeys(row.group for row in ROWS):
        parts.append(f"\n## {group}\n\n| what | error | message | exit code |\n|---|---|---|---|\n")
        for row in ROWS:
            if row.group == group:
                error = row.refusal()
                said = str(error).replace("\n", "<br>").replace("|", "\\|")
                parts.append(f"| {row.what} | `{type(error).__name__}` | {said} | {exit_code(error)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page(lambda _: 1))
