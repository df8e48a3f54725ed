"""What ``clawdlets lab status`` prints, from values alone; and the scenario's pure parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import FleetError, LabError
from clawdlets_ops.lab import control, doctor, overview
from clawdlets_ops.lab.control import LabServer, LabStatus
from clawdlets_ops.lab.scenario import environment, lay_out, read_results
from clawdlets_ops.layout import Layout
from clawdlets_ops.testing import FakeRunner
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify.exposure import Cell, Exposure

ALPHA = LabServer("alpha", "running", "198.18.1.10", "2001:2:0:10a::1", ("100.64.1.10", "fd7a::a"), True, 17, 1)
BRAVO = LabServer("bravo-with-a-long-name", "off", "198.18.1.11", "2001:2:0:10b::1", (), False, None, 2)
UP = LabStatus("up", 7, "http://127.0.0.1:9/v1", (ALPHA, BRAVO), ("operator", "stranger"))
EXPOSURE = Exposure(
    (
        Cell("operator", "internet", 4, "198.18.1.10", 22, "no"),
        Cell("operator", "internet", 6, "2001:2:0:10a::1", 22, "unknown", "the control was not reached"),
        Cell("member", "tailnet", 4, "100.64.1.10", 22, "yes"),
    )
)
REQUEST: dict[str, Any] = {
    "ts": "2026-01-02T03:04:05+00:00",
    "method": "POST",
    "path": "/v1/servers",
    "status": 201,
    "userAgent": "hcloud-terraform/1.50 (more)",
    "mutates": True,
    "body": {"name": "alpha"},
}


def test_every_column_is_aligned_and_says_what_is_not_there() -> None:
    lines = overview.text(UP, [REQUEST], {"alpha": EXPOSURE}).splitlines()
    assert lines[0] == "the lab is up (number 7): http://127.0.0.1:9/v1"
    head, alpha, bravo = lines[2:5]
    assert head.split() == ["MACHINE", "STATUS", "IPV4", "IPV6", "TAILNET", "INSTALLED"]
    assert alpha.split() == ["alpha", "running", "198.18.1.10", "2001:2:0:10a::1", "100.64.1.10", "fd7a::a", "yes"]
    assert bravo.split() == ["bravo-with-a-long-name", "off", "198.18.1.11", "2001:2:0:10b::1", "-", "no"]
    assert {line.index(word) for line, word in ((head, "STATUS"), (alpha, "running"), (bravo, "off"))} == {24}
    assert "operator  internet  no    unknown" in lines
    assert "member    tailnet   yes   -" in lines
    assert lines[-1].split() == ["03:04:05", "POST", "/v1/servers", "201", "yes", "hcloud-terraform/1.50"]


def test_which_tailnet_it_is_is_told_with_what_shows_it() -> None:
    real = control.Tailnet("real", True, "headscale v0.28.0 at https://198.19.7.4")
    assert "\nits tailnet is the real one: headscale v0.28.0 at https" in overview.text(replace(UP, tailnet=real))
    broken = control.Tailnet("real", False, "member ended")
    assert "the real one: member ended; clawdlets lab up mends it\n" in overview.text(replace(UP, tailnet=broken))
    played = control.Tailnet("stand-in", True, "a second network")
    assert "its tailnet is the stand-in: a second network\n" in overview.text(replace(UP, tailnet=played))
    said = {"kind": "stand-in", "works": True, "evidence": "a second network"}
    assert overview.as_json(replace(UP, tailnet=played))["tailnet"] == said


def test_exposure_that_was_not_measured_is_not_claimed() -> None:
    said = overview.text(UP)
    assert "--probe measures" in said
    assert "real connections" not in said
    assert "exposure" not in overview.as_json(UP)["machines"][0]


@pytest.mark.parametrize(("state", "hint"), [("down", ""), ("dead", "clawdlets lab up mends it")])
def test_a_lab_that_is_not_up(state: str, hint: str) -> None:
    said = overview.text(LabStatus(state))
    assert said.startswith(f"the lab is {state}")
    assert hint in said
    assert json.dumps(overview.as_json(LabStatus(state)))


def test_json_has_the_measured_cells_and_no_request_bodies() -> None:
    document = json.loads(json.dumps(overview.as_json(UP, [REQUEST], {"alpha": EXPOSURE})))
    assert document["machines"][0]["exposure"][1]["reach"] == "unknown"
    assert "exposure" not in document["machines"][1]
    assert set(document["requests"][0]) == {"ts", "method", "path", "status", "userAgent", "mutates"}


def test_what_a_client_wrote_cannot_drive_the_terminal() -> None:
    said = overview.text(UP, [{**REQUEST, "userAgent": "\x1b[2Jbad", "path": "/v1/" + "x" * 300}])
    assert "\x1b" not in said
    assert "?[2Jbad" in said
    assert max(len(line) for line in said.splitlines()) < 160


def test_only_running_machines_are_probed() -> None:
    answer = {"results": [{"family": 4, "address": "198.18.1.10", "port": 22, "outcome": "open", "banner": "", "detail": ""},
                          {"family": 6, "address": "2001:2:0:10a::1", "port": 22, "outcome": "open", "banner": "", "detail": ""}]}  # fmt: skip
    runner = FakeRunner([(("via",), (0, json.dumps(answer)))])
    measured = overview.measure(UP, [Vantage("stranger", "internet", via=("via",))], runner)
    assert list(measured) == ["alpha"]
    assert measured["alpha"].open_from_internet() == ("stranger over IPv4", "stranger over IPv6")
    assert len(runner.ran) == 1


def test_the_newest_requests_leave_out_the_labs_own(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.lab.mkdir(parents=True)
    with pytest.raises(LabError, match="has written nothing"):
        control.requests(layout)
    agents = ["a", "clawdlets-lab", "b", "clawdlets-lab", "c"]
    (layout.lab / "journal.jsonl").write_text("".join(json.dumps({**REQUEST, "userAgent": a}) + "\n" for a in agents))
    assert [entry["userAgent"] for entry in control.requests(layout, 2)] == ["b", "c"]
    assert [entry["userAgent"] for entry in control.requests(layout)] == agents


def test_pyinfras_results_table_is_read_and_nothing_else_is_taken_for_it() -> None:
    table = "--> Results:\n    Operation    Hosts   Success   Error   No Change\n    Grand total   5   {}   -   1\n"
    assert (read_results(table.format("4")).ran, read_results(table.format("4")).changed) == (5, 4)
    assert read_results(table.format("-")).changed == 0
    with pytest.raises(LabError, match="no results"):
        read_results("no hosts matched")


def test_a_scenarios_environment_carries_no_identity() -> None:
    given = {"PATH": "/bin", "HOME": "/h", "HCLOUD_TOKEN": "canary", "SSH_AUTH_SOCK": "/s", "SOPS_AGE_KEY": "canary"}
    made = environment(given, programs=Path("/programs"))
    assert made["PATH"] == "/programs:/bin"
    assert "canary" not in str(made)
    assert "SSH_AUTH_SOCK" not in made


def test_a_fleet_as_content_becomes_a_project_with_deploys_of_its_own(root: Path, tmp_path: Path) -> None:
    document = json.loads((root / "fleet" / "clawdlets.json").read_text())
    document["hosts"]["bravo"] = document["hosts"]["alpha"]
    environ = environment({"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)})
    with pytest.raises(FleetError, match="did you mean 'bravo'"):
        lay_out(tmp_path / "p", document, cache=tmp_path, environ=environ, hosts=["brave"])
    lay_out(tmp_path / "p", document, cache=tmp_path, environ=environ, hosts=["bravo"])
    assert list(json.loads((tmp_path / "p/fleet/clawdlets.json").read_text())["hosts"]) == ["bravo"]
    for path in sorted((root / "deploys").glob("*.py")):
        assert (tmp_path / "p" / "deploys" / path.name).read_text() == path.read_text()
    assert (tmp_path / "p" / ".git").is_dir()


def test_every_tier_is_told_with_what_it_lacks(tmp_path: Path) -> None:
    told = {finding.claim: finding for finding in doctor.tiers(Layout(tmp_path), {"PATH": str(tmp_path)})}
    assert [claim.split()[1] for claim in told] == ["unit", "contract", "integration", "lab"]
    assert told["the unit tests run here"].observed == "yes"
    assert "hcloud" in told["the contract tests run here"].observed
    assert "hcloud-cli" in told["the contract tests run here"].fix
    assert told["the lab tests run here"].observed.startswith("no: ")
    assert "make setup" in told["the lab tests run here"].fix


def test_an_address_that_is_not_there_the_rescue_system_and_cut_flows_are_shown() -> None:
    six = replace(ALPHA, ipv4="", in_rescue=True)
    assert six.public_addresses == {6: ALPHA.ipv6}
    assert replace(BRAVO, ipv6="").public_addresses == {4: BRAVO.ipv4}
    status = replace(UP, servers=(six, replace(BRAVO, in_rescue=True)), cut_established=True)
    said = overview.text(status).splitlines()
    assert any(line.split()[:5] == ["alpha", "running", "(rescue)", "-", ALPHA.ipv6] for line in said)
    assert any(line.split()[:2] == [BRAVO.name, "off"] and "rescue" not in line for line in said)
    assert any("ends the flows" in line for line in said)
    assert "ends the flows" not in overview.text(UP)
    document = overview.as_json(status)
    assert (document["cutEstablished"], document["machines"][0]["inRescue"]) == (True, True)
    assert document["machines"][0]["ipv4"] == ""


@pytest.mark.parametrize("bound", ["the lab", "https://api.example/v1"])
def test_the_end_of_a_lab_is_the_end_of_what_was_known_of_its_servers(tmp_path: Path, bound: str) -> None:
    layout = Layout(tmp_path)
    known = (layout.installer_pin("alpha"), layout.install_receipt("alpha"), layout.install_dir("alpha") / "pins")
    for path in (*known, layout.bound_to, layout.lab / "something", layout.reports("alpha") / "report.html"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    layout.bound_to.write_text(f"{bound}\n")
    control.down(layout, {"PATH": "/usr/bin:/bin"})
    assert not layout.lab.exists()
    assert [path.exists() for path in known] == [bound != "the lab"] * 3
    assert (layout.reports("alpha") / "report.html").exists()
