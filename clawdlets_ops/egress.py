"""The egress policy of a host: from the fleet file to nftables rules, the proxy's configuration and units. Pure.

Three walls, each of which holds alone. The unit's cgroup lets a bot reach 127.0.0.1 and ::1 and nothing else
(``IPAddressDeny``, systemd.resource-control(5)); nftables lets every process of a bot's user, in the unit or outside it,
reach its own port of the proxy and nothing else; the proxy lets through what is on the bot's list, and the proxy's own user
never reaches a private address, whatever a name resolves to. The texts lie in ``hostfiles/``, where Nix reads them too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from clawdlets_ops import hostfiles
from clawdlets_ops.bots import EgressMode, bot_unit, bot_user, covers
from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import Host

_DATA = hostfiles.data("egress.json")
DROPPED_TCP_PORTS: tuple[int, ...] = tuple(_DATA["droppedTcpPorts"])
METADATA_ADDRESS: str = _DATA["metadataAddress"]
PROXY_USER: str = _DATA["proxyUser"]
RULES_UNIT = "clawdlets-egress.service"
PROXY_UNIT = "clawdlets-egress-proxy.service"
INSIDE = tuple(ipaddress.ip_network(text) for text in (*_DATA["inside4"], *_DATA["inside6"]))
"""Where the proxy never goes: this host, private networks, the tailnet, link-local and translated addresses, multicast."""

WEB_PORTS = {"http": 80, "https": 443}
# Units are made from the fleet file alone; a command that it leaves open is the caller's.
Units = dict[str, str]


@dataclass(frozen=True)
class Line:
    """One way out: of a bot, or of the host itself (``name`` is ``host``). ``port`` is the proxy's on 127.0.0.1."""

    name: str
    mode: EgressMode
    domains: tuple[str, ...]
    port: int
    path: str
    """Where the fleet file says so, below the host."""

    @property
    def proxied(self) -> bool:
        """Whether the proxy has a port for it."""
        return self.mode == "proxy-allowlist"


@dataclass(frozen=True)
class Policy:
    """What may leave a host, and by whom."""

    host: Line
    bots: tuple[Line, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """The host's own and every bot's."""
        return (self.host, *self.bots)

    @property
    def proxy(self) -> bool:
        """Whether a proxy is needed."""
        return any(line.proxied for line in self.lines)

    def bot(self, name: str) -> Line:
        """The line of the bot called ``name``; FleetError."""
        for line in self.bots:
            if line.name == bot_user(name):
                return line
        known = ", ".join(line.name.removeprefix("bot-") for line in self.bots) or "none"
        raise FleetError(f"there is no bot {name!r}", where="bots", fix=f"declared are: {known}")


@dataclass(frozen=True)
class Answer:
    """Whether a request would get out, by which rule (a key path of the fleet file, or a rule that always holds)."""

    allowed: bool
    rule: str
    why: str


def policy_of(host: Host) -> Policy:
    """The policy that the fleet file declares. A bot's port follows from its place among the host's bots by name."""
    bots = []
    for place, name in enumerate(sorted(host.bots)):
        effective, own = host.egress_of(name), host.bots[name].egress
        path = f"bots.{name}.egress" if own.mode or own.allowed_domains is not None else "egress"
        port = _DATA["firstBotPort"] + place
        bots.append(Line(bot_user(name), effective.mode, effective.allowed_domains, port, path))
    mine = Line("host", host.egress.mode, host.egress.allowed_domains, _DATA["hostPort"], "egress")
    return Policy(mine, tuple(bots))


def nft_rules(policy: Policy) -> str:
    """The table ``inet clawdlets-egress``, for ``nft -f``; its users must exist."""
    confined = [line for line in policy.bots if line.proxied]
    drops_mail = policy.host.mode != "none"
    rules = _DATA["rules"][policy.host.mode]
    return _filled(
        hostfiles.text("egress.nft"),
        {
            "CONFINED": _elements(f'"{line.name}"' for line in confined),
            "PROXY_PORT": _elements(f'"{line.name}" . {line.port}' for line in confined),
            "MAY_MAIL": _elements(f'"{line.name}"' for line in policy.bots if drops_mail and line.mode == "none"),
            "NO_MAIL": _elements(f'"{line.name}"' for line in policy.bots if not drops_mail and line.mode != "none"),
            "INSIDE4": ", ".join(_DATA["inside4"]),
            "INSIDE6": ", ".join(_DATA["inside6"]),
            "PROXY_USER": PROXY_USER,
            "OUTPUT": "\n    ".join(rules["output"]),
            "FORWARD": "\n    ".join(rules["forward"]),
        },
    )


def squid_conf(policy: Policy) -> str:
    """The proxy's configuration, for squid 5 and later."""
    proxied = [line for line in policy.lines if line.proxied]
    templates = _DATA["squid"]

    def each(template: str) -> str:
        return "\n".join(_filled(templates[template], {"PORT": str(line.port), "NAME": line.name}) for line in proxied)

    return _filled(
        hostfiles.text("squid.conf"),
        {
            "PORTS": each("port"),
            "INSIDE4": " ".join(_DATA["inside4"]),
            "INSIDE6": " ".join(_DATA["inside6"]),
            "LISTS": each("list"),
            "DENY": each("deny"),
            "ALLOW": each("allow"),
        },
    )


def proxy_environment(line: Line) -> dict[str, str]:
    """What makes a program use the proxy; empty where there is none."""
    if not line.proxied:
        return {}
    return {name: _filled(value, {"PORT": str(line.port)}) for name, value in _DATA["environment"].items()}


def units(host: Host, *, nft: str, squid: str, left_open: str) -> Units:
    """Every unit that the policy and the bots need, name → text. ``left_open`` is the command of a bot that declares none."""
    policy, templates = policy_of(host), hostfiles.data("units.json")
    hardening = hostfiles.data("hardening.json")
    rules = templates[RULES_UNIT]
    found = {RULES_UNIT: _filled(_ini(rules), {"NFT": nft})}
    if policy.proxy:
        proxy = templates[PROXY_UNIT]
        found[PROXY_UNIT] = _filled(_ini({**proxy, "Service": {**hardening, **proxy["Service"]}}), {"SQUID": squid})
    for name, bot in sorted(host.bots.items()):
        # Filled before anything of the fleet file is in it: what stands there is never taken for a mark of ours.
        line, template = policy.bot(name), _all_filled(templates["clawdlets-bot-@BOT@.service"], {"BOT": name})
        wants = {"Wants": [PROXY_UNIT], "After": [*template["Unit"]["After"], PROXY_UNIT]} if line.proxied else {}
        environment = {**bot.environment, **proxy_environment(line)}
        limits: dict[str, Any] = {"MemoryMax": f"{bot.limits.memory_max_mb}M", "TasksMax": bot.limits.tasks_max}
        if bot.limits.cpu_quota_percent is not None:
            limits["CPUQuota"] = f"{bot.limits.cpu_quota_percent}%"
        service = {
            **hardening,
            **(hostfiles.data("confined.json") if line.proxied else {}),
            **template["Service"],
            **limits,
            "Environment": [f'"{key}={_quoted(value)}"' for key, value in sorted(environment.items())],
            "ExecStart": bot.exec_start or left_open,
        }
        found[bot_unit(name)] = _ini({**template, "Unit": {**template["Unit"], **wants}, "Service": service})
    return found


def etc_files(host: Host) -> dict[str, str]:
    """What lies below ``/etc/clawdlets/egress``: name → text."""
    policy = policy_of(host)
    files = {"mode": f"{policy.host.mode}\n", "rules.nft": nft_rules(policy)}
    if policy.proxy:
        files["squid.conf"] = squid_conf(policy)
        for line in policy.lines:
            if line.proxied:
                files[f"{line.name}.domains"] = "".join(f"{domain}\n" for domain in line.domains)
    return files


def service_users(host: Host) -> tuple[str, ...]:
    """The users that the rules and units speak of."""
    return (PROXY_USER, *(bot_user(name) for name in sorted(host.bots)))


def explain(policy: Policy, url: str, *, bot: str | None = None) -> Answer:
    """Whether ``url`` (or ``host:port``) can be reached, by the host's own programs or by a bot; FleetError.

    What only the time of the request knows, such as an address that a name resolves to, is said in ``why``.
    """
    scheme, name, port = _target(url)
    line = policy.bot(bot) if bot is not None else policy.host
    address = _address(name)
    if address is not None and str(address) == METADATA_ADDRESS:
        return Answer(False, "metadata", "the metadata service answers root alone, in every mode")
    if bot is not None and line.proxied:
        return _by_the_proxy(line, scheme, name, port, address)
    if port in DROPPED_TCP_PORTS and line.mode != "none":
        return Answer(False, f"{line.path}.mode", f"{line.mode} drops TCP port {port}, on IPv4 and IPv6")
    if line.mode == "none":
        return Answer(True, f"{line.path}.mode", "none: NOTHING is held back, mail included")
    if line.mode == "proxy-allowlist":
        return Answer(
            True, f"{line.path}.mode", "proxy-allowlist confines bots; the host's own programs lose mail alone"
        )
    return Answer(True, f"{line.path}.mode", "smtp-only drops mail and nothing else")


def _by_the_proxy(line: Line, scheme: str, name: str, port: int, address: object) -> Answer:
    path = f"{line.path}.allowedDomains"
    if scheme not in WEB_PORTS:
        return Answer(False, f"{line.path}.mode", f"a confined bot has the proxy alone, and it does not speak {scheme}")
    if port not in WEB_PORTS.values() or (scheme == "https" and port != WEB_PORTS["https"]):
        return Answer(False, "ports", f"the proxy lets 443 through, and 80 without TLS; not {scheme} on {port}")
    if address is not None:
        return Answer(
            False, path, "an address is no name: the list holds names, and the proxy asks no name for an address"
        )
    for place, entry in enumerate(line.domains):
        if covers(entry, name):
            return Answer(True, f"{path}[{place}]", f"{entry}; as long as {name} resolves to public addresses alone")
    return Answer(False, path, f"{name} is not on the list ({', '.join(line.domains)})")


def _target(url: str) -> tuple[str, str, int]:
    """Scheme, name (as it goes over the wire) and port of an address; FleetError."""
    text = url if "://" in url else f"//{url}"
    try:
        parts = urlsplit(text)
        name, port = (parts.hostname or "").rstrip("."), parts.port
        if not name.isascii():
            name = name.encode("idna").decode()
    except (ValueError, UnicodeError) as error:
        raise FleetError(f"cannot be read as an address: {error}", where=url) from None
    scheme = parts.scheme or ("http" if port == WEB_PORTS["http"] else "https" if port in (None, 443) else "tcp")
    if not name or (port is None and scheme not in WEB_PORTS):
        raise FleetError("needs a host, and a port where the scheme does not say it", where=url)
    return scheme, name.lower(), port if port is not None else WEB_PORTS[scheme]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _elements(entries: Any) -> str:
    listed = ", ".join(entries)
    return f"elements = {{ {listed} }}" if listed else ""


def _filled(template: str, values: Mapping[str, str]) -> str:
    """``template`` with each ``@NAME@`` replaced; as Nix's ``replaceStrings`` does, in one go and never within a value."""
    parts, rest = [], template
    while rest:
        places = {name: at for name in values if (at := rest.find(f"@{name}@")) >= 0}
        if not places:
            break
        first = min(places, key=lambda name: places[name])
        parts += [rest[: places[first]], values[first]]
        rest = rest[places[first] + len(first) + 2 :]
    return "".join((*parts, rest))


def _all_filled(part: Any, values: Mapping[str, str]) -> Any:
    """Every text in ``part`` filled."""
    if isinstance(part, dict):
        return {key: _all_filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [_all_filled(value, values) for value in part]
    return _filled(part, values) if isinstance(part, str) else part


def _ini(unit: Mapping[str, Mapping[str, Any]]) -> str:
    """A unit file; a list is a line for each (systemd.syntax(7))."""
    lines = []
    for section in ("Unit", "Service", "Install"):
        lines.append(f"[{section}]")
        for key, value in unit[section].items():
            for one in value if isinstance(value, list) else [value]:
                lines.append(f"{key}={str(one).lower() if isinstance(one, bool) else one}")
    return "\n".join((*lines, ""))


def _quoted(value: str) -> str:
    """Within double quotes of a unit file: backslash, quote and percent sign stand for themselves."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
