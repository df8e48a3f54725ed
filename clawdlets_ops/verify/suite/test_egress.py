"""What egress.mode holds back besides mail. Bots in mode proxy-allowlist: walls as they are in force, real attempts against each, and the proxy between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from .nft import Packet, judge, surely_dropped
from .reading import NotApplicable, Unknown, listeners, ruleset, section, settle, user_ids

Observe = Callable[[str], None]

CONFINED = "force bot services to talk only to localhost (systemd `IPAddressDeny=any` + allow loopback)"
PROXY = "start a local HTTP proxy on loopback"
THROUGH = "require all outbound HTTP(S) to go through the proxy"
LIST = "enforce a domain allowlist at the proxy layer"
LOOPBACK = {"127.0.0.1/32", "::1/128"}
# What a bot's user could start something with outside its unit, in the words of clawdlets-egress.
DOORS = {
    "sudo": "may run commands with sudo",
    "linger": "has a session that lingers",
    "job": "has a job of cron or at",
    "socket": "may write to the socket of a container engine",
}
DENIED, FORBIDDEN = "denied", "403"


def confined(expected: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bots that the proxy is for; NotApplicable when there are none, loudly when that is because nothing is held back."""
    found = [bot for bot in expected["egress"]["bots"] if bot["mode"] == "proxy-allowlist"]
    if not found:
        mode = expected["egress"]["mode"]
        loud = ": NOTHING of the host itself is held back" if mode == "none" else ""
        raise NotApplicable(f"no bot is in mode proxy-allowlist (egress.mode is {mode}{loud})")
    return found


class Seen:
    """What ``clawdlets-egress facts`` printed; Unknown for a line that is not understood."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.show: dict[str, dict[str, str]] = {}
        self.lists: dict[str, tuple[int, set[str]]] = {}
        self.tries: dict[tuple[str, str], dict[str, str]] = {}
        self.sockets: dict[str, dict[str, str]] = {}
        self.asked: dict[str, dict[str, str]] = {}
        self.doors: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for line in section(facts, "egress").splitlines():
            match line.split():
                case ["show", bot, *_]:
                    key, _, value = line.split(" ", 2)[2].partition("=")
                    self.show.setdefault(bot, {})[key] = value
                case ["list", name, port, *domains] if port.isdigit():
                    self.lists[name] = (int(port), set(domains))
                case ["try", bot, where, to, "sent" | "denied" | "failed" as result]:
                    self.tries.setdefault((bot, where), {})[to] = result
                case ["socket", bot, path, "visible" | "hidden" | "absent" as result]:
                    self.sockets.setdefault(bot, {})[path] = result
                case ["ask", bot, status, *request] if request:
                    self.asked.setdefault(bot, {})[" ".join(request)] = status
                case ["door", bot, kind, "no" | "yes" | "unknown" as result, *what] if kind in DOORS:
                    self.doors.setdefault((bot, kind), []).append((result, " ".join(what)))
                case []:
                    continue
                case _:
                    raise Unknown(f"a line is not understood: {line[:200]!r}")

    def unit(self, bot: str) -> dict[str, str]:
        """The properties of a bot's unit; Unknown unless it runs, as nothing can be tried from inside it otherwise."""
        found = self.show.get(bot)
        if found is None:
            raise Unknown(f"the unit of {bot} was not looked at")
        if found.get("ActiveState") != "active":
            raise Unknown(f"the unit of {bot} is {found.get('ActiveState') or 'not known'}")
        return found

    def sent(self, bot: str, where: str) -> list[str]:
        """Where packets got out to, from there; Unknown unless root's got out to the same family, or nothing was tried."""
        tried = self.tries.get((bot, where), {})
        control = self.tries.get(("-", "root"), {})
        open_to = {to for to, result in control.items() if result == "sent"}
        if not open_to:
            raise Unknown("root could not send either, so it proves nothing that bots could not")
        outside = {to: result for to, result in tried.items() if to in open_to}
        if not open_to <= outside.keys() or "failed" in outside.values():
            raise Unknown(f"not everything could be tried from {bot} ({where})")
        return [to for to, result in outside.items() if result != DENIED]


@pytest.mark.check(
    id="EGR-04",
    severity="low",
    vantage="host",
    claim="It does **not** restrict HTTPS/API egress, Discord, GitHub, model providers, etc.",
    expect="where only mail is held back, a packet to tcp/443 may go out on both families",
    fix="another table of nftables holds back more than egress.mode says; say proxy-allowlist when that is what you want",
)
def test_nothing_but_mail_is_held_back(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """What the host's rules do to the first packet of an HTTPS connection of root's and of each bot's that is not confined."""
    mode = expected["egress"]["mode"]
    if mode != "smtp-only":
        raise NotApplicable(f"egress.mode is {mode}")
    objects, numbers = ruleset(facts), user_ids(facts)
    free = ["root", *(bot["user"] for bot in expected["egress"]["bots"] if bot["mode"] != "proxy-allowlist")]
    faults = [
        f"tcp/443 of {user} is dropped over IPv{family}"
        for user in free
        if user in numbers
        for family in (4, 6)
        if surely_dropped(judge(objects, Packet(family, "eth0", 443, hook="output", user=numbers[user])))
    ]
    observe(settle(faults, f"tcp/443 may go out on IPv4 and IPv6, for {', '.join(free)}"))


@pytest.mark.check(
    id="PXY-01",
    severity="critical",
    vantage="host",
    claim=CONFINED,
    expect="IPAddressDeny=any, exactly 127.0.0.1 and ::1 allowed, no Delegate, and packets of root from the unit's cgroup are dropped",
    fix="the unit's directives are those of hostfiles/confined.json; on a kernel without BPF for cgroups they have no effect",
)
def test_units_are_confined_by_their_cgroup(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The unit's properties, and a packet that root sends from within its cgroup: nftables does not hold root back."""
    bots, seen = confined(expected), Seen(facts)
    faults = []
    for bot in bots:
        unit = seen.unit(bot["name"])
        if set(unit.get("IPAddressDeny", "").split()) not in ({"any"}, {"::/0", "0.0.0.0/0"}):
            faults.append(f"{bot['unit']}: IPAddressDeny is {unit.get('IPAddressDeny') or 'not set'}")
        if set(unit.get("IPAddressAllow", "").split()) != LOOPBACK:
            faults.append(f"{bot['unit']}: IPAddressAllow is {unit.get('IPAddressAllow') or 'not set'}")
        if unit.get("Delegate") != "no":
            faults.append(f"{bot['unit']}: Delegate is {unit.get('Delegate') or 'not known'}")
        if unit.get("User") != bot["user"]:
            faults.append(f"{bot['unit']}: runs as {unit.get('User') or 'root'}")
        faults += [f"{bot['unit']}: a packet to {to} left its cgroup" for to in seen.sent(bot["name"], "cgroup")]
    observe(settle(faults, f"{_names(bots)}: properties as declared, and packets from their cgroups are dropped"))


@pytest.mark.check(
    id="PXY-02",
    severity="critical",
    vantage="host",
    claim=CONFINED,
    expect="packets of the bot's user are dropped on both families, in its unit and outside it",
    fix="systemctl reload clawdlets-egress; the table inet clawdlets-egress holds back every process of a bot's user",
)
def test_packets_of_a_bots_user_are_dropped_wherever_it_runs(
    expected: dict[str, Any], facts: dict[str, Any], observe: Observe
) -> None:
    """Packets to addresses that are nobody's, as the bot's user, within the unit's cgroup and outside any; root's are the control."""
    bots, seen = confined(expected), Seen(facts)
    faults = [
        f"{bot['user']} ({'in its unit' if where == 'unit' else 'outside its unit'}) sends to {to}"
        for bot in bots
        for where in ("unit", "outside")
        for to in seen.sent(bot["name"], where)
    ]
    observe(settle(faults, f"{_names(bots)}: nothing leaves, in the unit or outside it; root's packets do"))


@pytest.mark.check(
    id="PXY-03",
    severity="critical",
    vantage="host",
    claim=PROXY,
    expect="the proxy listens on the declared ports of 127.0.0.1, and nowhere else",
    fix="http_port 127.0.0.1:PORT, for each bot one; a proxy that others reach is theirs too",
)
def test_the_proxy_is_on_loopback_alone(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Who listens on the proxy's ports, and where else the proxy listens."""
    confined(expected)
    ports, found = set(expected["egress"]["proxyPorts"]), listeners(facts)
    programs = {program for one in found if one.port in ports for program in one.programs}
    faults = [
        f"{one} is not on loopback"
        for one in found
        if (one.port in ports or programs & set(one.programs)) and not one.loopback
    ]
    faults += [f"nobody listens on 127.0.0.1:{port}" for port in sorted(ports - {one.port for one in found})]
    observe(settle(faults, f"{', '.join(sorted(programs))} on 127.0.0.1, ports {', '.join(map(str, sorted(ports)))}"))


@pytest.mark.check(
    id="PXY-04",
    severity="critical",
    vantage="host",
    claim=LIST,
    expect="no entry that is not declared; every request for something else is answered 403",
    fix="dstdomain -n for the list, deny private destinations after it, CONNECT to 443 alone, deny all at the end",
)
def test_the_proxy_denies_what_is_not_on_the_list(
    expected: dict[str, Any], facts: dict[str, Any], observe: Observe
) -> None:
    """Real requests from the bot's cgroup: other names, prefix and suffix tricks, other ports, addresses, private ones."""
    bots, seen = confined(expected), Seen(facts)
    faults, count = [], 0
    for bot in bots:
        seen.unit(bot["name"])
        port, domains = seen.lists.get(bot["user"], (0, set()))
        faults += [
            f"{bot['user']}: {domain} is let through and not declared"
            for domain in sorted(domains - set(bot["domains"]))
        ]
        if port != bot["port"]:
            faults.append(f"{bot['user']}: its port of the proxy is {port or 'not known'}, expected {bot['port']}")
        asked = {
            request: status for request, status in seen.asked.get(bot["name"], {}).items() if not _allowed(request, bot)
        }
        if len(asked) < bot["refusals"]:
            raise Unknown(f"only {len(asked)} requests of {bot['name']} were tried")
        if silent := [request for request, status in asked.items() if status == "none"]:
            raise Unknown(f"the proxy did not answer {bot['name']}: {silent[0]}")
        faults += [
            f"{bot['name']}: {request} was answered {status}"
            for request, status in asked.items()
            if status != FORBIDDEN
        ]
        count += len(asked)
    observe(settle(faults, f"{_names(bots)}: {count} requests for something else, all answered 403"))


@pytest.mark.check(
    id="PXY-05",
    severity="high",
    vantage="host",
    claim=CONFINED,
    expect="no resolver can be asked from the unit, over the network or over a socket that resolves on others' behalf",
    fix="allow 127.0.0.1 and ::1 alone (127.0.0.53 is a resolver), and hide the sockets: InaccessiblePaths of hostfiles/confined.json",
)
def test_names_do_not_leak(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Packets to port 53 of every resolver from within the unit, and which of the known sockets its user sees there."""
    bots, seen = confined(expected), Seen(facts)
    faults = []
    for bot in bots:
        seen.unit(bot["name"])
        resolvers = {
            to: result for to, result in seen.tries.get((bot["name"], "unit"), {}).items() if to.endswith(":53")
        }
        sockets = seen.sockets.get(bot["name"], {})
        if DENIED not in resolvers.values() or not sockets:
            raise Unknown(f"no resolver was tried from the unit of {bot['name']}")
        faults += [f"{bot['name']} sends to the resolver {to}" for to, result in resolvers.items() if result == "sent"]
        faults += [f"{bot['name']} sees {path}" for path, result in sockets.items() if result == "visible"]
    observe(settle(faults, f"{_names(bots)}: no resolver is reached, no socket that would ask one is seen"))


@pytest.mark.check(
    id="PXY-06",
    severity="high",
    vantage="host",
    claim=THROUGH,
    expect="no new privileges, no packet sockets; for a bot's user no group of others, no rule of sudo, no lingering session, no job "
    "of cron or at, no container engine that it may command",
    fix="the unit's directives are those of hostfiles/hardening.json; a bot's user is in no group but its own and clf-bots; "
    "take the rule or the job away, loginctl disable-linger",
)
def test_there_is_no_side_door(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """What of the unit and its user would lead around the other walls, as the host's own programs see it."""
    bots, seen = confined(expected), Seen(facts)
    groups = _groups(facts)
    faults, unseen = [], []
    for bot in bots:
        unit = seen.unit(bot["name"])
        if unit.get("NoNewPrivileges") != "yes":
            faults.append(f"{bot['unit']}: NoNewPrivileges is {unit.get('NoNewPrivileges') or 'not known'}")
        families = set(unit.get("RestrictAddressFamilies", "").split())
        if not families or families - {"AF_UNIX", "AF_INET", "AF_INET6"}:
            faults.append(
                f"{bot['unit']}: RestrictAddressFamilies is {unit.get('RestrictAddressFamilies') or 'not set'}"
            )
        for group in sorted(groups.get(bot["user"], set()) - {"clf-bots"}):
            faults.append(f"{bot['user']} is in the group {group}")
        for kind, words in DOORS.items():
            found = seen.doors.get((bot["name"], kind), [])
            faults += [f"{bot['user']} {words} {what}".rstrip() for result, what in found if result == "yes"]
            if not found or any(result == "unknown" for result, _ in found):
                unseen.append(f"whether {bot['user']} {words}")
    text = settle(faults, f"{_names(bots)}: no new privileges, three address families, no other way to start something")
    if unseen:
        raise Unknown(f"it was not seen {unseen[0]}")
    observe(text)


@pytest.mark.check(
    id="PXY-07",
    severity="medium",
    vantage="host",
    claim=THROUGH,
    expect="a bot's unit does not run without the rules, and does run without the proxy (closed)",
    fix="Requires= and After=clawdlets-egress.service in the unit; the proxy is only wanted",
)
def test_it_fails_closed(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """What the unit requires; that a bot stays closed without the proxy follows from PXY-01 and PXY-02, which do not need it."""
    bots, seen = confined(expected), Seen(facts)
    faults = []
    for bot in bots:
        unit = seen.unit(bot["name"])
        for key in ("Requires", "After"):
            if "clawdlets-egress.service" not in unit.get(key, "").split():
                faults.append(f"{bot['unit']}: {key} does not name clawdlets-egress.service")
    observe(settle(faults, f"{_names(bots)}: not started without the rules"))


@pytest.mark.check(
    id="PXY-08",
    severity="medium",
    vantage="host",
    claim=LIST,
    expect="every declared entry is on the list, and a request for one is not refused",
    fix="render the lists anew and restart clawdlets-egress-proxy; a proxy that refuses too much is one that people go around",
)
def test_the_proxy_lets_through_what_is_declared(
    expected: dict[str, Any], facts: dict[str, Any], observe: Observe
) -> None:
    """A real request for a declared name. Whether the other side then answers is not the proxy's doing, and is told."""
    bots, seen = confined(expected), Seen(facts)
    faults, told = [], []
    for bot in bots:
        seen.unit(bot["name"])
        _, domains = seen.lists.get(bot["user"], (0, set()))
        faults += [
            f"{bot['user']}: {domain} is declared and not on the list"
            for domain in sorted(set(bot["domains"]) - domains)
        ]
        allowed = {
            request: status for request, status in seen.asked.get(bot["name"], {}).items() if _allowed(request, bot)
        }
        if not allowed:
            raise Unknown(f"no declared name was asked for by {bot['name']}")
        for request, status in allowed.items():
            if status in (FORBIDDEN, "none"):
                faults.append(f"{bot['name']}: {request} was {'refused' if status == FORBIDDEN else 'not answered'}")
            elif status == "200":
                told.append(f"{bot['name']}: {request} got through")
            else:
                told.append(f"{bot['name']}: {request} was let through, and the other side not reached ({status})")
    observe(settle(faults, "; ".join(told)))


def _names(bots: list[dict[str, Any]]) -> str:
    return ", ".join(bot["name"] for bot in bots)


def _allowed(request: str, bot: Mapping[str, Any]) -> bool:
    return any(request == f"CONNECT {domain.removeprefix('.')}:443" for domain in bot["domains"])


def _groups(facts: Mapping[str, Any]) -> dict[str, set[str]]:
    """User → the groups that name it as a member."""
    found: dict[str, set[str]] = {}
    for line in section(facts, "users").splitlines():
        kind, *rest = line.split(":")
        if kind == "group" and len(rest) >= 3:
            for member in filter(None, rest[2].split(",")):
                found.setdefault(member, set()).add(rest[0])
    return found
