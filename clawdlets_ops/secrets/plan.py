"""Which secrets a host needs, what may be given for them, and which recipients read what. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clawdlets_ops.errors import SecretsError
from clawdlets_ops.fleet import Host, SecretWiring
from clawdlets_ops.mkpasswd import is_crypt_hash
from clawdlets_ops.sensitive import Secret

HASH_SUFFIX = "_hash"

MAX_VALUE_BYTES = 1 << 20

_PLACEHOLDER = re.compile(
    r"\s*|\s*<[^<>]*>\s*|(?:change|fill|replace|insert)[-_ ]?me(?:[^a-z].*)?|(?:todo|fixme|tbd|placeholder)\b.*|x{4,}",
    re.IGNORECASE | re.DOTALL,
)
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Need:
    """One secret that a host must have: one encrypted file called ``name``, decrypted for ``wiring.owner``.

    A ``password-hash`` is read before users exist and therefore belongs to root; everything else is a ``value``.
    """

    name: str
    why: str
    kind: Literal["password-hash", "value"]
    wiring: SecretWiring

    @property
    def password_name(self) -> str | None:
        """What the password itself is called where it may be given instead of its hash."""
        return self.name.removesuffix(HASH_SUFFIX) if self.kind == "password-hash" else None


def needs(host_name: str, host: Host) -> tuple[Need, ...]:
    """Every secret that ``host`` needs."""
    found = [
        Need("admin_password_hash", "the admin user's sudo and console password", "password-hash", SecretWiring()),
        Need("breakglass_password_hash", "the breakglass user's console password", "password-hash", SecretWiring()),
    ]
    if host.tailnet.mode == "tailscale":
        found.append(Need("tailscale_auth_key", "tailnet.mode is tailscale", "value", SecretWiring()))
    for name, wiring in sorted(host.secrets.items()):
        found.append(Need(name, f"hosts.{host_name}.secrets.{name}", "value", wiring))
    return tuple(found)


def read_value(raw: bytes, name: str) -> Secret:
    """The value in ``raw``, UTF-8, at most 1 MiB; SecretsError. The newline after a single line is not part of it."""
    if len(raw.removesuffix(b"\n")) > MAX_VALUE_BYTES:
        raise SecretsError(
            f"is larger than {MAX_VALUE_BYTES} bytes", where=name, fix="a secret is a key, not an archive"
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise SecretsError("is not UTF-8 text", where=name, fix="encode it, in base64 for instance") from None
    return Secret(text.removesuffix("\n").removesuffix("\r") if text.count("\n") == 1 else text, name)


def is_placeholder(value: str) -> bool:
    """True for what people and templates leave where a value belongs: nothing, ``<…>``, CHANGEME, FILL_ME, TODO."""
    return _PLACEHOLDER.fullmatch(value) is not None


def input_names(needed: Iterable[Need]) -> dict[str, Need]:
    """The keys that a values file may have, each with the secret it is for: its name, or the password of a hash."""
    names: dict[str, Need] = {}
    for need in needed:
        names[need.name] = need
        if need.password_name:
            names[need.password_name] = need
    return names


def value_faults(needed: Iterable[Need], values: Mapping[str, Secret]) -> list[str]:
    """What is wrong with the keys of ``values``, one sentence each: unknown, given twice, still a placeholder."""
    known = input_names(needed)
    faults: list[str] = []
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            faults.append(
                f"{name}: this host has no such secret; "
                + (f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}")
            )
            continue
        if known[name].password_name == name and known[name].name in values:
            faults.append(f"{name}: {known[name].name} is given too; give one of the two")
        if is_placeholder(value.reveal()):
            faults.append(f"{name}: is empty or still a placeholder")
        if len(value.reveal().encode(errors="surrogatepass")) > MAX_VALUE_BYTES:
            faults.append(f"{name}: is larger than {MAX_VALUE_BYTES} bytes")
        if _UNWRITABLE.search(value.reveal()):
            faults.append(f"{name}: holds a NUL or half a surrogate pair, which no file can hold as text")
    return faults


def parse_values(text: str, host: str, *, where: str, declared: Collection[str] = ()) -> dict[str, Secret]:
    """The values for ``host`` in ``text``: JSON, either ``{"secret": "value"}`` or ``{"<host>": {…}}``.

    In the second form a host may be left out; every one that is named must be ``declared``, where those are given.
    SecretsError, which calls the text ``where`` and never holds a value.
    """
    try:
        raw: Any = json.loads(text, object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise SecretsError(f"the key {error.args[0]!r} appears twice in one object", where=where) from None
    except ValueError:
        raise SecretsError("is not valid JSON", where=where, fix='write {"secret_name": "value", …}') from None
    if not isinstance(raw, dict):
        raise SecretsError("is not a JSON object", where=where, fix='write {"secret_name": "value", …}')
    if raw and all(isinstance(part, dict) for part in raw.values()):
        for name in raw if declared else ():
            if name not in declared:
                near = difflib.get_close_matches(name, declared, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"declared are {', '.join(sorted(declared))}"
                raise SecretsError(f"has values for {name!r}, which is no host of the fleet; {hint}", where=where)
        raw = raw.get(host, {})
    if wrong := sorted(name for name, value in raw.items() if not isinstance(value, str)):
        raise SecretsError(f"every value must be a string; these are not: {', '.join(wrong)}", where=where)
    return {name: Secret(value, name) for name, value in raw.items()}


def value_fault(need: Need, value: Secret) -> str | None:
    """Why ``value`` cannot be used for ``need``, or None."""
    if is_placeholder(value.reveal()):
        return "is empty or still a placeholder"
    if need.kind == "password-hash" and not is_crypt_hash(value.reveal()):
        return "is no password hash"
    return None


def sops_config(hosts: Mapping[str, str], operators: Collection[str]) -> str:
    """The text of ``secrets/.sops.yaml``: ``hosts`` maps each host to its recipient, ``operators`` read everything.

    For people who run sops by hand, inside ``secrets/``: sops matches the path relative to this file. There is no
    rule for any other file, so sops refuses to encrypt one. Our own code never reads it.
    """
    lines = [
        "# Written by clawdlets secrets from the declared hosts and operators. Run sops inside this folder.",
        "creation_rules:",
    ]
    for host, recipient in sorted(hosts.items()):
        key_files = rf"^keys/hosts/{host}\.(agekey|ssh_host_ed25519_key)\.yaml$"
        for pattern, readers in (
            (key_files, set(operators)),
            (rf"^hosts/{host}/[a-z][a-z0-9_]*\.yaml$", {recipient, *operators}),
        ):
            lines += [f"  - path_regex: '{pattern}'", "    key_groups:", "      - age:"]
            lines += [f"          - {reader}" for reader in sorted(readers)]
    return "\n".join(lines) + "\n"


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _DuplicateKey(key)
        seen[key] = value
    return seen
