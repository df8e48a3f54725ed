"""secrets set and rotate, two at once, and the command line, with the real sops."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner

from clawdlets_ops import age
from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.commands.secrets import secrets
from clawdlets_ops.errors import ClawdletsError, SecretsError, UnreadableError
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.secrets import changes
from clawdlets_ops.secrets.store import check_host, init_host
from clawdlets_ops.sensitive import Secret
from tests.integration.secrets_changes.desk import (
    FILES,
    GIVEN,
    HASH,
    a_project,
    data_of,
    put,
    sealed_files,
    snapshot,
    states,
    value_in,
)

pytestmark = pytest.mark.integration

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
        ("discord_token", "canary" * 700_000, "is larger than 1048576 bytes"),
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
from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.commands.secrets import secrets
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
