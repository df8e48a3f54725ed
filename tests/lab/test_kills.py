"""A short run of benchmarks/kills.py: one host, one kill; the long ones are run by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.lab.conftest import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]


def test_a_bootstrap_that_is_killed_at_random_converges_and_leaves_nothing_twice() -> None:
    argv = [sys.executable, "-P", "benchmarks/kills.py", "--kills", "1", "--hosts", "1", "--within", "15", "--json"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=840)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout)
    assert tally["kills"] == 1
    zero = ("duplicates", "orphans", "reinstalls", "plaintext_keys", "not_converged")
    assert [tally[name] for name in zero] == [0] * len(zero)
