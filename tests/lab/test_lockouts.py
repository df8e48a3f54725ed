"""A run of benchmarks/lockouts.py, each fault twice; the whole of it (200 rounds and more) is run by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.conftest import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(2400)]


def test_no_fault_at_any_step_of_a_lockdown_locks_anybody_out(tmp_path: Path) -> None:
    kept = tmp_path / "rounds.jsonl"
    argv = [sys.executable, "-P", "benchmarks/lockouts.py", "--rounds", "16", "--hosts", "2", "--json", str(kept)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=2300)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rounds) == 16
    assert {one["ended"] for one in rounds} <= {"locked", "open", "locked, tailnet lost later"}
