"""What a host's egress policy has held back: counters of nftables, and what the proxy denied. ``read_log`` is pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from clawdlets_ops.egress import Policy, policy_of
from clawdlets_ops.errors import EgressError
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.layout import HOST_PROGRAMS
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.sync import connect

LOG = f"sudo -n {HOST_PROGRAMS}/clawdlets-egress log"
RULES = {
    "mail": "mail (TCP 25, 465, 587, 2525)",
    "metadata": "the metadata service, asked by others than root",
    "confined": "confined bots, past the proxy",
    "forwarded": "forwarded for containers",
    "proxy": "the proxy itself, to private addresses",
}


@dataclass(frozen=True)
class Denied:
    """One request that the proxy denied. ``bot`` is empty for a program of the host's own."""

    at: datetime
    bot: str
    method: str
    name: str
    port: int
    status: str


@dataclass(frozen=True)
class Denials:
    """``packets``: rule (see RULES) → packets since the rules were loaded; ``confined``: user → packets it sent, whatever
    became of them; ``denied``: oldest first."""

    packets: Mapping[str, int] = field(default_factory=dict)
    confined: Mapping[str, int] = field(default_factory=dict)
    denied: tuple[Denied, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "packets": dict(self.packets),
            "confined": dict(self.confined),
            "denied": [
                {"at": one.at.isoformat(), "bot": one.bot, "method": one.method, "name": one.name, "port": one.port, "status": one.status}
                for one in self.denied
            ],
        }  # fmt: skip


def read_log(text: str, policy: Policy) -> Denials:
    """What ``clawdlets-egress log`` printed; EgressError when it is not understood."""
    users: dict[int, str] = {}
    rules: dict[str, Any] | None = None
    denied = []
    by_port = {line.port: line.name.removeprefix("bot-") if line is not policy.host else "" for line in policy.lines}
    try:
        for line in text.splitlines():
            word, _, rest = line.partition(" ")
            if word == "user":
                name, number = rest.split()
                users[int(number)] = name
            elif word == "nft":
                rules = json.loads(rest)
            elif word == "proxy":
                at, port, status, method, name, target, *_ = rest.split()
                moment = datetime.fromtimestamp(float(at), UTC)
                denied.append(Denied(moment, by_port.get(int(port), f"port {port}"), method, name, int(target), status))
            elif line:
                raise ValueError(line[:80])
        if rules is None:
            raise ValueError("no rules")
        return Denials(_packets(rules), _confined(rules, users), tuple(denied))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise EgressError(f"the host's answer is not understood: {error}", where="clawdlets-egress log") from None


def fetch(project: Project, host: str, *, runner: Runner, cloud: Cloud) -> Denials:
    """Ask the host, over SSH with its pinned key; HostKeyError, UnreachableError, EgressError."""
    policy = policy_of(project.fleet.host(host))
    with connect(project, host, runner=runner, cloud=cloud) as link:
        answer = link.shell.run(LOG)
    if not answer.ok:
        said = (answer.stderr or answer.stdout).strip()[-300:]
        raise EgressError(
            f"clawdlets-egress ended with status {answer.exit_code}: {said}",
            where=host,
            fix="is the host's system as old as this policy? install or update it",
        )
    return read_log(answer.stdout, policy)


def _packets(rules: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for rule in (item["rule"] for item in rules["nftables"] if "rule" in item):
        for part in rule.get("expr", ()):
            if "counter" in part and "comment" in rule:
                found[rule["comment"]] = found.get(rule["comment"], 0) + part["counter"]["packets"]
    return found


def _confined(rules: dict[str, Any], users: Mapping[int, str]) -> dict[str, int]:
    found = {}
    for item in rules["nftables"]:
        if item.get("set", {}).get("name") == "confined":
            for element in item["set"].get("elem", ()):
                inner = element["elem"]
                found[users.get(inner["val"], str(inner["val"]))] = inner["counter"]["packets"]
    return found
