"""Operators in the fleet file, and a value as it comes in."""

import json

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import FleetError, SecretsError
from clawdlets_ops.fleet import json_schema, parse_fleet
from clawdlets_ops.secrets.plan import MAX_VALUE_BYTES, read_value

MAREN, LENA = age.generate().recipient, age.generate().recipient
HOST = {"provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"}}


def fleet(**more):
    return json.dumps({"schemaVersion": 1, "hosts": {"alpha": HOST}, **more})


def test_operators_are_optional_and_every_real_key_is_accepted():
    assert parse_fleet(fleet()).operators == {}
    operators = {f"operator-{number}": {"ageRecipient": age.generate().recipient} for number in range(50)}
    assert len(parse_fleet(fleet(operators={"$comment": "us", **operators})).operators) == len(operators)


@pytest.mark.parametrize(
    ("operators", "says"),
    [
        ({}, "operators: declares nobody"),
        ({"$comment": "nobody yet"}, "operators: declares nobody"),
        ({"maren": {"ageRecipint": MAREN}}, "operators.maren.ageRecipint: unknown key; did you mean 'ageRecipient'?"),
        ({"maren": {}}, "operators.maren.ageRecipient: is required"),
        ({"maren": MAREN}, "operators.maren"),
        ({"Maren": {"ageRecipient": MAREN}}, "operators.Maren"),
        ({"../maren": {"ageRecipient": MAREN}}, "operators.../maren"),
        ({"maren": {"ageRecipient": MAREN.upper()}}, "operators.maren.ageRecipient: an age recipient is age1"),
        ({"maren": {"ageRecipient": MAREN + " "}}, "an age recipient is age1"),
        ({"maren": {"ageRecipient": MAREN + "\n"}}, "an age recipient is age1"),
        ({"maren": {"ageRecipient": "ssh-ed25519 AAAA"}}, "an age recipient is age1"),
        ({"maren": {"ageRecipient": "AGE-SECRET-KEY-1CANARY"}}, "this is a private key"),
        ({"maren": {"ageRecipient": MAREN}, "lena": {"ageRecipient": MAREN}}, "maren and lena have the same"),
        (None, "operators"),
    ],
)
def test_operators_that_are_none_are_refused(operators, says):
    with pytest.raises(FleetError) as caught:
        parse_fleet(fleet(operators=operators))
    assert says in str(caught.value)
    assert "CANARY" not in str(caught.value)


def test_a_misspelt_key_at_the_top_is_recognised_and_the_schema_knows_the_right_one():
    with pytest.raises(FleetError, match="operatrs: unknown key; did you mean 'operators'"):
        parse_fleet(fleet(operatrs={"maren": {"ageRecipient": MAREN}}))
    assert "operators" in json_schema()["properties"]
    assert "operators" not in json_schema()["required"]


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"canary", "canary"),
        (b"canary\n", "canary"),
        (b"canary\r\n", "canary"),
        (b" canary \n", " canary "),
        (b"a\nb\n", "a\nb\n"),
        (b"a\nb", "a\nb"),
        (b"x" * MAX_VALUE_BYTES + b"\n", "x" * MAX_VALUE_BYTES),
    ],
)
def test_the_newline_of_a_single_line_is_not_part_of_the_value(raw, value):
    assert read_value(raw, "token").reveal() == value


@pytest.mark.parametrize(
    ("raw", "says"),
    [(b"\xffcanary", "is not UTF-8 text"), (b"canary" * MAX_VALUE_BYTES, "is larger than 1048576 bytes")],
)
def test_what_is_no_value_is_refused_without_showing_it(raw, says):
    with pytest.raises(SecretsError) as caught:
        read_value(raw, "token")
    assert says in str(caught.value)
    assert "canary" not in str(caught.value)
