"""The table of states: pure, from declared and observed values."""

import pytest

from clawdlets_ops.secrets.status import Expected, Observed, State, exit_code, rows

OPERATOR, OTHER, HOST, STRANGER = "age1maren", "age1lena", "age1alpha", "age1stranger"
NAMES = {OPERATOR: "maren", OTHER: "lena", HOST: "host alpha"}
FILE = "secrets/hosts/alpha/token.yaml"
READERS = frozenset({OPERATOR, HOST})


def row_of(seen, readers=READERS, kind="value"):
    expected = Expected("alpha", "token", kind, "hosts.alpha.secrets.token", FILE, readers)
    (row,) = rows([expected], [], {FILE: seen} if seen else {}, NAMES)
    return row


@pytest.mark.parametrize(
    ("seen", "states", "says", "fix", "status"),
    [
        (Observed(READERS), ["present"], "", "", 0),
        (None, ["missing"], "", "clawdlets secrets set token --host alpha", 1),
        (Observed(READERS, unusable="is a placeholder"), ["placeholder"], "is a placeholder", "secrets set token", 1),
        (Observed(READERS, unreadable="altered"), ["unreadable"], "altered", "restore it from git", 2),
        (Observed(frozenset(), unreadable="no YAML"), ["unreadable"], "no YAML", "restore it from git", 2),
        (Observed(READERS | {OTHER}), ["over-shared"], "also read by lena", "secrets reconcile", 1),
        (Observed(READERS | {STRANGER}), ["over-shared"], "also read by age1stranger", "secrets reconcile", 1),
        (Observed(frozenset({HOST})), ["under-shared"], "not read by maren", "secrets reconcile", 1),
        (
            Observed(frozenset({OTHER}), unreadable="is not encrypted to you"),
            ["unreadable", "over-shared", "under-shared"],
            "not read by host alpha, maren",
            "reconcile",
            1,
        ),
        (
            Observed(READERS | {OTHER}, unusable="x"),
            ["placeholder", "over-shared"],
            "also read by lena",
            "set token",
            1,
        ),
    ],
)
def test_every_state_is_told_with_who_and_what_to_do(seen, states, says, fix, status):
    row = row_of(seen)
    assert [str(state) for state in row.states] == states
    assert says in row.observed
    assert fix in row.fix
    assert exit_code([row]) == status
    assert row.as_json()["state"] == states[0]


def test_readers_are_called_by_name():
    assert row_of(Observed(READERS | {STRANGER})).readers == ("age1stranger", "host alpha", "maren")


def test_what_no_host_needs_is_stale_and_a_host_without_a_key_shares_nothing():
    expected = Expected("beta", "token", "value", "why", "secrets/hosts/beta/token.yaml", None)
    table = rows([expected], [("alpha", FILE)], {FILE: Observed(READERS)}, NAMES)
    assert [(row.host, row.state) for row in table] == [("alpha", State.STALE), ("beta", State.MISSING)]
    assert "secrets init --host beta" in table[1].fix
    assert table[0].readers == ("host alpha", "maren")


def test_unreadable_alone_is_unknown_and_nothing_at_all_too():
    unreadable, missing = row_of(Observed(READERS, unreadable="x")), row_of(None)
    assert exit_code([unreadable, row_of(Observed(READERS))]) == 2
    assert exit_code([unreadable, missing]) == 1
    assert exit_code([]) == 2
