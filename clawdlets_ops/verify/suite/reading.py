"""How the host's evidence is read. Pure: text in, values out; what cannot be understood is Unknown, never fine.

Shape of ``facts``: ``{"problem": str | None, "network": "tailnet" | "public", "address": str, "sections": {name: {"status":
int | None, "text": str}}}``; a status of None says that the section was cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FRAME = re.compile(r"^=== (?P<nonce>[0-9a-f]{32}) (?P<what>begin|end) (?P<name>[a-z-]+)(?: (?P<status>\d+))?$")
_STAT = re.compile(r"^(?P<mode>[0-7]{1,4}) (?P<owner>\S+) (?P<group>\S+) (?P<kind>\D+?) (?P<size>\d+) (?P<path>/.*)$")
_SHOWN = 6


class Fault(AssertionError):
    """The claim does not hold; the text says what was seen."""


class Unknown(Exception):
    """It could not be seen whether the claim holds."""


class NotApplicable(Exception):
    """The claim is not made for this host; the text says why."""


@dataclass(frozen=True)
class Stat:
    """One line of stat: ``mode`` in octal as a number, names of owner and group, ``kind`` as GNU stat calls it."""

    mode: int
    owner: str
    group: str
    kind: str
    path: str


@dataclass(frozen=True)
class User:
    """One entry of the user database; ``groups`` are the names of all groups, ``group`` of the primary one."""

    name: str
    group: str
    groups: frozenset[str]


def parse_frames(text: str, nonce: str) -> dict[str, dict[str, Any]]:
    """The sections in the output of clawdlets-facts. Only frames with our nonce count; a begun section without its end
    has the status None."""
    sections: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    current = ""
    for line in text.split("\n"):
        frame = FRAME.match(line)
        if frame is None or frame["nonce"] != nonce:
            lines.append(line)
        elif frame["what"] == "begin":
            current, lines = frame["name"], []
            sections[current] = {"status": None, "text": ""}
        elif frame["name"] == current and frame["status"] is not None:
            sections[current] = {"status": int(frame["status"]), "text": "\n".join(lines).strip("\n")}
            current = ""
    return sections


def section(facts: Mapping[str, Any], name: str, *, ok: tuple[int, ...] = (0,)) -> str:
    """The text of a section; Unknown when there are no facts, or it is missing, cut off, or failed."""
    if facts.get("problem"):
        raise Unknown(str(facts["problem"]))
    found = facts["sections"].get(name)
    if found is None:
        raise Unknown(f"the host's facts have no section {name}")
    if found["status"] is None:
        raise Unknown(f"the section {name} of the host's facts was cut off")
    if found["status"] not in ok:
        last = found["text"].strip().splitlines()[-1:] or [""]
        raise Unknown(f"the host could not say: {name} ended with status {found['status']} ({last[0][:200]})")
    return str(found["text"])


def settle(faults: Iterable[str], observed: str) -> str:
    """``observed`` when there is no fault; else Fault with the first few."""
    found = list(dict.fromkeys(faults))
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise Fault("; ".join(found[:_SHOWN]) + more)
    return observed


def stats(text: str, *, skip: tuple[str, ...] = ()) -> dict[str, Stat]:
    """Path → Stat. Lines ``absent PATH`` give no entry; those that begin with one of ``skip`` are left out."""
    found: dict[str, Stat] = {}
    for line in text.splitlines():
        if not line or line.startswith(("absent ", *skip)):
            continue
        match = _STAT.match(line)
        if match is None:
            raise Unknown(f"a line of stat is not understood: {line[:200]!r}")
        found[match["path"]] = Stat(
            int(match["mode"], 8), match["owner"], match["group"], match["kind"].strip(), match["path"]
        )
    return found


def users(facts: Mapping[str, Any]) -> dict[str, User]:
    """Every user of the host by name."""
    names: dict[str, str] = {}
    members: dict[str, set[str]] = {}
    entries: list[tuple[str, str]] = []
    for line in section(facts, "users").splitlines():
        kind, *rest = line.split(":")
        if kind == "group" and len(rest) >= 3:
            names[rest[1]] = rest[0]
            members.setdefault(rest[0], set()).update(name for name in rest[2].split(",") if name)
        elif kind == "user" and len(rest) >= 5:
            entries.append((rest[0], rest[2]))
        else:
            raise Unknown(f"an entry of the user database is not understood: {line[:200]!r}")
    found = {}
    for name, gid in entries:
        primary = names.get(gid, gid)
        more = {group for group, inside in members.items() if name in inside}
        found[name] = User(name, primary, frozenset({primary, *more}))
    return found


def user_ids(facts: Mapping[str, Any]) -> dict[str, int]:
    """Every user of the host by name, with its number."""
    entries = [line.split(":") for line in section(facts, "users").splitlines() if line.startswith("user:")]
    if not entries or not all(len(words) > 2 and words[2].isdigit() for words in entries):
        raise Unknown("the user database is not understood")
    return {words[1]: int(words[2]) for words in entries}


def sshd_settings(facts: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """(user, source address) → keyword → its values, as ``sshd -T -C`` of the host sees them."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for line in section(facts, "sshd-config").splitlines():
        words = line.split()
        if len(words) >= 3 and words[2].islower():
            found.setdefault((words[0], words[1]), {}).setdefault(words[2], []).append(" ".join(words[3:]))
    if not found:
        raise Unknown("sshd -T printed nothing")
    return found


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket: ``address`` as ss prints it, without brackets or scope; ``programs`` that hold it."""

    address: str
    port: int
    programs: tuple[str, ...]

    @property
    def loopback(self) -> bool:
        """Whether only the host itself can reach it."""
        return self.address.startswith("127.") or self.address in ("::1", "::ffff:127.0.0.1")

    def __str__(self) -> str:
        return f"{', '.join(self.programs) or 'something'} on {self.address}:{self.port}"


def listeners(facts: Mapping[str, Any]) -> list[Listener]:
    """Every listening TCP socket of the host (``ss -Hltnp``)."""
    found = []
    for line in section(facts, "listen-tcp").splitlines():
        words = line.split()
        if not words:
            continue
        address, _, port = words[3].rpartition(":") if len(words) > 3 else ("", "", "")
        if not port.isdigit():
            raise Unknown(f"a line of ss is not understood: {line[:200]!r}")
        programs = tuple(dict.fromkeys(re.findall(r'\("([^"]+)"', line)))
        found.append(Listener(address.partition("%")[0].strip("[]"), int(port), programs))
    return found


def ruleset(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of ``nft -j list ruleset``."""
    try:
        return list(json.loads(section(facts, "nft"))["nftables"])
    except (ValueError, KeyError, TypeError) as error:
        raise Unknown(f"the firewall's rules are not understood: {error!r}") from None


def path_faults(found: Mapping[str, Stat], wanted: Mapping[str, Any]) -> list[str]:
    """What is wrong with the path in ``wanted`` ({path, mode, owner, group, kind}; group None: not compared)."""
    path = wanted["path"]
    stat = found.get(path)
    if stat is None:
        return [f"{path} is not there"]
    faults = []
    kind = {"file": "regular", "directory": "directory", "socket": "socket"}[wanted["kind"]]
    if not stat.kind.startswith(kind):
        faults.append(f"{path} is a {stat.kind}")
    if stat.mode != int(wanted["mode"], 8):
        faults.append(f"{path} has mode {stat.mode:04o}, expected {wanted['mode']}")
    if stat.owner != wanted["owner"]:
        faults.append(f"{path} belongs to {stat.owner}, expected {wanted['owner']}")
    if wanted["group"] is not None and stat.group != wanted["group"]:
        faults.append(f"{path} has the group {stat.group}, expected {wanted['group']}")
    return faults


def parent_faults(found: Mapping[str, Stat], paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that somebody other than root could change; Unknown when one was not looked at."""
    faults = []
    for path in paths:
        stat = found.get(path)
        if stat is None:
            raise Unknown(f"{path} was not looked at")
        if stat.mode & 0o022 or stat.owner != "root":
            faults.append(f"{path} can be changed by others ({stat.owner}:{stat.group} {stat.mode:04o})")
    return faults


def read_attempts(facts: Mapping[str, Any]) -> dict[tuple[str, str], bool]:
    """(user, path) → whether that user could read it. Unknown unless every user could read the control file."""
    found: dict[tuple[str, str], bool] = {}
    controls: dict[str, bool] = {}
    for line in section(facts, "isolation").splitlines():
        words = line.split()
        if len(words) != 3 or words[2] not in ("ok", "denied", "failed"):
            continue
        if words[1] == "control":
            controls[words[0]] = words[2] == "ok" and controls.get(words[0], True)
        else:
            found[words[0], words[1]] = words[2] == "ok"
    if not controls:
        raise Unknown("nobody tried to read anything")
    if failed := sorted(name for name, ok in controls.items() if not ok):
        raise Unknown(f"the control failed: {', '.join(failed)} could not even read what everybody may read")
    if strays := sorted({user for user, _ in found} - controls.keys()):
        raise Unknown(f"no control was made as {', '.join(strays)}")
    return found
