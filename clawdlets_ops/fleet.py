"""``fleet/clawdlets.json``: the declared fleet as strict models. Holds no secret, only names of secrets.

``sshExposure.mode`` says where SSH may be reached from, and the three words mean three different things:

* ``tailnet`` — the goal for a bot host. Public SSH exists only between creation and lockdown, from ``adminCidrs``;
  after lockdown neither the cloud firewall nor the host accepts tcp/22 except on ``tailscale0``.
* ``bootstrap`` — deliberately still on the way: the window for ``adminCidrs`` stays open, lockdown is not attempted,
  and every verification reports the open window as a failure, because public SSH is meant to be temporary.
* ``public`` — a decision: SSH stays reachable from ``adminCidrs`` for good, and verification expects exactly that.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator

from clawdlets_ops import fleetfile
from clawdlets_ops.bots import PROXY_VARIABLES, Bots, Egress, bot_user
from clawdlets_ops.declared import HostName, LabelKey, LabelValue, ResourceName, SecretName
from clawdlets_ops.declared import Model as _Model
from clawdlets_ops.errors import FleetError
from clawdlets_ops.herd import OWN_LABELS, RULES, Cattle, secrets_of

# As the operator's name is made from the login name; it names files.
OperatorName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_][a-z0-9_-]{0,62}$")]
UnixName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,30}$")]

VolumeName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$")]
RESERVED_LABELS = OWN_LABELS

# [user@]address of the tailnet; it never begins with a dash, which a program could take for an option.
TARGET_HOST = r"^(?:[a-z_][a-z0-9_-]*@)?[A-Za-z0-9][A-Za-z0-9.:-]*$"

# Bech32 of 32 bytes after the prefix; its checksum is looked at where the key is used.
AGE_RECIPIENT = r"age1[02-9ac-hj-np-z]{58}"

HttpAddress = Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+(?:/[A-Za-z0-9/_.-]*)?$")]
"""Without credentials: a user name or password in it is refused, as the file is public."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

WORLD_OPEN_BELOW_PREFIX = {4: 8, 6: 20}
"""A network with a shorter prefix than this is the internet at large, whatever its first address."""

KEY_TYPES = ("ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ecdsa-sha2-nistp256", "sk-ecdsa-sha2-nistp256@openssh.com")
RESERVED_SECRETS = {
    "admin_password_hash": "set by every host's admin user",
    "breakglass_password_hash": "set by every host's breakglass user",
    "tailscale_auth_key": "wired by tailnet.mode",
}


class Volume(_Model):
    """A volume that stays when the server is replaced. It can grow, never shrink; ``format`` counts at creation only."""

    size_gb: Annotated[int, Field(ge=10, le=10240)] = 10
    format: Literal["ext4", "xfs"] = "ext4"


class Hetzner(_Model):
    """What to order. ``image`` is only the system that the installation starts from.

    ``serverTypeFallbacks`` are taken, in this order, when ``serverType`` is not to be had in the location; a server
    that exists keeps its type. ``reservedIps`` orders addresses that stay when the server is replaced.
    ``placementGroup`` keeps the hosts that name the same one on different machines.
    """

    server_type: ResourceName = "cx23"
    server_type_fallbacks: tuple[ResourceName, ...] = ()
    location: ResourceName = "nbg1"
    image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+$")] = "debian-12"
    ipv4: bool = True
    ipv6: bool = True
    reserved_ips: bool = False
    placement_group: ResourceName | None = None
    volumes: dict[VolumeName, Volume] = Field(default_factory=dict)
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    delete_protection: bool = True

    @field_validator("labels")
    @classmethod
    def _not_our_own(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if name in RESERVED_LABELS or "hetzner.cloud/" in name:
                raise ValueError(f"the label {name} is set by clawdlets or Hetzner, and is not to be declared")
        return values

    @model_validator(mode="after")
    def _has_an_address(self) -> Hetzner:
        if not (self.ipv4 or self.ipv6):
            raise ValueError("with neither ipv4 nor ipv6 nobody could reach the host to install it")
        if self.server_type in self.server_type_fallbacks:
            raise ValueError(f"serverTypeFallbacks repeat serverType ({self.server_type})")
        return self

    @property
    def server_types(self) -> tuple[str, ...]:
        """The acceptable types, the wanted one first."""
        return (self.server_type, *self.server_type_fallbacks)


class Provisioning(_Model):
    """Who may reach the host before lockdown. ``sshPubkeyFile`` is relative to the project, or starts with ``~/``."""

    admin_cidrs: tuple[str, ...] = ()
    admin_cidr_allow_world_open: bool = False
    ssh_pubkey_file: str = ""

    @field_validator("admin_cidrs")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse_cidr(value)) for value in values)

    @model_validator(mode="after")
    def _not_the_world(self) -> Provisioning:
        if not self.admin_cidr_allow_world_open:
            for network in world_open(parse_cidr(value) for value in self.admin_cidrs):
                raise ValueError(
                    f"adminCidrs open the host to the internet at large ({network}); name your own networks, "
                    "or say adminCidrAllowWorldOpen: true"
                )
        return self

    @property
    def networks(self) -> tuple[Network, ...]:
        """The admin networks, parsed."""
        return tuple(parse_cidr(value) for value in self.admin_cidrs)


class SshExposure(_Model):
    """Where SSH may be reached from once the host is set up; see the module's docstring."""

    mode: Literal["bootstrap", "tailnet", "public"] = "tailnet"


class Tailnet(_Model):
    """``allowUdpIngress`` opens UDP/41641 for direct connections; without it Tailscale relays through DERP."""

    mode: Literal["none", "tailscale"] = "tailscale"
    allow_udp_ingress: bool = True


class SecretWiring(_Model):
    """Who may read a secret once it is decrypted to ``/run/secrets/<name>``: a service user, made when missing."""

    owner: UnixName = "root"
    group: UnixName | None = None
    mode: Annotated[str, StringConstraints(pattern=r"^0[46]00$|^0[46]40$")] = "0400"


class Orchestrator(_Model):
    """clf-orchestrator on this host, which the bots ask for work over ``/run/clf/orchestrator.sock``.

    ``store: postgresql`` reads its URL from the secret ``clf_database_url``. ``bootstrapPort`` is on the tailnet address
    only. Members of ``operatorsGroup`` see and cancel every job; a bot its own.
    """

    enable: bool = False
    store: Literal["sqlite", "postgresql"] = "sqlite"
    bootstrap_port: Annotated[int, Field(ge=1024, le=65535)] = 18337
    operators_group: UnixName = "clf-operators"
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    keep_days: Annotated[int, Field(ge=1, le=365)] = 7


class Host(_Model):
    """One host of the fleet."""

    system: Literal["x86_64-linux", "aarch64-linux"] = "x86_64-linux"
    disk_device: Annotated[str, StringConstraints(pattern=r"^/dev/[A-Za-z0-9][A-Za-z0-9/_.:-]*$")] = "/dev/sda"
    hetzner: Hetzner = Field(default_factory=Hetzner)
    provisioning: Provisioning = Field(default_factory=Provisioning)
    ssh_authorized_keys: tuple[str, ...] = ()
    ssh_exposure: SshExposure = Field(default_factory=SshExposure)
    tailnet: Tailnet = Field(default_factory=Tailnet)
    target_host: Annotated[str, StringConstraints(pattern=TARGET_HOST)] | None = None
    egress: Egress = Field(default_factory=Egress)
    secrets: dict[SecretName, SecretWiring] = Field(default_factory=dict)
    orchestrator: Orchestrator = Field(default_factory=Orchestrator)
    bots: Bots = Field(default_factory=dict)

    @field_validator("disk_device")
    @classmethod
    def _no_climbing(cls, value: str) -> str:
        if ".." in value.split("/"):
            raise ValueError("diskDevice must be a plain path below /dev")
        return value

    @field_validator("ssh_authorized_keys")
    @classmethod
    def _public_keys(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            check_public_key(value)
        return values

    @field_validator("secrets")
    @classmethod
    def _not_reserved(cls, values: dict[str, SecretWiring]) -> dict[str, SecretWiring]:
        for name in values.keys() & RESERVED_SECRETS.keys():
            raise ValueError(f"{name} is {RESERVED_SECRETS[name]}; it is not to be wired here")
        for name in values:
            if name.endswith("_unencrypted"):  # sops' default unencrypted suffix
                raise ValueError(f"{name}: sops leaves a value of such a name in clear; choose another")
        return values

    @model_validator(mode="after")
    def _reachable(self) -> Host:
        if self.ssh_exposure.mode == "tailnet" and self.tailnet.mode == "none":
            raise ValueError("sshExposure.mode tailnet with tailnet.mode none is a host that nobody can reach")
        if not self.ssh_authorized_keys and not self.provisioning.ssh_pubkey_file:
            raise ValueError("no admin key: give sshAuthorizedKeys, provisioning.sshPubkeyFile, or both")
        if not self.provisioning.admin_cidrs:
            raise ValueError("provisioning.adminCidrs is empty: nobody could reach the host to install it")
        if self.orchestrator.enable and self.tailnet.mode == "none":
            raise ValueError("orchestrator.enable needs a tailnet: machines fetch their environment over it")
        if (
            self.orchestrator.enable
            and self.orchestrator.store == "postgresql"
            and "clf_database_url" not in self.secrets
        ):
            raise ValueError("orchestrator.store postgresql needs clf_database_url among the host's secrets")
        return self

    @model_validator(mode="after")
    def _bots_fit(self) -> Host:
        for name, bot in self.bots.items():
            self.egress_of(name)
            for secret in bot.secrets:
                if secret not in self.secrets:
                    raise ValueError(f"bots.{name}.secrets names {secret}, which is not among the host's secrets")
                if self.secrets[secret].owner != bot_user(name):
                    raise ValueError(
                        f"bots.{name}.secrets names {secret}, whose owner is {self.secrets[secret].owner}; "
                        f"set secrets.{secret}.owner to {bot_user(name)}"
                    )
        return self

    def egress_of(self, bot: str) -> Egress:
        """What holds for one bot: its own words, and the host's where it has none. ValueError: a mode without its domains."""
        own = self.bots[bot].egress
        mode = own.mode or self.egress.mode
        domains = self.egress.allowed_domains if own.allowed_domains is None else own.allowed_domains
        if mode == "proxy-allowlist" and not domains:
            raise ValueError(
                f"bots.{bot}.egress: mode proxy-allowlist needs an entry in allowedDomains, here or at the host"
            )
        return Egress.model_construct(mode=mode, allowed_domains=domains)


class Operator(_Model):
    """Who may read every secret of the fleet: the public half of an age key (X25519)."""

    age_recipient: str

    @field_validator("age_recipient")
    @classmethod
    def _is_public(cls, value: str) -> str:
        if value.upper().startswith("AGE-SECRET-KEY-"):
            raise ValueError("this is a private key: take it out of the file and replace the key pair")
        if not re.fullmatch(AGE_RECIPIENT, value):
            raise ValueError("an age recipient is age1 and 58 small letters and digits; see secrets operator add")
        return value


class LocalState(_Model):
    """OpenTofu's state in this checkout's runtime dir; for one operator, or several on one machine."""

    backend: Literal["local"] = "local"


class S3State(_Model):
    """OpenTofu's state in a bucket, with lock files. Credentials come from ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY`` and ``AWS_SESSION_TOKEN``. ``endpoint`` is for what only speaks like S3."""

    backend: Literal["s3"]
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
    region: ResourceName = "us-east-1"
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9/_-]*$")] = "clawdlets"
    endpoint: HttpAddress | None = None


class PgState(_Model):
    """OpenTofu's state in PostgreSQL, one schema per host, locked by advisory locks. Where it is and the credentials come
    from ``PG_CONN_STR``, or from PGHOST, PGUSER, PGPASSWORD and their like."""

    backend: Literal["pg"]
    schema_prefix: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,30}$")] = "clawdlets"


class HttpState(_Model):
    """OpenTofu's state behind HTTP: ``<address>/<host>`` is read and written, ``<address>/<host>/lock`` takes LOCK and
    UNLOCK. Credentials come from ``TF_HTTP_USERNAME`` and ``TF_HTTP_PASSWORD``."""

    backend: Literal["http"]
    address: HttpAddress


class Fleet(_Model):
    """The whole file. ``operators``, when given, is the whole truth of who reads secrets besides the hosts; without it,
    every public key under ``secrets/keys/operators`` is a reader. ``state`` is where OpenTofu's state lies."""

    schema_version: Literal[1]
    hosts: Annotated[dict[HostName, Host], Field(min_length=1)]
    state: Annotated[LocalState | S3State | PgState | HttpState, Field(discriminator="backend")] = Field(
        default_factory=LocalState
    )
    operators: dict[OperatorName, Operator] = Field(default_factory=dict)
    cattle: Cattle = Field(default_factory=Cattle)

    @field_validator("schema_version", mode="before")
    @classmethod
    def _version(cls, value: object) -> object:
        if problem := fleetfile.version_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("operators")
    @classmethod
    def _somebody_and_each_once(cls, values: dict[str, Operator]) -> dict[str, Operator]:
        if not values:
            raise ValueError("declares nobody, and nobody could read a secret; name an operator, or leave the key out")
        names: dict[str, str] = {}
        for name, operator in values.items():
            first = names.setdefault(operator.age_recipient, name)
            if first != name:
                raise ValueError(
                    f"{first} and {name} have the same ageRecipient; every operator has a key of their own"
                )
        return values

    @model_validator(mode="after")
    def _cattle_has_a_home(self) -> Fleet:
        """The orchestrator is on a declared host, which is on the tailnet and has what personas are to be given."""
        name = self.cattle.host
        if name is None:
            return self
        if name not in self.hosts:
            raise ValueError(f"cattle.host: there is no host {name}")
        if self.cattle.enabled and self.hosts[name].tailnet.mode == "none":
            raise ValueError(f"cattle.host: {name} is not on the tailnet, where cattle fetches its environment")
        for secret, personas in secrets_of(self.cattle).items():
            if secret not in self.hosts[name].secrets:
                raise ValueError(f"cattle.personas.{personas[0]}.secrets: {name} has no secret {secret}")
        return self

    def orders_cattle(self, name: str) -> bool:
        """Whether the orchestrator of this host orders the throw-away servers."""
        return self.cattle.enabled and self.cattle.host == name and self.host(name).orchestrator.enable

    def tailnet_ports(self, name: str) -> tuple[int, ...]:
        """TCP ports of this host that are open to the tailnet besides SSH: where cattle fetches its environment."""
        return (self.host(name).orchestrator.bootstrap_port,) if self.orders_cattle(name) else ()

    def host(self, name: str) -> Host:
        """The host called ``name``; FleetError with the nearest name when there is none."""
        if name in self.hosts:
            return self.hosts[name]
        near = [f"; did you mean {one!r}?" for one in difflib.get_close_matches(name, self.hosts, n=1)]
        known = f"declared are: {', '.join(sorted(self.hosts))}"
        raise FleetError(f"there is no host {name!r}{''.join(near)}", where="hosts", fix=known)


def parse_cidr(text: str) -> Network:
    """``text`` as a network. A ``/0`` may have host bits (it means the world anyway); anywhere else they are refused.

    A bare address is one host (/32, /128). ValueError otherwise.
    """
    try:
        loose = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a network in CIDR form: {error}") from error
    address = ipaddress.ip_address(text.split("/")[0])
    if loose.prefixlen and address != loose.network_address:
        raise ValueError(f"{text!r} has host bits set; did you mean {loose}?")
    return loose


def world_open(networks: Iterable[Network]) -> list[Network]:
    """Those networks, taken together, that amount to the internet at large (two /1 make a /0)."""
    nets = list(networks)
    v4 = ipaddress.collapse_addresses(net for net in nets if isinstance(net, ipaddress.IPv4Network))
    v6 = ipaddress.collapse_addresses(net for net in nets if isinstance(net, ipaddress.IPv6Network))
    together: list[Network] = [*v4, *v6]
    return [net for net in together if net.prefixlen < WORLD_OPEN_BELOW_PREFIX[net.version]]


def check_public_key(line: str) -> None:
    """ValueError unless ``line`` is one OpenSSH public key of an accepted type, without options."""
    if "PRIVATE KEY" in line:
        raise ValueError("this is a private key: take it out of the file and replace the key pair")
    if "\n" in line or not re.fullmatch(r"\S+ [A-Za-z0-9+/]+={0,3}( .*)?", line):
        raise ValueError("an authorized key is one line: type, base64, optional comment; no options")
    if line.split()[0] not in KEY_TYPES:
        raise ValueError(f"key type {line.split()[0]!r} is not accepted; accepted are {', '.join(KEY_TYPES)}")


def parse_fleet(text: str, *, where: str = "fleet/clawdlets.json") -> Fleet:
    """The fleet in ``text`` (JSON). Every fault is named with its key path; FleetError.

    ``$schema`` at the top and ``$comment`` in any object are for people and editors, and are dropped.
    """
    raw = fleetfile.parse(text, where=where)
    if isinstance(raw, dict):
        raw.pop("$schema", None)
    try:
        return Fleet.model_validate_json(json.dumps(fleetfile.without_comments(raw)))
    except RecursionError:
        raise FleetError("is nested too deeply", where=where) from None
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors()]
        raise FleetError(
            "\n".join(["is not an acceptable fleet:", *(f"  {fault}" for fault in faults)]), where=where
        ) from None


def load_fleet(path: Path) -> Fleet:
    """The fleet in the file ``path``; FleetError when it is missing or wrong."""
    return parse_fleet(fleetfile.read_text(path), where=str(path))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    schema = Fleet.model_json_schema(by_alias=True)
    schema["properties"]["$schema"] = {"type": "string"}
    for part in [schema, *schema.get("$defs", {}).values()]:
        if part.get("type") == "object" and "properties" in part:
            part["properties"]["$comment"] = {"type": "string"}
            for value in part["properties"].values():
                _name_the_keys(value)
    schema["x-rules"] = {  # of the rules that no schema can say: read by nix/rules.nix, which has them too
        "ageRecipient": AGE_RECIPIENT,
        "botUserPrefix": bot_user(""),
        "keyTypes": KEY_TYPES,
        "reservedSecrets": list(RESERVED_SECRETS),
        "unencryptedSuffix": "_unencrypted",
        "worldOpenBelowPrefix": WORLD_OPEN_BELOW_PREFIX,
        "proxyVariables": PROXY_VARIABLES,
        **RULES,
    }
    plain: dict[str, Any] = json.loads(json.dumps(schema))
    return plain


def _name_the_keys(part: dict[str, Any]) -> None:
    """A map takes keys of its pattern and a comment, and no others: an editor then marks a wrong name at once."""
    if part.get("patternProperties"):
        part["properties"] = {"$comment": {"type": "string"}}
        part["additionalProperties"] = False


def _describe(fault: Any) -> str:
    """One fault as ``key.path: what is wrong``, with a suggestion for a misspelt key. Values are not repeated."""
    location = [part for part in fault["loc"] if part != "[key]"]
    path = _plain(".".join(str(part) for part in location)) or "(top)"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{path}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{path}: is required"
    if fault["type"] == "union_tag_invalid":  # pydantic's own words would repeat the value
        return f"{path}.{fault['ctx']['discriminator'].strip(chr(39))}: is none of {fault['ctx']['expected_tags']}"
    return f"{path}: {_plain(fault['msg'].removeprefix('Value error, '))}"


def _plain(text: str) -> str:
    """``text`` for a terminal: a key or value of the file may hold anything, control characters too."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _known_keys(location: list[Any]) -> list[str]:
    """The keys that the model at ``location`` knows."""
    model: Any = Fleet
    inside_map = False
    for part in location:
        if inside_map:  # this part is a key of a map, such as a host's name
            inside_map = False
            continue
        info = next((field for field in model.model_fields.values() if field.alias == part), None)
        if info is None:
            return []
        annotation = info.annotation
        arguments = [argument for argument in get_args(annotation) if isinstance(argument, type)]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
        elif arguments and issubclass(arguments[-1], BaseModel):
            model, inside_map = arguments[-1], True
        else:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]
