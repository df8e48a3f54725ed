"""The plan gate: a saved plan's JSON against what its stage is about. Pure.

What is not understood is refused: another plan format, an action or a resource that the stage does not name, an attribute
that it does not change. A delete or replacement of a server, a primary IP or a volume needs the host's name.
JSON form: opentofu.org/docs/internals/json-format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from clawdlets_ops.errors import PlanRefused

FORMAT_MAJOR = "1"
PROVIDER = "hetznercloud/hcloud"

# Their loss is the loss of a host, of its address, or of its data.
PRECIOUS = ("hcloud_server", "hcloud_volume", "hcloud_primary_ip")

# How the provider behaves, kept in the state alone; an import has them empty. The API never sees them.
_ONLY_IN_STATE = frozenset(
    {
        "allow_deprecated_images",
        "automount",
        "ignore_remote_firewall_ids",
        "keep_disk",
        "shutdown_before_deletion",
    }
)
_PROTECTION = frozenset({"delete_protection", "rebuild_protection"})


@dataclass(frozen=True)
class Stage:
    """What a stage is about: the resource types that it may create, the attributes per type that it may change in place,
    and whether it may delete."""

    name: str
    creates: frozenset[str] = frozenset()
    updates: Mapping[str, frozenset[str]] = field(default_factory=dict)
    deletes: bool = False


PROVISION = Stage(
    "provision",
    creates=frozenset(
        {
            "hcloud_ssh_key",
            "hcloud_firewall",
            "hcloud_server",
            "hcloud_volume",
            "hcloud_primary_ip",
            "hcloud_placement_group",
        }
    ),
    updates={
        "hcloud_ssh_key": frozenset({"name", "labels"}),
        "hcloud_firewall": frozenset({"name", "labels", "rule"}),
        "hcloud_server": frozenset({"labels", "firewall_ids"}) | _PROTECTION,
        "hcloud_volume": frozenset({"labels", "size", "server_id", "delete_protection"}),
        "hcloud_primary_ip": frozenset({"labels", "auto_delete", "delete_protection"}),
        "hcloud_placement_group": frozenset({"labels"}),
    },
)
"""Making what is missing, and what can be changed while the server runs on."""

EXPOSURE = Stage(
    "lockdown",
    creates=frozenset({"hcloud_firewall"}),
    updates={"hcloud_firewall": frozenset({"rule"}), "hcloud_server": frozenset({"firewall_ids"})},
)
"""The rules at the edge, and that they are in force; nothing else."""

UNPROTECT = Stage(
    "unprotect",
    updates={
        "hcloud_server": _PROTECTION,
        "hcloud_volume": frozenset({"delete_protection"}),
        "hcloud_primary_ip": frozenset({"delete_protection"}),
        "hcloud_placement_group": frozenset({"labels"}),
    },
)
"""The first of the two steps of a destruction: taking the delete protection off."""

DESTROY = Stage("destroy", deletes=True)
"""The second step, of a host that was named."""


@dataclass(frozen=True)
class Change:
    """One planned change: ``address`` in the configuration, ``actions`` as the plan has them (create, update, delete);
    ``attributes`` that change in place; ``imported`` when the resource is taken over from the cloud."""

    address: str
    type: str
    actions: tuple[str, ...]
    attributes: frozenset[str] = frozenset()
    imported: bool = False

    @property
    def verb(self) -> str:
        """The actions as one word."""
        return "replace" if set(self.actions) == {"create", "delete"} else "+".join(self.actions)

    def __str__(self) -> str:
        if self.imported and set(self.actions) <= {"no-op"}:
            return f"adopt {self.address}"
        told = f" ({', '.join(sorted(self.attributes))})" if self.attributes and self.actions == ("update",) else ""
        return f"{'adopt and ' if self.imported else ''}{self.verb} {self.address}{told}"


def gate(
    plan: Mapping[str, Any],
    *,
    stage: Stage,
    host: str,
    exists: Collection[str] = (),
    may_replace: bool = False,
) -> tuple[Change, ...]:
    """The plan's changes, when all of them are what ``stage`` is about; PlanRefused otherwise.

    ``exists`` are the addresses that the API showed: none of these is to be made again. ``may_replace``: the operator
    named this host, and what is precious may be deleted or replaced too.
    """
    where = f"tofu plan of {host}"
    _understood(plan, where)
    said = _configured(plan)
    found = [_change(entry, said.get(str(entry.get("address"))), where) for entry in plan.get("resource_changes") or ()]
    changes = tuple(change for change in found if change is not None)
    for change in changes:
        if change.type in PRECIOUS and "delete" in change.actions and not (stage.deletes or may_replace):
            raise PlanRefused(
                f"the plan would {change}: a server, its address or its disk is never deleted unless named",
                where=where,
                fix=f"undo what differs in the fleet file; or, if what is on it may be lost: --allow-replace {host}",
            )
    for change in changes:
        if change.actions == ("create",) and change.address in exists:
            raise PlanRefused(
                f"the plan would {change}, which exists already",
                where=where,
                fix="run again; if it stays, look at the state (tofu state list in the working directory)",
            )
    for change in changes:
        if not _is_about(change, stage, may_replace=may_replace):
            raise PlanRefused(
                f"the plan would {change}, which the {stage.name} stage is not about",
                where=where,
                fix=_FIX.get(stage.name, "look at what differs, and change one thing at a time"),
            )
    for entry in plan.get("resource_changes") or ():
        _values(entry, stage, where)
    return changes


_FIX = {"lockdown": "run the provision stage first: something else differs from the fleet file"}


def tainted(plan: Mapping[str, Any]) -> set[str]:
    """Addresses that the plan replaces only because their creation did not end well."""
    return {
        str(entry.get("address"))
        for entry in plan.get("resource_changes") or ()
        if entry.get("action_reason") == "replace_because_tainted"
    }


def _understood(plan: Mapping[str, Any], where: str) -> None:
    version = str(plan.get("format_version", ""))
    if version.partition(".")[0] != FORMAT_MAJOR:
        raise PlanRefused(
            f"the plan has the format {version or 'unknown'}, this program reads {FORMAT_MAJOR}.x",
            where=where,
            fix="use an OpenTofu that this version of clawdlets-ops knows (1.10 to 1.12)",
        )
    if plan.get("errored") or plan.get("complete") is False:
        raise PlanRefused("the plan is not complete", where=where, fix="run again")


def _configured(plan: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The attributes that the configuration sets, by address."""
    module = (plan.get("configuration") or {}).get("root_module") or {}
    return {str(one["address"]): frozenset(one.get("expressions") or ()) for one in module.get("resources") or ()}


def _change(entry: Mapping[str, Any], configured: frozenset[str] | None, where: str) -> Change | None:
    """One entry of ``resource_changes``; None when it changes nothing."""
    change = entry.get("change") or {}
    actions = tuple(change.get("actions") or ("?",))
    address, kind, mode = str(entry.get("address", "?")), str(entry.get("type", "?")), entry.get("mode")
    imported = bool(change.get("importing"))
    if mode == "data" and set(actions) <= {"no-op", "read", "delete"}:
        return None  # a data source is nothing in the cloud
    if entry.get("deposed"):
        raise PlanRefused(
            f"the state holds a left-over of an interrupted replacement ({address}, deposed {entry['deposed']})",
            where=where,
            fix="look at the project's console; remove that one there, and take it out of the state",
        )
    if mode != "managed" or PROVIDER not in str(entry.get("provider_name", "")):
        raise PlanRefused(f"the plan would touch {address}, which is none of ours", where=where)
    if actions == ("no-op",) and not imported:
        return None
    attributes = _attributes(change, configured) if actions == ("update",) else frozenset()
    return Change(address, kind, actions, attributes, imported)


def _attributes(change: Mapping[str, Any], configured: frozenset[str] | None) -> frozenset[str]:
    """The attributes that change. One whose value is not known yet counts too, unless the configuration is known and does
    not set it: then it is the API's own, shown again after every change."""
    before, after = change.get("before") or {}, change.get("after") or {}
    unknown = {name for name, value in (change.get("after_unknown") or {}).items() if _any(value)}
    if configured is not None:
        unknown &= configured
    differing = {name for name in {*before, *after} if name in after and before.get(name) != after[name]}
    return frozenset(differing | unknown) - _ONLY_IN_STATE


def _any(value: Any) -> bool:
    """Whether a (nested) marker says that something is unknown."""
    if isinstance(value, Mapping):
        return any(map(_any, value.values()))
    if isinstance(value, list):
        return any(map(_any, value))
    return bool(value)


def _is_about(change: Change, stage: Stage, *, may_replace: bool) -> bool:
    """Whether the stage is about this change; an action that is not known is nobody's."""
    match tuple(sorted(change.actions)):
        case ("no-op",):  # only taken over
            return True
        case ("create",):
            return change.type in stage.creates
        case ("update",):
            return change.attributes <= stage.updates.get(change.type, frozenset())
        case ("delete",):
            return stage.deletes or (may_replace and change.type in PRECIOUS)
        case ("create", "delete"):
            return may_replace and change.type in PRECIOUS
        case _:
            return False


def _values(entry: Mapping[str, Any], stage: Stage, where: str) -> None:
    """Values that no stage wants, whatever else is allowed."""
    change, kind = entry.get("change") or {}, entry.get("type")
    before, after = change.get("before") or {}, change.get("after") or {}
    if entry.get("mode") != "managed" or not after:
        return
    if kind == "hcloud_firewall" and not after.get("rule") and set(change.get("actions") or ()) & {"create", "update"}:
        raise PlanRefused(
            f"the plan would leave {entry['address']} without a rule: the provider does not carry that out",
            where=where,
            fix="report this: a rendered rule set is never empty",
        )
    if kind == "hcloud_volume" and before and int(after.get("size") or 0) < int(before.get("size") or 0):
        raise PlanRefused(
            f"the plan would make {entry['address']} smaller ({before['size']} to {after['size']} GB), and a volume only grows",
            where=where,
            fix=f"declare {before['size']} GB or more",
        )
    if stage is UNPROTECT and any(after.get(name) and not before.get(name) for name in _PROTECTION):
        raise PlanRefused(f"the plan would protect {entry['address']} instead", where=where)
