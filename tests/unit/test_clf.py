"""``clf jobs enqueue``: what is no payload is told before anybody is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "from clawdlets_ops.clf import main; main()"


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"\xff", "is not JSON"),
        (b"[" * 5000, "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"@/nowhere", "cannot be read"),
    ],
)
def test_what_is_no_payload_is_a_wrong_use(tmp_path: Path, payload: bytes, said: str) -> None:
    words = [sys.executable, "-c", PROGRAM, "--socket", str(tmp_path / "none"), "jobs", "enqueue", "count", "--payload"]
    argv = [*map(os.fsencode, words), payload]
    done = subprocess.run(argv, capture_output=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
