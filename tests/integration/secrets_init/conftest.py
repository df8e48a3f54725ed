"""A project without secrets yet, and a runner that remembers."""

import pytest

from tests.integration.secrets_init.desk import a_project
from tests.recording import Recording


@pytest.fixture
def runner():
    return Recording()


@pytest.fixture
def project(tmp_path):
    return a_project(tmp_path / "project")
