"""Whatever a client sends, the emulator answers as documented and its state stays whole.

Requests are generated from our own OpenAPI description, as it says and bent out of shape, and sent in sequences through
the emulator without a socket.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawdlets_ops.lab import openapi
from clawdlets_ops.lab.api import Answer, Emulator, Request
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.records import State
from clawdlets_ops.lab.store import Store

TOKEN = "canary00" * 8
HEADERS = {"authorization": f"Bearer {TOKEN}", "user-agent": "property-test"}
DOCUMENT = openapi.document()

# Few names, so that they clash.
NAMES = st.sampled_from(["alpha", "beta", "edge"])
# What every emulator starts with, so that requests meet something. Ids are deterministic.
SEED: list[tuple[str, dict[str, Any]]] = [
    (
        "ssh_keys",
        {
            "name": "operator",
            "public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s",
        },
    ),
    ("firewalls", {"name": "first"}),
    (
        "firewalls",
        {"name": "second", "rules": [{"direction": "in", "protocol": "tcp", "port": "22", "source_ips": ["::/0"]}]},
    ),
    ("networks", {"name": "inner", "ip_range": "10.0.0.0/16"}),
    ("placement_groups", {"name": "spread", "type": "spread"}),
    ("servers", {"name": "one", "server_type": "cx23", "image": "debian-12", "location": "nbg1"}),
    (
        "servers",
        {"name": "two", "server_type": "cx23", "image": "debian-12", "location": "nbg1", "labels": {"group": "x"}},
    ),
    ("volumes", {"name": "disk", "size": 10, "location": "nbg1"}),
    ("primary_ips", {"name": "fixed", "type": "ipv4", "location": "nbg1"}),
]


@contextmanager
def emulator(*, seeded: bool = True, state_file: Path | None = None) -> Iterator[tuple[Emulator, Cloud]]:
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=state_file)
    try:
        api = Emulator(cloud, token=TOKEN, journal_file=None)
        for kind, body in SEED if seeded else ():
            answer = send(api, "POST", f"/{kind}", json.dumps(body).encode())
            assert answer.status == 201, answer
        yield api, cloud
    finally:
        cloud.close()


def send(api: Emulator, method: str, path: str, body: bytes = b"") -> Answer:
    return api.handle(Request(method, f"/v1{path}", HEADERS, body))


def seeded_ids() -> dict[str, list[int]]:
    """The ids of what every emulator starts with, by kind."""
    with emulator() as (api, _):
        listed = {kind: send(api, "GET", f"/{kind}").payload for kind in openapi.CREATE}
    return {kind: [row["id"] for row in payload[kind]] for kind, payload in listed.items()}  # type: ignore[index]


def operations() -> list[tuple[str, str, dict[str, Any] | None]]:
    found = []
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            found.append((method.upper(), path, body))
    return found


OPERATIONS = operations()
KNOWN = seeded_ids()
IDS = st.sampled_from([*(ident for known in KNOWN.values() for ident in known), 9_999_999])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """One request: as described, with one part bent, with nonsense for a body, or with no JSON at all."""
    method, path, schema = draw(st.sampled_from(OPERATIONS))
    kind = path.split("/")[1]
    path = path.replace("{id}", str(draw(st.sampled_from([*KNOWN.get(kind, ()), *KNOWN.get(kind, ()), 9_999_999]))))
    if schema is None:
        return method, path, b""
    how = draw(st.sampled_from(["described", "described", "described", "bent", "nonsense", "bytes"]))
    if how == "bytes":
        return method, path, draw(st.binary(max_size=40))
    if how == "nonsense":
        return method, path, json.dumps(draw(JSON)).encode()
    body = draw(from_schema(schema))
    if how == "bent":
        key = draw(st.sampled_from([*sorted(schema["properties"]), "no_such_field"]))
        body = {**body, key: draw(JSON)}
    return method, path, json.dumps(body).encode()


def from_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of our description allows; it uses a small part of JSON Schema only."""
    if "oneOf" in schema:
        return st.one_of([from_schema(one) for one in schema["oneOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object" if "properties" in schema:
            required = set(schema["required"])
            parts = {name: from_schema(part) for name, part in schema["properties"].items()}
            return st.fixed_dictionaries(
                {name: part for name, part in parts.items() if name in required},
                optional={name: part for name, part in parts.items() if name not in required},
            )
        case "object":
            return st.dictionaries(st.sampled_from(["group", "ring", "a.b/c"]), st.sampled_from(["", "x", "canary"]))
        case "array":
            return st.lists(from_schema(schema["items"]), max_size=schema.get("maxItems", 3))
        case "integer":
            return IDS | st.integers(schema.get("minimum", -5), schema.get("maximum", 2**40))
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        case "string":
            return NAMES | st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 30), 70))
        case _:
            return st.none() | NAMES


def check_whole(cloud: Cloud) -> None:
    """The state can be stored and read again, names are unique, and nothing refers to what is not there."""
    with cloud_lock(cloud):
        text = state_of(cloud).to_json()
    assert State.from_json(text).to_json() == text
    stored = json.loads(text)
    tables = {name: rows for name, rows in stored.items() if isinstance(rows, list)}
    assert len(tables) >= 4
    for table, rows in tables.items():
        ids = [row["id"] for row in rows]
        assert len(ids) == len(set(ids)), table
        names = [row["name"] for row in rows if row.get("name")]
        assert len(names) == len(set(names)), table


def state_of(cloud: Cloud) -> State:
    return cloud._ledger.state


def cloud_lock(cloud: Cloud) -> Any:
    return cloud._ledger.lock


@given(sequence=st.lists(requests(), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_any_sequence_is_answered_as_documented_and_leaves_the_state_whole(
    sequence: list[tuple[str, str, bytes]],
) -> None:
    with emulator() as (api, cloud):
        for method, path, body in sequence:
            before = cloud.mutations()
            answer = send(api, method, path, body)
            assert answer.status in openapi.DONE | openapi.REFUSED, (method, path, body, answer)
            if answer.status in openapi.REFUSED:
                error = answer.payload["error"]  # type: ignore[index,call-overload]
                assert set(error) == {"code", "message", "details"}
                assert isinstance(error["code"], str)
                assert cloud.mutations() == before, (method, path, body)
            else:
                json.dumps(answer.payload)
            if method == "GET":
                assert cloud.mutations() == before
        for kind in openapi.READABLE:
            assert send(api, "GET", f"/{kind}").status == 200
        check_whole(cloud)


@given(sequence=st.lists(requests(), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_any_sequence_is_on_disk_as_it_is_in_memory(sequence: list[tuple[str, str, bytes]]) -> None:
    """No change is overlooked: what is answered is what a killed emulator comes back with."""
    with tempfile.TemporaryDirectory() as folder:
        file, copy = Path(folder) / "cloud.json", Path(folder) / "copy.json"
        copy.touch(0o600)
        with emulator(state_file=file) as (api, cloud):
            for method, path, body in sequence:
                send(api, method, path, body)
                with cloud_lock(cloud):
                    copy.write_bytes(file.read_bytes())
                    assert Store(copy).state.to_json() == state_of(cloud).to_json(), (method, path, body)


@pytest.mark.parametrize(("method", "path", "schema"), OPERATIONS, ids=lambda value: str(value)[:50])
def test_every_described_operation_exists(method: str, path: str, schema: dict[str, Any] | None) -> None:
    with emulator() as (api, _):
        answer = send(api, method, path.replace("{id}", "999999"), b"{}" if schema else b"")
        assert answer.status not in (405, 501)
        if answer.status == 404:
            assert answer.payload["error"]["code"] == "not_found"  # type: ignore[index,call-overload]
            assert "does not exist" not in answer.payload["error"]["message"]  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'"x"', b"\xff\xfe", b"{" * 2000, b"null", b'{"name": "a", "name": "b"}']
)
def test_a_malformed_body_is_refused_or_harmless(body: bytes) -> None:
    with emulator() as (api, cloud):
        before = cloud.mutations()
        answer = send(api, "POST", "/servers", body)
        assert answer.status in (400, 422)
        assert cloud.mutations() == before


def test_the_description_is_of_the_right_version_and_names_every_resource() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    assert len(OPERATIONS) > 60
