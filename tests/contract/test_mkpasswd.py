"""Password hashes, held against Debian's mkpasswd."""

import os
import shutil

import pytest

from clawdlets_ops.errors import SecretsError, ToolMissingError
from clawdlets_ops.mkpasswd import MAX_PASSWORD_BYTES, Mkpasswd, is_crypt_hash
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.sensitive import Secret
from tests.recording import Recording

pytestmark = pytest.mark.contract

needs_mkpasswd = pytest.mark.skipif(not shutil.which("mkpasswd"), reason="mkpasswd (Debian package whois) is not there")
CANARY = Secret("canary pässword -x $y$ '\"", "admin_password")


@needs_mkpasswd
def test_a_hash_is_yescrypt_salted_and_matches_its_password_only():
    runner = Recording()
    mkpasswd = Mkpasswd(runner)
    one, two = mkpasswd.hash(CANARY), mkpasswd.hash(CANARY)
    assert one.reveal().startswith("$y$")
    assert one != two
    assert mkpasswd.matches(CANARY, one)
    assert not mkpasswd.matches(Secret("canary other", "p"), one)
    assert not any("canary" in line for line in runner.lines)
    assert len(runner.lines) == 4


@needs_mkpasswd
@pytest.mark.parametrize("method", ["yescrypt", "gost-yescrypt", "scrypt", "sha512crypt", "bcrypt"])
def test_hashes_of_every_accepted_method_are_known_and_compared(method):
    runner = LocalRunner(os.environ)
    made = runner.run(Command(["mkpasswd", "-s", "-m", method], "hash", stdin=CANARY)).check().stdout.strip()
    assert is_crypt_hash(made)
    assert Mkpasswd(runner).matches(CANARY, Secret(made, "h"))
    assert not Mkpasswd(runner).matches(Secret("canary", "p"), Secret(made, "h"))


@needs_mkpasswd
def test_methods_that_are_too_weak_are_no_hashes():
    runner = LocalRunner(os.environ)
    for method in ("md5crypt", "sha256crypt", "descrypt"):
        made = runner.run(Command(["mkpasswd", "-s", "-m", method], "hash", stdin="canary")).check().stdout.strip()
        assert not is_crypt_hash(made)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "*",
            "!",
            "!!",
            "x",
            "canary",
            "$y$",
            "$y$j9T$salt$short",
            "$6$salt$short",
            "$1$salt$0123456789012345678901",
        ),
        "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8\n",
        "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8:",
    ],
)
def test_other_text_is_no_hash(text):
    assert not is_crypt_hash(text)


def test_a_whole_hash_is_one():
    assert is_crypt_hash("$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8")


@needs_mkpasswd
def test_the_whole_of_the_longest_password_counts():
    mkpasswd = Mkpasswd(LocalRunner(os.environ))
    long = "a" * (MAX_PASSWORD_BYTES - 1)
    hashed = mkpasswd.hash(Secret(long + "b", "p"))
    assert mkpasswd.matches(Secret(long + "b", "p"), hashed)
    assert not mkpasswd.matches(Secret(long + "c", "p"), hashed)


@pytest.mark.parametrize("password", ["", "canary\nsecond line", "canary\0", "canary" * 100, "canary\x7f"])
def test_a_password_that_would_be_cut_is_refused_unseen(password):
    with pytest.raises(SecretsError) as caught:
        Mkpasswd(LocalRunner(os.environ)).hash(Secret(password, "admin_password"))
    assert str(caught.value).startswith("admin_password: ")
    assert "canary" not in str(caught.value)


def test_the_missing_program_is_named_with_its_package(tmp_path):
    with pytest.raises(ToolMissingError, match="package whois"):
        Mkpasswd(LocalRunner({"PATH": str(tmp_path)})).hash(CANARY)
