"""The orchestrator's database, as the tests of its queue and of its store have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clawdlets_ops.orchestrator.store import Store, open_sqlite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may be made: nothing is there yet, in a private folder."""
    folder = tmp_path / "orchestrator"
    folder.mkdir(mode=0o700)
    return folder / "state.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Opened there, and closed afterwards."""
    opened = open_sqlite(path)
    yield opened
    opened.close()
