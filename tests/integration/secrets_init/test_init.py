"""secrets init on a real disk with the real sops: twice is once, interrupted is finished."""

import stat
from pathlib import Path

import pytest

from clawdlets_ops import hostkey
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.store import (
    check_host,
    host_ssh_pin,
    init_host,
    operator_identity,
    plan_host,
)
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import recipients
from tests.integration.secrets_init.desk import (
    GIVEN,
    KEY_FILES,
    NEEDED_FILES,
    PASSWORDS,
    VALUES,
    a_project,
    declared_readers,
    hits,
    modes,
    needs_mkpasswd,
    snapshot,
    value_in,
)

pytestmark = pytest.mark.integration

# --- once and twice ---


def test_the_first_run_makes_everything_and_the_host_can_use_it(project, runner):
    outcome = init_host(project, "alpha", VALUES, runner=runner)
    assert runner.taken() == NEEDED_FILES + KEY_FILES
    assert outcome.updated == outcome.unchanged == outcome.stale == ()
    assert modes(project.layout.root) == {
        ".clawdlets": "0700",
        ".clawdlets/keys": "0700",
        ".clawdlets/keys/operators": "0700",
        ".clawdlets/keys/operators/maren.agekey": "0600",
        ".clawdlets/state": "0700",
        ".clawdlets/state/secrets-alpha.json": "0600",
        "fleet": modes(project.layout.root)["fleet"],
        "fleet/clawdlets.json": modes(project.layout.root)["fleet/clawdlets.json"],
        "secrets": "0755",
        "secrets/.sops.yaml": "0644",
        "secrets/hosts": "0755",
        "secrets/hosts/alpha": "0755",
        **{f"secrets/hosts/alpha/{name}.yaml": "0600" for name in GIVEN},
        "secrets/keys": "0755",
        "secrets/keys/hosts": "0755",
        "secrets/keys/hosts/alpha.age.pub": "0644",
        "secrets/keys/hosts/alpha.agekey.yaml": "0600",
        "secrets/keys/hosts/alpha.ssh_host_ed25519_key.pub": "0644",
        "secrets/keys/hosts/alpha.ssh_host_ed25519_key.yaml": "0600",
        "secrets/keys/operators": "0755",
        "secrets/keys/operators/maren.age.pub": "0644",
    }
    check_host(project, "alpha", runner=runner)
    for name, value in GIVEN.items():
        assert value_in(project, runner, name) == value
        assert recipients(project.layout.secret_file("alpha", name).read_text()) == declared_readers(project)
    for path in (project.layout.host_age_key_file("alpha"), project.layout.host_ssh_key_file("alpha")):
        assert recipients(path.read_text()) == {operator_identity(project).recipient}
    hostkey.parse_public(host_ssh_pin(project, "alpha"))


@pytest.mark.parametrize("again", [VALUES, {}, {"discord_token": VALUES["discord_token"]}], ids=["all", "none", "one"])
def test_the_second_run_changes_nothing_and_starts_nothing(project, runner, again):
    first = init_host(project, "alpha", VALUES, runner=runner)
    before = snapshot(project.layout.root)
    runner.taken()
    outcome = init_host(project, "alpha", again, runner=runner)
    assert runner.taken() == 0
    assert snapshot(project.layout.root) == before
    assert not outcome.changed
    assert set(outcome.unchanged) == set(first.created) - {".clawdlets/keys/operators/maren.agekey"}


@pytest.mark.parametrize("damage", ["absent", "garbage", "open"])
def test_without_the_record_of_last_time_files_are_decrypted_and_still_kept(project, runner, damage):
    init_host(project, "alpha", VALUES, runner=runner)
    record = project.layout.runtime / "state" / "secrets-alpha.json"
    before = snapshot(project.layout.secrets_dir)
    if damage == "absent":
        record.unlink()
    elif damage == "garbage":
        record.write_text("{")
    else:
        record.chmod(0o644)
    runner.taken()
    assert not init_host(project, "alpha", VALUES, runner=runner).changed
    assert runner.taken() == NEEDED_FILES + KEY_FILES
    assert snapshot(project.layout.secrets_dir) == before
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    init_host(project, "alpha", VALUES, runner=runner)
    assert runner.taken() == 0


def test_a_new_value_changes_its_file_alone(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    before = snapshot(project.layout.secrets_dir)
    runner.taken()
    new = {**VALUES, "discord_token": Secret("canary-discord-new")}
    planned = plan_host(project, "alpha", new, runner=runner)
    assert snapshot(project.layout.secrets_dir) == before
    assert runner.taken() == 0
    outcome = init_host(project, "alpha", new, runner=runner)
    assert outcome.updated == planned.updated == ("secrets/hosts/alpha/discord_token.yaml",)
    assert runner.taken() == 1
    after = snapshot(project.layout.secrets_dir)
    assert {path for path in after if after[path] != before[path]} == {"hosts/alpha/discord_token.yaml"}
    assert value_in(project, runner, "discord_token") == "canary-discord-new"


def test_an_older_version_of_a_file_is_noticed(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    path = project.layout.secret_file("alpha", "discord_token")
    old = path.read_text()
    new = {"discord_token": Secret("canary-discord-new")}
    init_host(project, "alpha", new, runner=runner)
    path.write_text(old)
    assert init_host(project, "alpha", new, runner=runner).updated == ("secrets/hosts/alpha/discord_token.yaml",)
    assert value_in(project, runner, "discord_token") == "canary-discord-new"


def test_a_file_that_is_gone_is_asked_for_again(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    project.layout.secret_file("alpha", "discord_token").unlink()
    with pytest.raises(SecretsError, match="discord_token"):
        init_host(project, "alpha", {}, runner=runner)
    assert init_host(project, "alpha", VALUES, runner=runner).created == ("secrets/hosts/alpha/discord_token.yaml",)


@needs_mkpasswd
def test_passwords_become_hashes_and_stay_while_they_are_the_same(project, runner):
    words = {name: Secret(f"canary-{name}-word", name) for name in PASSWORDS}
    rest = {name: value for name, value in VALUES.items() if not name.endswith("_hash")}
    init_host(project, "alpha", words | rest, runner=runner)
    hashed = value_in(project, runner, "admin_password_hash")
    assert hashed.startswith("$y$")
    check_host(project, "alpha", runner=runner)
    before = snapshot(project.layout.secrets_dir)
    runner.taken()
    init_host(project, "alpha", words | rest, runner=runner)
    assert runner.taken() == 0
    (project.layout.runtime / "state" / "secrets-alpha.json").unlink()
    init_host(project, "alpha", words | rest, runner=runner)
    assert sum("mkpasswd" in line for line in runner.lines) == len(PASSWORDS)
    assert snapshot(project.layout.secrets_dir) == before
    other = {"admin_password": Secret("canary-another-word")}
    assert init_host(project, "alpha", other, runner=runner).updated == (
        "secrets/hosts/alpha/admin_password_hash.yaml",
    )
    assert value_in(project, runner, "admin_password_hash") != hashed
    for word in (*words.values(), *other.values()):
        assert hits(project.layout.root, word.reveal()) == set()


# --- interrupted ---


def test_a_run_that_is_cut_off_at_any_write_is_finished_by_the_next(tmp_path, runner):
    """Before the first write, between any two, before the last; what was made before the cut is kept."""
    writes: list[Path] = []

    def counting(path, content, *, mode):
        writes.append(path)
        return write_atomic(path, content, mode=mode)

    init_host(a_project(tmp_path / "whole"), "alpha", VALUES, runner=runner, disk=Disk(write=counting))
    assert len(writes) == 13
    expected = modes(tmp_path / "whole")
    for cut in range(len(writes)):
        root = tmp_path / f"cut-{cut}"
        project = a_project(root)
        done: list[Path] = []

        def failing(path, content, *, mode, cut=cut, done=done):
            if len(done) == cut:
                raise KeyboardInterrupt
            done.append(path)
            return write_atomic(path, content, mode=mode)

        with pytest.raises(KeyboardInterrupt):
            init_host(project, "alpha", VALUES, runner=runner, disk=Disk(write=failing))
        left = snapshot(root)
        (root / "secrets" / ".x.yaml.0a0a0a0a0a0a.tmp").touch()  # what kill -9 leaves of a write
        init_host(project, "alpha", VALUES, runner=runner)
        assert modes(root) == expected, cut
        now = snapshot(root)
        assert {path for path in left if now.get(path) != left[path]} == set(), cut
        runner.taken()
        assert not init_host(project, "alpha", VALUES, runner=runner).changed
        assert runner.taken() == 0
        check_host(project, "alpha", runner=runner)


def test_what_another_host_of_the_same_run_is_writing_stays(project, runner):
    """Its own thread writes what it knows of the cloud, under a lock of its own, while this one sweeps."""
    init_host(project, "alpha", VALUES, runner=runner)
    state = project.layout.state_file("any").parent
    begun = state / ".provision-beta.json.0a0a0a0a0a0a.tmp"
    left = [state / f".{name}-alpha.json.0a0a0a0a0a0a.tmp" for name in ("secrets", "payload")]
    for path in (begun, *left):
        path.touch()
    init_host(project, "alpha", VALUES, runner=runner)
    assert begun.exists()
    assert [path for path in left if path.exists()] == []
