"""A report's signature, made by the real ssh-keygen and checked by it as an auditor would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clawdlets_ops.process import Command, LocalRunner, Result
from clawdlets_ops.verify.signature import NAMESPACE, sign

pytestmark = pytest.mark.integration


@pytest.fixture
def runner() -> LocalRunner:
    return LocalRunner({"PATH": os.environ["PATH"]})


def make_key(folder: Path, runner: LocalRunner, passphrase: str = "") -> Path:
    key = folder / "id"
    runner.run(Command(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", key], "make a key")).check()
    return key


def audit(report: Path, signature: Path, key: Path, runner: LocalRunner) -> Result:
    signers = report.with_name("allowed_signers")
    signers.write_text(f'operator namespaces="{NAMESPACE}" {key.with_suffix(".pub").read_text()}')
    words = ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", "operator", "-n", NAMESPACE, "-s", signature]
    return runner.run(Command(words, "verify the signature", stdin=report.read_bytes()))


def test_an_auditor_can_verify_it_and_sees_a_change(tmp_path: Path, runner: LocalRunner) -> None:
    key = make_key(tmp_path, runner)
    report = tmp_path / "report.json"
    report.write_text("{}\n")
    signature, why = sign(report, key, runner=runner)
    assert signature is not None, why
    assert audit(report, signature, key, runner).ok
    again, _ = sign(report, key, runner=runner)  # one that is there already is replaced, and nobody is asked
    assert again == signature
    report.write_text("{ }\n")
    assert not audit(report, signature, key, runner).ok


def test_a_key_with_a_passphrase_signs_nothing_and_nobody_is_asked(tmp_path: Path, runner: LocalRunner) -> None:
    key = make_key(tmp_path, runner, "a passphrase of a test")
    report = tmp_path / "report.json"
    report.write_text("{}\n")
    signature, why = sign(report, key, runner=runner)
    assert signature is None
    assert "could not sign" in why
    assert not report.with_name("report.json.sig").exists()


def test_no_key_is_said(tmp_path: Path, runner: LocalRunner) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}\n")
    assert sign(report, tmp_path / "nothing", runner=runner)[0] is None
