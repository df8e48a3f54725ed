"""The emulator's requests and answers: selectors, routes, refusals, pages, and the journal; no sockets, no machines."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.api import Answer, Emulator, Request
from clawdlets_ops.lab.cloud import ApiError, Cloud, LoopbackPool, StubBackend
from clawdlets_ops.lab.ratelimit import Budget, Rate

TOKEN = ("canary" * 11)[:64]
ALPHA = {"name": "alpha", "server_type": "cx23", "image": "debian-13"}


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None)
    yield made
    made.close()


class TestLabelSelectors:
    @pytest.mark.parametrize(
        ("expression", "labels", "expected"),
        [
            ("env", {"env": ""}, True),
            ("env", {}, False),
            ("!env", {}, True),
            ("!env", {"env": "x"}, False),
            ("env=prod", {"env": "prod"}, True),
            ("env == prod", {"env": "lab"}, False),
            ("env!=prod", {"env": "lab"}, True),
            ("env!=prod", {}, True),
            ("env!=prod", {"env": "prod"}, False),
            ("env in (prod, lab)", {"env": "lab"}, True),
            ("env in (prod,lab)", {}, False),
            ("env notin (prod,lab)", {"env": "lab"}, False),
            ("env notin (prod,lab)", {}, True),
            ("env in (prod,lab),!old,clawdlets.dev/host=alpha", {"env": "lab", "clawdlets.dev/host": "alpha"}, True),
            ("env in (prod,lab),!old", {"env": "lab", "old": ""}, False),
            ("env=", {"env": ""}, True),
            ("in in (in)", {"in": "in"}, True),
        ],
    )
    def test_grammar(self, expression: str, labels: dict[str, str], expected: bool) -> None:
        assert grammar.selector(expression)(labels) is expected

    @pytest.mark.parametrize(
        "expression", ["", "a b", "a=b=c", "a in b", "a in ()", "!a=b", "a,,b", "-a", "a in (b", "é"]
    )
    def test_what_is_no_selector_is_refused(self, expression: str) -> None:
        with pytest.raises(ApiError, match="label_selector"):
            grammar.selector(expression)


class TestApi:
    @pytest.fixture
    def journal_file(self, tmp_path: Path) -> Path:
        return tmp_path / "journal.jsonl"

    @pytest.fixture
    def emulator(self, cloud: Cloud, journal_file: Path) -> Emulator:
        routes = {("POST", "/lab/echo"): lambda body: dict(body), ("GET", "/lab/echo"): lambda query: dict(query)}
        return Emulator(cloud, token=TOKEN, journal_file=journal_file, extra_routes=routes)

    def ask(self, emulator: Emulator, method: str, target: str, body: Any = None, token: str = TOKEN) -> Answer:
        headers = {"authorization": f"Bearer {token}", "user-agent": "canary/1"}
        return emulator.handle(Request(method, target, headers, b"" if body is None else json.dumps(body).encode()))

    def code(self, answer: Answer) -> tuple[int, str]:
        assert isinstance(answer.payload, dict)
        return answer.status, answer.payload["error"]["code"]

    @pytest.mark.parametrize(
        ("method", "target", "expected"),
        [
            ("GET", "/v1/servers/7", (404, "not_found")),
            ("GET", "/v1/nothing", (404, "not_found")),
            ("GET", "/servers", (404, "not_found")),
            ("PUT", "/v1/servers", (405, "method_not_allowed")),
            ("GET", "/v1/datacenters", (410, "deprecated_api_endpoint")),
            ("GET", "/v1/actions", (410, "deprecated_api_endpoint")),
            ("GET", "/v1/load_balancers?page=1", (501, "not_implemented")),
            ("GET", "/v1/servers?sort=colour", (422, "invalid_input")),
            ("GET", "/v1/servers?page=0", (422, "invalid_input")),
            ("GET", "/v1/servers?label_selector=%21", (422, "invalid_input")),
            ("POST", "/v1/servers/7/actions/poweron", (404, "not_found")),
            ("GET", f"/v1/servers/{'9' * 5000}", (404, "not_found")),
            ("GET", f"/v1/servers?page={'9' * 5000}", (422, "invalid_input")),
        ],
    )
    def test_refusals(self, emulator: Emulator, method: str, target: str, expected: tuple[int, str]) -> None:
        assert self.code(self.ask(emulator, method, target)) == expected

    def test_a_wrong_token_is_refused_and_a_short_one_cannot_be_configured(
        self, emulator: Emulator, cloud: Cloud
    ) -> None:
        assert self.code(self.ask(emulator, "GET", "/v1/servers", token=TOKEN[:-1])) == (401, "unauthorized")
        assert self.code(self.ask(emulator, "POST", "/lab/echo", {"a": "b"}, token="é")) == (401, "unauthorized")
        assert self.code(emulator.handle(Request("GET", "/v1/servers", {}, b""))) == (401, "unauthorized")
        with pytest.raises(ValueError, match="64"):
            Emulator(cloud, token="canary", journal_file=None)

    def test_text_that_no_encoding_has_is_no_server_error(self, emulator: Emulator) -> None:
        assert self.ask(emulator, "POST", "/v1/servers", ALPHA | {"user_data": "\ud800"}).status == 201
        refusal = self.ask(emulator, "POST", "/v1/ssh_keys", {"name": "a", "public_key": "\ud800 AAAA"})
        assert self.code(refusal) == (422, "invalid_input")

    @pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
    def test_a_body_that_is_no_object_is_refused(self, emulator: Emulator, body: bytes) -> None:
        headers = {"authorization": f"Bearer {TOKEN}"}
        assert self.code(emulator.handle(Request("POST", "/v1/ssh_keys", headers, body))) == (400, "json_error")

    def test_pages_sort_and_filters(self, emulator: Emulator, cloud: Cloud) -> None:
        for index in range(60):
            labels = {"half": str(index % 2)}
            cloud.create("placement_groups", {"name": f"edge-{index:02}", "type": "spread", "labels": labels})

        def names(query: str) -> tuple[list[str], dict[str, Any]]:
            answer = self.ask(emulator, "GET", f"/v1/placement_groups{query}").payload
            assert isinstance(answer, dict)
            return [row["name"] for row in answer["placement_groups"]], answer["meta"]["pagination"]

        first, pages = names("")
        assert (first[0], len(first)) == ("edge-00", 25)
        assert pages == {
            "page": 1,
            "per_page": 25,
            "previous_page": None,
            "next_page": 2,
            "last_page": 3,
            "total_entries": 60,
        }
        last, pages = names("?page=2&per_page=100")
        assert (len(last), pages["per_page"], pages["next_page"], pages["previous_page"]) == (10, 50, None, 1)
        assert names("?name=edge-07")[0] == ["edge-07"]
        assert names("?name=nothing")[1]["last_page"] == 1
        odd_down, _ = names("?label_selector=half%3D1&sort=name%3Adesc&per_page=2")
        assert odd_down == ["edge-59", "edge-57"]

    def test_images_by_name_architecture_and_age(self, emulator: Emulator) -> None:
        def found(query: str) -> list[tuple[str, str]]:
            payload = self.ask(emulator, "GET", f"/v1/images?{query}").payload
            assert isinstance(payload, dict)
            return [(row["name"], row["architecture"]) for row in payload["images"]]

        assert found("name=debian-12") == [("debian-12", "x86"), ("debian-12", "arm")]
        assert found("name=debian-12&architecture=arm") == [("debian-12", "arm")]
        assert found("name=debian-11") == []
        assert found("name=debian-11&include_deprecated=true") == [("debian-11", "x86")]

    def test_actions_by_id_kind_and_resource(self, emulator: Emulator, cloud: Cloud) -> None:
        edge = cloud.create("firewalls", {"name": "edge"})["firewall"]["id"]
        made = cloud.create("servers", ALPHA | {"firewalls": [{"firewall": edge}]})

        def ids(target: str) -> list[int]:
            payload = self.ask(emulator, "GET", target).payload
            assert isinstance(payload, dict)
            return [row["id"] for row in payload["actions"]]

        create, start = made["action"]["id"], made["next_actions"][0]["id"]
        assert ids(f"/v1/actions?id={start}&id={create}&page=1&sort=status&sort=id") == [create, start]
        assert ids("/v1/servers/actions") == ids("/v1/servers/1001/actions") == [create, start]
        assert ids(f"/v1/firewalls/{edge}/actions") == [create - 1]
        one = self.ask(emulator, "GET", f"/v1/servers/1001/actions/{create}").payload
        assert isinstance(one, dict)
        assert one["action"]["command"] == "create_server"

    def test_extra_routes(self, emulator: Emulator, journal_file: Path) -> None:
        assert self.ask(emulator, "GET", "/lab/echo?a=b").payload == {"a": "b"}
        assert self.ask(emulator, "POST", "/v1/lab/echo", {"authKey": "canary-secret"}).payload == {
            "authKey": "canary-secret"
        }
        assert "canary-secret" not in journal_file.read_text()

    def test_a_fault_replaces_the_handling_of_who_is_known_and_of_nothing_of_the_lab_s_own(self, cloud: Cloud) -> None:
        asked: list[str] = []

        def faults(request: Request) -> Answer | None:
            asked.append(request.target)
            return Answer(502, None, "ignored") if request.method == "POST" else None

        routes = {("POST", "/lab/echo"): lambda body: dict(body)}
        emulator = Emulator(cloud, token=TOKEN, journal_file=None, extra_routes=routes, faults=faults)
        answer = self.ask(emulator, "POST", "/v1/servers", ALPHA)
        assert (answer.status, answer.payload, answer.request_id != "ignored") == (502, None, True)
        assert cloud.servers() == ()
        assert self.ask(emulator, "GET", "/v1/servers").status == 200
        assert self.ask(emulator, "POST", "/v1/servers", ALPHA, token="wrong").status == 401
        assert self.ask(emulator, "POST", "/lab/echo", {"a": "b"}).status == 200
        assert asked == ["/v1/servers", "/v1/servers"]

    def test_the_budget_is_spent_by_requests_and_refilled_by_time(self, cloud: Cloud) -> None:
        now = [1_000_000.0]
        emulator = Emulator(cloud, token=TOKEN, journal_file=None, budget=Budget(3600, clock=lambda: now[0]))
        for _ in range(3600):
            answer = self.ask(emulator, "GET", "/v1/pricing")
        assert (answer.status, answer.rate) == (200, Rate(3600, 0, 1_003_600))
        assert self.code(self.ask(emulator, "GET", "/v1/pricing")) == (429, "rate_limit_exceeded")
        assert self.ask(emulator, "GET", "/v1/pricing", token="wrong").status == 401
        now[0] += 2.5
        statuses = [self.ask(emulator, "GET", "/v1/pricing").status for _ in range(3)]
        assert statuses == [200, 200, 429]
        now[0] += 10_000
        assert self.ask(emulator, "GET", "/v1/pricing").rate == Rate(3600, 3599, 1_010_004)

    def test_datacenters_for_old_clients(self, cloud: Cloud) -> None:
        emulator = Emulator(cloud, token=TOKEN, journal_file=None, datacenters=True)
        listed = self.ask(emulator, "GET", "/v1/datacenters?name=nbg1-dc3").payload
        assert isinstance(listed, dict)
        [row] = listed["datacenters"]
        assert row["location"]["name"] == "nbg1"
        assert self.ask(emulator, "GET", f"/v1/datacenters/{row['id']}").payload == {"datacenter": row}
        assert self.code(self.ask(emulator, "GET", "/v1/datacenters/99")) == (404, "not_found")

    @pytest.mark.parametrize(
        ("query", "status"),
        [
            ("type=cpu,disk&start=2026-11-22T10:00:00Z&end=2026-11-22T11:00:00Z&step=60", 200),
            ("type=cpu&start=2026-11-22T10:00:00+00:00&end=2026-11-22T11:00:00+00:00", 200),
            ("type=cpu&start=0001-01-01T00:00:00Z&end=9999-11-22T11:00:00Z&step=0.001", 200),
            ("type=heat&start=2026-11-22T10:00:00Z&end=2026-11-22T11:00:00Z", 422),
            ("type=cpu&start=2026-11-22T10:00:00Z&end=2026-11-22T10:00:00Z", 422),
            ("type=cpu&start=noon&end=2026-11-22T10:00:00Z", 422),
            ("type=cpu&start=2026-11-22T10:00:00Z&end=2026-11-22T11:00:00Z&step=nan", 422),
            ("", 422),
        ],
    )
    def test_metrics_have_a_bounded_number_of_points(
        self, emulator: Emulator, cloud: Cloud, query: str, status: int
    ) -> None:
        cloud.create("servers", ALPHA)
        answer = self.ask(emulator, "GET", f"/v1/servers/1001/metrics?{query}")
        assert answer.status == status
        if status == 200:
            assert isinstance(answer.payload, dict)
            assert 2 <= len(answer.payload["metrics"]["time_series"]["cpu"]["values"]) <= 501

    def test_the_journal_says_what_was_asked_and_changed_but_no_secret(
        self, emulator: Emulator, journal_file: Path, cloud: Cloud
    ) -> None:
        secret = "canary-user-data"
        body = ALPHA | {"user_data": secret}
        self.ask(emulator, "POST", "/v1/servers", body)
        self.ask(emulator, "POST", "/v1/servers", body)
        self.ask(emulator, "GET", "/v1/servers?name=alpha")
        cloud.close()
        self.ask(emulator, "PUT", "/v1/servers/1001", {"labels": {}})
        self.ask(emulator, "PUT", "/v1/servers/1001", {"labels": {"env": "prod"}})
        self.ask(emulator, "GET", "/v1/servers", token="wrong")
        text = journal_file.read_text()
        entries = [json.loads(line) for line in text.splitlines()]
        assert [(entry["method"], entry["status"], entry["mutates"]) for entry in entries] == [
            ("POST", 201, True),
            ("POST", 409, False),
            ("GET", 200, False),
            ("PUT", 200, False),
            ("PUT", 200, True),
            ("GET", 401, False),
        ]
        assert entries[0]["body"] == body | {
            "user_data": {"bytes": len(secret), "sha256": hashlib.sha256(secret.encode()).hexdigest()}
        }
        assert entries[2]["query"] == {"name": ["alpha"]}
        assert {entry["userAgent"] for entry in entries} == {"canary/1"}
        assert len({entry["requestId"] for entry in entries}) == len(entries)
        assert secret not in text
        assert TOKEN not in text
        assert stat.S_IMODE(journal_file.stat().st_mode) == 0o600
