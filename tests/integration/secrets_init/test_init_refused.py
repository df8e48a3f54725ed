"""What secrets init refuses is untouched: missing and unusable values, unreadable files, exchanged keys."""

from dataclasses import replace

import pytest

from clawdlets_ops import age, hostkey
from clawdlets_ops.errors import ClawdletsError, SecretsError, SettingsError, UnreadableError
from clawdlets_ops.secrets.store import (
    check_host,
    init_host,
    operator_identity,
)
from clawdlets_ops.secrets.vault import host_recipient_file
from clawdlets_ops.sensitive import Secret
from tests.integration.secrets_init.desk import GIVEN, VALUES, declared_readers, put, snapshot

pytestmark = pytest.mark.integration

# --- refused ---


def refused(project, runner, kind, values=VALUES) -> ClawdletsError:
    """The error of a run that must change nothing."""
    before = snapshot(project.layout.root)
    with pytest.raises(kind) as caught:
        init_host(project, "alpha", values, runner=runner)
    assert snapshot(project.layout.root) == before
    assert "canary" not in str(caught.value)
    return caught.value


def test_missing_values_are_all_named_and_nothing_is_written(project, runner):
    project.layout.runtime.mkdir(mode=0o700)
    error = refused(project, runner, SecretsError, {"discord_token": VALUES["discord_token"]})
    for name in set(GIVEN) - {"discord_token"}:
        assert name in str(error)
    assert "discord_token" not in str(error)
    assert "admin_password, which is then hashed" in str(error)
    assert "nothing was written" in str(error)
    assert runner.taken() == 0


def test_unacceptable_values_are_all_named_and_nothing_is_written(project, runner):
    project.layout.runtime.mkdir(mode=0o700)
    wrong = {"discord_tokn": "canary", "model_api_key": "<canary>", "admin_password_hash": "canary-is-a-password"}
    error = refused(project, runner, SecretsError, VALUES | {name: Secret(value) for name, value in wrong.items()})
    for part in ("did you mean 'discord_token'", "model_api_key: is empty or still", "admin_password_hash: is no"):
        assert part in str(error)


def encrypted_to_a_stranger(project, runner):
    put(project, runner, "discord_token", {"discord_token": "canary-x"}, to={age.generate().recipient})


def claims_to_be_ours(project, runner):
    """The metadata name us; the key inside is somebody else's."""
    stranger = age.generate().recipient
    put(project, runner, "discord_token", {"discord_token": "canary-x"}, to={stranger})
    path = project.layout.secret_file("alpha", "discord_token")
    path.write_text(path.read_text().replace(stranger, operator_identity(project).recipient))


def altered(project, runner):
    path = project.layout.secret_file("alpha", "discord_token")
    path.write_text(path.read_text().replace("data:", "data:AA", 1))


def in_clear(project, runner):
    project.layout.secret_file("alpha", "discord_token").write_text("discord_token: canary-in-clear\n")


def a_folder(project, runner):
    path = project.layout.secret_file("alpha", "discord_token")
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [encrypted_to_a_stranger, claims_to_be_ours, altered, in_clear, a_folder],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "unrecorded"])
def test_an_unreadable_file_is_never_overwritten(project, runner, damage, recorded):
    init_host(project, "alpha", VALUES, runner=runner)
    damage(project, runner)
    project.layout.secret_file("alpha", "model_api_key").unlink()  # work to do, which must not be begun
    if not recorded:
        (project.layout.runtime / "state" / "secrets-alpha.json").unlink()
    error = refused(project, runner, UnreadableError)
    assert "discord_token.yaml" in str(error)
    with pytest.raises(UnreadableError, match=r"discord_token\.yaml"):
        check_host(project, "alpha", runner=runner)


def test_every_unreadable_file_is_named(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    for name in ("discord_token", "model_api_key"):
        put(project, runner, name, {name: "canary-x"}, to={age.generate().recipient})
    error = refused(project, runner, UnreadableError)
    assert "2 secrets" in str(error)
    assert "discord_token.yaml" in str(error)
    assert "model_api_key.yaml" in str(error)


def test_a_file_with_another_key_inside_is_refused(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    put(project, runner, "discord_token", {"other": "canary-x"}, to=declared_readers(project))
    assert "exactly one key, 'discord_token'" in str(refused(project, runner, SecretsError))


@pytest.mark.parametrize("half", ["agekey.yaml", "ssh_host_ed25519_key.yaml"])
def test_a_host_key_that_is_gone_is_not_made_anew(project, runner, half):
    init_host(project, "alpha", VALUES, runner=runner)
    (project.layout.secrets_dir / "keys" / "hosts" / f"alpha.{half}").unlink()
    assert "is gone" in str(refused(project, runner, SecretsError))


def test_a_host_key_that_is_gone_with_its_public_half_is_still_in_use(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    project.layout.host_age_key_file("alpha").unlink()
    host_recipient_file(project.layout, "alpha").unlink()
    assert "encrypted to it" in str(refused(project, runner, SecretsError))


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "unrecorded"])
def test_a_pin_or_recipient_that_was_exchanged_is_refused(project, runner, recorded):
    init_host(project, "alpha", VALUES, runner=runner)
    if not recorded:
        (project.layout.runtime / "state" / "secrets-alpha.json").unlink()
    for path, other in (
        (project.layout.host_ssh_public_key("alpha"), hostkey.generate("alpha")[1]),
        (host_recipient_file(project.layout, "alpha"), age.generate().recipient),
    ):
        before = path.read_text()
        path.write_text(other + "\n")
        assert "is not the public half" in str(refused(project, runner, SecretsError))
        with pytest.raises(SecretsError):
            check_host(project, "alpha", runner=runner)
        path.write_text(before)


def test_a_public_half_that_is_gone_is_derived_again(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    before = snapshot(project.layout.secrets_dir, times=False)
    project.layout.host_ssh_public_key("alpha").unlink()
    host_recipient_file(project.layout, "alpha").unlink()
    init_host(project, "alpha", VALUES, runner=runner)
    assert snapshot(project.layout.secrets_dir, times=False) == before


def test_an_operator_whose_private_half_is_elsewhere_gets_no_new_one(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    project.layout.operator_key("maren").unlink()
    assert "is not on this machine" in str(refused(project, runner, SecretsError))


def test_an_operator_key_of_another_pair_is_refused(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    project.layout.operator_key("maren").write_text(age.to_key_file(age.generate()).reveal())
    assert "is not the public half" in str(refused(project, runner, SecretsError))


def test_an_operator_key_that_others_can_read_is_refused(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    project.layout.operator_key("maren").chmod(0o640)
    assert "open to group or others" in str(refused(project, runner, SettingsError))


def test_a_stranger_to_the_project_changes_nothing(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    stranger = replace(project, operator="stranger")
    assert "is not encrypted to the operator 'stranger'" in str(refused(stranger, runner, UnreadableError))
