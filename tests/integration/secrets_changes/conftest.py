"""A project whose host has its secrets, and a runner that remembers."""

import os
import subprocess

import pytest

from clawdlets_ops.secrets.store import init_host
from tests.integration.secrets_changes.desk import VALUES, a_project
from tests.recording import Recording


@pytest.fixture
def runner():
    return Recording()


@pytest.fixture
def project(tmp_path, runner):
    project = a_project(tmp_path / "project")
    init_host(project, "alpha", VALUES, runner=runner)
    runner.taken()
    return project


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes in memory, which is full soon."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = []

    def make(size_bytes):
        point = tmp_path / f"small-{len(mounted)}"
        point.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(point)], check=True)
        mounted.append(point)
        return point

    yield make
    for point in mounted:
        subprocess.run(["umount", str(point)], check=True)
