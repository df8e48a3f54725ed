"""Nix and Python read the same fleet file, and refuse the same ones at the same key: every field wrong in turn."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import json_schema, parse_fleet
from tests.nix_side import needs_nix, nix

pytestmark = [pytest.mark.contract, needs_nix]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
AGE = "age1" + "q" * 58
# Every field there is, set to something: a field that is missing here fails test_the_whole_fleet_names_every_field.
WHOLE: dict[str, Any] = {
    "schemaVersion": 1,
    "state": {
        "backend": "s3",
        "bucket": "states",
        "region": "us-east-1",
        "prefix": "x",
        "endpoint": "https://s3.example",
    },
    "operators": {"ada": {"ageRecipient": AGE}, "bob": {"ageRecipient": AGE[:-1] + "p"}},
    "hosts": {
        "alpha": {
            "system": "x86_64-linux",
            "diskDevice": "/dev/disk/by-id/scsi-0HC_1",
            "hetzner": {
                "serverType": "cx23",
                "serverTypeFallbacks": ["cx33"],
                "location": "nbg1",
                "image": "debian-12",
                "ipv4": True,
                "ipv6": True,
                "reservedIps": True,
                "placementGroup": "apart",
                "volumes": {"data": {"sizeGb": 20, "format": "xfs"}},
                "labels": {"team": "a", "example.org/x": ""},
                "deleteProtection": False,
            },
            "provisioning": {
                "adminCidrs": ["203.0.113.0/24", "2001:db8::/32"],
                "adminCidrAllowWorldOpen": False,
                "sshPubkeyFile": "keys/ada.pub",
            },
            "sshAuthorizedKeys": [KEY],
            "sshExposure": {"mode": "tailnet"},
            "tailnet": {"mode": "tailscale", "allowUdpIngress": False},
            "targetHost": "admin@100.64.0.1",
            "egress": {"mode": "proxy-allowlist", "allowedDomains": [".example.org", "api.example.net"]},
            "secrets": {
                "token": {"owner": "bot-maren", "group": "wheel", "mode": "0440"},
                "guest": {},
                "clf_database_url": {},
            },
            "orchestrator": {
                "enable": True,
                "store": "postgresql",
                "bootstrapPort": 18337,
                "operatorsGroup": "clf-operators",
                "workers": 2,
                "keepDays": 7,
            },
            "bots": {
                "maren": {
                    "execStart": "/run/current-system/sw/bin/maren --serve",
                    "environment": {"GREETING": "good day"},
                    "secrets": ["token"],
                    "egress": {"mode": "proxy-allowlist", "allowedDomains": ["one.example"]},
                    "limits": {"memoryMaxMb": 512, "tasksMax": 64, "cpuQuotaPercent": 50},
                },
                "plain": {},
            },
        },
        "beta": {
            "system": "aarch64-linux",
            "provisioning": {"adminCidrs": ["203.0.113.7"]},
            "sshAuthorizedKeys": [KEY],
        },
    },
    "cattle": {
        "enabled": True,
        "host": "alpha",
        "images": ["debian-12", "12345"],
        "serverTypes": ["cx23", "cx33"],
        "locations": ["nbg1", "fsn1"],
        "maxInstances": 5,
        "maxPerBot": 2,
        "defaultTtl": "1h",
        "maxTtl": "2h",
        "tokenTtl": "90s",
        "maxResultBytes": 2048,
        "labels": {"herd": "x"},
        "tailnet": {
            "key": "headscale",
            "headscaleUser": "clawdlets",
            "tag": "tag:cattle",
            "keyTtl": "10m",
            "rotateAfterDays": 10,
            "apiEndpoint": "https://head.example",
        },
        "egress": "tailnet-only",
        "bots": {
            "maren": {
                "personas": ["rex"],
                "maxInstances": 2,
                "maxTtl": "30m",
                "images": ["debian-12"],
                "serverTypes": ["cx23"],
                "locations": ["fsn1"],
            }
        },
        "personas": {
            "rex": {
                "command": ["./run", "--fast"],
                "variables": {"COLOUR": "red"},
                "secrets": {"API_KEY": "guest", "OTHER_KEY": "guest"},
                "anyOf": [["API_KEY", "OTHER_KEY"]],
            }
        },
    },
}
WRONG: tuple[Any, ...] = (
    None, True, 0, 7, 10.0, "", "x", "X y\n", "none", [], ["x", 1], {"x": {}},
)  # fmt: skip
TEXTS = (
    # networks
    "1.2.3.4/0", "0.0.0.0/1", "8.0.0.0/7", "10.0.0.0/8", "203.0.113.0/33", "203.0.113.0/024", "203.0.113.0/", "01.2.3.4",
    "1.2.3", "1.2.3.256", "::/0", "2000::/3", "2001:db8::/19", "2001:d00::/20", "2001:db8::1/32", "::ffff:1.2.3.4", "1::2::3",
    "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "12345::", "::1.2.3.4/128", "2001:DB8::/48", "::", ":", "1:2", "::g", "203.0.113.0/24 ",
    # names, domains, paths, keys
    "example.org", ".example.org", "*.example.org", "a.*.org", "https://example.org", "example.org:443", "example.org.", "1.1.1.1",
    "bücher.example", "EXAMPLE.org", "a" * 64 + ".org", "localhost", "-oProxyCommand=x", "root@[::1]", "/dev/sda", "/dev/.x",
    "/dev/a..b", "~/.ssh/id.pub", "tailscale_auth_key", "token", "x_unencrypted", "managed-by", "hetzner.cloud/x", "PATH",
    "LD_PRELOAD", "HTTP_PROXY", "API_KEY", "ssh-rsa AAAA x", KEY, KEY + " more", "command=\"x\" " + KEY, "-----BEGIN OPENSSH PRIVATE KEY-----",
    "29s", "30s", "1m", "1h", "3601s", "2h", "8d", "7d", "0m", "1w", "root", "bot-maren", "bot-other", "0400", "0640", "0644", "tag:x", "rex",
    "AGE-SECRET-KEY-1X", AGE, AGE + "q", "a\tb", "x" * 254 + "z", "http://a.example/b?c", "https://u@x/y", "http://[::1]:80/p",
)  # fmt: skip


def everywhere(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in a document, the whole of it first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from everywhere(below, (*path, key))


PATHS = tuple(everywhere(WHOLE))[1:]


def changed(path: tuple[str | int, ...], value: Any, how: str = "set") -> dict[str, Any]:
    """The whole fleet with one thing different: the value at ``path``, a key beside it, or no such key."""
    document = copy.deepcopy(WHOLE)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    last = path[-1]
    if how == "set":
        at[last] = value
    elif how == "remove":
        del at[last]
    elif isinstance(at, dict):
        name = value if isinstance(value, str) and value and value.isprintable() else "unknownKey"
        at[name if name not in ("$comment", "$schema") else "x"] = at.pop(last) if how == "rename" else 1
    else:
        at.append(value)
    return document


def refused_by_python(document: dict[str, Any]) -> set[str]:
    """The key paths that Python names; empty when it accepts."""
    try:
        parse_fleet(json.dumps(document))
    except FleetError as error:
        lines = [line.removeprefix("  ") for line in str(error).split("\n  ")[1:]]
        return {line.partition(": ")[0] for line in lines}
    return set()


def refused_by_nix(documents: list[dict[str, Any]]) -> list[set[str]]:
    """The same for many fleets, in one question to Nix."""
    answers = nix(
        "map (one: map (fault: fault.path) ((import ./schema.nix schema).faults one)) documents",
        schema=json_schema(),
        documents=documents,
    )
    return [set(paths) for paths in answers]


def disagreements(documents: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """How many were refused, and what the two sides say differently."""
    ours = [refused_by_python(document) for document in documents]
    found = [
        f"python {sorted(mine)} nix {sorted(theirs)}: {_difference(document)}"
        for document, mine, theirs in zip(documents, ours, refused_by_nix(documents), strict=True)
        if mine != theirs
    ]
    return sum(1 for mine in ours if mine), found


def _difference(document: dict[str, Any]) -> str:
    def lines(value: Any) -> set[str]:
        return set(json.dumps(value, indent=1, sort_keys=True).splitlines())

    return " ".join(sorted(lines(document) ^ lines(WHOLE)))[:300]


def test_the_whole_fleet_is_accepted_by_both_and_names_every_field() -> None:
    assert refused_by_python(WHOLE) == set()
    assert refused_by_nix([WHOLE]) == [set()]
    named = {key for path in PATHS for key in path if isinstance(key, str)}
    fields = {
        key
        for part in [json_schema(), *json_schema()["$defs"].values()]
        for key in part.get("properties", {})
        if not key.startswith("$")
    }
    # Of the four places that a state may be in, the fleet has one.
    assert fields - named == {"address", "schemaPrefix"}


def test_with_every_field_wrong_in_turn_both_refuse_the_same_at_the_same_key() -> None:
    documents = [changed(path, value) for path in PATHS for value in WRONG]
    documents += [changed(path, None, "remove") for path in PATHS]
    documents += [changed(path, "unknownKey", how) for path in PATHS for how in ("beside", "rename")]
    refused, different = disagreements(documents)
    print(f"{len(documents)} fleets, {refused} of them refused, {len(different)} disagreements")  # noqa: T201 - a figure for whoever runs with -s
    assert different == []
    assert refused > len(documents) * 0.8


def _something_wrong() -> st.SearchStrategy[tuple[Any, ...]]:
    scalar = st.one_of(
        st.sampled_from(TEXTS),
        st.none(),
        st.booleans(),
        st.integers(-(2**40), 2**40),
        st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=":"), max_size=8),
    )
    value = st.one_of(
        scalar,
        st.lists(scalar, max_size=3),
        st.dictionaries(st.sampled_from(TEXTS), scalar, max_size=2),
        st.sampled_from(WRONG),
    )
    return st.tuples(st.sampled_from(PATHS), value, st.sampled_from(("set", "set", "set", "beside", "rename")))


@settings(
    max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.lists(_something_wrong(), min_size=100, max_size=100))
def test_whatever_is_put_anywhere_both_say_the_same(changes: list[tuple[Any, ...]]) -> None:
    documents = [changed(*change) for change in changes]
    refused, different = disagreements(documents)
    print(f"{len(documents)} fleets, {refused} of them refused, {len(different)} disagreements")  # noqa: T201 - a figure for whoever runs with -s
    assert different == []


@pytest.mark.parametrize("field", ["state", "cattle", "operators"])
def test_every_network_in_the_list_is_read_alike(field: str) -> None:
    documents = []
    for text in TEXTS:
        for beside in ([], ["128.0.0.0/1"], ["8.0.0.0/8", "2001::/21", "2001:800::/21"]):
            document = changed(("hosts", "alpha", "provisioning", "adminCidrs"), [text, *beside])
            document.pop(field)
            documents.append(document)
    _, different = disagreements(documents)
    assert different == []


def test_patterns_are_in_what_both_regular_expressions_have() -> None:
    """No look-around, no classes by letter, no escape inside brackets but the one that nix/schema.nix knows."""

    def patterns(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield from part.get("patternProperties", {})
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            for below in part.values():
                yield from patterns(below)
        elif isinstance(part, list):
            for below in part:
                yield from patterns(below)

    found = set(patterns(json_schema()))
    assert len(found) > 15
    assert {pattern for pattern in found if unportable(pattern)} == set()


def unportable(pattern: str) -> bool:
    plain = pattern.replace(r"[A-Za-z0-9.\[\]:-]", "").replace("(?:", "(")
    for code in ("00", "08", "0a", "1f", "7f"):
        plain = plain.replace(rf"\x{code}", "")
    return (
        bool(re.search(r"\(\?|\\[A-Za-z]|\[[^\]]*\\", plain))
        or not pattern.startswith("^")
        or not pattern.endswith("$")
    )


@pytest.mark.parametrize(
    ("pattern", "is_so"),
    [(r"^\d+$", True), (r"^[\w]+$", True), (r"^(?=x)$", True), ("x", True), (r"^(?:a|\.b)$", False)],
)
def test_the_pattern_check_catches_what_it_should(pattern: str, *, is_so: bool) -> None:
    assert unportable(pattern) is is_so


def test_a_file_is_loaded_with_its_defaults_and_comments_or_refused_with_the_path(root: Path, tmp_path: Path) -> None:
    loaded = nix("(import ./fleet.nix).load ../fleet/clawdlets.json")
    ours = json.loads(parse_fleet((root / "fleet" / "clawdlets.json").read_text()).model_dump_json(by_alias=True))
    assert loaded == ours
