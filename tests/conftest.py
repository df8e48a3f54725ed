"""Shared by all tiers: unit tests cannot reach a network, and the lab tier says what is missing when it cannot run."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAB_PROGRAMS = ("systemd-nspawn", "nft", "ip", "ssh-keygen")


def lab_is_missing() -> str:
    """What this machine lacks for the lab tier, as a sentence; empty when nothing."""
    if sys.platform != "linux":
        return "the lab needs Linux"
    if os.geteuid() != 0:
        return "the lab needs root"
    if missing := [name for name in LAB_PROGRAMS if shutil.which(name) is None]:
        return f"the lab needs {', '.join(missing)} (make setup)"
    if not (ROOT / ".cache" / "lab" / "base").exists():
        return "the lab's base image is not built (make setup)"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the lab tier, with one sentence, where it cannot run, and stories of minutes where nobody asked for them."""
    if not os.environ.get("LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; make test LONG=1 runs it"))
    if reason := lab_is_missing():
        for item in items:
            if item.get_closest_marker("lab"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Our commands make it private, and a test may run one in its own process: the next test begins as a shell does."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(autouse=True)
def _no_network_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection from a unit test, on loopback too."""
    if "unit" not in Path(str(request.node.path)).parts:
        return

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a unit test tried to connect to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT
