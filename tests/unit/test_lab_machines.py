"""The machine backend without machines: what it remembers for the lab's next daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawdlets_ops.lab.addressing import Addressing
from clawdlets_ops.lab.backend import AddressingBackend, BackendError, MachineSpec, RescueBackend, SnapshotBackend
from clawdlets_ops.lab.machine import RECORD_FILE, Desired
from clawdlets_ops.lab.machines import Machines
from clawdlets_ops.lab.network import Network
from clawdlets_ops.process import Command, Result, Runner

SPEC = MachineSpec(1001, "alpha", "198.18.1.10", "2001:2:0:10a::/64", "debian-12", (), "")


class NoNetwork(Runner):
    """A stand-in that loads no firewall, and keeps what it was to load."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def run(self, command: Command, **_: object) -> Result:
        self.loaded.append(command.stdin or "")
        return Result(command, 0, "", "", 0.0)


def make_machines(folder: Path, runner: Runner) -> Machines:
    network = Network(Addressing(1), runner)
    return Machines(folder / "machines", base=folder, network=network, runner=runner, path="", on_down=lambda _: None)


def saved(folder: Path) -> Path:
    """A machine that is off, as an earlier daemon left it."""
    place = folder / "machines" / "1001"
    place.mkdir(parents=True)
    Desired(SPEC, None, powered=False).write(place / RECORD_FILE)
    return place / RECORD_FILE


def test_cut_flows_survive_the_daemon(tmp_path: Path) -> None:
    first = NoNetwork()
    machines = make_machines(tmp_path, first)
    assert not machines.cuts_established
    machines.cut_established(True)
    assert make_machines(tmp_path, NoNetwork()).cuts_established
    machines.cut_established(False)
    assert not make_machines(tmp_path, NoNetwork()).cuts_established
    assert len(first.loaded) == 2, "the rules in force were not replaced"


def test_addresses_of_a_machine_that_is_off_count_from_now_on_and_survive_the_daemon(tmp_path: Path) -> None:
    file = saved(tmp_path)
    machines = make_machines(tmp_path, NoNetwork())
    assert isinstance(machines, AddressingBackend)
    assert isinstance(machines, RescueBackend)
    assert isinstance(machines, SnapshotBackend)
    renamed = MachineSpec(1001, "renamed", "", "2001:2:0:10b::/64", "debian-13", (), "other")
    machines.set_addresses(renamed)
    spec = Desired.read(file).spec
    assert (spec.ipv4, spec.ipv6_network) == ("", "2001:2:0:10b::/64")
    assert (spec.name, spec.image, spec.user_data) == ("alpha", "debian-12", "")
    with pytest.raises(BackendError, match="no machine 7"):
        machines.set_addresses(MachineSpec(7, "x", "", "", "debian-12", (), ""))
