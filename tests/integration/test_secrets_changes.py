"""secrets status, set, reconcile and rotate on a real disk with the real sops and real keys."""

import base64
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import pyrage
import pytest
import yaml
from click.testing import CliRunner
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from clawdlets_ops import age
from clawdlets_ops.commands.secrets import ENVIRON, secrets
from clawdlets_ops.errors import ClawdletsError, SecretsError, UnreadableError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import changes
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.status import exit_code
from clawdlets_ops.secrets.store import check_host, init_host, operator_identity
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops, recipients

pytestmark = pytest.mark.integration

HASH = "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8"
GIVEN = {"admin_password_hash": HASH, "breakglass_password_hash": HASH, "discord_token": "canary-discord-0002"}
VALUES = {name: Secret(value, name) for name, value in GIVEN.items()}
FILES = 5
HOST = {
    "provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"},
    "sshExposure": {"mode": "public"},
    "tailnet": {"mode": "none"},
    "secrets": {"discord_token": {"owner": "bot-maren"}},
}


class Recording(LocalRunner):
    """Keeps what it was asked to run."""

    def __init__(self, environ=os.environ):
        super().__init__(environ)
        self.lines: list[str] = []

    def run(self, command, **more):
        self.lines.append(str(command))
        return super().run(command, **more)

    def taken(self) -> int:
        count, self.lines = len(self.lines), []
        return count


@pytest.fixture
def runner():
    return Recording()


def a_project(root: Path, *, hosts=("alpha",), operator="maren", operators=None, wired=None) -> Project:
    host = {**HOST, "secrets": HOST["secrets"] if wired is None else wired}
    fleet = {"schemaVersion": 1, "hosts": dict.fromkeys(hosts, host)}
    if operators:
        fleet["operators"] = {name: {"ageRecipient": recipient} for name, recipient in operators.items()}
    (root / "fleet").mkdir(parents=True, exist_ok=True)
    (root / "fleet" / "clawdlets.json").write_text(json.dumps(fleet))
    return load_project(root, {"USER": operator, "PATH": os.environ["PATH"]})


@pytest.fixture
def project(tmp_path, runner):
    project = a_project(tmp_path / "project")
    init_host(project, "alpha", VALUES, runner=runner)
    runner.taken()
    return project


def snapshot(root: Path) -> dict[str, tuple]:
    """Every file below ``root`` but locks: mode, content, inode and time of change."""
    return {
        path.relative_to(root).as_posix(): (
            stat.S_IMODE(path.stat().st_mode),
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_ino,
            path.stat().st_mtime_ns,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file() and "locks" not in path.parts
    }


def sealed_files(project) -> list[Path]:
    return sorted(path for path in project.layout.secrets_dir.rglob("*.yaml") if path.name != ".sops.yaml")


def opens(path: Path, identity, runner) -> bool:
    try:
        Sops(runner, find_sops(runner)).decrypt(path, identity=identity.secret)
    except UnreadableError:
        return False
    return True


def value_in(project, runner, name, host="alpha") -> str:
    path = project.layout.secret_file(host, name)
    return Sops(runner, find_sops(runner)).decrypt(path, identity=operator_identity(project).secret)[name].reveal()


def put(project, runner, name, value, *, to):
    text = Sops(runner, find_sops(runner)).encrypt({name: Secret(value)}, recipients=to, filename=name)
    project.layout.secret_file("alpha", name).write_text(text)


def readers_of(project, name, host="alpha") -> set[str]:
    return recipients(project.layout.secret_file(host, name).read_text())


def states(project, runner, hosts=()) -> dict[str, str]:
    return {row.name: ", ".join(row.states) for row in status(project, hosts, runner=runner)}


def as_operator(project, name) -> Project:
    """The same repository on another machine: only ``secrets/`` and ``fleet/`` come along, as with git."""
    root = project.layout.root.with_name(f"of-{name}")
    shutil.copytree(project.layout.secrets_dir, root / "secrets")
    shutil.copytree(project.layout.fleet_file.parent, root / "fleet")
    return load_project(root, {"USER": name, "PATH": os.environ["PATH"]})


def carry(source: Project, target: Project) -> None:
    """What git does between two machines."""
    shutil.rmtree(target.layout.secrets_dir)
    shutil.copytree(source.layout.secrets_dir, target.layout.secrets_dir)


# --- status ---


def test_status_after_init_is_all_present_and_costs_no_process(project, runner):
    before = snapshot(project.layout.root)
    table = status(project, runner=runner)
    assert {str(row.state) for row in table} == {"present"}
    assert [row.name for row in table] == ["(age key)", "(SSH host key)", *GIVEN]
    assert {row.readers for row in table} == {("maren",), ("host alpha", "maren")}
    assert table[-1].why == "hosts.alpha.secrets.discord_token"
    assert exit_code(table) == 0
    assert runner.taken() == 0
    assert snapshot(project.layout.root) == before


def test_status_without_the_record_decrypts_each_file_once(project, runner):
    project.layout.state_file("secrets-alpha").unlink()
    assert set(states(project, runner).values()) == {"present"}
    assert runner.taken() == FILES


def test_status_tells_each_state(project, runner):
    layout, stranger = project.layout, age.generate().recipient
    mine = readers_of(project, "discord_token")
    assert states(project, runner)["discord_token"] == "present"
    put(project, runner, "discord_token", "<canary>", to=mine)
    assert states(project, runner)["discord_token"] == "placeholder"
    put(project, runner, "discord_token", "canary", to=mine | {stranger})
    assert states(project, runner)["discord_token"] == "over-shared"
    put(project, runner, "discord_token", "canary", to={operator_identity(project).recipient})
    assert states(project, runner)["discord_token"] == "under-shared"
    put(project, runner, "discord_token", "canary", to={stranger})
    assert states(project, runner)["discord_token"] == "unreadable, over-shared, under-shared"
    layout.secret_file("alpha", "discord_token").write_text("discord_token: canary-in-clear\n")
    assert states(project, runner)["discord_token"] == "unreadable"
    layout.secret_file("alpha", "discord_token").unlink()
    assert states(project, runner)["discord_token"] == "missing"
    layout.secret_file("alpha", "discord_token").symlink_to(layout.secret_file("alpha", "admin_password_hash"))
    assert states(project, runner)["discord_token"] == "unreadable"


def test_status_sees_a_public_key_that_is_not_the_hosts(project, runner):
    project.layout.host_age_public_key("alpha").write_text(age.generate().recipient + "\n")
    table = status(project, runner=runner)
    assert str(table[0].state) == "unreadable"
    assert "not the private half of alpha.age.pub" in table[0].observed
    with pytest.raises(SecretsError, match="is not the public half"):
        changes.reconcile(project, runner=runner)


def test_status_needs_no_key_to_name_readers(project, runner):
    shutil.rmtree(project.layout.runtime)
    table = status(project, runner=runner)
    assert {str(row.state) for row in table} == {"unreadable"}
    assert {row.readers for row in table} == {("maren",), ("host alpha", "maren")}
    assert exit_code(table) == 2


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


def data_of(text: str) -> str:
    return next(line for line in text.splitlines() if "ENC[AES256_GCM" in line and "mac:" not in line)


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


# --- set and rotate ---


def test_set_changes_one_file_and_again_none(project, runner):
    before = snapshot(project.layout.secrets_dir)
    new = Secret("canary-discord-new")
    made = changes.set_secret(project, "alpha", "discord_token", new, runner=runner)
    assert made.updated == ("secrets/hosts/alpha/discord_token.yaml",)
    assert runner.taken() == 1
    after = snapshot(project.layout.secrets_dir)
    assert {path for path in after if after[path] != before[path]} == {"hosts/alpha/discord_token.yaml"}
    assert value_in(project, runner, "discord_token") == "canary-discord-new"
    runner.taken()
    assert not changes.set_secret(project, "alpha", "discord_token", new, runner=runner).changed
    assert set(states(project, runner).values()) == {"present"}
    assert runner.taken() == 0
    assert snapshot(project.layout.secrets_dir) == after


@pytest.mark.skipif(not shutil.which("mkpasswd"), reason="mkpasswd (Debian package whois) is not there")
def test_a_password_is_hashed(project, runner):
    changes.set_secret(project, "alpha", "admin_password", Secret("canary-a-good-word"), runner=runner)
    before = snapshot(project.layout.secrets_dir)
    assert value_in(project, runner, "admin_password_hash").startswith("$y$")
    changes.set_secret(project, "alpha", "admin_password", Secret("canary-a-good-word"), runner=runner)
    assert snapshot(project.layout.secrets_dir) == before


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("../x", "canary", "this host has no such secret"),
        ("discord_tokn", "canary", "did you mean 'discord_token'"),
        ("discord_token", "", "is empty or still a placeholder"),
        ("discord_token", "<canary>", "is empty or still a placeholder"),
        ("discord_token", "canary\0", "holds a NUL"),
        ("discord_token", "canary" * 200_000, "is larger than 1048576 bytes"),
        ("admin_password_hash", "canary-in-clear", "is no password hash"),
    ],
)
def test_set_refuses_what_is_no_name_or_no_value(project, runner, name, value, says):
    before = snapshot(project.layout.root)
    with pytest.raises(SecretsError) as caught:
        changes.set_secret(project, "alpha", name, Secret(value), runner=runner)
    assert says in str(caught.value)
    assert "canary" not in str(caught.value)
    assert snapshot(project.layout.root) == before
    assert runner.taken() == 0


def test_set_never_overwrites_what_it_cannot_read_and_needs_a_host_with_a_key(project, runner):
    put(project, runner, "discord_token", "canary", to={age.generate().recipient})
    with pytest.raises(UnreadableError, match=r"discord_token\.yaml"):
        changes.set_secret(project, "alpha", "discord_token", Secret("canary-new"), runner=runner)
    both = a_project(project.layout.root, hosts=("alpha", "beta"))
    with pytest.raises(SecretsError, match="has no key yet"):
        changes.set_secret(both, "beta", "discord_token", Secret("canary-new"), runner=runner)


def test_a_value_of_one_mebibyte_and_newlines_comes_back_whole(project, runner):
    value = ("canary-line\n" * 90_000)[: 1 << 20]
    changes.set_secret(project, "alpha", "discord_token", Secret(value), runner=runner)
    assert value_in(project, runner, "discord_token") == value
    assert set(states(project, runner).values()) == {"present"}


def test_new_data_keys_for_every_file_and_the_same_values(project, runner):
    before = {path: data_of(path.read_text()) for path in sealed_files(project)}
    made = changes.rotate_data_keys(project, runner=runner)
    assert len(made.updated) == FILES
    assert all(data_of(path.read_text()) != before[path] for path in sealed_files(project))
    check_host(project, "alpha", runner=runner)
    assert {name: value_in(project, runner, name) for name in GIVEN} == GIVEN
    runner.taken()
    assert not changes.reconcile(project, runner=runner).changed
    assert set(states(project, runner).values()) == {"present"}
    assert runner.taken() == 0


def test_two_at_once_take_turns_and_nothing_is_mixed(tmp_path, runner):
    project = a_project(tmp_path / "two", wired={"one": {}, "two": {}})
    hashes = {name: Secret(HASH) for name in ("admin_password_hash", "breakglass_password_hash")}
    init_host(project, "alpha", {**hashes, "one": Secret("canary-1"), "two": Secret("canary-2")}, runner=runner)

    def work(name):
        for number in range(3):
            changes.set_secret(
                project, "alpha", name, Secret(f"canary-{name}-{number}"), runner=LocalRunner(os.environ)
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, ["one", "two"]))
    assert [value_in(project, runner, name) for name in ("one", "two")] == ["canary-one-2", "canary-two-2"]
    runner.taken()
    assert set(states(project, runner).values()) == {"present"}
    assert runner.taken() == 0  # neither has overwritten what the other remembered


# --- the command line ---


@pytest.fixture
def run(project):
    @click.group()
    @click.pass_context
    def clawdlets(context):
        context.obj = project.layout.root
        context.meta[ENVIRON] = project.environ

    clawdlets.add_command(secrets)

    def run(*words, stdin=None):
        try:
            return CliRunner().invoke(clawdlets, ["secrets", *words], input=stdin, catch_exceptions=False)
        except ClawdletsError as error:
            return error

    return run


def test_the_command_line_from_status_to_revocation(run, project, runner):
    result = run("status")
    assert result.exit_code == 0
    assert "host alpha, maren" in result.stdout
    assert len(json.loads(run("status", "--json").stdout)) == FILES
    assert (
        "updated secrets/hosts/alpha/discord_token.yaml"
        in run("set", "discord_token", "--host", "alpha", stdin="canary-from-stdin\n").stdout
    )
    assert value_in(project, runner, "discord_token") == "canary-from-stdin"
    assert run("set", "discord_token", "--host", "alpha", stdin="canary-from-stdin").stdout.startswith("unchanged")
    key = "-----BEGIN X-----\ncanary\n-----END X-----\n"
    run("set", "discord_token", "--host", "alpha", stdin=key)
    assert value_in(project, runner, "discord_token") == key
    (project.layout.operator_recipients_dir / "lena.age.pub").write_text(age.generate().recipient + "\n")
    result = run("status")
    assert (result.exit_code, result.stdout.count("not read by lena")) == (1, FILES)
    assert run("reconcile", "--dry-run").stdout.count("would be updated") == FILES + 1
    assert run("status").exit_code == 1
    assert run("reconcile").exit_code == 0
    assert run("status").exit_code == 0
    result = run("rotate", "--operator", "lena", "--revoke")
    assert "removed secrets/keys/operators/lena.age.pub" in result.stdout
    assert "replace every value" in result.stderr
    assert run("rotate", "--operator", "lena", "--revoke").stderr == ""
    assert run("rotate", "--data-keys").stdout.count("updated") == FILES
    assert run("operator", "add").stdout.startswith("unchanged")
    assert run("init", "--host", "alpha").exit_code == 0
    assert "canary" not in str(run("set", "discord_token", "--host", "alpha", stdin=b"\xffcanary"))
    assert run("rotate", "--operator", "lena").exit_code == 2


PROMPTED = """
import os, sys
from pathlib import Path
from clawdlets_ops.commands.secrets import ENVIRON, secrets
with secrets.make_context("secrets", sys.argv[2:], obj=Path(sys.argv[1])) as context:
    context.meta[ENVIRON] = os.environ
    secrets.invoke(context)
"""


def test_at_a_terminal_the_value_is_asked_for_and_not_shown(project, runner):
    ours, theirs = os.openpty()
    words = ["set", "discord_token", "--host", "alpha"]
    child = subprocess.Popen(
        [sys.executable, "-c", PROMPTED, str(project.layout.root), *words],
        env={"PATH": os.environ["PATH"], "USER": "maren", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    for _ in range(2):  # and once more, to be sure of what was typed blind
        while not shown.endswith(b": "):
            shown += os.read(ours, 1000)
        os.write(ours, b"canary-typed\n")
        shown += b"|"
    printed, _ = child.communicate(timeout=60)
    with contextlib.suppress(OSError):  # the terminal hangs up with the child
        shown += os.read(ours, 10_000)
    os.close(ours)
    assert child.returncode == 0, shown
    assert b"updated secrets/hosts/alpha/discord_token.yaml" in printed
    assert b"canary" not in shown + printed
    assert value_in(project, runner, "discord_token") == "canary-typed"


def test_no_value_is_in_a_command_line(run, project, runner):
    changes.set_secret(project, "alpha", "discord_token", Secret("canary-in-argv"), runner=runner)
    changes.rotate_data_keys(replace(project), runner=runner)
    assert runner.lines
    assert not any("canary" in line or "AGE-SECRET" in line for line in runner.lines)
