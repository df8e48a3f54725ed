"""The cloud's state on disk: whole after any cut, as cheap as the change, and readable from a lab of before."""

from __future__ import annotations

import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.store import Store


def make_cloud(file: Path) -> Cloud:
    return Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=file)


def group(cloud: Cloud, name: str, **labels: str) -> int:
    made = cloud.create("placement_groups", {"name": name, "type": "spread", "labels": labels})
    row_id: int = made["placement_group"]["id"]
    return row_id


def on_disk(file: Path, content: bytes | None = None) -> str:
    """What a lab that starts now would have, of this content or of what the file has."""
    copy = file.with_name("copy.json")
    copy.touch(0o600)
    copy.write_bytes(file.read_bytes() if content is None else content)
    return Store(copy).state.to_json()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full: nothing of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_cut_at_any_byte_is_the_state_of_the_last_whole_change(tmp_path: Path) -> None:
    file = tmp_path / "cloud.json"
    cloud = make_cloud(file)
    states: dict[int, str] = {}

    def note() -> None:
        states[file.stat().st_size] = cloud._ledger.state.to_json()

    note()
    first = group(cloud, "first")
    note()
    group(cloud, "sécond", a="b")
    note()
    cloud.delete("placement_groups", first)
    note()
    cloud.create("ssh_keys", {"name": "k", "public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMFuYXJ5"})
    note()
    cloud.close()
    content = file.read_bytes()
    snapshot_bytes = len(content.split(b"\n")[0])
    assert len(states) == 5
    cuts = {*range(snapshot_bytes, len(content), 5), *states, *(size - 1 for size in states)}
    for size in sorted(cuts - set(range(snapshot_bytes))):
        whole = max((one for one in states if one <= size), default=min(states))
        assert on_disk(file, content[:size]) == states[whole], size


def test_what_was_cut_off_does_not_spoil_the_next_change(tmp_path: Path) -> None:
    file = tmp_path / "cloud.json"
    cloud = make_cloud(file)
    group(cloud, "first")
    cloud.close()
    file.write_bytes(file.read_bytes() + b'{"placement_groups": {"7002": {"id": 70')
    again = make_cloud(file)
    assert group(again, "second") == 7002
    assert on_disk(file) == again._ledger.state.to_json()
    again.close()


def test_a_change_writes_itself_and_not_the_whole_cloud(tmp_path: Path) -> None:
    file = tmp_path / "cloud.json"
    cloud = make_cloud(file)
    for index in range(300):
        group(cloud, f"group-{index}")
    before = file.stat().st_size
    assert before > 30_000
    cloud.update("placement_groups", 7001, {"labels": {"changed": "once"}})
    assert file.stat().st_size - before < 300
    # What changes nothing writes nothing.
    before = file.stat().st_size
    cloud.update("placement_groups", 7001, {"labels": {"changed": "once"}})
    assert file.stat().st_size == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    cloud.close()


def test_the_file_does_not_grow_with_the_number_of_changes(tmp_path: Path) -> None:
    file = tmp_path / "cloud.json"
    cloud = make_cloud(file)
    row_id = group(cloud, "one")
    largest = 0
    for index in range(300):
        cloud.update("placement_groups", row_id, {"labels": {f"k{n}": f"{'v' * 50}{index}" for n in range(150)}})
        largest = max(largest, file.stat().st_size)
    assert largest > 1_000_000
    assert file.stat().st_size < largest
    assert largest < 1_200_000
    assert on_disk(file) == cloud._ledger.state.to_json()
    cloud.close()


def test_a_change_that_found_no_room_is_stored_with_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "cloud.json"
    cloud = make_cloud(file)
    group(cloud, "first")
    before = file.read_bytes()
    with file_size_limit(len(before) + 20), pytest.raises(OSError, match=r"File too large|No space left"):
        group(cloud, "second")
    assert file.read_bytes() == before
    group(cloud, "third")
    assert [row["name"] for row in cloud.rows("placement_groups")] == ["first", "second", "third"]
    assert on_disk(file) == cloud._ledger.state.to_json()
    cloud.close()


def test_a_state_of_a_lab_of_before_is_taken_over(tmp_path: Path) -> None:
    """It was one JSON document without an end of line."""
    file = tmp_path / "cloud.json"
    cloud = make_cloud(tmp_path / "other.json")
    group(cloud, "old")
    before = cloud._ledger.state.to_json()
    cloud.close()
    file.touch(0o600)
    file.write_text(before)
    again = make_cloud(file)
    assert again._ledger.state.to_json() == before
    assert group(again, "new") == 7002
    again.close()
    assert on_disk(file) == again._ledger.state.to_json()


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"servers": {"1": {"id": 1}}}', b'{"cats": {"1": {"id": 1}}}'])
def test_a_whole_line_that_is_no_change_is_an_error_that_names_the_file(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "cloud.json"
    cloud = make_cloud(file)
    group(cloud, "first")
    cloud.close()
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(LabError, match=r"cloud\.json"):
        make_cloud(file)


def test_a_state_tells_what_changed_and_nothing_of_what_is_gone() -> None:
    assert Store(None).commit() is False
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None)
    row_id = group(cloud, "one")
    record: Any = cloud._ledger.state.named("placement_groups")[row_id]
    assert cloud._ledger.state.changed == set()
    record.name = "two"
    assert cloud._ledger.state.changed == {("placement_groups", row_id)}
    cloud.delete("placement_groups", row_id)
    record.name = "three"
    assert cloud._ledger.state.changed == set()
    cloud.close()
