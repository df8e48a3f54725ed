"""What else of the host can be reached, what can still reach out, and whether the tailnet stays a way in."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from .nft import DROP, Packet, interfaces, judge, redirections, surely_dropped
from .reading import Listener, NotApplicable, Unknown, listeners, ruleset, section, settle
from .test_exposure import EGRESS, HOST_FIREWALL

Observe = Callable[[str], None]

USER_DATA = "Threat model MUST assume user_data can be read by anyone with Hetzner project/API access."
# Tailscale's address ranges: tailscale.com/kb/1015.
TAILNETS = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
CLOCK_SLACK_S = 30
COMMON_PORTS = (80, 443, 2222, 3128, 8080)


def let_in(objects: list[dict[str, Any]], interface: str, ports: Iterable[int]) -> list[str]:
    """Those of ``ports`` for which a first packet on ``interface`` is not surely dropped, with the family."""
    return [
        f"tcp/{port} on {interface} over IPv{family}"
        for port in ports
        for family in (4, 6)
        if not surely_dropped(judge(objects, Packet(family, interface, port)))
    ]


def other_listeners(expected: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Listener]:
    """What listens beyond loopback, besides sshd; Unknown when not even sshd is seen to listen."""
    found, port = listeners(facts), expected["ssh"]["port"]
    if not any(one.port == port for one in found):
        raise Unknown(f"nobody was seen on port {port}, so the list of listeners proves nothing")
    return [one for one in found if one.port != port and not one.loopback]


@pytest.mark.check(
    id="EXP-06",
    severity="critical",
    claim=HOST_FIREWALL,
    expect="no listener beyond loopback but sshd is let in, and no rule redirects packets",
    fix="let the service listen on 127.0.0.1, or drop its port on every interface but the tailnet's; no DNAT, no published ports",
)
def test_nothing_else_is_published(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Every listening TCP socket against the ruleset in force, and every rule that sends packets elsewhere."""
    objects, others = ruleset(facts), other_listeners(expected, facts)
    elsewhere = sorted(interfaces(objects) - {"lo", expected["tailnet"]["interface"], ""} | {"eth0"})
    faults = [
        f"{one} can be reached: {place}"
        for one in others
        for interface in elsewhere
        for place in let_in(objects, interface, (one.port,))
    ]
    faults += [f"{place} sends incoming packets elsewhere" for place in redirections(objects)]
    seen = f"{len(others)} other listeners beyond loopback, none let in; nothing is redirected"
    observe(settle(faults, seen))


@pytest.mark.check(
    id="EXP-07",
    severity="high",
    claim="Public SSH is temporary (bootstrap only; controlled by sshExposure.mode).",
    expect="every established SSH session has a peer on the tailnet",
    fix="end the old sessions (ss -K on the host), and close the operator's shared connections",
)
def test_no_session_survives_from_before(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Who is logged in over SSH now: a connection from before lockdown goes on when the rule is gone."""
    if expected["mode"] != "tailnet":
        raise NotApplicable(f"sshExposure.mode is {expected['mode']}")
    peers = []
    for line in section(facts, "survivors").splitlines():
        try:
            peers.append(_address(line.split()[-1]))
        except (IndexError, ValueError):
            raise Unknown(f"a line of ss is not understood: {line[:200]!r}") from None
    if not peers:
        raise Unknown("not even our own session was seen")
    strangers = sorted({str(peer) for peer in peers if not any(peer in net for net in TAILNETS)})
    observe(settle([f"a session from {peer}" for peer in strangers], f"{len(peers)} sessions, all over the tailnet"))


@pytest.mark.check(
    id="EXP-10",
    severity="high",
    claim="Public SSH is temporary (bootstrap only; controlled by sshExposure.mode).",
    expect="the declared mode is in force, and not on trial",
    fix="run the lockdown stage again: it confirms what it has tried, or goes back",
)
def test_the_host_keeps_the_declared_mode(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The host's own account of its firewall: which mode is in force, and whether it would go back by itself."""
    said = section(facts, "exposure-now").strip()
    found = re.fullmatch(r"mode=(\S+) armed=(yes|no)", said)
    if found is None:
        raise Unknown(f"the host's exposure status is not understood: {said[:200]!r}")
    faults = [f"{found[1]} is in force, {expected['mode']} is declared"] if found[1] != expected["mode"] else []
    faults += ["what is in force is on trial: it goes back by itself"] if found[2] == "yes" else []
    observe(settle(faults, f"{found[1]} is in force, for good"))


@pytest.mark.check(
    id="TS-02",
    severity="medium",
    claim=HOST_FIREWALL,
    expect="other ports than 22, and than the one of cattle on the host that orders it, are dropped on tailscale0",
    fix="/etc/clawdlets/tailnet-ports holds the ports besides SSH; no rule of yours lets tailscale0 in",
)
def test_the_tailnet_reaches_ssh_alone(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The ruleset for packets from the tailnet, for every port that something listens on and some that others use."""
    if expected["tailnet"]["mode"] == "none":
        raise NotApplicable("tailnet.mode is none")
    objects = ruleset(facts)
    others = {one.port for one in other_listeners(expected, facts)} | set(COMMON_PORTS)
    ports = sorted(others - set(expected["tailnet"]["ports"]))
    faults = let_in(objects, expected["tailnet"]["interface"], ports)
    observe(settle(faults, f"{len(ports)} other ports are dropped on {expected['tailnet']['interface']}"))


@pytest.mark.check(
    id="TS-03",
    severity="high",
    claim="Public SSH is temporary (bootstrap only; controlled by sshExposure.mode).",
    expect="tailscale runs, and the node's key is good for 30 days or does not run out",
    fix="disable the node's key expiry (a tagged node has none), or log it in again, before it drops off the tailnet",
)
def test_the_host_stays_on_the_tailnet(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """When the node's key runs out: after lockdown that would be the end of every way in."""
    if expected["tailnet"]["mode"] == "none":
        raise NotApplicable("tailnet.mode is none")
    said = section(facts, "tailscale-self")
    if said.strip() != "absent":
        state = re.search(r'"BackendState":\s*"([^"]*)"', said)
        expiry = re.search(r'"KeyExpiry":\s*"([^"]*)"', said)
        if state is None:
            raise Unknown("tailscale did not say its state")
        settle([] if state[1] == "Running" else [f"tailscale is {state[1]} on the host"], "")
        until, who = (expiry[1] if expiry else None), "the host"
    elif (node := expected["tailnet"].get("node")) is not None:
        until, who = node["keyExpiry"], "the operator's tailscale"
    else:
        raise Unknown("neither the host nor the operator's tailscale could be asked")
    if until is None:
        observe(f"the node's key does not run out, says {who}")
        return
    left = _moment(until) - _moment(expected["asOf"])
    enough = timedelta(days=expected["tailnet"]["minKeyLifeDays"])
    faults = [] if left >= enough else [f"the node's key runs out in {left.days} days, at {until}"]
    observe(settle(faults, f"the node's key is good for {left.days} days, says {who}"))


@pytest.mark.check(
    id="EGR-02",
    severity="high",
    claim=EGRESS,
    expect="a forward chain drops tcp 25, 465, 587, 2525 on both families",
    fix="the same drop in a chain on the forward hook: containers' packets never pass through output",
)
def test_mail_ports_are_dropped_for_containers_too(
    expected: dict[str, Any], facts: dict[str, Any], observe: Observe
) -> None:
    """Forwarded packets to mail ports on both families, wherever they come from."""
    if expected["egress"]["mode"] == "none":
        raise NotApplicable("egress.mode is none: NOTHING is held back, mail included")
    objects = ruleset(facts)
    faults = []
    for port in expected["egress"]["droppedTcpPorts"]:
        for family in (4, 6):
            verdicts = judge(objects, Packet(family, "", port, hook="forward"))
            if not any(verdict.outcomes == {DROP} for verdict in verdicts):
                faults.append(f"tcp/{port} may be forwarded over IPv{family}")
    observe(settle(faults, "forwarded packets to mail ports are dropped, on IPv4 and IPv6"))


@pytest.mark.check(
    id="EGR-03",
    severity="high",
    claim=EGRESS,
    expect="no attempt opens, of root's or of a bot's, and the counters of our own rules move for each",
    fix="look at EGR-01; a drop upstream is not ours: only a counter that moves shows that this host's rule works",
)
def test_mail_does_not_go_out(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Real attempts to mail ports of addresses that are nobody's, as root and as a bot, and whether the rule's counter moved."""
    egress = expected["egress"]
    if egress["mode"] == "none":
        raise NotApplicable("egress.mode is none: NOTHING is held back, mail included")
    ports = {str(port) for port in egress["droppedTcpPorts"]}
    dropped: dict[tuple[str, int], set[str]] = {}
    faults, unknown, no_way = [], [], set()
    for line in section(facts, "mail-out").splitlines():
        match line.split():
            case [user, address, port, "open" | "passed" | "dropped" | "untried" as result] if port in ports:
                family = 6 if ":" in address else 4
                tried = dropped.setdefault((user, family), set())
                if user in egress["mayMail"]:
                    continue
                if result == "dropped":
                    tried.add(port)
                elif result == "untried":
                    unknown.append(f"it was not seen that {user} tried {address} on tcp/{port}")
                else:
                    what = "answered" if result == "open" else "was not dropped by a rule that counts"
                    faults.append(f"{address} on tcp/{port}, tried by {user}, {what}")
            case [user, address, "unreachable"]:
                family = 6 if ":" in address else 4
                dropped.setdefault((user, family), set())
                no_way.add(family)
            case _:
                raise Unknown(f"a line is not understood: {line[:200]!r}")
    bots = {bot["user"] for bot in egress["bots"]} - set(egress["mayMail"])
    users = {user for user, _ in dropped} - set(egress["mayMail"])
    who = ", ".join(sorted(users))
    seen = [
        f"no way out over IPv{family}" if family in no_way else f"attempts of {who} dropped over IPv{family}"
        for family in (4, 6)
    ]
    text = settle(faults, "; ".join(seen))
    unknown += [
        f"the host has no way out over IPv{one}"
        for one in sorted(no_way)
        if str(one) in expected["addresses"]["public"]
    ]
    if "root" not in users or (bots and not bots & users):
        unknown.append("not both root and a bot tried")
    unknown += [
        f"{user} did not try every port over IPv{family}"
        for user in sorted(users)
        for family in (4, 6)
        if family not in no_way and dropped.get((user, family)) != ports
    ]
    if unknown:
        raise Unknown("; ".join(unknown[:3]))
    observe(text)


@pytest.mark.check(
    id="UD-04",
    severity="high",
    claim=USER_DATA,
    expect="root reaches the metadata service and nobody else does",
    fix="nft: in the output hook, ip daddr 169.254.169.254 meta skuid != 0 drop",
)
def test_workloads_do_not_reach_the_metadata_service(facts: dict[str, Any], observe: Observe) -> None:
    """Real connections to 169.254.169.254 as every service user, admin and nobody; root's is the control."""
    tried = dict(line.split() for line in section(facts, "metadata").splitlines() if len(line.split()) == 2)
    others = sorted(user for user in tried if user != "root")
    seen = settle(
        [f"{user} reaches the metadata service" for user in others if tried[user] not in ("closed", "untried")],
        f"{', '.join(others)} do not reach it; root does",
    )
    if tried.get("root") != "open":
        raise Unknown("root did not reach the metadata service either, so it proves nothing that others did not")
    if missing := [user for user in others if tried[user] == "untried"]:
        raise Unknown(f"nobody could try as {', '.join(missing)}")
    if not others:
        raise Unknown("nobody but root tried")
    observe(seen)


@pytest.mark.check(
    id="EXP-09",
    severity="medium",
    claim=HOST_FIREWALL,
    expect="the server is in no private network",
    fix="take the server out of the network: cloud firewalls do not filter private networks",
    vantage="api",
)
def test_no_unfiltered_network(cloud: dict[str, Any] | None, observe: Observe) -> None:
    """The private networks of the server as the API shows them: what comes in there passes no cloud firewall."""
    if cloud is None:
        raise Unknown("the Hetzner API could not be asked")
    attached = cloud["server"].get("privateAddresses")
    if attached is None:
        raise Unknown("nobody asked for the server's private networks")
    observe(settle([f"{address} is in a private network" for address in attached], "in no private network"))


@pytest.mark.check(
    id="EXP-11",
    severity="high",
    claim=HOST_FIREWALL,
    expect="no other port that is often open answers on the public addresses, and each control is reached",
    fix="look at EXP-06 for who listens; what it does not show is hidden: find out before you trust the host",
    vantage="outside",
)
def test_other_ports_are_closed_from_outside(
    expected: dict[str, Any], exposure: list[dict[str, Any]], observe: Observe
) -> None:
    """Real connections to other ports of the public addresses, from every vantage on the internet side: whatever the host
    says of itself."""
    ports = expected.get("closedPorts", [])
    cells = [cell for cell in exposure if cell["side"] == "internet" and cell["port"] in ports]
    faults, unknown = [], []
    for cell in cells:
        place = f"{cell['vantage']} over IPv{cell['family']}"
        if cell["reach"] == "yes":
            faults.append(f"{place} reaches {cell['address']} port {cell['port']} ({cell['detail']})")
        elif cell["reach"] == "unknown":
            unknown.append(f"{place}: {cell['detail']}")
    seen = settle(faults, f"{', '.join(map(str, ports))} are closed: {len(cells)} looks from outside")
    if unknown:
        raise Unknown("; ".join(dict.fromkeys(unknown)))
    if not cells:
        raise Unknown("nobody looked from outside")
    observe(seen)


@pytest.mark.check(
    id="CLK-01",
    severity="medium",
    claim="Public SSH is temporary (bootstrap only; controlled by sshExposure.mode).",
    expect="the host's clock is right within 30 s",
    fix="timedatectl; let systemd-timesyncd reach a server: what is temporary ends by this clock",
)
def test_the_clock_is_right(facts: dict[str, Any], observe: Observe) -> None:
    """The host's time against this machine's at the moment of asking."""
    said = section(facts, "clock").strip()
    if not said.isdigit():
        raise Unknown(f"not a time: {said[:60]!r}")
    asked = facts.get("asked")
    if asked is None:
        raise Unknown("nobody noted when the host was asked")
    off = max(asked["from"] - CLOCK_SLACK_S - int(said), int(said) - asked["to"] - CLOCK_SLACK_S, 0.0)
    observe(
        settle(
            [f"the clock is {off + CLOCK_SLACK_S:.0f} s off or more"] if off else [], f"right within {CLOCK_SLACK_S} s"
        )
    )


def _address(end: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of ``address:port`` as ss prints it; ValueError."""
    address = ipaddress.ip_address(end.rpartition(":")[0].strip("[]").partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _moment(text: str) -> datetime:
    """A time of RFC 3339; Unknown when it is none. Go prints more digits of a second than Python reads."""
    try:
        found = datetime.fromisoformat(re.sub(r"\.\d+", "", text).replace("Z", "+00:00"))
    except ValueError:
        raise Unknown(f"not a time: {text[:60]!r}") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
