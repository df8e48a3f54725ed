"""Who reaches port 22: three values, and no "no" without a positive control."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.testing import FakeRunner
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify.exposure import Exposure, measure_exposure, probe_from
from clawdlets_ops.verify.probe import outcome_of

PUBLIC = {4: "198.18.7.10", 6: "2001:2:0:70a::1"}
TAILNET = {4: "100.64.7.10"}
CONTROLS = {4: ("198.19.7.3", 4242), 6: ("2001:2:0:700::3", 4242)}
OUTSIDE = Vantage("stranger", "internet", ("ip", "netns", "exec", "outside"), CONTROLS)
INSIDE = Vantage("member", "tailnet", ("ip", "netns", "exec", "member"), {4: ("100.64.7.3", 4242)})


def answering(outcomes: dict[str, str], banner: str = "") -> FakeRunner:
    """A runner whose probe sees each address as ``outcomes`` says."""

    def answer(command: Command) -> tuple[int, str]:
        words = command.argv[command.argv.index("-") + 1 :]
        targets = [(int(words[at]), words[at + 1], int(words[at + 2])) for at in range(0, len(words), 3)]
        results = [
            {"family": f, "address": a, "port": p, "outcome": outcomes[a], "banner": banner, "detail": ""}
            for f, a, p in targets
        ]
        return 0, json.dumps({"results": results})

    return FakeRunner(script=[(("ip",), answer)])


def reach(exposure: Exposure) -> dict[tuple[str, int], str]:
    return {(cell.vantage, cell.family): cell.reach for cell in exposure.cells}


UP = dict.fromkeys(("198.19.7.3", "2001:2:0:700::3", "100.64.7.3"), "open")


def test_each_side_looks_at_its_own_addresses() -> None:
    runner = answering(
        {**UP, PUBLIC[4]: "filtered", PUBLIC[6]: "refused", TAILNET[4]: "open"}, banner="SSH-2.0-OpenSSH_9.2"
    )
    exposure = measure_exposure((OUTSIDE, INSIDE), PUBLIC, TAILNET, runner=runner)
    assert reach(exposure) == {("stranger", 4): "no", ("stranger", 6): "no", ("member", 4): "yes"}
    assert exposure.cells[2].detail == "open, SSH-2.0-OpenSSH_9.2"
    assert (exposure.open_from_internet(), exposure.closed_from_tailnet(), exposure.unknown()) == ((), (), ())


def test_one_process_a_vantage_with_the_script_on_standard_input() -> None:
    runner = answering({**UP, PUBLIC[4]: "filtered", PUBLIC[6]: "filtered"})
    measure_exposure((OUTSIDE,), PUBLIC, {}, runner=runner, port=2222)
    (command,) = runner.ran
    assert command.argv[:7] == ("ip", "netns", "exec", "outside", "python3", "-I", "-")
    assert command.argv[7:10] == ("4", PUBLIC[4], "2222")
    assert "socket" in str(command.stdin)


@pytest.mark.parametrize("control", ["filtered", "refused", "unreachable", "error"])
def test_closed_means_nothing_when_the_control_was_not_reached(control: str) -> None:
    runner = answering({**UP, "2001:2:0:700::3": control, PUBLIC[4]: "filtered", PUBLIC[6]: "filtered"})
    exposure = measure_exposure((OUTSIDE,), PUBLIC, {}, runner=runner)
    assert reach(exposure) == {("stranger", 4): "no", ("stranger", 6): "unknown"}
    assert "2001:2:0:700::3 port 4242" in exposure.unknown()[0]


def test_closed_means_nothing_without_a_control() -> None:
    bare = Vantage("stranger", "internet", OUTSIDE.via, {4: CONTROLS[4]})
    exposure = measure_exposure(
        (bare,), PUBLIC, {}, runner=answering({**UP, PUBLIC[4]: "refused", PUBLIC[6]: "refused"})
    )
    assert reach(exposure) == {("stranger", 4): "no", ("stranger", 6): "unknown"}


def test_open_needs_no_control() -> None:
    bare = Vantage("stranger", "internet", OUTSIDE.via)
    exposure = measure_exposure((bare,), PUBLIC, {}, runner=answering({PUBLIC[4]: "open", PUBLIC[6]: "open"}))
    assert exposure.open_from_internet() == ("stranger over IPv4", "stranger over IPv6")


@pytest.mark.parametrize("outcome", ["unreachable", "error"])
def test_no_way_there_is_not_closed(outcome: str) -> None:
    runner = answering({**UP, PUBLIC[4]: outcome, PUBLIC[6]: "filtered"})
    assert reach(measure_exposure((OUTSIDE,), PUBLIC, {}, runner=runner))["stranger", 4] == "unknown"


@pytest.mark.parametrize(
    "answer", [(1, "ip: cannot open the namespace"), (0, "not JSON"), (0, '{"results": []}'), (0, '{"results": [{}]}')]
)
def test_a_vantage_that_cannot_be_used_is_unknown(answer: tuple[int, str]) -> None:
    exposure = measure_exposure((OUTSIDE,), PUBLIC, {}, runner=FakeRunner(script=[(("ip",), answer)]))
    assert set(reach(exposure).values()) == {"unknown"}
    assert len(exposure.cells) == 2


def test_a_vantage_whose_program_is_missing_is_unknown() -> None:
    exposure = measure_exposure((OUTSIDE,), PUBLIC, {}, runner=FakeRunner(programs=frozenset()))
    assert set(reach(exposure).values()) == {"unknown"}


def test_an_answer_about_other_targets_is_refused() -> None:
    answer = json.dumps({"results": [{"family": 4, "address": "192.0.2.1", "port": 22, "outcome": "filtered"}]})
    with pytest.raises(ClawdletsError, match="other targets"):
        probe_from(OUTSIDE, [(4, PUBLIC[4], 22)], runner=FakeRunner(script=[(("ip",), (0, answer))]))


def test_no_vantages_and_no_addresses_give_no_cells() -> None:
    assert measure_exposure((), PUBLIC, TAILNET, runner=FakeRunner()).cells == ()
    assert measure_exposure((INSIDE,), PUBLIC, {}, runner=FakeRunner()).cells == ()


def test_the_table_has_a_row_a_vantage_and_a_column_a_family() -> None:
    runner = answering({**UP, PUBLIC[4]: "filtered", PUBLIC[6]: "error", TAILNET[4]: "open"})
    lines = measure_exposure((OUTSIDE, INSIDE), PUBLIC, TAILNET, runner=runner).text().splitlines()
    assert [line.split() for line in lines] == [
        ["vantage", "side", "IPv4", "IPv6"],
        ["stranger", "internet", "no", "unknown"],
        ["member", "tailnet", "yes", "-"],
    ]


def test_it_becomes_json() -> None:
    cells = measure_exposure((INSIDE,), {}, TAILNET, runner=answering({**UP, TAILNET[4]: "open"})).as_json()["cells"]
    assert json.loads(json.dumps(cells))[0] == {
        "vantage": "member", "side": "tailnet", "family": 4, "address": TAILNET[4], "port": 22, "reach": "yes", "detail": "open",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (TimeoutError("timed out"), "filtered"),
        (OSError(errno.ETIMEDOUT, "timed out"), "filtered"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "refused"),
        (OSError(errno.ENETUNREACH, "unreachable"), "unreachable"),
        (OSError(errno.EHOSTUNREACH, "no route"), "unreachable"),
        (OSError(errno.EADDRNOTAVAIL, "no IPv6"), "unreachable"),
        (PermissionError(errno.EPERM, "not permitted"), "error"),
    ],
)
def test_what_a_failed_connect_means(error: OSError, outcome: str) -> None:
    assert outcome_of(error) == outcome


def test_it_is_imported_without_pytest_and_testinfra(root: Path) -> None:
    code = (
        "import sys; import clawdlets_ops.verify.exposure, clawdlets_ops.verify.run\n"
        "bad = {'pytest', 'testinfra', '_pytest'} & set(sys.modules); assert not bad, bad"
    )

    LocalRunner({}).run(Command([sys.executable, "-c", code], "import it", env={"PYTHONPATH": str(root)})).check()
