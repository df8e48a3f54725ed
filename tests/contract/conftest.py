"""Fixtures of the contract tests of the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hcloud import Client

from clawdlets_ops.lab.cloud import StubBackend
from tests.contract.emulator_lab import Lab, Tofu, running_lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with running_lab(tmp_path, StubBackend()) as running:
        yield running


@pytest.fixture
def client(lab: Lab) -> Iterator[Client]:
    with lab.client() as made:
        yield made


@pytest.fixture
def hcloud_program() -> str:
    program = shutil.which("hcloud")
    if program is None:
        pytest.skip("the hcloud CLI is missing (Debian package hcloud-cli)")
    return program


@pytest.fixture
def tofu(lab: Lab, tmp_path: Path) -> Tofu:
    return Tofu(lab, tmp_path)
