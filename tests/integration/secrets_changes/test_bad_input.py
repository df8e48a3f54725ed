"""What lies in the way of set, edit, reconcile and rotate is told, and nothing is lost, half-written or written elsewhere."""

import os
import subprocess
from dataclasses import replace

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError, UnreadableError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.secrets import changes, edit
from clawdlets_ops.secrets.store import check_host, init_host
from clawdlets_ops.sensitive import Secret
from tests.integration.secrets_changes.desk import GIVEN, VALUES, a_project, readers_of, snapshot, states, value_in

pytestmark = pytest.mark.integration

NAME = "discord_token"


def setting(project, runner):
    changes.set_secret(project, "alpha", NAME, Secret("canary-new"), runner=runner)


def editing(project, runner):
    edit.save(project, edit.begin(project, "alpha", NAME, runner=runner), Secret("canary-new"), runner=runner)


def rotating(project, runner):
    changes.rotate_data_keys(project, runner=runner)


def reconciling(project, runner):
    changes.reconcile(project, runner=runner)


WAYS = (setting, editing, rotating)


def cut_in_half(path, _):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_at_the_end(path, _):
    path.write_bytes(path.read_bytes()[:-40])


def emptied(path, _):
    path.write_bytes(b"")


def value_altered(path, _):
    before = path.read_text()
    path.write_text(before.replace("data:", "data:AAAA", 1))
    assert path.read_text() != before


def mac_altered(path, _):
    before = path.read_text()
    head, _, tail = before.partition("mac: ENC[AES256_GCM,data:")
    path.write_text(f"{head}mac: ENC[AES256_GCM,data:{'B' if tail[0] == 'A' else 'A'}{tail[1:]}")
    assert path.read_text() != before


def of_another_file(path, project):
    path.write_bytes(project.layout.secret_file("alpha", "admin_password_hash").read_bytes())


def not_utf8(path, _):
    path.write_bytes(path.read_bytes() + b"\xff\xfe")


def of_200_megabytes(path, _):
    os.truncate(path, 200_000_000)


def a_pipe(path, _):
    path.unlink()
    os.mkfifo(path)


def a_link(path, _):
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def conflicted(path, _):
    text = path.read_text()
    path.write_text(f"<<<<<<< HEAD\n{text}=======\n{text}>>>>>>> theirs\n")


DAMAGES = (
    *(cut_in_half, cut_at_the_end, emptied, value_altered, mac_altered, of_another_file, not_utf8),
    *(of_200_megabytes, a_pipe, a_link, conflicted),
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_neither_opened_nor_overwritten(project, runner, damage):
    path = project.layout.secret_file("alpha", NAME)
    damage(path, project)
    layout = project.layout
    before = {name: entry for name, entry in snapshot(layout.root).items() if not name.endswith(f"{NAME}.yaml")}
    kind = path.lstat()
    # rotating keeps what a file holds, whatever it is: it is no value that is missing
    for way in WAYS if damage is not of_another_file else (setting, editing):
        with pytest.raises(SecretsError) as caught:
            way(project, runner)
        assert path.name in str(caught.value)
        assert "canary" not in str(caught.value)
    after = {name: entry for name, entry in snapshot(layout.root).items() if not name.endswith(f"{NAME}.yaml")}
    assert after == before
    assert path.lstat() == kind or damage is a_pipe
    assert states(project, runner)[NAME].startswith("placeholder" if damage is of_another_file else "unreadable")


@pytest.mark.parametrize("way", [*WAYS, reconciling], ids=lambda way: way.__name__)
def test_with_a_key_that_opens_nothing_nothing_is_written(project, runner, way):
    stranger = replace(project, operator="stranger")
    key = project.layout.operator_key("stranger")
    write_atomic(key, age.to_key_file(age.generate()).reveal(), mode=0o600)
    (project.layout.operator_recipients_dir / "lena.age.pub").write_text(age.generate().recipient + "\n")
    before = snapshot(project.layout.root)
    with pytest.raises(UnreadableError, match="is not encrypted to"):
        way(stranger, runner)
    assert snapshot(project.layout.root) == before


def test_a_folder_that_is_a_link_is_not_written_through(project, runner, tmp_path):
    folder = project.layout.host_secrets_dir("alpha")
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = snapshot(elsewhere)
    for way in WAYS:
        with pytest.raises(SecretsError, match="is a link"):
            way(project, runner)
    assert snapshot(elsewhere) == before


def room(folder) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def test_a_disk_that_fills_in_the_middle_loses_nothing_and_the_next_run_finishes(small_disk, runner):
    root = small_disk(2_000_000) / "project"
    both = a_project(root, hosts=("alpha", "beta"))
    init_host(both, "alpha", VALUES, runner=runner)
    filler = root.parent / "filler"
    page = os.sysconf("SC_PAGESIZE")
    filler.write_bytes(b"x" * (room(root) - 5 * page))
    before = {path: entry for path, entry in snapshot(root).items() if "beta" not in path}
    with pytest.raises(SecretsError, match=r"No space left on device; every file is whole"):
        init_host(both, "beta", VALUES, runner=runner)
    made = [path for path in snapshot(root) if "beta" in path]
    assert 0 < len(made) < 7  # it was the middle
    for path in (root / "secrets").rglob("*beta*.yaml"):
        assert "mac: ENC[" in path.read_text()
    filler.unlink()
    init_host(both, "beta", VALUES, runner=runner)
    for host in ("alpha", "beta"):
        check_host(both, host, runner=runner)
        assert {name: value_in(both, runner, name, host) for name in GIVEN} == GIVEN
    after = snapshot(root)
    assert {path for path in before if after[path] != before[path]} <= {"secrets/.sops.yaml"}
    assert list(root.rglob("*.tmp")) == []


def test_a_disk_that_is_full_from_the_start_and_one_that_is_read_only(small_disk, runner):
    point = small_disk(2_000_000)
    project = a_project(point / "project")
    init_host(project, "alpha", VALUES, runner=runner)
    filler = point / "filler"
    filler.write_bytes(b"x" * room(point))
    before = snapshot(project.layout.root)
    for way in WAYS:
        with pytest.raises(SecretsError, match="No space left"):
            way(project, runner)
        assert snapshot(project.layout.root) == before
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    for way in WAYS:
        with pytest.raises(SecretsError, match="Read-only file system"):
            way(project, runner)
        assert snapshot(project.layout.root) == before
    environ = {"EDITOR": "true", "PATH": os.environ["PATH"]}
    with pytest.raises(SecretsError, match="Read-only file system"):
        edit.edit_secret(project, "alpha", NAME, runner=runner, environ=environ, again=lambda _: False, say=print)
    subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)
    readers = readers_of(project, NAME)
    for way in WAYS:
        way(project, runner)
    assert value_in(project, runner, NAME) == "canary-new"
    assert readers_of(project, NAME) == readers
