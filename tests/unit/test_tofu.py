import json
from pathlib import Path

import pytest

from clawdlets_ops.errors import BusyError, CommandError
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.testing import FakeRunner
from clawdlets_ops.tofu import Encryption, Tofu, escape, is_encrypted

TOKEN = Secret("canary" * 10 + "0000", "hcloud_token")
KEY = Secret("canary-state-key-not-a-real-secret", "opentofu_state")


def test_template_markers_become_literal_at_any_depth() -> None:
    assert escape({"a": ["${x}", "%{if}"], "b": 1}) == {"a": ["$${x}", "%%{if}"], "b": 1}


def test_the_token_travels_by_environment_only(tmp_path: Path) -> None:
    runner = FakeRunner(
        script=[
            (("tofu", "init"), (0, "")),
            (("tofu", "plan"), (0, "")),
            (("tofu", "show"), (0, json.dumps({"resource_changes": []}))),
            (("tofu", "apply"), (0, "")),
        ]
    )
    tofu = Tofu(runner, tmp_path / "alpha", token=TOKEN, encryption=Encryption(KEY))
    tofu.prepare({"terraform": {}})
    assert tofu.plan() == {"resource_changes": []}
    tofu.apply()
    assert len(runner.ran) == 4
    for command in runner.ran:
        assert command.env["HCLOUD_TOKEN"] == TOKEN
        for secret in (TOKEN, KEY):
            assert secret.reveal() not in str(command)
            assert secret.reveal() not in repr(command)
            assert command.redactor().scrub(secret.reveal()) == "[secret]"
    written = (tmp_path / "alpha" / "main.tf.json").read_text()
    assert TOKEN.reveal() not in written
    assert KEY.reveal() not in written


def test_a_failed_apply_shows_the_error_scrubbed_and_says_how_to_go_on(tmp_path: Path) -> None:
    runner = FakeRunner(
        script=[
            (("tofu", "init"), (0, "")),
            (("tofu", "apply"), (1, f"hcloud_server.host: Creating...\nError: invalid input {TOKEN.reveal()}\nmore")),
        ]
    )
    tofu = Tofu(runner, tmp_path, token=TOKEN)
    tofu.prepare({"terraform": {}})
    with pytest.raises(CommandError) as caught:
        tofu.apply()
    assert "Error: invalid input" in str(caught.value)
    assert "Creating..." not in str(caught.value)
    assert TOKEN.reveal() not in str(caught.value)
    assert "run again" in str(caught.value)


def test_an_unchanged_configuration_is_initialised_once(tmp_path: Path) -> None:
    def init(_: object) -> tuple[int, str]:
        (tmp_path / ".terraform").mkdir(exist_ok=True)
        (tmp_path / ".terraform.lock.hcl").touch()
        return 0, ""

    runner = FakeRunner(script=[(("tofu", "init"), init)])
    tofu = Tofu(runner, tmp_path, token=TOKEN)
    tofu.prepare({"terraform": {"a": 1}})
    tofu.prepare({"terraform": {"a": 1}, "resource": {}})
    assert len(runner.ran) == 1
    tofu.prepare({"terraform": {"a": 2}})
    assert len(runner.ran) == 2


def test_an_initialisation_that_failed_is_tried_again(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("tofu", "init"), (1, "Error: no such provider"))])
    (tmp_path / ".terraform").mkdir()
    (tmp_path / ".terraform.lock.hcl").touch()
    tofu = Tofu(runner, tmp_path, token=TOKEN)
    for _ in range(2):
        with pytest.raises(CommandError, match="no such provider"):
            tofu.prepare({"terraform": {"a": 1}})
    assert len(runner.ran) == 2


def test_encryption_is_enforced_but_for_the_run_that_moves_an_old_state_over() -> None:
    usual = json.loads(Encryption(KEY).as_env().reveal())
    assert usual["state"]["enforced"] is True
    assert usual["plan"]["enforced"] is True
    assert "unencrypted" not in usual["method"]
    once = json.loads(Encryption(KEY, accept_plain=True).as_env().reveal())
    assert once["state"]["fallback"] == {"method": "method.unencrypted.before"}
    assert once["plan"]["enforced"] is True


@pytest.mark.parametrize(
    ("content", "encrypted"),
    [
        (b'{"meta": {}, "encrypted_data": "x", "encryption_version": "v0"}', True),
        (b'{"version": 4, "resources": []}', False),
        (b'{"encrypted_data": "x", "resources": []}', False),
        (b"PK\x03\x04", False),
        (b"", False),
    ],
)
def test_an_encrypted_state_is_told_from_any_other(content: bytes, *, encrypted: bool) -> None:
    assert is_encrypted(content) is encrypted


LOCKED = """
Error: Error acquiring the state lock

Error message: resource temporarily unavailable
Lock Info:
  ID:        6d11261c-b8f2
  Path:      terraform.tfstate
  Operation: OperationTypeApply
  Who:       maren@desk
  Created:   2026-11-22 22:30:44 UTC
"""


@pytest.mark.parametrize(
    ("said", "error", "told"),
    [
        (LOCKED, BusyError, "maren@desk since 2026-11-22 22:30:44 UTC"),
        ("Error: Error acquiring the state lock\n\nError message: Already locked\n", BusyError, "does not say who"),
        ("Error: error during placement (resource_unavailable, 01ab)", CommandError, "serverTypeFallbacks"),
        ("Error: limit reached (resource_limit_exceeded, 01ab)", CommandError, "ask for a higher limit"),
        ("Error: read only (token_readonly, 01ab)", CommandError, "read and write permission"),
        ("Error: slow down (rate_limit_exceeded, 01ab)", CommandError, "wait some minutes"),
        ("Error: Saved plan is stale", CommandError, "somebody else changed the state"),
        ("Error: decryption failed for all provided methods", CommandError, "opentofu_state.yaml"),
        ("Error: something new", CommandError, "what exists already is recognised"),
    ],
)
def test_what_opentofu_says_is_told_with_what_to_do(
    tmp_path: Path, said: str, error: type[Exception], told: str
) -> None:
    runner = FakeRunner(script=[(("tofu", "plan"), (1, said))])
    with pytest.raises(error, match=told):
        Tofu(runner, tmp_path, token=TOKEN).plan()


def test_a_long_error_is_cut(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("tofu", "plan"), (1, "Error: long\n" + "\0x\xff" * 5_000_000 + "\nmore" * 100_000))])
    with pytest.raises(CommandError) as caught:
        Tofu(runner, tmp_path, token=TOKEN).plan()
    assert len(str(caught.value)) < 70_000
