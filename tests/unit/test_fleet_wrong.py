"""Every field of a fleet file wrong in turn: refused with its key path, never with a traceback, never with its value."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import json_schema, load_fleet, parse_fleet

EXAMPLE = Path(__file__).parents[2] / "fleet" / "clawdlets.json"
Path_ = tuple[str | int, ...]


def full() -> dict[str, Any]:
    """The example with every default written out, and one entry at least in every map and list."""
    document: dict[str, Any] = json.loads(load_fleet(EXAMPLE).model_dump_json(by_alias=True))
    host = document["hosts"]["alpha"]
    host["targetHost"] = "admin@100.64.0.9"
    host["hetzner"] |= {
        "volumes": {"data": {"sizeGb": 10, "format": "ext4"}},
        "labels": {"team": "ops"},
        "placementGroup": "apart",
    }
    host["sshAuthorizedKeys"] = ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s a@b"]
    host["egress"] = {"mode": "proxy-allowlist", "allowedDomains": [".example.org"]}
    host["bots"] = {
        "maren": {
            "execStart": "/bin/true", "environment": {"MOOD": "calm"}, "secrets": ["discord_token"],
            "egress": {"mode": "smtp-only", "allowedDomains": ["example.net"]},
            "limits": {"memoryMaxMb": 64, "tasksMax": 32, "cpuQuotaPercent": 50},
        }
    }  # fmt: skip
    document["operators"] = {"olive": {"ageRecipient": "age1" + "q" * 58}}
    return document


def places(value: object, path: Path_ = ()) -> list[Path_]:
    found: list[Path_] = [path] if path else []
    if isinstance(value, dict):
        for key, part in value.items():
            found += places(part, (*path, key))
    if isinstance(value, list):
        for index, part in enumerate(value):
            found += places(part, (*path, index))
    return found


def put(path: Path_, value: object) -> str:
    document = copy.deepcopy(full())
    part: Any = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return json.dumps(document)


PLACES = places(full())


def shown(path: Path_) -> str:
    return ".".join(map(str, path))


def test_the_full_file_is_a_fleet_and_what_is_shown_of_it_is_the_same_fleet() -> None:
    fleet = parse_fleet(json.dumps(full()))
    assert parse_fleet(fleet.model_dump_json(by_alias=True)) == fleet


def test_the_full_file_has_every_field_of_the_schema() -> None:
    """A field that is new has to be in the file above, so that it is tried."""
    named = {str(key) for path in PLACES for key in path}
    defs = json_schema()["$defs"]
    skipped = {"S3State", "PgState", "HttpState"}  # one state at a time; test_fleet.py has these
    missing = {
        f"{name}.{field}"
        for name, part in defs.items()
        if name not in skipped
        for field in part.get("properties", {})
        if field != "$comment" and field not in named
    }
    assert missing == set()


@pytest.mark.parametrize("path", PLACES, ids=shown)
def test_each_field_with_a_value_of_no_kind_is_refused_with_its_key_path(path: Path_) -> None:
    wrong: object = {"canary-key": [{"canary": 1}]}
    with pytest.raises(FleetError) as caught:
        parse_fleet(put(path, wrong))
    said = str(caught.value)
    # A map takes any object: it is then the entry in it that is named.
    assert f"  {shown(path)}" in said or f"  state.local.{path[-1]}" in said, said
    assert "canary" not in said.replace("canary-key", "")


@pytest.mark.parametrize("path", [path for path in PLACES if isinstance(path[-1], str) and len(path) > 1], ids=shown)
def test_each_key_with_a_letter_too_many_is_refused_by_name(path: Path_) -> None:
    document = copy.deepcopy(full())
    part: Any = document
    for key in path[:-1]:
        part = part[key]
    part[f"{path[-1]}$"] = part.pop(path[-1])
    with pytest.raises(FleetError) as caught:
        parse_fleet(json.dumps(document))
    assert str(path[-1]) in str(caught.value)


@given(path=st.sampled_from(PLACES), value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
))  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_whatever_stands_anywhere_is_accepted_or_refused_in_words(path: Path_, value: object) -> None:
    text = put(path, value)
    try:
        fleet = parse_fleet(text)
    except FleetError as error:
        said = str(error)
        assert str(path[0]) in said or "(top)" in said, said
        assert all(sign.isprintable() or sign == "\n" for sign in said)
        assert len(said) < 5000
    else:
        assert parse_fleet(fleet.model_dump_json(by_alias=True)) == fleet


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        ("https://example.org", "without scheme"),
        ("example.org/path", "without scheme and path"),
        ("example.org:443", "has a port"),
        ("api.*.example.org", "has a wildcard"),
        ("*.example.org", "write .example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("example.org.", "ends with a dot"),
        ("203.0.113.7", "is an IP address"),
        ("2001:db8::7", "is an IP address"),
        ("[2001:db8::7]", "is an IP address"),
        ("0x7f.1", "domain"),
        ("0x7f000001", "is an IP address"),
        ("2130706433", "is an IP address"),
        ("localhost", "at least two labels"),
        ("a..b", "is not a domain name"),
        ("-a.example", "is not a domain name"),
        ("Example.org", "capital"),
        (" example.org", "is not a domain name"),
        ("example.org\n", ""),
        ("a" * 64 + ".example", "is not a domain name"),
        ("example.org\u0000.evil.example", ""),
        ("user@example.org", "is not a domain name"),
    ],
)
def test_a_domain_that_is_none_is_refused_with_what_to_write(domain: str, said: str) -> None:
    for path in (("hosts", "alpha", "egress", "allowedDomains"),):
        with pytest.raises(FleetError) as caught:
            parse_fleet(put(path, [domain]))
        assert f"{shown(path)}.0: " in str(caught.value)
        assert said in str(caught.value)
