"""Three hosts that are closed together: canaries first, and each host looked at from the others."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import hcloud
import pytest
from hcloud.firewalls import FirewallRule

from clawdlets_ops.lab import control, faults
from clawdlets_ops.lab.scenario import Scenario
from clawdlets_ops.provision import firewall_name
from tests.lab.conftest import ROOT, TAILNET

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HOSTS = ("alpha", "bravo", "charlie")


def declare(lab: Scenario, mode: str) -> None:
    def change(document: dict[str, Any]) -> None:
        for host in document["hosts"].values():
            host["sshExposure"]["mode"] = mode

    lab.declare(change)


def open_to_the_internet(lab: Scenario) -> list[str]:
    """By real connections of the operator's; None of them unknown."""
    seen = {host: lab.reach("operator", host, 4) for host in HOSTS}
    assert set(seen.values()) <= {"yes", "no"}, seen
    return [host for host, reach in seen.items() if reach == "yes"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
    document.pop("cattle", None)  # it names a host of the example fleet
    document["hosts"] = {name: copy.deepcopy(document["hosts"]["alpha"]) for name in HOSTS}
    folder = tmp_path_factory.mktemp("fleet")
    with Scenario(document, folder=folder, cache=ROOT / ".cache", environ=os.environ, tailnet=TAILNET) as made:
        declare(made, "public")
        done = made.run("clawdlets", "bootstrap", "--parallel", "3")
        assert done.ok, done.stdout + done.stderr
        yield made


def test_after_a_canary_that_failed_no_other_host_is_begun(lab: Scenario) -> None:
    assert open_to_the_internet(lab) == list(HOSTS)
    declare(lab, "tailnet")
    faults.inject(lab.layout, faults.parse_fault(["answer", "locked", "POST", "/firewalls/*/actions/*", "times=1"]))
    done = lab.run("clawdlets", "lockdown", "--all", "--canary", "1")
    assert done.exit_code == 1, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("alpha: failed")
    assert lines[-2:] == ["bravo: not begun", "charlie: not begun"]
    assert "bravo" not in done.stderr
    assert "charlie" not in done.stderr
    assert open_to_the_internet(lab) == list(HOSTS)


def test_after_canaries_that_succeeded_the_others_follow(lab: Scenario) -> None:
    faults.clear(lab.layout)
    done = lab.run("clawdlets", "lockdown", "--all", "--canary", "2", "--parallel", "2")
    assert done.exit_code == 0, done.stdout + done.stderr
    steps = done.stderr.splitlines()
    first = {host: next(number for number, line in enumerate(steps) if line.startswith(f"{host}: ")) for host in HOSTS}
    last = {host: max(number for number, line in enumerate(steps) if line.startswith(f"{host}: ")) for host in HOSTS}
    assert last["alpha"] < first["bravo"] <= last["bravo"] < first["charlie"], "the canaries one by one, then the rest"
    assert open_to_the_internet(lab) == []


def test_a_host_is_looked_at_from_the_others(lab: Scenario) -> None:
    done = lab.run("clawdlets", "probe", "alpha", "--others", "--format", "json")
    look = json.loads(done.stdout)
    assert (done.exit_code, look["state"]) == (0, "pass"), look
    cells = {(cell["vantage"], cell["family"]): (cell["reach"], cell["expect"]) for cell in look["cells"]}
    for neighbour in ("bravo", "charlie"):
        for family in (4, 6):
            assert cells[neighbour, family] == ("no", "no"), "closed, and its control was reached"


def test_what_a_neighbour_gets_into_is_told(lab: Scenario) -> None:
    """Open again behind everybody's back, to the neighbours alone, which no declared vantage sees: on the host, then at the
    edge too."""
    lab.guest("bravo", "nft", "add rule inet clawdlets input tcp dport 22 accept").check()
    done = lab.run("clawdlets", "probe", "bravo", "--others")
    assert done.exit_code == 0, "the edge still holds"
    servers = {host: control.find_server(lab.layout, host) for host in HOSTS}
    neighbours = [f"{servers['charlie'].public_addresses[4]}/32", f"{servers['charlie'].public_addresses[6]}/128"]
    client = hcloud.Client(
        token=lab.project.token.reveal(), api_endpoint=lab.project.hcloud_endpoint, poll_interval=0.05
    )
    edge = client.firewalls.get_by_name(firewall_name("bravo"))
    assert edge is not None
    rule = FirewallRule(direction="in", protocol="tcp", port="22", source_ips=neighbours)
    for action in edge.set_rules([*(edge.rules or []), rule]):
        action.wait_until_finished()
    alone = lab.run("clawdlets", "probe", "bravo")
    assert alone.exit_code == 0, alone.stdout
    done = lab.run("clawdlets", "probe", "bravo", "--others")
    assert done.exit_code == 1, done.stdout
    for family in (4, 6):
        assert f"FAIL    charlie over IPv{family}: yes, declared is no" in done.stdout
    assert "FAIL    alpha" not in done.stdout
