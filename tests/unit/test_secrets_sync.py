"""What separates a host from its repository, and what a host is sent is signed with. Pure."""

import hashlib
from dataclasses import replace

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import SyncError
from clawdlets_ops.secrets.payload import set_digest
from clawdlets_ops.secrets.sync import OnHost, SecretSet, SyncPlan, fingerprint, parse_status, plan, signature

WANTED = SecretSet("alpha", "wiring\n", {"one": "sealed one\n", "two": "sealed two\n"})
THERE = OnHost(
    WANTED.digest, {name: hashlib.sha256(text.encode()).hexdigest() for name, text in WANTED.files.items()}, ("f",)
)


def test_a_host_that_has_the_set_needs_nothing():
    assert plan(WANTED, THERE) == SyncPlan("alpha")
    assert plan(WANTED, THERE).empty


def test_what_is_missing_other_or_too_much_is_named():
    files = {"one": "0" * 64, "old": "1" * 64, "?planted": "a word in the place of a digest"}
    planned = plan(WANTED, replace(THERE, digest="x", files=files))
    assert planned.steps == (
        "add two on alpha",
        "replace one on alpha",
        "remove ?planted on alpha",
        "remove old on alpha",
    )


def test_owners_that_changed_are_a_change_even_with_the_same_files():
    planned = plan(replace(WANTED, wiring="other wiring\n"), THERE)
    assert planned.steps == ("change who reads the secrets of alpha",)
    assert not planned.empty


@pytest.mark.parametrize(
    "other",
    [
        replace(WANTED, wiring="x"),
        replace(WANTED, files={**WANTED.files, "two": "sealed three\n"}),
        replace(WANTED, files={"one": "sealed one\n"}),
        replace(WANTED, files={"one": "sealed two\n", "two": "sealed one\n"}),
    ],
)
def test_everything_of_a_set_is_in_its_digest(other):
    assert other.digest != WANTED.digest
    assert WANTED.digest == set_digest(WANTED.wiring, dict(reversed(WANTED.files.items())))


def test_the_host_in_a_set_is_never_shown_with_its_files():
    assert "sealed" not in repr(WANTED)


def test_a_signature_is_over_every_part_and_under_the_key():
    one, other = age.generate(), age.generate()
    document = {"version": 1, "verb": "set", "base": "a"}
    mac = signature(one, document)
    assert signature(one, dict(reversed(document.items()))) == mac
    assert signature(one, {**document, "base": "b"}) != mac
    assert signature(one, {**document, "more": ""}) != mac
    assert signature(other, document) != mac
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    "said", [{}, {"host": "beta", "set": "x", "files": {}, "keys": []}, {"host": "alpha", "files": [], "keys": []}]
)
def test_an_account_that_is_no_account_of_this_host_is_refused(said):
    with pytest.raises(SyncError, match="not understood"):
        parse_status(said, "alpha")
