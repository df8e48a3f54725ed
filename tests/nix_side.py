"""Asks a real Nix about ``nix/``, without nixpkgs: the store is a dummy, so that nothing can be copied into it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NIX = ROOT / "nix"

needs_nix = pytest.mark.skipif(
    shutil.which("nix-instantiate") is None, reason="needs nix-instantiate (Debian: nix-bin)"
)


def nix(expression: str, **inputs: Any) -> Any:
    """The value of ``expression``, in which every one of ``inputs`` is bound; AssertionError with what Nix says."""
    done = nix_run(expression, **inputs)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def nix_run(expression: str, **inputs: Any) -> subprocess.CompletedProcess[str]:
    bindings = "".join(f"{name} = builtins.fromJSON {_quoted(json.dumps(value))}; " for name, value in inputs.items())
    return subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "--store", "dummy://", "-"],
        input=f"let {bindings} in {expression}",
        cwd=NIX,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${") + '"'
