import base64
import copy
import pickle

import pytest

from clawdlets_ops.sensitive import MASK, Redactor, Secret

VALUE = "canary-not-a-real-secret/with+odd=chars"


def test_a_secret_shows_itself_to_reveal_only() -> None:
    secret = Secret(VALUE, "token")
    for text in (str(secret), repr(secret), f"{secret}", f"{secret!r}", f"{secret:>40}", str([secret])):
        assert VALUE not in text
    assert secret.reveal() == VALUE


def test_a_secret_is_not_pickled_or_copied() -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(Secret(VALUE))


def test_equal_secrets_are_equal_and_different_ones_are_not() -> None:
    assert Secret(VALUE) == Secret(VALUE, "other name")
    assert Secret(VALUE) != Secret(VALUE + "x")
    assert Secret(VALUE) != VALUE


def test_the_redactor_finds_the_forms_that_tools_echo() -> None:
    redactor = Redactor([Secret(VALUE)])
    for form in (VALUE, base64.b64encode(VALUE.encode()).decode(), "canary-not-a-real-secret%2Fwith%2Bodd%3Dchars"):
        assert "canary" not in redactor.scrub(f"before {form} after")
        assert MASK in redactor.scrub(form)


def test_every_line_of_a_multi_line_secret_is_scrubbed() -> None:
    redactor = Redactor([Secret("first-canary-line\nsecond-canary-line\n")])
    assert redactor.scrub("x second-canary-line y") == f"x {MASK} y"


def test_short_values_and_other_text_are_left_alone() -> None:
    assert Redactor([Secret("abc")]).scrub("abc and abcdef") == "abc and abcdef"
    assert Redactor([Secret(VALUE)]).scrub("nothing here") == "nothing here"
