"""A repository, and clawdlets as a program."""

import sys

import pytest

from tests.integration.guard.desk import PROGRAM, Git


@pytest.fixture
def git(tmp_path):
    return Git(tmp_path / "repo")


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "bin" / "clawdlets"
    path.parent.mkdir()
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path
