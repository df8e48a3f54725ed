"""Look at one host's SSH port from everywhere that the operator can: the declared vantages, machines by SSH, other hosts."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import ClawdletsError, VerifyError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.finding import State
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify import host as one_host
from clawdlets_ops.verify import vantage
from clawdlets_ops.verify.exposure import Cell, Exposure, Sight, measure_hosts
from clawdlets_ops.verify.ssh_config import known_hosts, ssh_config


@dataclass(frozen=True)
class Look:
    """What was seen of ``host``. ``expected`` maps a vantage's name to yes or no, as the fleet file declares it."""

    host: str
    mode: str
    exposure: Exposure
    expected: Mapping[str, str]

    def odd(self) -> tuple[Cell, ...]:
        """What was seen otherwise than it is declared."""
        return tuple(one for one in self.exposure.cells if one.reach not in ("unknown", self.expected[one.vantage]))

    @property
    def state(self) -> State:
        """Fail when anything is otherwise than declared, unknown when something was not seen, or nothing was looked at."""
        if self.odd():
            return State.FAIL
        return State.UNKNOWN if self.exposure.unknown() or not self.exposure.cells else State.PASS

    def as_json(self) -> dict[str, Any]:
        """JSON-able form."""
        cells = [{**cell, "expect": self.expected[cell["vantage"]]} for cell in self.exposure.as_json()["cells"]]
        return {"host": self.host, "mode": self.mode, "state": str(self.state), "cells": cells}

    def __str__(self) -> str:
        lines = [f"{self.host} is declared {self.mode}", str(self.exposure)]
        lines += [
            f"FAIL    {one.vantage} over IPv{one.family}: {one.reach}, declared is {self.expected[one.vantage]} ({one.detail})"
            for one in self.odd()
        ]
        lines += [f"unknown {text}" for text in self.exposure.unknown()]
        return "\n".join(lines)


def probe(
    project: Project,
    host: str,
    *,
    runner: Runner,
    cloud: Cloud,
    via: Sequence[str] = (),
    others: bool = False,
    controls: Sequence[str] = (),
) -> Look:
    """Look at port 22 of ``host`` over both families, from every vantage at once.

    ``via`` are SSH destinations; ``others``: from each other host of the fleet too. These have the ``controls`` that are
    given (``ADDRESS:PORT``), else those of the first declared vantage on the internet side. VerifyError when there is no
    such server, FleetError when it is not declared.
    """
    given = dict(vantage.parse_control(text) for text in controls) or _usual_controls(project.vantages)
    expectation = one_host.expect(
        project, host, cloud=cloud, seen=lambda: one_host.peers(project, project.fleet.hosts, runner=runner)
    )
    expected = {entry["name"]: entry["expect"] for entry in expectation["vantages"]}
    addresses = {
        side: {int(family): address for family, address in found.items()}
        for side, found in expectation["addresses"].items()
    }
    sight = Sight(addresses["public"], addresses["tailnet"], expectation["ssh"]["port"])
    # Whoever comes by SSH is a stranger to the host: outside adminCidrs.
    stranger = "yes" if expectation["mode"] == "public" and expectation["worldOpen"] else "no"
    with _neighbours(project, host, given, runner=runner, cloud=cloud, wanted=others) as neighbours:
        added = [*(vantage.by_ssh(one, given) for one in via), *neighbours]
        if twice := {one.name for one in added} & expected.keys():
            raise VerifyError("is the name of a declared vantage already", where=", ".join(sorted(twice)))
        places = [*project.vantages, *added]
        seen = measure_hosts(places, {host: sight}, runner=runner)[host]
    return Look(host, expectation["mode"], seen, {**expected, **{one.name: stranger for one in added}})


@contextmanager
def _neighbours(
    project: Project, host: str, controls: vantage.Controls, *, runner: Runner, cloud: Cloud, wanted: bool
) -> Iterator[Collection[Vantage]]:
    """Every other host that is there, reached with its pinned key as the verification reaches it."""
    found: list[Vantage] = []
    with tempfile.TemporaryDirectory(prefix="clp-") as scratch:
        for name in project.fleet.hosts if wanted else ():
            if name == host:
                continue
            try:
                expectation = one_host.expect(
                    project, name, cloud=cloud, seen=lambda: one_host.peers(project, project.fleet.hosts, runner=runner)
                )
            except ClawdletsError:
                continue  # it is not there: nobody looks from it
            folder = Path(scratch) / name
            folder.mkdir(mode=0o700)
            write_atomic(folder / "known_hosts", known_hosts(expectation))
            text = "\n".join(
                line for line in ssh_config(expectation, folder).splitlines() if not line.strip().startswith("Control")
            )
            write_atomic(folder / "config", text + "\n")
            found.append(vantage.by_ssh(name, controls, config=folder / "config"))
        yield found


def _usual_controls(declared: Collection[Vantage]) -> vantage.Controls:
    return next((one.controls for one in declared if one.side == "internet" and one.controls), {})
