"""The socket and the files as root, a bot, another bot, a bot outside the group, another service, an operator, a stranger inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be several users"),
]


@pytest.fixture(scope="module")
def matrix() -> Any:
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.orchestrator_matrix"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("mount namespaces are not allowed here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_modes_are_the_security_models(matrix: Any) -> None:
    assert matrix["modes"] == {
        "/run/clf": "0750 root",
        "/run/clf/orchestrator.sock": "0660 root",
        "/var/lib/clf/orchestrator": "0700 clf-orchestrator",
        "/var/lib/clf/orchestrator/state.sqlite": "0600 clf-orchestrator",
        "/var/lib/clf/orchestrator/state.sqlite-shm": "0600 clf-orchestrator",
        "/var/lib/clf/orchestrator/state.sqlite-wal": "0600 clf-orchestrator",
    }


@pytest.mark.parametrize("user", ["bot-scout", "bot-miner"])
def test_a_bot_in_the_group_asks_and_sees_its_own(matrix: Any, user: str) -> None:
    found = matrix[user]
    assert (found["connect"], found["list"], found["enqueue"][0]) == (200, 200, 200)
    assert found["seen"] == [user.removeprefix("bot-")]
    assert found["others"] == (200 if user == "bot-scout" else 404)


@pytest.mark.parametrize("user", ["root", "olga"])
def test_an_operator_sees_all(matrix: Any, user: str) -> None:
    found = matrix[user]
    assert (found["connect"], found["list"], found["enqueue"][0], found["others"]) == (200, 200, 200, 200)
    assert {"scout", "miner"} <= set(found["seen"])


@pytest.mark.parametrize("user", ["bot-outside", "web"])
def test_whoever_is_outside_the_group_cannot_even_connect(matrix: Any, user: str) -> None:
    assert {matrix[user][what] for what in ("connect", "list", "enqueue", "others")} == {"PermissionError"}


def test_whoever_is_in_the_group_and_no_bot_gets_nothing(matrix: Any) -> None:
    found = matrix["helper"]
    assert (found["connect"], found["list"], found["enqueue"][0], found["others"]) == (200, 403, 403, 403)


@pytest.mark.parametrize("user", ["bot-scout", "bot-miner", "bot-outside", "web", "olga", "helper"])
def test_the_database_is_nobodys_but_the_orchestrators(matrix: Any, user: str) -> None:
    assert matrix[user]["read database"] == "PermissionError"
    assert matrix[user]["list state folder"] == "PermissionError"
    assert matrix[user]["replace socket"] == "PermissionError"
    assert matrix["clf-orchestrator"]["read database"] == 16, "the search itself can read it"


def test_a_folder_that_lets_in_another_group_is_refused_at_the_start(matrix: Any) -> None:
    assert matrix["for another group"] == 1
