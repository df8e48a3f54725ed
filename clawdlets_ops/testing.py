"""Fakes for tests, ours and our users': unscripted means failure. Each has a contract test against the real thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import ToolMissingError
from clawdlets_ops.hetzner import (
    Firewall,
    FirewallRule,
    Labelled,
    Offer,
    PlacementGroup,
    PrimaryIp,
    Server,
    SshKey,
    Volume,
)
from clawdlets_ops.process import Command, Result
from clawdlets_ops.sensitive import Secret


class Unscripted(AssertionError):
    """A fake was asked for something that the test did not script."""


@dataclass
class FakeRunner:
    """Answers commands from ``script``: pairs of the first words of a command line and what to answer.

    An answer is ``(exit_code, stdout)`` or a function of the command that returns one. The first match wins; no match
    raises Unscripted. ``ran`` keeps every command; ``programs`` are what ``which`` finds.
    """

    script: list[tuple[tuple[str, ...], tuple[int, str] | Callable[[Command], tuple[int, str]]]] = field(
        default_factory=list
    )
    programs: frozenset[str] | None = None
    ran: list[Command] = field(default_factory=list)

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """Answer from the script."""
        self.ran.append(command)
        if self.which(command.argv[0]) is None:
            raise ToolMissingError(f"the program {command.argv[0]!r} is not on PATH", where=command.argv[0])
        for words, answer in self.script:
            if command.argv[: len(words)] == words:
                exit_code, stdout = answer(command) if callable(answer) else answer
                redactor = command.redactor()
                for line in stdout.splitlines():
                    if on_line is not None:
                        on_line(redactor.scrub(line))
                stderr = "" if exit_code == 0 else redactor.scrub(stdout)
                return Result(command, exit_code, stdout, stderr, duration_s=0.0)
        raise Unscripted(f"no answer is scripted for: {command}")

    def which(self, program: str) -> Path | None:
        """A path for every program, or for those in ``programs`` only."""
        name = Path(program).name
        return Path("/fake/bin") / name if self.programs is None or name in self.programs else None


@dataclass
class FakeCloud:
    """The API's reads from lists."""

    servers: list[Server] = field(default_factory=list)
    firewalls: list[Firewall] = field(default_factory=list)
    ssh_keys: list[SshKey] = field(default_factory=list)
    volume_list: list[Volume] = field(default_factory=list)
    primary_ip_list: list[PrimaryIp] = field(default_factory=list)
    placement_groups: list[PlacementGroup] = field(default_factory=list)
    offer_list: list[Offer] = field(default_factory=list)
    writable: bool = True
    rebuilt: list[tuple[str, str]] = field(default_factory=list)

    def server(self, name: str) -> Server | None:
        """By name."""
        return next((server for server in self.servers if server.name == name), None)

    def servers_with(self, labels: Mapping[str, str]) -> tuple[Server, ...]:
        """By labels."""
        return tuple(one for one in self.servers if labels.items() <= dict(one.labels).items())

    def firewall(self, name: str) -> Firewall | None:
        """By name."""
        return next((firewall for firewall in self.firewalls if firewall.name == name), None)

    def ssh_key(self, fingerprint: str) -> SshKey | None:
        """By MD5 fingerprint."""
        return next((key for key in self.ssh_keys if key.fingerprint == fingerprint), None)

    def volumes(self) -> tuple[Volume, ...]:
        """All of them."""
        return tuple(self.volume_list)

    def primary_ips(self) -> tuple[PrimaryIp, ...]:
        """All of them."""
        return tuple(self.primary_ip_list)

    def placement_group(self, name: str) -> PlacementGroup | None:
        """By name."""
        return next((group for group in self.placement_groups if group.name == name), None)

    def offers(self) -> tuple[Offer, ...]:
        """All of them."""
        return tuple(self.offer_list)

    def has_image(self, name: str, architecture: str) -> bool:
        """Every Debian there is."""
        return name.startswith("debian-") and architecture in ("x86", "arm")

    def may_write(self) -> bool:
        """As ``writable`` says."""
        return self.writable

    def labelled(self, labels: Mapping[str, str]) -> tuple[Labelled, ...]:
        """Whatever in the lists has all these labels."""
        kinds: dict[str, Sequence[Server | Firewall | SshKey | Volume | PrimaryIp | PlacementGroup]] = {
            "servers": self.servers,
            "volumes": self.volume_list,
            "primary_ips": self.primary_ip_list,
            "firewalls": self.firewalls,
            "placement_groups": self.placement_groups,
            "ssh_keys": self.ssh_keys,
        }
        return tuple(
            Labelled(kind, one.id, one.name)
            for kind, ones in kinds.items()
            for one in ones
            if labels.items() <= dict(one.labels).items()
        )

    def rebuild(self, server: Server, image: str) -> None:
        """Only remembered, in ``rebuilt``."""
        self.rebuilt.append((server.name, image))

    def set_rules(self, firewall: Firewall, rules: tuple[FirewallRule, ...]) -> None:
        """Replaced in the list, at once."""
        self._put(firewall, rules=tuple(sorted(rules)))

    def set_labels(self, firewall: Firewall, labels: Mapping[str, str]) -> None:
        """Replaced in the list, at once."""
        self._put(firewall, labels=dict(labels))

    def _put(self, firewall: Firewall, **changed: Any) -> None:
        self.firewalls = [replace(one, **changed) if one.id == firewall.id else one for one in self.firewalls]


@dataclass
class FrozenClock:
    """A clock that moves when told to; ``sleep`` moves it."""

    at: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        """The time it shows."""
        return self.at

    def sleep(self, seconds: float) -> None:
        """Move on by ``seconds``."""
        self.at += timedelta(seconds=seconds)


def canary(name: str) -> Secret:
    """A secret that is none, and says so, to be planted and looked for."""
    return Secret(f"canary-{name}-not-a-real-secret", name)
