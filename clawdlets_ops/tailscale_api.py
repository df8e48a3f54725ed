"""Auth keys from a tailnet's own API: Tailscale's, with an OAuth client, and headscale's, with an API key.

Only the endpoint that is named is ever asked. Both mint a key that is ephemeral, tagged, good for one machine and for a
short time, and look at the answer before they believe it. A request is sent once: a key that nobody got runs out by itself.
A key that its machine has not used is revoked by its id; what has joined stays joined.

Sources: tailscale.com/api (OAuth token; POST /tailnet/-/keys, DELETE /tailnet/-/keys/ID, whose answer has no body that
matters; the client's id in the request is ignored, its secret says which it is), headscale 0.28
proto/headscale/v1/preauthkey.proto.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import requests

from clawdlets_ops.errors import CattleError, SettingsError, UnreachableError
from clawdlets_ops.sensitive import Secret

TIMEOUT_S: Final = 15.0
SLACK_S: Final = 120
"""How much longer than asked for a key may live by the answer: clocks differ."""


def _now() -> datetime:
    return datetime.now(UTC)


def require_safe(endpoint: str) -> str:
    """``endpoint`` without its last slash; SettingsError for plain HTTP to anything but this machine."""
    parts = urlsplit(endpoint)
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise SettingsError("is not encrypted: use https", where=endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise SettingsError("is not an address of an API", where=endpoint)
    return endpoint.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class TailscaleKeys:
    """Tailscale's API. ``client_secret`` is an OAuth client's with the scope ``auth_keys`` for the tag."""

    endpoint: str
    client_secret: Secret
    ca_file: Path | None = None
    now: Callable[[], datetime] = field(default=_now)

    def mint(self, description: str, *, tag: str, ttl_s: int) -> tuple[str, Secret]:
        """The id and the key; CattleError when the answer is not a key as asked for, UnreachableError."""
        endpoint = require_safe(self.endpoint)
        asked = {"reusable": False, "ephemeral": True, "preauthorized": True, "tags": [tag]}
        body = {
            "capabilities": {"devices": {"create": asked}},
            "expirySeconds": ttl_s,
            "description": description[:50],
        }
        made = _ask(f"{endpoint}/api/v2/tailnet/-/keys", token=self._access(), body=body, verify=self.ca_file)
        got = ((made.get("capabilities") or {}).get("devices") or {}).get("create") or {}
        wrong = [name for name, value in asked.items() if got.get(name) != value]
        return _checked(made.get("id"), made.get("key"), wrong, made.get("expires"), ttl_s, self.now(), endpoint)

    def revoke(self, key_id: str) -> None:
        """The key is good for nothing any more, also when there is none with this id; CattleError, UnreachableError."""
        url = f"{require_safe(self.endpoint)}/api/v2/tailnet/-/keys/{quote(key_id, safe='')}"
        _ask(url, method="DELETE", token=self._access(), verify=self.ca_file)

    def _access(self) -> str:
        granted = _ask(
            f"{require_safe(self.endpoint)}/api/v2/oauth/token",
            form={"client_id": "clawdlets-ops", "client_secret": self.client_secret.reveal()},
            verify=self.ca_file,
        )
        return str(granted.get("access_token", ""))


@dataclass(frozen=True)
class HeadscaleKeys:
    """headscale's API: the keys belong to the user ``user``."""

    endpoint: str
    api_key: Secret
    user: str
    ca_file: Path | None = None
    now: Callable[[], datetime] = field(default=_now)

    def mint(self, description: str, *, tag: str, ttl_s: int) -> tuple[str, Secret]:
        """The id and the key; CattleError when the answer is not a key as asked for, UnreachableError."""
        del description  # it has no place for one
        endpoint, token = require_safe(self.endpoint), self.api_key.reveal()
        listed = _ask(f"{endpoint}/api/v1/user?name={self.user}", token=token, verify=self.ca_file)
        users = [str(one["id"]) for one in listed.get("users") or () if one.get("name") == self.user]
        if len(users) != 1:
            raise CattleError(f"has no user {self.user!r}", where=endpoint)
        expires = (self.now() + timedelta(seconds=ttl_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {"user": users[0], "reusable": False, "ephemeral": True, "expiration": expires, "aclTags": [tag]}
        made = (
            _ask(f"{endpoint}/api/v1/preauthkey", token=token, body=body, verify=self.ca_file).get("preAuthKey") or {}
        )
        asked = {"reusable": False, "ephemeral": True, "aclTags": [tag]}
        # protobuf's JSON leaves out what is false
        got = {
            "reusable": made.get("reusable", False),
            "ephemeral": made.get("ephemeral"),
            "aclTags": made.get("aclTags"),
        }
        wrong = [name for name, value in asked.items() if got[name] != value]
        return _checked(made.get("id"), made.get("key"), wrong, made.get("expiration"), ttl_s, self.now(), endpoint)

    def revoke(self, key_id: str) -> None:
        """The key is good for nothing any more, also when there is none with this id; CattleError, UnreachableError."""
        url = f"{require_safe(self.endpoint)}/api/v1/preauthkey/expire"
        _ask(url, token=self.api_key.reveal(), body={"id": key_id}, verify=self.ca_file)


def _checked(
    key_id: Any, key: Any, wrong: list[str], expires: Any, ttl_s: int, now: datetime, endpoint: str
) -> tuple[str, Secret]:
    if not isinstance(key, str) or len(key) < 16 or any(character.isspace() for character in key):
        raise CattleError("answered without a key", where=endpoint)
    try:
        until = datetime.fromisoformat(str(expires).replace("Z", "+00:00"))
    except ValueError:
        wrong = [*wrong, "expires"]
    else:
        if until - now > timedelta(seconds=ttl_s + SLACK_S):
            wrong = [*wrong, "expires"]
    if wrong:
        raise CattleError(f"the key is not as it was asked for ({', '.join(wrong)}), and is not used", where=endpoint)
    return str(key_id), Secret(key, "tailnet auth key")


def _ask(
    url: str,
    *,
    method: str = "",
    token: str = "",
    body: Mapping[str, Any] | None = None,
    form: Mapping[str, str] | None = None,
    verify: Path | None = None,
) -> dict[str, Any]:
    """One request; nothing of it, and nothing of the answer's text, gets into an error. A deletion answers with nothing,
    and of what is not there it is no fault."""
    headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    place = url.partition("?")[0]
    try:
        # Without a session that would trust the environment: no proxy, no .netrc, no redirect to another host.
        with requests.Session() as session:
            session.trust_env = False
            answer = session.request(
                method or ("GET" if body is None and form is None else "POST"),
                url,
                headers=headers,
                json=body,
                data=form,
                timeout=TIMEOUT_S,
                allow_redirects=False,
                verify=True if verify is None else str(verify),
            )
        if method == "DELETE" and answer.status_code in (200, 204, 404):
            return {}
        found = answer.json() if answer.status_code == 200 else None
    except ValueError:
        raise CattleError("answered with something else than JSON", where=place) from None
    except requests.exceptions.RequestException as error:
        raise UnreachableError(f"does not answer ({type(error).__name__})", where=place) from None
    if not isinstance(found, dict):
        fix = (
            "is the secret the right one, and may it mint keys for this tag?"
            if answer.status_code in (401, 403)
            else ""
        )
        raise CattleError(f"refused with {answer.status_code}", where=place, fix=fix)
    return found
