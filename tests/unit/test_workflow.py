"""The order of the stages on one host: when the verification comes before the lockdown, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import workflow
from clawdlets_ops.cloud import Firewall, FirewallRule
from clawdlets_ops.errors import CloudError, UnreachableError, VerifyError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.journal import Journal, read_journal

FLEET = """{"schemaVersion": 1, "hosts": {"alpha": {
  "provisioning": {"adminCidrs": ["203.0.113.0/24"], "sshPubkeyFile": "key.pub"},
  "sshExposure": {"mode": "%s"}}}}"""
SSH = FirewallRule("in", "tcp", "22", ("203.0.113.0/24",), "")


class Bench:
    """One host whose stages are played: ``steps`` is what each one would do, ``verdicts`` how its verifications end."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[str, tuple[str, ...]] = {}
        self.verdicts: list[str] = []
        self.done: list[str] = []
        self.edge: tuple[FirewallRule, ...] = ()
        self.journal = Journal(folder / "run")
        self.mode = "tailnet"
        self.lost = False
        monkeypatch.setattr(workflow, "plan", self.plan)
        monkeypatch.setattr(workflow, "_apply", self.apply)

    def plan(self, stage: str, _project: Any, host: str, _tools: Any) -> workflow.StagePlan:
        self.done.append(f"plan {stage}")
        if stage == "lockdown" and self.lost:
            raise UnreachableError("does not answer", where=host)
        return workflow.StagePlan(stage, host, self.steps.get(stage, ()))

    def apply(self, stage: str, *_: Any) -> tuple[bool, str]:
        self.done.append(stage)
        if stage == "verify" and (verdict := self.verdicts.pop(0) if self.verdicts else ""):
            raise VerifyError(verdict, where="alpha")
        return stage != "verify", "text"

    def firewall(self, name: str) -> Firewall:
        return Firewall(1, name, {}, self.edge)

    def bootstrap(self, **more: Any) -> list[tuple[str, bool]]:
        project: Any = type("P", (), {"fleet": parse_fleet(FLEET % self.mode, where="fleet")})()
        cloud: Any = type("C", (), {"firewall": staticmethod(self.firewall)})()
        tools = workflow.Tools(runner=None, cloud=cloud, journal=self.journal)  # type: ignore[arg-type]
        return [(outcome.stage, outcome.changed) for outcome in workflow.bootstrap(project, "alpha", tools, **more)]

    def ended(self) -> list[tuple[str, str]]:
        events = read_journal(self.journal.path)
        return [(e["stage"], e["event"]) for e in events if e["event"] in ("done", "unchanged", "failed")]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


UNCHANGED = [(stage, False) for stage in workflow.STAGES]


@pytest.mark.parametrize("mode", ["tailnet", "public"])
def test_a_host_that_is_as_declared_is_not_asked_by_the_lockdown(bench: Bench, mode: str) -> None:
    bench.mode, bench.edge = mode, (SSH,) if mode == "public" else ()
    assert bench.bootstrap() == UNCHANGED
    assert bench.done == ["plan payload", "plan provision", "plan install", "verify"]
    assert sorted(bench.ended()) == sorted(
        [*((stage, "unchanged") for stage in workflow.STAGES[:4]), ("verify", "done")]
    )


def test_a_host_on_trial_is_locked_down_and_judged_again(bench: Bench) -> None:
    bench.verdicts, bench.steps = ["EXP-10 failed"], {"lockdown": ("put the host's firewall to tailnet",)}
    assert bench.bootstrap() == [*UNCHANGED[:3], ("lockdown", True), ("verify", False)]
    assert bench.done[3:] == ["verify", "plan lockdown", "lockdown", "verify"]
    assert ("verify", "failed") not in bench.ended()


def test_where_the_lockdown_has_nothing_to_do_the_verification_is_not_made_twice(bench: Bench) -> None:
    bench.verdicts = ["SSH-01 failed"]
    with pytest.raises(VerifyError, match="SSH-01"):
        bench.bootstrap()
    assert bench.done[3:] == ["verify", "plan lockdown"]
    assert bench.ended()[3:] == [("verify", "failed"), ("lockdown", "unchanged")]


def test_a_host_that_is_lost_to_both_ends_with_what_the_lockdown_says(bench: Bench) -> None:
    bench.verdicts, bench.lost = ["unknown"], True
    with pytest.raises(UnreachableError, match="does not answer"):
        bench.bootstrap()
    assert bench.ended()[3:] == [("verify", "failed"), ("lockdown", "failed")]


@pytest.mark.parametrize("why", ["an earlier stage", "the edge is open"])
def test_after_any_change_the_stages_come_in_their_order(bench: Bench, why: str) -> None:
    if why == "an earlier stage":
        bench.steps = {"provision": ("label it",)}
    else:
        bench.edge = (SSH,)
    bench.bootstrap()
    assert bench.done[-2:] == ["plan verify", "verify"]
    assert "plan lockdown" in bench.done[:-2]


def test_it_goes_no_further_than_told(bench: Bench) -> None:
    assert bench.bootstrap(until="provision") == UNCHANGED[:2]
    assert bench.bootstrap(until="lockdown") == UNCHANGED[:4]
    assert bench.done[-1] == "plan lockdown"


def refuse() -> None:
    raise CloudError("9 requests are left")


@pytest.mark.parametrize("stage", ["provision", "install", "lockdown"])
def test_what_would_change_something_is_asked_for_first_and_what_would_not_is_not(bench: Bench, stage: str) -> None:
    bench.edge = (SSH,)
    assert bench.bootstrap(before_change=refuse, until="lockdown") == UNCHANGED[:4]
    bench.steps = {"payload": ("make it",), stage: ("do it",)}
    with pytest.raises(CloudError, match="9 requests"):
        bench.bootstrap(before_change=refuse)
    assert "payload" in bench.done
    assert stage not in bench.done
    assert bench.ended()[-1] == (stage, "failed")


def test_the_lockdown_after_a_verification_is_asked_for_too(bench: Bench) -> None:
    bench.verdicts, bench.steps = ["EXP-10 failed"], {"lockdown": ("put the host's firewall to tailnet",)}
    with pytest.raises(CloudError, match="9 requests"):
        bench.bootstrap(before_change=refuse)
    assert "lockdown" not in bench.done
    assert bench.ended()[-1] == ("lockdown", "failed")
