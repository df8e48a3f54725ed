import json
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import CommandError, PlanRefused
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.testing import FakeRunner
from clawdlets_ops.tofu import Change, Tofu, changes, escape, gate

TOKEN = Secret("canary" * 10 + "0000", "hcloud_token")


def entry(address: str, *actions: str, mode: str = "managed") -> dict[str, Any]:
    return {"address": address, "type": address.split(".")[0], "mode": mode, "change": {"actions": list(actions)}}


def test_changes_leave_out_reads_and_no_ops() -> None:
    plan = {
        "resource_changes": [
            entry("hcloud_server.host", "no-op"),
            entry("data.hcloud_ssh_key.operator", "read", mode="data"),
            entry("hcloud_firewall.edge", "update"),
        ]
    }
    assert changes(plan) == (Change("hcloud_firewall.edge", "hcloud_firewall", ("update",)),)
    assert changes({}) == ()


@pytest.mark.parametrize("actions", [("delete",), ("delete", "create"), ("create", "delete")])
@pytest.mark.parametrize("kind", ["hcloud_server", "hcloud_volume", "hcloud_primary_ip"])
def test_deleting_or_replacing_something_precious_is_refused_whatever_is_allowed(
    kind: str, actions: tuple[str, ...]
) -> None:
    with pytest.raises(PlanRefused, match="never deleted unless named"):
        gate([Change(f"{kind}.x", kind, actions)], host="alpha", allowed=lambda _: True)


def test_the_gate_lets_pass_what_is_allowed_and_refuses_the_rest() -> None:
    update = Change("hcloud_firewall.edge", "hcloud_firewall", ("update",))
    gate([update], host="alpha", allowed=lambda _: True)
    with pytest.raises(PlanRefused, match="not about"):
        gate([update], host="alpha", allowed=lambda _: False)


def test_template_markers_become_literal_at_any_depth() -> None:
    assert escape({"a": ["${x}", "%{if}"], "b": 1}) == {"a": ["$${x}", "%%{if}"], "b": 1}


def test_the_token_travels_by_environment_only(tmp_path: Path) -> None:
    runner = FakeRunner(
        script=[
            (("tofu", "init"), (0, "")),
            (("tofu", "plan"), (0, "")),
            (("tofu", "show"), (0, json.dumps({"resource_changes": []}))),
            (("tofu", "apply"), (0, "")),
        ]
    )
    tofu = Tofu(runner, tmp_path / "alpha", token=TOKEN)
    tofu.prepare({"terraform": {}})
    assert tofu.plan() == ()
    tofu.apply()
    assert len(runner.ran) == 4
    for command in runner.ran:
        assert command.env["HCLOUD_TOKEN"] == TOKEN
        assert TOKEN.reveal() not in str(command)
    assert TOKEN.reveal() not in (tmp_path / "alpha" / "main.tf.json").read_text()


def test_a_failed_apply_shows_the_error_scrubbed_and_says_how_to_go_on(tmp_path: Path) -> None:
    runner = FakeRunner(
        script=[
            (("tofu", "init"), (0, "")),
            (("tofu", "apply"), (1, f"hcloud_server.host: Creating...\nError: invalid input {TOKEN.reveal()}\nmore")),
        ]
    )
    tofu = Tofu(runner, tmp_path, token=TOKEN)
    tofu.prepare({"terraform": {}})
    with pytest.raises(CommandError) as caught:
        tofu.apply()
    assert "Error: invalid input" in str(caught.value)
    assert "Creating..." not in str(caught.value)
    assert TOKEN.reveal() not in str(caught.value)
    assert "run again" in str(caught.value)


def test_an_unchanged_configuration_is_initialised_once(tmp_path: Path) -> None:
    def init(_: object) -> tuple[int, str]:
        (tmp_path / ".terraform").mkdir(exist_ok=True)
        (tmp_path / ".terraform.lock.hcl").touch()
        return 0, ""

    runner = FakeRunner(script=[(("tofu", "init"), init)])
    tofu = Tofu(runner, tmp_path, token=TOKEN)
    tofu.prepare({"terraform": {"a": 1}})
    tofu.prepare({"terraform": {"a": 1}, "resource": {}})
    assert len(runner.ran) == 1
    tofu.prepare({"terraform": {"a": 2}})
    assert len(runner.ran) == 2


def test_no_state_yet_is_not_an_error_and_another_failure_is(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("tofu", "state"), (1, "No state file was found!"))])
    assert Tofu(runner, tmp_path, token=TOKEN).owned() == frozenset()
    runner.script[:] = [(("tofu", "state"), (1, "state is encrypted"))]
    with pytest.raises(CommandError):
        Tofu(runner, tmp_path, token=TOKEN).owned()
