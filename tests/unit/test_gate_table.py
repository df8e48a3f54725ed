from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clawdlets_ops import cli
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.provision.gate import DESTROY, EXPOSURE, PROVISION, UNPROTECT, Stage, gate
from tests.gate_table import ROWS, Row, entry, page, plan_of


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[ClawdletsError], int]:
    """How the command line ends when a command raises that error."""

    def code(error: ClawdletsError) -> int:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(cli.clawdlets, "main", fail)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(str(ended.value.code))

    return code


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.group}: {row.what}")
def test_it_is_refused_with_a_place_and_a_way_on(row: Row) -> None:
    error = row.refusal()
    assert error.where
    assert error.fix or "none of ours" in error.what or "instead" in error.what


def test_the_page_is_as_the_code_is(root: Path, exit_code: Callable[[ClawdletsError], int]) -> None:
    written = (root / "docs" / "reference" / "gates.md").read_text()
    assert written == page(exit_code), "python -m tests.gate_table > docs/reference/gates.md"


PROTECTED, OPEN = {"delete_protection": True}, {"delete_protection": False}
RULES = {"rule": [{"port": "22"}]}


@pytest.mark.parametrize(
    ("stage", "change", "may_replace"),
    [
        (PROVISION, entry("hcloud_server.host", "create", after={"name": "alpha"}), False),
        (PROVISION, entry("hcloud_firewall.edge", "update", before=RULES, after={"rule": [{"port": "23"}]}), False),
        (PROVISION, entry("hcloud_volume.data", "update", before={"size": 10}, after={"size": 20}), False),
        (
            PROVISION,
            entry("hcloud_server.host", "update", before={"keep_disk": None}, after={"keep_disk": False}),
            False,
        ),
        (PROVISION, entry("hcloud_server.host", "no-op", change={"importing": {"id": "44"}}), False),
        (PROVISION, entry("hcloud_server.host", "delete", "create"), True),
        (PROVISION, entry("hcloud_volume.data", "delete"), True),
        (EXPOSURE, entry("hcloud_firewall.edge", "update", before=RULES, after={"rule": [{"port": "1"}]}), False),
        (UNPROTECT, entry("hcloud_server.host", "update", before=PROTECTED, after=OPEN), False),
        (DESTROY, entry("hcloud_server.host", "delete"), False),
    ],
)
def test_what_a_stage_is_about_passes(stage: Stage, change: dict[str, object], *, may_replace: bool) -> None:
    [passed] = gate(plan_of(change), stage=stage, host="alpha", may_replace=may_replace)
    assert passed.address == change["address"]


def test_reads_and_no_ops_are_no_changes() -> None:
    nothing = entry("hcloud_server.host", "no-op")
    read = entry("data.hcloud_ssh_key.operator", "read") | {"mode": "data"}
    assert gate(plan_of(nothing, read), stage=PROVISION, host="alpha") == ()


def test_a_change_says_what_it_is() -> None:
    update = entry("hcloud_server.host", "update", before={"labels": {}}, after={"labels": {"a": "b"}})
    adopted = entry("hcloud_firewall.edge", "no-op", change={"importing": {"id": "3"}})
    replaced = entry("hcloud_volume.data", "create", "delete")
    told = gate(plan_of(update, adopted, replaced), stage=PROVISION, host="alpha", may_replace=True)
    assert [str(change) for change in told] == [
        "update hcloud_server.host (labels)",
        "adopt hcloud_firewall.edge",
        "replace hcloud_volume.data",
    ]
