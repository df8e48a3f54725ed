"""secrets reconcile and revoke, declared operators: who reads what, tried with the real keys."""

import base64
import errno
import os
import re
import shutil

import pyrage
import pytest
import yaml
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError, UnreadableError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.secrets import changes
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.status import exit_code
from clawdlets_ops.secrets.store import check_host, init_host, operator_identity
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops
from tests.integration.secrets_changes.desk import (
    FILES,
    GIVEN,
    VALUES,
    a_project,
    as_operator,
    carry,
    data_of,
    opens,
    put,
    sealed_files,
    snapshot,
    states,
    value_in,
)

pytestmark = pytest.mark.integration

# --- reconcile ---


def test_reconcile_of_what_is_right_changes_no_byte_and_starts_nothing(project, runner):
    before = snapshot(project.layout.root)
    assert not changes.reconcile(project, runner=runner).changed
    assert runner.taken() == 0
    assert snapshot(project.layout.root) == before


def test_a_second_operators_first_day_is_two_commands_and_their_last_is_one(project, runner):
    lenas = as_operator(project, "lena")
    assert set(states(lenas, runner).values()) == {"unreadable"}
    assert changes.add_operator(lenas, runner=runner).created == (
        ".clawdlets/keys/operators/lena.agekey",
        "secrets/keys/operators/lena.age.pub",
    )
    with pytest.raises(UnreadableError, match="secrets reconcile"):
        changes.reconcile(lenas, runner=runner)
    assert not changes.add_operator(lenas, runner=runner).changed
    lena = operator_identity(lenas)
    carry(lenas, project)
    assert set(states(project, runner).values()) == {"under-shared"}
    planned = changes.reconcile(project, runner=runner, dry_run=True)
    assert not any(opens(path, lena, runner) for path in sealed_files(project))
    assert changes.reconcile(project, runner=runner) == planned
    assert len(planned.updated) == FILES + 1  # and .sops.yaml
    before = snapshot(project.layout.root)
    runner.taken()
    assert not changes.reconcile(project, runner=runner).changed
    assert runner.taken() == 0
    assert snapshot(project.layout.root) == before
    carry(project, lenas)
    assert all(opens(path, lena, runner) for path in sealed_files(lenas))
    assert set(states(lenas, runner).values()) == {"present"}
    check_host(lenas, "alpha", runner=runner)

    shared = {path: path.read_text() for path in sealed_files(project)}
    made = changes.revoke(project, "lena", runner=runner)
    assert made.removed == ("secrets/keys/operators/lena.age.pub",)
    assert len(sealed_files(project)) == FILES
    for path in sealed_files(project):
        assert not opens(path, lena, runner), path
        assert opens(path, operator_identity(project), runner), path
        assert data_of(path.read_text()) != data_of(shared[path])
    assert lena.recipient not in (project.layout.sops_config).read_text()
    check_host(project, "alpha", runner=runner)
    before = snapshot(project.layout.root)
    assert not changes.revoke(project, "lena", runner=runner).changed
    assert snapshot(project.layout.root) == before
    assert {name: value_in(project, runner, name) for name in GIVEN} == GIVEN


def data_key(text: str, identity) -> bytes:
    """The data key of a sops file, as its metadata give it to ``identity``."""
    entries = yaml.safe_load(text)["sops"]["age"]
    armoured = next(entry["enc"] for entry in entries if entry["recipient"] == identity.recipient)
    return pyrage.decrypt(armoured.encode(), [pyrage.x25519.Identity.from_str(identity.secret.reveal())])


def value_under(key: bytes, text: str, name: str) -> str:
    """The value of ``name`` opened with a data key alone; InvalidTag when it is another's."""
    data, iv, tag = re.search(r"data:([^,]*),iv:([^,]*),tag:([^,]*),", yaml.safe_load(text)[name]).groups()
    sealed = base64.b64decode(data) + base64.b64decode(tag)
    return AESGCM(key).decrypt(base64.b64decode(iv), sealed, f"{name}:".encode()).decode()


@pytest.fixture
def with_lena(project, runner):
    """The project once lena reads everything, and her key."""
    lena = age.generate()
    (project.layout.operator_recipients_dir / "lena.age.pub").write_text(lena.recipient + "\n")
    changes.reconcile(project, runner=runner)
    return project, lena


def test_a_kept_data_key_opens_nothing_that_was_written_after_the_revocation(with_lena, runner):
    """The reason why reconcile is not ``sops updatekeys``, which leaves the data key as it was."""
    project, lena = with_lena
    path = project.layout.secret_file("alpha", "discord_token")
    kept = data_key(path.read_text(), lena)
    assert value_under(kept, path.read_text(), "discord_token") == GIVEN["discord_token"]
    changes.revoke(project, "lena", runner=runner)
    with pytest.raises(InvalidTag):
        value_under(kept, path.read_text(), "discord_token")


def test_what_a_revoked_operator_kept_of_a_hosts_own_key_still_opens_that_hosts_secrets(with_lena, runner):
    """A limit, stated in docs/howto/secrets.md: only a new host key ends it."""
    project, lena = with_lena
    kept = Sops(runner, find_sops(runner)).decrypt(project.layout.host_age_key_file("alpha"), identity=lena.secret)
    changes.revoke(project, "lena", runner=runner)
    host = age.from_secret(kept["age_secret_key"])
    assert opens(project.layout.secret_file("alpha", "discord_token"), host, runner)
    assert not opens(project.layout.host_ssh_key_file("alpha"), host, runner)


def test_what_no_host_needs_goes_and_a_host_that_left_takes_everything_along(tmp_path, runner):
    root = tmp_path / "project"
    both = a_project(root, hosts=("alpha", "beta"))
    for host in ("alpha", "beta"):
        init_host(both, host, VALUES, runner=runner)
    before = snapshot(root)
    less = a_project(root, hosts=("alpha", "beta"), wired={})
    assert [row.file for row in status(less, ["alpha"], runner=runner) if "stale" in row.states] == [
        "secrets/hosts/alpha/discord_token.yaml"
    ]
    made = changes.reconcile(less, ["alpha"], runner=runner)
    assert made.removed == ("secrets/hosts/alpha/discord_token.yaml",)
    alone = a_project(root, hosts=("alpha",))
    assert exit_code(status(alone, runner=runner)) == 1
    made = changes.reconcile(alone, runner=runner)
    assert set(made.removed) == {path for path in before if "beta" in path and path.startswith("secrets/")}
    assert made.missing == ("alpha/discord_token",)
    assert not (root / "secrets" / "hosts" / "beta").exists()
    assert "beta" not in (root / "secrets" / ".sops.yaml").read_text()
    after = snapshot(root)
    assert {path for path in after if path in before and after[path] != before[path]} <= {
        "secrets/.sops.yaml",
        "fleet/clawdlets.json",
        ".clawdlets/state/secrets-alpha.json",
    }
    assert not changes.reconcile(alone, runner=runner).changed
    assert snapshot(root) == after


def test_what_is_not_ours_is_not_removed_and_stops_everything(project, runner):
    stray = project.layout.host_secrets_dir("alpha") / "notes.yaml"
    stray.write_text("notes: canary\n")
    (project.layout.operator_recipients_dir / "lena.age.pub").write_text(age.generate().recipient + "\n")
    before = snapshot(project.layout.root)
    with pytest.raises(SecretsError, match=r"notes\.yaml"):
        changes.reconcile(project, runner=runner)
    assert snapshot(project.layout.root) == before


def test_one_file_that_cannot_be_opened_stops_everything(project, runner):
    put(project, runner, "discord_token", "canary", to={age.generate().recipient})
    (project.layout.operator_recipients_dir / "lena.age.pub").write_text(age.generate().recipient + "\n")
    before = snapshot(project.layout.root)
    with pytest.raises(UnreadableError, match=r"discord_token\.yaml"):
        changes.reconcile(project, runner=runner)
    assert snapshot(project.layout.root) == before


def test_a_planted_link_is_neither_followed_nor_written_through(project, runner, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(project.layout.host_secrets_dir("alpha"), outside)
    project.layout.host_secrets_dir("alpha").symlink_to(outside)
    before = snapshot(outside)
    with pytest.raises(SecretsError, match="is a link"):
        changes.set_secret(project, "alpha", "discord_token", Secret("canary-new"), runner=runner)
    assert snapshot(outside) == before


def test_a_full_disk_is_an_error_that_says_so_and_the_next_run_finishes(with_lena, runner):
    project, _ = with_lena
    written = []

    def write(path, content, *, mode):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        return write_atomic(path, content, mode=mode)

    with pytest.raises(SecretsError, match="cannot be written: No space left"):
        changes.rotate_data_keys(project, runner=runner, disk=Disk(write=write))
    assert set(states(project, runner).values()) == {"present"}
    assert not changes.reconcile(project, runner=runner).changed
    assert {name: value_in(project, runner, name) for name in GIVEN} == GIVEN


def test_a_file_too_large_for_a_secret_is_not_read(project, runner):
    path = project.layout.secret_file("alpha", "discord_token")
    with path.open("r+b") as handle:
        handle.truncate(200 << 20)
    (row,) = [row for row in status(project, runner=runner) if row.name == "discord_token"]
    assert str(row.state) == "unreadable"
    assert "209715200 bytes" in row.observed


# --- declared operators ---


def test_a_fleet_file_that_names_its_operators_is_the_whole_truth(project, runner):
    root, maren, lena = project.layout.root, operator_identity(project), age.generate()
    (project.layout.operator_recipients_dir / "lena.age.pub").write_text(lena.recipient + "\n")
    changes.reconcile(project, runner=runner)
    declared = a_project(root, operators={"maren": maren.recipient})
    assert set(states(declared, runner).values()) == {"over-shared"}
    made = changes.reconcile(declared, runner=runner)
    assert made.removed == ("secrets/keys/operators/lena.age.pub",)
    assert not any(opens(path, lena, runner) for path in sealed_files(declared))
    before = snapshot(root)
    assert not changes.reconcile(declared, runner=runner).changed
    assert not init_host(declared, "alpha", {}, runner=runner).changed
    assert snapshot(root) == before
    both = a_project(root, operators={"maren": maren.recipient, "lena": lena.recipient})
    made = changes.reconcile(both, runner=runner)
    assert made.created == ("secrets/keys/operators/lena.age.pub",)
    assert all(opens(path, lena, runner) for path in sealed_files(both))
    with pytest.raises(SecretsError, match=f'remove the line "lena": .*{lena.recipient}'):
        changes.revoke(both, "lena", runner=runner)
    changes.reconcile(declared, runner=runner)
    assert not any(opens(path, lena, runner) for path in sealed_files(declared))


def test_who_is_not_declared_makes_nothing_and_is_told_the_line_to_add(project, runner):
    declared = a_project(
        project.layout.root, operator="lena", operators={"maren": operator_identity(project).recipient}
    )
    before = snapshot(project.layout.root)
    with pytest.raises(SecretsError, match='add "lena"'):
        init_host(declared, "alpha", {}, runner=runner)
    assert snapshot(project.layout.root) == before
    changes.add_operator(declared, runner=runner)
    assert not (project.layout.operator_recipients_dir / "lena.age.pub").exists()
    lena = operator_identity(declared).recipient
    with pytest.raises(SecretsError, match=f'"lena": {{"ageRecipient": "{lena}"}}'):
        init_host(declared, "alpha", {}, runner=runner)


def test_a_recipient_with_a_typing_error_is_named(project, runner):
    right = operator_identity(project).recipient
    wrong = right[:-1] + ("q" if right[-1] != "q" else "p")
    with pytest.raises(SecretsError, match=r"operators\.lena\.ageRecipient: is not an age recipient"):
        status(a_project(project.layout.root, operators={"maren": right, "lena": wrong}), runner=runner)


def test_the_last_operator_cannot_be_revoked_and_a_misspelt_one_is_not_taken_for_done(project, runner):
    before = snapshot(project.layout.root)
    with pytest.raises(SecretsError, match="no operator would be left"):
        changes.revoke(project, "maren", runner=runner)
    with pytest.raises(SecretsError, match="did you mean 'maren'"):
        changes.revoke(project, "marne", runner=runner)
    assert snapshot(project.layout.root) == before
