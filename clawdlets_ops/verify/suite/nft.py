"""What a ruleset does to one packet, read from ``nft -j list ruleset`` (libnftables-json(5)). Pure.

Three-valued: a match on something that the packet leaves open (its source address, a mark, a set that changes by itself)
may or may not hold. The result of a base chain is therefore a set of outcomes, and a packet counts as dropped only when
"drop" is the one outcome that is left. A drop in one base chain is final whatever the others accept (nft(8)). The ruleset is a
host's: one that takes too many steps to follow is Unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .reading import Unknown

ACCEPT, DROP, RETURN, NEXT = "accept", "drop", "return", "next"

_SEES = {"inet": (4, 6), "ip": (4,), "ip6": (6,)}
# Statements that neither decide nor depend on the packet.
_PASSIVE = {"counter", "log", "mangle", "notrack", "set", "map", "secmark", "last", "comment", "ct helper"}
# Rules and elements that are looked at for one packet; a large firewall has thousands.
MAX_STEPS = 500_000
_PROTOCOL_NUMBERS = {6: "tcp", 17: "udp", 1: "icmp", 58: "ipv6-icmp"}


class _Absent:
    """The packet has no such header: nothing matches, not even ``!=``."""


class _Open:
    """The packet leaves this open."""


_ABSENT, _OPEN = _Absent(), _Open()


@dataclass(frozen=True)
class Packet:
    """The first packet of a TCP connection, to ``port``. ``interface`` is where it comes in (hook input) or goes out
    (hook output); a forwarded packet (hook forward) leaves open where it comes from and goes to. ``user`` is the id of the
    one who sends it, or left open."""

    family: int
    interface: str
    port: int
    hook: str = "input"
    user: int | None = None

    def field(self, left: Any) -> Any:
        """What the left side of a match is for this packet."""
        match left:
            case {"meta": {"key": "iifname" | "iif" | "oifname" | "oif"}} if self.hook == "forward":
                return _OPEN
            case {"meta": {"key": "iifname" | "iif"}}:
                return self.interface if self.hook == "input" else ""
            case {"meta": {"key": "oifname" | "oif"}}:
                return self.interface if self.hook == "output" else ""
            case {"meta": {"key": "skuid"}} if self.user is not None and self.hook == "output":
                return self.user
            case {"meta": {"key": "l4proto"}}:
                return "tcp"
            case {"meta": {"key": "nfproto"}}:
                return f"ipv{self.family}"
            case {"meta": {"key": "protocol"}}:
                return "ip" if self.family == 4 else "ip6"
            case {"ct": {"key": "state"}}:
                return "new"
            case {"payload": {"protocol": "tcp" | "th", "field": "dport"}}:
                return self.port
            case {"payload": {"protocol": "tcp" | "th"}}:
                return _OPEN
            case {"payload": {"protocol": "ip", "field": "protocol"}} if self.family == 4:
                return "tcp"
            case {"payload": {"protocol": "ip6", "field": "nexthdr"}} if self.family == 6:
                return "tcp"
            case {"payload": {"protocol": "ip" | "ip6" as protocol}}:
                return _OPEN if (protocol == "ip") == (self.family == 4) else _ABSENT
            case {"payload": {"protocol": "udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "udplite" | "esp" | "ah"}}:
                return _ABSENT
            case {"concat": [*parts]}:
                values = [self.field(part) for part in parts]
                return _ABSENT if _ABSENT in values else tuple(values)
            case _:
                return _OPEN


@dataclass(frozen=True)
class Verdict:
    """What one base chain does: ``outcomes`` ⊆ {accept, drop}; ``counted`` when every rule that surely drops counts."""

    family: str
    table: str
    chain: str
    outcomes: frozenset[str]
    counted: bool

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain}: {' or '.join(sorted(self.outcomes))}"


def judge(objects: Sequence[Mapping[str, Any]], packet: Packet) -> list[Verdict]:
    """The verdict of every base chain of filter type that sees ``packet``; empty when none does. Unknown when it takes more
    than ``MAX_STEPS``."""
    found = []
    steps = _Steps()
    tables: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for item in objects:
        for kind in ("rule", "set", "map"):
            if kind in item:
                tables.setdefault((item[kind]["family"], item[kind]["table"]), []).append(item[kind])
    for chain in (item["chain"] for item in objects if "chain" in item):
        if chain.get("hook") != packet.hook or chain.get("type") != "filter":
            continue
        if packet.family in _SEES.get(chain["family"], ()):
            walk = _Walk(tables.get((chain["family"], chain["table"]), ()), packet, steps)
            ends = walk.chain(chain["name"], ())
            outcomes = {chain.get("policy", ACCEPT) if end == RETURN else end for end in ends}
            found.append(
                Verdict(
                    chain["family"],
                    chain["table"],
                    chain["name"],
                    frozenset(outcomes),
                    bool(walk.drops) and all(walk.drops),
                )
            )
    return found


def surely_dropped(verdicts: Iterable[Verdict]) -> bool:
    """Whether the packet cannot get through."""
    return any(verdict.outcomes == {DROP} for verdict in verdicts)


def redirections(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the ruleset sends packets on to another address or port than they came for, as ``family table chain``."""
    return [
        f"{rule['family']} {rule['table']} {rule['chain']}"
        for rule in (item["rule"] for item in objects if "rule" in item)
        if any(kind in statement for statement in rule.get("expr", ()) for kind in ("dnat", "redirect", "tproxy"))
    ]


def interfaces(objects: Sequence[Mapping[str, Any]]) -> set[str]:
    """Every interface name that the ruleset speaks of; a pattern ``en*`` gives ``en0``."""
    names: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, str):
            names.add(value.replace("*", "0"))
        elif isinstance(value, Mapping):
            for part in value.values():
                collect(part)
        elif isinstance(value, list):
            for part in value:
                collect(part)

    for rule in (item["rule"] for item in objects if "rule" in item):
        for statement in rule.get("expr", ()):
            if "match" in statement and _speaks_of_interface(statement["match"]["left"]):
                collect(statement["match"]["right"])
            elif "vmap" in statement and _speaks_of_interface(statement["vmap"]["key"]):
                collect(statement["vmap"]["data"])
    for item in objects:
        named = item.get("set") or item.get("map") or {}
        if "ifname" in str(named.get("type", "")):
            collect(named.get("elem", []))
    return {name for name in names if not name.startswith("@")}


def _speaks_of_interface(left: Any) -> bool:
    if isinstance(left, Mapping) and "concat" in left:
        return any(_speaks_of_interface(part) for part in left["concat"])
    return isinstance(left, Mapping) and left.get("meta", {}).get("key") in ("iif", "iifname", "oif", "oifname")


class _Steps:
    """How many steps one packet has taken, in all chains."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def take(self, number: int = 1) -> None:
        """Unknown when there are none left."""
        self._left -= number
        if self._left < 0:
            raise Unknown(f"the firewall's rules take more than {MAX_STEPS} steps to follow")


class _Walk:
    """One packet through the chains of one table; ``here`` are its rules, sets and maps. ``drops``: for each rule that surely
    drops, whether it counts."""

    def __init__(self, here: Sequence[Mapping[str, Any]], packet: Packet, steps: _Steps) -> None:
        self.packet = packet
        self.drops: list[bool] = []
        self._steps = steps
        self._steps.take(len(here))
        self._ends: dict[str, frozenset[str]] = {}
        self._sets = {part["name"]: part for part in here if "name" in part and "expr" not in part}
        self._rules: dict[str, list[list[Any]]] = {}
        for part in here:
            if "expr" in part:
                self._rules.setdefault(part["chain"], []).append(part["expr"])

    def chain(self, name: str, above: tuple[str, ...]) -> set[str]:
        """How a packet that enters the chain may leave it: accept, drop, return. Followed once: where a packet came from
        changes nothing but what a loop is cut off at, and a loop that is cut off gives all that there can be."""
        if name in above:
            return {ACCEPT, DROP, RETURN}  # nft refuses loops; should one be there, nothing is sure
        if name not in self._ends:
            self._ends[name] = frozenset(self._through(name, (*above, name)))
        return set(self._ends[name])

    def _through(self, name: str, above: tuple[str, ...]) -> set[str]:
        ends: set[str] = set()
        for statements in self._rules.get(name, []):
            self._steps.take()
            sure, result = self._rule(statements, above)
            ends |= result - {NEXT}
            if sure and NEXT not in result:
                return ends
        return ends | {RETURN}

    def _rule(self, statements: list[Any], above: tuple[str, ...]) -> tuple[bool, set[str]]:
        """Whether the rule surely applies, and what it then may do."""
        sure = True
        for statement in statements:
            kind = next(iter(statement))
            if kind == "match":
                matched = self._match(statement["match"])
                if matched is False:
                    return True, {NEXT}
                sure = sure and matched is True
            elif kind == "vmap":
                return sure, self._verdict_map(statement["vmap"], above)
            elif (result := self._verdict(statement, above)) is not None:
                if sure and result == {DROP}:
                    self.drops.append(any("counter" in part for part in statements))
                return sure, result
            elif kind == "xt":  # a rule of iptables that nft cannot show
                return False, {ACCEPT, DROP, NEXT}
            elif kind not in _PASSIVE:
                sure = False
        return True, {NEXT}

    def _verdict(self, statement: Mapping[str, Any], above: tuple[str, ...]) -> set[str] | None:
        match statement:
            case {"accept": _}:
                return {ACCEPT}
            case {"drop": _} | {"reject": _}:
                return {DROP}
            case {"return": _}:
                return {RETURN}
            case {"continue": _}:
                return {NEXT}
            case {"queue": _}:
                return {ACCEPT, DROP}
            case {"jump": {"target": target}}:
                return {NEXT if end == RETURN else end for end in self.chain(target, above)}
            case {"goto": {"target": target}}:
                return self.chain(target, above)
            case _:
                return None

    def _verdict_map(self, statement: Mapping[str, Any], above: tuple[str, ...]) -> set[str]:
        value = self.packet.field(statement["key"])
        elements = self._elements(statement["data"])
        if elements is None:
            return {ACCEPT, DROP, RETURN, NEXT}
        results: set[str] = set()
        if value is _ABSENT:
            return {NEXT}
        for key, verdict in elements:
            self._steps.take()
            inside = self._inside(value, key)
            if inside is False:
                continue
            results |= self._verdict(verdict, above) or {NEXT}
            if inside is True:
                return results
        return results | {NEXT}

    def _match(self, match: Mapping[str, Any]) -> bool | None:
        value, right = self.packet.field(match["left"]), match["right"]
        if value is _ABSENT:
            return False
        if value is _OPEN:
            return None
        operator = match["op"]
        if operator in ("==", "in", "!="):
            inside = self._inside(value, right)
            return inside if operator != "!=" or inside is None else not inside
        if isinstance(value, int) and isinstance(right, int):
            return {"<": value < right, ">": value > right, "<=": value <= right, ">=": value >= right}.get(operator)
        return None

    def _elements(self, data: Any) -> list[Any] | None:
        """The elements of a set or map, anonymous or named; None when they are not fixed."""
        if isinstance(data, Mapping) and "set" in data:
            return list(data["set"])
        if isinstance(data, str) and data.startswith("@"):
            named = self._sets.get(data[1:])
            if named is None or "dynamic" in named.get("flags", ()) or "timeout" in named.get("flags", ()):
                return None
            return list(named.get("elem", []))
        return None

    def _inside(self, value: Any, right: Any) -> bool | None:
        """Whether ``value`` is, or is among, ``right``."""
        self._steps.take()
        if value is _OPEN:
            return None
        if isinstance(right, list):
            return _any(self._inside(value, part) for part in right)
        if (isinstance(right, Mapping) and "set" in right) or (isinstance(right, str) and right.startswith("@")):
            elements = self._elements(right)
            return None if elements is None else _any(self._inside(value, part) for part in elements)
        match right:
            case {"elem": {"val": inner}}:
                return self._inside(value, inner)
            case {"concat": [*parts]} if isinstance(value, tuple) and len(parts) == len(value):
                return _all(self._inside(one, part) for one, part in zip(value, parts, strict=True))
            case {"range": [int() as low, int() as high]}:
                return low <= value <= high if isinstance(value, int) else None
            case {"range": _} | {"prefix": _}:
                return None
        if isinstance(value, int) and isinstance(right, str):
            return None  # a name for a number
        if isinstance(value, str) and isinstance(right, int):
            right = _PROTOCOL_NUMBERS.get(right, str(right))
        if isinstance(value, str) and isinstance(right, str):
            return value.startswith(right[:-1]) if right.endswith("*") else value == right
        return bool(value == right) if isinstance(right, str | int) else None


def _any(answers: Iterable[bool | None]) -> bool | None:
    found = list(answers)
    return True if True in found else (None if None in found else False)


def _all(answers: Iterable[bool | None]) -> bool | None:
    found = list(answers)
    return False if False in found else (None if None in found else True)
