"""A few of the kills that ``benchmarks/cattle_kills.py`` counts by the hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20
ZERO = ("duplicates", "orphans", "lost", "over_cap", "strangers", "tokens", "twice")

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]


def test_workers_and_daemon_are_killed_and_nothing_is_made_twice_left_or_lost(root: Path) -> None:
    argv = [sys.executable, str(root / "benchmarks" / "cattle_kills.py"), "--kills", str(KILLS), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    found = json.loads(done.stdout)
    assert {name: found[name] for name in ZERO} == dict.fromkeys(ZERO, 0), found["notes"]
    assert done.returncode == 0
    assert found["kills"] == KILLS
    assert found["ended"]["done"] > 0
    assert found["attempts"] > found["accepted"], "some kills took a job from its worker"
