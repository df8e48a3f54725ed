"""Key pairs made in process, held against age-keygen and ssh-keygen."""

import os
import shutil

import pytest

from clawdlets_ops import age, hostkey
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.sensitive import Secret

pytestmark = pytest.mark.contract

needs_age = pytest.mark.skipif(
    not shutil.which("age-keygen"), reason="age-keygen (Debian package age) is not installed"
)
needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen (openssh-client) is not installed")


@pytest.fixture
def runner():
    return LocalRunner(os.environ)


@needs_age
def test_age_keygen_derives_the_same_recipient(runner):
    identity = age.generate()
    result = runner.run(Command(["age-keygen", "-y"], "derive", stdin=age.to_key_file(identity)))
    assert result.check().stdout.strip() == identity.recipient


@needs_age
def test_a_key_file_of_age_keygen_is_read(runner):
    result = runner.run(Command(["age-keygen"], "generate")).check()
    declared = next(line.split(": ")[1] for line in result.stdout.splitlines() if "public key" in line)
    assert age.from_key_file(Secret(result.stdout, "key")).recipient == declared


def test_a_key_file_survives_the_round_trip():
    identity = age.generate()
    assert age.from_key_file(age.to_key_file(identity)) == identity


def test_two_keys_are_never_the_same():
    assert age.generate().recipient != age.generate().recipient


@pytest.mark.parametrize("text", ["", "age1canary", "AGE-SECRET-KEY-1CANARY", "canary"])
def test_a_malformed_identity_is_refused_unseen(text):
    with pytest.raises(SecretsError) as caught:
        age.from_secret(Secret(text, "the key"))
    assert "the key" in str(caught.value)
    assert "canary" not in str(caught.value).lower()


def test_a_file_with_two_keys_is_refused():
    both = age.generate().secret.reveal() + "\n" + age.generate().secret.reveal()
    with pytest.raises(SecretsError, match="holds 2 keys"):
        age.from_key_file(Secret(both, "key"))


@pytest.mark.parametrize("text", ["", "age1x", "ssh-ed25519 AAAA", "age1a age1b", "-----BEGIN AGE ENCRYPTED FILE-----"])
def test_a_malformed_recipient_is_refused(text):
    with pytest.raises(SecretsError, match=r"x\.pub: is not an age recipient"):
        age.parse_recipient(text, where="x.pub")


def test_a_recipient_is_read_without_its_line_end():
    recipient = age.generate().recipient
    assert age.parse_recipient(f"{recipient}\n") == recipient


@needs_ssh
def test_ssh_keygen_reads_the_host_key(runner, tmp_path):
    private, line = hostkey.generate("alpha")
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(private.reveal())
    derived = runner.run(Command(["ssh-keygen", "-y", "-P", "", "-f", path], "derive")).check().stdout.strip()
    assert derived.split()[:2] == line.split()[:2]
    assert derived.split()[:2] == hostkey.public_of(private).split()
    assert line.split()[2] == "alpha"


@needs_ssh
def test_a_key_of_ssh_keygen_is_read_and_other_kinds_are_refused(runner, tmp_path):
    for kind, accepted in (("ed25519", True), ("ecdsa", False)):
        path = tmp_path / kind
        runner.run(Command(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "x", "-f", path], "generate")).check()
        private = Secret(path.read_text(), kind)
        if accepted:
            assert hostkey.public_of(private) == hostkey.parse_public(path.with_suffix(".pub").read_text())
        else:
            with pytest.raises(SecretsError, match="is not an ed25519 key"):
                hostkey.public_of(private)


@pytest.mark.parametrize("line", ["", "ssh-ed25519", "ssh-rsa AAAAB3 x", "ssh-ed25519 AAAA x", "no key"])
def test_a_malformed_public_key_is_refused(line):
    with pytest.raises(SecretsError, match="pin: is not"):
        hostkey.parse_public(line, where="pin")


def test_something_else_than_a_private_key_is_refused_unseen():
    with pytest.raises(SecretsError) as caught:
        hostkey.public_of(Secret("canary-not-a-key", "the key"))
    assert "canary" not in str(caught.value)
