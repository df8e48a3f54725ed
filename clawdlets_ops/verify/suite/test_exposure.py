"""Public SSH is temporary; after lockdown port 22 is reachable over the tailnet alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from .nft import DROP, Packet, interfaces, judge, surely_dropped
from .reading import Fault, NotApplicable, Unknown, ruleset, section, settle, user_ids

Observe = Callable[[str], None]
Cells = Sequence[Mapping[str, Any]]

TEMPORARY = "Public SSH is temporary (bootstrap only; controlled by sshExposure.mode)."
EDGE = "Confirm Hetzner firewall no longer allows TCP/22 from the internet after lockdown."
HOST_FIREWALL = "Confirm NixOS firewall only allows SSH via tailscale0 when sshExposure.mode=tailnet."
UDP = "If tailnet.mode=tailscale, the Hetzner firewall allows inbound UDP/41641 for direct Tailscale connectivity."
EGRESS = "It drops outbound TCP ports { 25, 465, 587, 2525 } (SMTP variants)."


def cloud_rules(expected: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every inbound rule of the attached firewalls; Unknown when the API could not be asked.

    A firewall whose rules are None was seen to be attached, but not what it lets in: see ``unseen``.
    """
    cloud = expected["cloud"]
    if cloud is None:
        raise Unknown("the Hetzner API could not be asked")
    if not cloud.get("firewalls"):
        raise Fault("no cloud firewall is attached to the server: everything is open at the edge")
    return [rule for firewall in cloud["firewalls"] for rule in firewall["rules"] or () if rule["direction"] == "in"]


def unseen(expected: Mapping[str, Any]) -> None:
    """Unknown when there is an attached firewall whose rules nobody read."""
    if hidden := [one["name"] for one in expected["cloud"]["firewalls"] if one["rules"] is None]:
        raise Unknown(f"another firewall is attached, whose rules were not read: {', '.join(hidden)}")


def covers(rule: Mapping[str, Any], protocol: str, port: int) -> bool:
    """Whether a rule lets ``protocol``/``port`` in; a rule without a port lets all of them in."""
    if rule["protocol"] != protocol:
        return False
    if rule["port"] in (None, "", "any"):
        return True
    first, _, last = str(rule["port"]).partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise Unknown(f"the port of a cloud firewall rule is not understood: {rule['port']!r}")
    return int(first) <= port <= int(last or first)


@pytest.mark.check(
    id="EXP-01",
    severity="critical",
    claim=EDGE,
    expect="no inbound rule lets tcp/22 in (public: from adminCidrs alone)",
    fix="run lockdown; in the Hetzner console, remove the rule that lets tcp/22 in",
    vantage="api",
)
def test_edge_is_closed(expected: dict[str, Any], observe: Observe) -> None:
    """The firewall's rules as the API gives them back, not as they were sent."""
    port = expected["ssh"]["port"]
    sources = sorted(
        {source for rule in cloud_rules(expected) if covers(rule, "tcp", port) for source in rule["sourceIps"]}
    )
    if expected["mode"] != "public":
        why = "" if expected["mode"] == "tailnet" else f" (sshExposure.mode is {expected['mode']}: not locked down yet)"
        faults = [f"tcp/{port} is let in from {source}{why}" for source in sources]
        seen = f"no rule lets tcp/{port} in"
    else:
        declared = [ipaddress.ip_network(cidr) for cidr in expected["adminCidrs"]]
        strangers = [source for source in sources if not _within(source, declared)]
        faults = [f"tcp/{port} is let in from {source}, which is not declared" for source in strangers]
        seen = f"tcp/{port} is let in from the declared {', '.join(expected['adminCidrs'])} alone"
    settle(faults, seen)
    unseen(expected)
    observe(seen)


def _within(source: str, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    inner = ipaddress.ip_network(source, strict=False)
    for outer in networks:
        if (
            isinstance(inner, ipaddress.IPv4Network)
            and isinstance(outer, ipaddress.IPv4Network)
            and inner.subnet_of(outer)
        ):
            return True
        if (
            isinstance(inner, ipaddress.IPv6Network)
            and isinstance(outer, ipaddress.IPv6Network)
            and inner.subnet_of(outer)
        ):
            return True
    return False


@pytest.mark.check(
    id="EXP-02",
    severity="critical",
    claim=EDGE,
    expect="at least one firewall is attached, and each is applied",
    fix="attach the host's firewall (provision does), and wait until the API says that it is applied",
    vantage="api",
)
def test_edge_firewall_is_in_force(expected: dict[str, Any], observe: Observe) -> None:
    """A rule set that is not applied protects nobody."""
    cloud_rules(expected)
    firewalls = expected["cloud"]["firewalls"]
    faults = [
        f"the firewall {one['name']} is {one.get('status') or 'of unknown status'}, not applied"
        for one in firewalls
        if one.get("status") != "applied"
    ]
    observe(settle(faults, f"applied: {', '.join(one['name'] for one in firewalls)}"))


@pytest.mark.check(
    id="EXP-03",
    severity="critical",
    claim=HOST_FIREWALL,
    expect="input is dropped on both families; tcp/22 comes in on tailscale0 alone",
    fix="networking.firewall.interfaces.tailscale0.allowedTCPPorts = [ 22 ], services.openssh.openFirewall = false",
)
def test_host_firewall_takes_ssh_on_the_tailnet_only(
    expected: dict[str, Any], facts: dict[str, Any], observe: Observe
) -> None:
    """The ruleset in force, followed rule by rule for a first packet on every interface and family."""
    if expected["mode"] != "tailnet":
        raise NotApplicable(f"sshExposure.mode is {expected['mode']}")
    objects, tailnet, port = ruleset(facts), expected["tailnet"]["interface"], expected["ssh"]["port"]
    elsewhere = sorted(interfaces(objects) - {"lo", tailnet, ""} | {"eth0", "an interface of any name"})
    faults = []
    for family in (4, 6):
        for interface in elsewhere:
            verdicts = judge(objects, Packet(family, interface, port))
            if not verdicts:
                faults.append(f"no input chain sees IPv{family}")
            elif not surely_dropped(verdicts):
                faults.append(
                    f"tcp/{port} may come in on {interface} over IPv{family} ({'; '.join(map(str, verdicts))})"
                )
        inside = judge(objects, Packet(family, tailnet, port))
        if surely_dropped(inside):
            faults.append(f"tcp/{port} is dropped on {tailnet} over IPv{family}")
    observe(settle(faults, f"input is dropped by default on IPv4 and IPv6; tcp/{port} comes in on {tailnet} alone"))


def judge_outside(expected: Mapping[str, Any], exposure: Cells, family: int) -> str:
    """What was seen of the public address of ``family``; Fault, Unknown or NotApplicable."""
    address = expected["addresses"]["public"].get(str(family))
    if address is None:
        raise NotApplicable(f"the host has no public IPv{family} address")
    wanted = {vantage["name"]: vantage["expect"] for vantage in expected["vantages"] if vantage["side"] == "internet"}
    port = expected["ssh"]["port"]
    cells = {
        cell["vantage"]: cell
        for cell in exposure
        if (cell["side"], cell["family"], cell["port"]) == ("internet", family, port)
    }
    faults, unknown, seen = [], [], []
    for name, expect in wanted.items():
        cell = cells.get(name)
        if cell is None or cell["reach"] == "unknown":
            unknown.append(f"{name}: {cell['detail'] if cell else 'did not look'}")
        elif cell["reach"] != expect:
            verb = "reaches" if cell["reach"] == "yes" else "does not reach"
            faults.append(f"{name} {verb} {address} port {expected['ssh']['port']} ({cell['detail']})")
        else:
            seen.append(f"{name}: {cell['detail']}")
    text = settle(faults, "; ".join(seen))
    if unknown:
        raise Unknown("; ".join(unknown))
    if not wanted:
        raise Unknown("there is no vantage on the internet to look from")
    if expected["mode"] == "public" and "no" not in wanted.values() and not expected["worldOpen"]:
        raise Unknown("every vantage is allowed in: only one outside adminCidrs could see whether others are kept out")
    return text


@pytest.mark.check(
    id="EXP-04",
    severity="critical",
    claim=TEMPORARY,
    expect="no vantage on the internet reaches port 22 over IPv4, and its control is reached",
    fix="run lockdown; look at EXP-01 (edge) and EXP-03 (host)",
    vantage="outside",
)
def test_closed_from_outside_ipv4(expected: dict[str, Any], exposure: Cells, observe: Observe) -> None:
    """Real connections to the public IPv4 address from every vantage on the internet side."""
    observe(judge_outside(expected, exposure, 4))


@pytest.mark.check(
    id="EXP-05",
    severity="critical",
    claim=TEMPORARY,
    expect="no vantage on the internet reaches port 22 over IPv6, and its control is reached",
    fix="run lockdown; an IPv4-only rule leaves IPv6 open: look at EXP-01 (edge) and EXP-03 (host)",
    vantage="outside",
)
def test_closed_from_outside_ipv6(expected: dict[str, Any], exposure: Cells, observe: Observe) -> None:
    """Real connections to the public IPv6 address from every vantage on the internet side."""
    observe(judge_outside(expected, exposure, 6))


@pytest.mark.check(
    id="TS-01",
    severity="critical",
    claim=HOST_FIREWALL,
    expect="every vantage on the tailnet reaches port 22",
    fix="bring the tailnet up (systemctl status tailscaled tailscaled-autoconnect) before anything is closed",
    vantage="outside",
)
def test_reachable_over_the_tailnet(
    expected: dict[str, Any], facts: dict[str, Any], exposure: Cells, observe: Observe
) -> None:
    """Every vantage on the tailnet reaches port 22, and our own session went that way with the pinned key."""
    if expected["tailnet"]["mode"] == "none":
        raise NotApplicable("tailnet.mode is none")
    if not expected["addresses"]["tailnet"]:
        raise Unknown("the host's address on the tailnet is not known")
    faults, unknown, seen = [], [], []
    for cell in exposure:
        if cell["side"] != "tailnet":
            continue
        place = f"{cell['vantage']} over IPv{cell['family']}"
        if cell["reach"] == "no":
            faults.append(f"{place} does not reach {cell['address']} ({cell['detail']})")
        elif cell["reach"] == "unknown":
            unknown.append(f"{place}: {cell['detail']}")
        else:
            seen.append(place)
    settle(faults, "")
    if facts["network"] == "tailnet":
        section(facts, "os-release")
        seen.append("our own session, with the pinned key")
    if unknown or not seen:
        raise Unknown("; ".join(unknown) or "there is no vantage on the tailnet to look from")
    observe(f"reached by {'; '.join(seen)}")


@pytest.mark.check(
    id="UDP-01",
    severity="low",
    claim=UDP,
    expect="udp/41641 is let in exactly when tailnet.mode and allowUdpIngress say so",
    fix="tailnet.mode and tailnet.allowUdpIngress decide about UDP/41641: run provision",
    vantage="api",
)
def test_udp_rule_follows_the_tailnet(expected: dict[str, Any], observe: Observe) -> None:
    """The rule is there exactly when it is declared."""
    tailnet = expected["tailnet"]
    present = any(covers(rule, "udp", tailnet["udpPort"]) for rule in cloud_rules(expected))
    declared = tailnet["mode"] == "tailscale" and tailnet["allowUdpIngress"]
    if present and not declared:
        raise Fault(f"udp/{tailnet['udpPort']} is let in, although it is not declared")
    unseen(expected)
    if declared and not present:
        raise Fault(f"udp/{tailnet['udpPort']} is not let in: tailnet traffic can only be relayed")
    observe(f"udp/{tailnet['udpPort']} is {'let in' if present else 'not let in'}, as declared")


@pytest.mark.check(
    id="EGR-01",
    severity="high",
    claim=EGRESS,
    expect="an output chain counts and drops tcp 25, 465, 587, 2525 on both families",
    fix="an nftables table of family inet with an output chain that counts and drops tcp dport { 25, 465, 587, 2525 }",
)
def test_mail_ports_are_dropped(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Outbound mail ports on both families, by rules that count, for every user who is not declared to be free of them."""
    if expected["egress"]["mode"] == "none":
        raise NotApplicable("egress.mode is none: NOTHING is held back, mail included")
    objects, free = ruleset(facts), expected["egress"]["mayMail"]
    users = {number: name for name, number in user_ids(facts).items() if name not in free}
    faults, uncounted = [], set()
    for port in expected["egress"]["droppedTcpPorts"]:
        for family in (4, 6):
            for number, name in sorted(users.items()):
                verdicts = judge(objects, Packet(family, "eth0", port, hook="output", user=number))
                dropping = [verdict for verdict in verdicts if verdict.outcomes == {DROP}]
                if not dropping:
                    faults.append(f"tcp/{port} may go out over IPv{family}, from {name}")
                    break
                if not any(verdict.counted for verdict in dropping):
                    uncounted.add(port)
    faults += [f"tcp/{port} is dropped by a rule without a counter" for port in sorted(uncounted)]
    ports = ", ".join(str(port) for port in expected["egress"]["droppedTcpPorts"])
    observe(settle(faults, f"outbound tcp {ports} is dropped and counted, on IPv4 and IPv6"))
