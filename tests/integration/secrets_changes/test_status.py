"""secrets status on a real disk: every state, no process where the record suffices, no key needed."""

import shutil

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.secrets import changes
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.status import exit_code
from clawdlets_ops.secrets.store import operator_identity
from tests.integration.secrets_changes.desk import FILES, GIVEN, put, readers_of, snapshot, states

pytestmark = pytest.mark.integration

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
