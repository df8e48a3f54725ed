"""``clawdlets lab setup``: where things go, and what is told of a step that fails. The script here stands in for tools/prepare."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab import setup
from clawdlets_ops.layout import Layout

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

STAND_IN = """\
mkdir -p "$CLAWDLETS_CACHE/log"
echo "$1 into $CLAWDLETS_CACHE"
test -x "$CLAWDLETS_PYTHON" || exit 9
echo "${GOPROXY:-none} ${HCLOUD_TOKEN:-none}" >> "$CLAWDLETS_CACHE/log/seen"
[ "$1" != "${FAILING:-base}" ] || [ ! -e "$CLAWDLETS_CACHE/fail" ] || { echo "no room" >&2; exit 3; }
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "shipped" / "tools" / "prepare"
    script.parent.mkdir(parents=True)
    script.write_text(STAND_IN)
    monkeypatch.setattr(setup, "shipped", lambda name: tmp_path / "shipped" / name)
    (tmp_path / "p" / "fleet").mkdir(parents=True)
    (tmp_path / "p" / "fleet" / "clawdlets.json").write_text("{}")
    return tmp_path / "p"


def prepare(project: Path, *, tailnet: bool = False) -> list[str]:
    said: list[str] = []
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(project.parent),
        "GOPROXY": "https://go.invalid",
        "HCLOUD_TOKEN": "canary",
    }
    setup.prepare(Layout(project), environ, tailnet=tailnet, say=said.append)
    return said


def test_every_project_of_a_user_has_the_same_cache(project: Path) -> None:
    cache = project.parent / ".cache" / "clawdlets-ops"
    assert prepare(project) == [f"{step} into {cache}" for step in ("apt", "tofu", "base")]
    assert (project / ".cache").is_symlink()
    assert (project / ".cache").resolve() == cache
    assert prepare(project, tailnet=True)[-1] == f"tailnet into {cache}"
    assert set((cache / "log" / "seen").read_text().splitlines()) == {"https://go.invalid none"}  # and no token


def test_a_cache_that_is_there_is_taken_and_a_checkouts_is_its_own(project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (project / ".cache").symlink_to(tmp_path / "elsewhere")
    assert prepare(project)[0] == f"apt into {tmp_path / 'elsewhere'}"
    checkout = tmp_path / "shipped"
    (checkout / "fleet").mkdir()
    (checkout / "fleet" / "clawdlets.json").write_text("{}")
    assert prepare(checkout)[0] == f"apt into {checkout / '.cache'}"
    assert not (checkout / ".cache").is_symlink()


def test_what_is_wrong_is_told(project: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="is no project"):
        prepare(tmp_path)
    prepare(project)
    (project / ".cache" / "fail").touch()
    with pytest.raises(LabError, match="base: could not be prepared:\nno room") as caught:
        prepare(project)
    assert "its whole log is in" in str(caught.value)
    (project / ".cache").unlink()
    (project / ".cache").symlink_to("nowhere")
    with pytest.raises(LabError, match="leads nowhere"):
        prepare(project)
