"""What we read from the Hetzner Cloud API, through python-hcloud, as plain values. Changes go through OpenTofu, with three
exceptions: rebuilding a named server from its image and cattle, which comes and goes, for which OpenTofu has no word; and
a firewall's rules and labels where a door has to open or close at a time when no OpenTofu runs (``lockdown/``).

The only importer of ``hcloud``. Facts about the API: docs.hetzner.cloud.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import hcloud
import requests
from hcloud.actions import ActionException, ActionTimeoutException
from hcloud.servers import BoundServer

from clawdlets_ops.cloud import (
    HOST_LABEL,
    MANAGED_BY,
    MANAGER,
    OURS,
    WINDOW_LABEL,
    WINDOW_RULE,
    WINDOW_TIME,
    Budget,
    Firewall,
    FirewallRule,
    Labelled,
    Offer,
    PlacementGroup,
    PrimaryIp,
    Server,
    SshKey,
    Volume,
    fingerprint_md5,
    is_ours,
)
from clawdlets_ops.errors import CloudError, OutcomeUnknown, SettingsError
from clawdlets_ops.hetzner import answers
from clawdlets_ops.sensitive import Redactor, Secret

__all__ = [
    "HOST_LABEL",
    "MANAGED_BY",
    "MANAGER",
    "OURS",
    "WINDOW_LABEL",
    "WINDOW_RULE",
    "WINDOW_TIME",
    "Budget",
    "Cloud",
    "Firewall",
    "FirewallRule",
    "HetznerCloud",
    "Labelled",
    "Offer",
    "PlacementGroup",
    "PrimaryIp",
    "Server",
    "SshKey",
    "Volume",
    "fingerprint_md5",
    "is_ours",
]

REQUEST_TIMEOUT_S = 30.0
REBUILD_POLLS = 600
REMEMBER_S = 300.0
BUDGET_ROUNDS = 3
NOT_BEGUN = {"rate_limit_exceeded": 20.0, "conflict": 2.0}
"""What may simply be asked again, and after how many seconds."""
KINDS = ("servers", "volumes", "primary_ips", "firewalls", "placement_groups", "ssh_keys")
REFUSALS = frozenset(
    {
        "deprecated_api_endpoint", "forbidden", "invalid_input", "json_error", "locked", "method_not_allowed", "not_found",
        "placement_error", "protected", "rate_limit_exceeded", "resource_in_use", "resource_limit_exceeded",
        "resource_unavailable", "token_readonly", "unauthorized", "uniqueness_error", "404",
    }
)  # fmt: skip
"""With these the API says that it has not begun. Any other answer to a change leaves open whether it was made."""
BUDGET_FIX = "wait some minutes and run again; nothing was changed by this request"
READ_ONLY = ("token_readonly", "forbidden", 403)

T = TypeVar("T")


class Cloud(Protocol):
    """The reads that the stages need. ``HetznerCloud`` asks the API, ``testing.FakeCloud`` a dictionary."""

    def server(self, name: str) -> Server | None:
        """The server called ``name``, or None."""
        ...

    def firewall(self, name: str) -> Firewall | None:
        """The firewall called ``name``, or None."""
        ...

    def ssh_key(self, fingerprint: str) -> SshKey | None:
        """The key with this MD5 fingerprint, or None."""
        ...

    def volumes(self) -> tuple[Volume, ...]:
        """Every volume of the project."""
        ...

    def primary_ips(self) -> tuple[PrimaryIp, ...]:
        """Every primary IP of the project."""
        ...

    def placement_group(self, name: str) -> PlacementGroup | None:
        """The placement group called ``name``, or None."""
        ...

    def offers(self) -> tuple[Offer, ...]:
        """Every server type, with where it can be ordered now."""
        ...

    def has_image(self, name: str, architecture: str) -> bool:
        """Whether there is a system image of this name for this architecture (x86, arm)."""
        ...

    def may_write(self) -> bool:
        """Whether the token may change things; asked without changing anything."""
        ...

    def labelled(self, labels: Mapping[str, str]) -> tuple[Labelled, ...]:
        """Everything in the project, of the kinds that we make, that has all these labels."""
        ...

    def rebuild(self, server: Server, image: str) -> None:
        """Overwrite the server's disk with ``image`` and wait until that is done."""
        ...

    def set_rules(self, firewall: Firewall, rules: tuple[FirewallRule, ...]) -> None:
        """Replace the firewall's whole rule set; in force only once the API says so."""
        ...

    def set_labels(self, firewall: Firewall, labels: Mapping[str, str]) -> None:
        """Replace the firewall's labels."""
        ...


class HetznerCloud:
    """Reads through python-hcloud. CloudError for every refusal, with the API's code and correlation id."""

    def __init__(
        self,
        token: Secret,
        endpoint: str,
        *,
        poll_interval_s: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
        order_timeout_s: float | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._sleep = sleep
        self._redactor = Redactor([token])
        self._client = hcloud.Client(
            token=token.reveal(),
            api_endpoint=endpoint,
            application_name="clawdlets-ops",
            poll_interval=poll_interval_s,
            timeout=REQUEST_TIMEOUT_S,
        )
        self.budget: Budget | None = None
        self._remembered: dict[str, tuple[float, Any]] = {}
        self.api_time_s: float | None = None
        self._client._client._session.hooks["response"].append(self._note_budget)
        self._once = hcloud.Client(
            token=token.reveal(),
            api_endpoint=endpoint,
            application_name="clawdlets-ops",
            timeout=REQUEST_TIMEOUT_S if order_timeout_s is None else order_timeout_s,
        )
        self._once._client._retry_max_retries = 0  # python-hcloud sends a POST again that timed out
        self._once._client._session.hooks["response"].append(self._note_budget)

    def _note_budget(self, response: requests.Response, *_: Any, **__: Any) -> None:
        """Read the ``RateLimit-*`` headers, of a refusal too, and what time it is there."""
        said = [response.headers.get(f"RateLimit-{name}", "") for name in ("Limit", "Remaining", "Reset")]
        if all(text.isascii() and text.isdigit() for text in said):
            limit, remaining, reset = map(int, said)
            self.budget = Budget(limit, remaining, reset)
        with suppress(ValueError, TypeError):
            self.api_time_s = parsedate_to_datetime(response.headers.get("Date", "")).timestamp()

    def server(self, name: str) -> Server | None:
        """The server called ``name``, or None; one request."""
        found = self._ask(f"server {name}", lambda: self._client.servers.get_by_name(name))
        return answers.server(found) if found else None

    def firewall(self, name: str) -> Firewall | None:
        """The firewall called ``name``, or None; one request."""
        found = self._ask(f"firewall {name}", lambda: self._client.firewalls.get_by_name(name))
        return answers.firewall(found) if found else None

    def ssh_key(self, fingerprint: str) -> SshKey | None:
        """The key with this MD5 fingerprint, or None; one request."""
        found = self._ask("SSH key", lambda: self._client.ssh_keys.get_by_fingerprint(fingerprint))
        return answers.ssh_key(found) if found else None

    def managed_servers(self) -> tuple[Server, ...]:
        """Every server with our label; one request for each 50."""
        found = self._ask("servers", lambda: self._client.servers.get_all(label_selector=OURS))
        return tuple(answers.server(one) for one in found)

    def managed_firewalls(self) -> tuple[Firewall, ...]:
        """Every firewall with our label; one request for each 50."""
        found = self._ask("firewalls", lambda: self._client.firewalls.get_all(label_selector=OURS))
        return tuple(answers.firewall(one) for one in found)

    def managed_placement_groups(self) -> tuple[PlacementGroup, ...]:
        """Every placement group with our label; one request for each 50."""
        found = self._ask("placement groups", lambda: self._client.placement_groups.get_all(label_selector=OURS))
        return tuple(answers.placement_group(one) for one in found)

    def volumes(self) -> tuple[Volume, ...]:
        """Every volume of the project; one request for each 50."""
        return tuple(answers.volume(found) for found in self._ask("volumes", self._client.volumes.get_all))

    def primary_ips(self) -> tuple[PrimaryIp, ...]:
        """Every primary IP of the project; one request for each 50."""
        return tuple(answers.primary_ip(found) for found in self._ask("primary IPs", self._client.primary_ips.get_all))

    def placement_group(self, name: str) -> PlacementGroup | None:
        """The placement group called ``name``, or None; one request."""
        found = self._ask(f"placement group {name}", lambda: self._client.placement_groups.get_by_name(name))
        return answers.placement_group(found) if found else None

    def offers(self) -> tuple[Offer, ...]:
        """Every server type, with where it can be ordered now; one request for each 50."""
        return self._lately(
            "offers", lambda: tuple(map(answers.offer, self._ask("server types", self._client.server_types.get_all)))
        )

    def has_image(self, name: str, architecture: str) -> bool:
        """Whether there is a system image of this name for this architecture; one request."""
        what = f"image {name} for {architecture}"
        ask = partial(self._client.images.get_by_name_and_architecture, name, architecture)
        return self._lately(what, lambda: self._ask(what, ask) is not None)

    def may_write(self) -> bool:
        """Whether the token may change things: an empty change of a key that cannot exist (id 0) is refused for its id
        when it may, and for the token when it may not. One request; nothing can be changed by it."""

        def ask() -> bool:
            try:
                self._client._client.request(method="PUT", url="/ssh_keys/0", json={})
            except hcloud.APIException as error:
                if error.code in READ_ONLY:
                    return False
                if error.code not in ("not_found", "invalid_input", 404):
                    raise
            return True

        return self._lately("may write", lambda: self._ask("the token's permission", ask))

    def labelled(self, labels: Mapping[str, str]) -> tuple[Labelled, ...]:
        """Everything of the kinds that we make that has all these labels; one request for each kind."""
        selector = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
        found: list[Labelled] = []
        for kind in KINDS:
            found += self._ask(kind, partial(self._labelled, kind, selector))
        return tuple(found)

    def _labelled(self, kind: str, selector: str) -> list[Labelled]:
        listed: list[Any] = getattr(self._client, kind).get_all(label_selector=selector)
        return [Labelled(kind, int(one.id), one.name or "") for one in listed]

    def rebuild(self, server: Server, image: str) -> None:
        """Overwrite the server's disk with ``image`` (its name) and wait until that is done. Each change is sent once.
        CloudError; OutcomeUnknown when there is no answer to one: look at the server before anything else."""
        what = f"server {server.name} (rebuild)"

        def look() -> tuple[bool, int]:
            bound = self._client.servers.get_by_id(server.id)
            architecture = bound.server_type.architecture if bound.server_type else None
            found = self._client.images.get_by_name_and_architecture(image, architecture or "x86")
            if found is None or found.id is None:
                raise CloudError(f"there is no image {image!r}", where=f"hosts.{server.name}.hetzner.image")
            return answers.is_protected(bound, "rebuild"), found.id

        protected, image_id = self._ask(what, look)
        if protected:  # the operator has named this host to be wiped; the next provision protects it anyway
            self._act(what, server, "change_protection", {"delete": False, "rebuild": False})
        self._act(what, server, "rebuild", {"image": image_id}, polls=REBUILD_POLLS)
        if protected:
            self._act(what, server, "change_protection", {"delete": True, "rebuild": True})

    def _act(
        self, what: str, server: Server, action: str, body: Mapping[str, Any], *, polls: int | None = None
    ) -> None:
        """An action of a server: asked for once, then waited for."""
        answer = self._change(what, "POST", f"/servers/{server.id}/actions/{action}", body, patient=True)

        def wait() -> None:
            self._client.actions.get_by_id(action_id).wait_until_finished(max_retries=polls)

        try:
            action_id = int(answer["action"]["id"])
            self._ask(what, wait)
        except (KeyError, TypeError, ValueError) as error:
            raise OutcomeUnknown(f"{what}: the answer to {action} is not one", where=server.name) from error
        except (CloudError, ActionTimeoutException) as error:
            raise OutcomeUnknown(f"{what}: the end of {action} was not seen: {error}", where=server.name) from error
        except ActionException as error:
            raise CloudError(f"{what}: {action} did not succeed: {error}", where=server.name) from error

    def set_rules(self, firewall: Firewall, rules: tuple[FirewallRule, ...]) -> None:
        """Replace the firewall's whole rule set; one request, sent once. Not waited for: look whether the server shows the
        firewall as applied. CloudError; OutcomeUnknown."""
        if not rules:
            raise CloudError("an empty rule set is never asked for", where=firewall.name)
        path = f"/firewalls/{firewall.id}/actions/set_rules"
        self._change(
            f"firewall {firewall.name} (rules)", "POST", path, {"rules": [*map(_as_sent, rules)]}, patient=True
        )

    def set_labels(self, firewall: Firewall, labels: Mapping[str, str]) -> None:
        """Replace the firewall's labels; one request, sent once. CloudError; OutcomeUnknown."""
        self._change(
            f"firewall {firewall.name} (labels)",
            "PUT",
            f"/firewalls/{firewall.id}",
            {"labels": dict(labels)},
            patient=True,
        )

    # Servers that come and go without OpenTofu: cattle.

    def servers_with(self, labels: Mapping[str, str]) -> tuple[Server, ...]:
        """Every server that has all these labels (every server, for none); one request for each 50."""
        selector = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
        found = self._ask("servers", lambda: self._client.servers.get_all(label_selector=selector or None))
        return tuple(answers.server(one) for one in found)

    def server_by_id(self, server_id: int) -> Server | None:
        """The server with this id, or None; one request."""

        def call() -> Any:
            try:
                return self._client.servers.get_by_id(server_id)
            except hcloud.APIException as error:
                if error.code in ("not_found", 404):
                    return None
                raise

        found = self._ask(f"server {server_id}", call)
        return answers.server(found) if found else None

    def order_server(
        self,
        name: str,
        *,
        image: str,
        server_type: str,
        location: str,
        labels: Mapping[str, str],
        user_data: Secret,
        firewalls: Sequence[int],
    ) -> Server:
        """Order a server, with one request that is never sent twice. CloudError: it was refused, and there is none.
        OutcomeUnknown: no answer, or one that does not say; look for the labels before anything else."""
        body = {
            "name": name,
            "image": image,
            "server_type": server_type,
            "location": location,
            "labels": dict(labels),
            "user_data": user_data.reveal(),
            "firewalls": [{"firewall": firewall} for firewall in firewalls],
            "public_net": {"enable_ipv4": True, "enable_ipv6": True},
            "start_after_create": True,
        }
        answer = self._change(f"server {name}", "POST", "/servers", body)
        try:
            return answers.server(BoundServer(self._client.servers, data=dict(answer["server"])))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise OutcomeUnknown(f"server {name}: the answer is not one", where=self._endpoint) from error

    def delete_server(self, server_id: int) -> None:
        """Ask for the server's deletion, once; one that is not there is none. CloudError, OutcomeUnknown."""
        try:
            self._change(f"server {server_id}", "DELETE", f"/servers/{server_id}", None)
        except CloudError as error:
            if error.code not in ("not_found", "404"):
                raise

    def make_firewall(self, name: str, *, rules: Sequence[FirewallRule], labels: Mapping[str, str]) -> Firewall:
        """The firewall called ``name``, made unless it is there. CloudError; OutcomeUnknown."""
        if (found := self.firewall(name)) is not None:
            return found
        try:
            self._change(
                f"firewall {name}",
                "POST",
                "/firewalls",
                {"name": name, "labels": dict(labels), "rules": [*map(_as_sent, rules)]},
            )
        except CloudError as error:
            if error.code != "uniqueness_error":  # somebody else made it meanwhile
                raise
        made = self.firewall(name)
        if made is None:
            raise CloudError(f"firewall {name}: was made, and is not there", where=self._endpoint)
        return made

    def _change(
        self, what: str, method: str, path: str, body: Mapping[str, Any] | None, *, patient: bool = False
    ) -> dict[str, Any]:
        """One request that changes something, sent once; with ``patient`` again if it was refused as NOT_BEGUN says."""

        def send() -> dict[str, Any]:
            answer: dict[str, Any] = self._once._client.request(
                method=method, url=path, **({} if body is None else {"json": body})
            )
            return answer

        try:
            with answers.understood(what, self._endpoint, OutcomeUnknown):
                return self._patiently(send) if patient else send()
        except hcloud.APIException as error:
            code = str(error.code)
            if code in ("unauthorized", "401"):
                raise _wrong_token() from None
            said = f"{what}: {self._redactor.scrub(str(error.message))} ({answers.code(error)})"
            kind = CloudError if code in REFUSALS else OutcomeUnknown
            fix = BUDGET_FIX if code == "rate_limit_exceeded" else ""
            raise kind(said, where=self._endpoint, fix=fix, code=code) from None
        except requests.exceptions.RequestException as error:
            raise OutcomeUnknown(
                f"{what}: the API did not answer ({type(error).__name__})", where=self._endpoint
            ) from None

    def _lately(self, what: str, ask: Callable[[], T]) -> T:
        """What was asked less than REMEMBER_S ago is not asked again: for what is the same for every host."""
        at, answer = self._remembered.get(what, (-math.inf, None))
        if time.monotonic() - at >= REMEMBER_S:
            answer = ask()
            self._remembered[what] = (time.monotonic(), answer)
        return cast(T, answer)

    def _patiently(self, call: Callable[[], T]) -> T:
        """What the API refuses for its budget, or because something changed meanwhile, it has not begun: it may be asked
        again, as python-hcloud does for reads."""
        for _ in range(BUDGET_ROUNDS - 1):
            try:
                return call()
            except hcloud.APIException as error:
                if error.code not in NOT_BEGUN:
                    raise
                self._sleep(NOT_BEGUN[str(error.code)])
        return call()

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            with answers.understood(what, self._endpoint):
                return self._patiently(call)
        except hcloud.APIException as error:
            if error.code in ("unauthorized", 401):
                raise _wrong_token() from None
            if error.code == "rate_limit_exceeded":
                raise CloudError(
                    f"{what}: the project's request budget (3600 an hour) is used up",
                    where=self._endpoint,
                    fix=BUDGET_FIX,
                ) from error
            raise CloudError(f"{what}: {error.message} ({answers.code(error)})", where=self._endpoint) from error
        except requests.exceptions.RequestException as error:
            raise CloudError(
                f"{what}: the API does not answer ({self._redactor.scrub(type(error).__name__)})",
                where=self._endpoint,
                fix="check the network; with the lab: is it up (clawdlets lab status)?",
            ) from None


def _wrong_token() -> SettingsError:
    return SettingsError(
        "the API does not accept this token",
        where="HCLOUD_TOKEN",
        fix="make a token with read and write permission in the project's console, and put it in place",
    )


def _as_sent(rule: FirewallRule) -> dict[str, Any]:
    """A rule as python-hcloud sends it: the networks stand at the end that is not ours, and what is not said is left out."""
    said = {
        "direction": rule.direction,
        "protocol": rule.protocol,
        "port": rule.port,
        ("source_ips" if rule.direction == "in" else "destination_ips"): list(rule.networks),
        "description": rule.description,
    }
    return {name: value for name, value in said.items() if value}
