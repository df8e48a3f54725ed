"""What red tests are made of: a seed (a fault, and how to mend it), and a bench to put it on and to judge it by."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import hcloud
from hcloud.firewalls import FirewallRule

from clawdlets_ops import workflow
from clawdlets_ops.lab import control
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import load_project
from clawdlets_ops.verify import catalogue, fleet, repository
from clawdlets_ops.verify import host as one_host
from tests.lab.conftest import LabProject

SSHD = "/etc/ssh/sshd_config"
RESTART = "systemctl reset-failed ssh; systemctl restart ssh"
PATH = "/run/current-system/sw/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Seed:
    """A fault and the ids of ``checks`` (separated by blanks) that it turns red, no others.

    ``do`` and ``undo`` are shell, run as root on the host; a fault elsewhere (the edge, the repository) is ``around``, a
    context manager that is given the bench. ``unknown`` are ids that cannot be seen while it lasts.
    """

    what: str
    checks: str
    do: str = ""
    undo: str = ""
    around: Callable[[Bench], AbstractContextManager[None]] | None = None
    unknown: str = ""

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


class Bench:
    """The project's one host, bootstrapped, with ways to break it and to judge it."""

    def __init__(self, lab: LabProject, host: str = "alpha") -> None:
        self.lab = lab
        self.name = host
        self.project = load_project(lab.root, lab.env())
        self.tools = workflow.tools_for(self.project)
        self.runner = LocalRunner(self.project.environ)

    def sh(self, script: str) -> str:
        """Run as root on the host, past its network."""
        servers = control.status(Layout(self.project.layout.root)).servers
        leader = next(one.leader_pid for one in servers if one.name == self.name)
        argv = ["nsenter", "-t", str(leader), "-a", "env", f"PATH={PATH}", "sh", "-euc", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def client(self) -> hcloud.Client:
        """Somebody else with the project's token, who changes things behind everybody's back."""
        return hcloud.Client(
            token=self.project.token.reveal(), api_endpoint=self.project.hcloud_endpoint, timeout=10, poll_interval=0.05
        )

    def expectation(self) -> dict[str, Any]:
        """What is expected of the host, as a verification would write it down now."""
        return one_host.expect(
            self.project,
            self.name,
            cloud=self.tools.cloud,
            seen=lambda: one_host.peers(self.project, (self.name,), runner=self.runner),
        )

    def report(self, only: Sequence[str] = ()) -> fleet.FleetReport:
        """One verification of the host as an operator makes it, of what is declared now."""
        project = load_project(self.lab.root, self.lab.env())
        return fleet.verify_fleet(project, (self.name,), runner=self.runner, cloud=self.tools.cloud, only=only)

    def judge(self, only: Sequence[str] = ()) -> dict[str, str]:
        """check → what was seen, of everything that did not pass."""
        return {
            one["check"]: f"{one['state']}: {one['observed']}"
            for one in self.report(only).document["findings"]
            if one["state"] in ("fail", "unknown")
        }

    def proves(self, seed: Seed) -> None:
        """The fault turns exactly its checks red; it is mended afterwards, whatever was found."""
        if seed.around is not None:
            with seed.around(self):
                found = self.judge()
        else:
            self.sh(seed.do)
            try:
                # What is done on the host changes nothing of the operator's repository: that is not scanned each time.
                found = self.judge(repository.without(catalogue.catalogue()))
            finally:
                self.sh(seed.undo)
        assert {check for check, text in found.items() if text.startswith("fail")} == set(seed.checks.split()), found
        assert {check for check, text in found.items() if text.startswith("unknown")} == set(seed.unknown.split()), (
            found
        )


def other_rules(*more: FirewallRule, without_udp: bool = False) -> Callable[[Bench], AbstractContextManager[None]]:
    """Other rules at the edge, set behind everybody's back, and the old ones afterwards."""

    @contextmanager
    def around(bench: Bench) -> Iterator[None]:
        client = bench.client()
        bound = client.firewalls.get_by_name(f"{bench.name}-edge")
        assert bound is not None
        kept = list(bound.rules or [])

        def put(rules: list[FirewallRule]) -> None:
            for action in bound.set_rules(rules):
                action.wait_until_finished()

        put([rule for rule in kept if not (without_udp and rule.protocol == "udp")] + list(more))
        try:
            yield
        finally:
            put(kept)

    return around
