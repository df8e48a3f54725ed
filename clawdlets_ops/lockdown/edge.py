"""The cloud's side of a door: its rules as they were, kept in the runtime dir, and putting them back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clawdlets_ops.errors import ClawdletsError, CloudError, SettingsError
from clawdlets_ops.files import ensure_dir, read_private, write_atomic
from clawdlets_ops.hetzner import WINDOW_LABEL, Cloud, Firewall, FirewallRule
from clawdlets_ops.layout import Layout

ORDER, DECISION, CLOSING, WATCHDOG, LOG = (
    "order.json", "decision.json", "closing", "watchdog.json", "watchdog.log",
)  # fmt: skip
Kind = Literal["lockdown", "window"]


@dataclass(frozen=True)
class Order:
    """What a watchdog is to do, and all that it needs for it but the token; kept as ``order.json`` (0600), nothing secret.

    ``rules`` and ``labels`` are put back on the firewall when ``deadline_s`` have passed since it was armed without a
    decision; for a lockdown also as soon as the operator's command is gone without one. ``ways`` are the host's tailnet
    addresses, ``journal`` is the run's folder. ``closing`` says that the edge was otherwise already when this was taken: an
    earlier lockdown had closed it and did not come to its end, or there is a window. It is part of the order, so that
    there is no moment in which one is known without the other.
    """

    id: str
    kind: Kind
    host: str
    operator: str
    endpoint: str
    server_id: int
    firewall_id: int
    firewall: str
    rules: tuple[FirewallRule, ...]
    labels: Mapping[str, str]
    taken_at: str
    deadline_s: float
    restore_s: float
    poll_s: float
    owner: str
    user: str
    identity_file: str
    pin: str
    ways: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    journal: str = ""
    until: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    closing: bool = False

    @property
    def opens(self) -> bool:
        """Whether tcp/22 is open at the edge once its rules are back."""
        return any(rule.covers_tcp(22) for rule in self.rules)

    def as_json(self) -> dict[str, Any]:
        """JSON-able form."""
        rules = [
            {
                "direction": rule.direction,
                "protocol": rule.protocol,
                "port": rule.port,
                "networks": list(rule.networks),
                "description": rule.description,
            }
            for rule in self.rules
        ]
        return {**vars(self), "rules": rules, "labels": dict(self.labels), "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Order:
        """Read back; ValueError, KeyError, TypeError for anything else."""
        rules = tuple(
            FirewallRule(
                rule["direction"], rule["protocol"], rule["port"], tuple(rule["networks"]), rule["description"]
            )
            for rule in raw["rules"]
        )
        lists = {name: tuple(raw[name]) for name in ("ways", "public")}
        return cls(**{**raw, **lists, "rules": rules})


def write_order(layout: Layout, order: Order) -> None:
    """Keep it, in the place of an earlier one, in one step: what else was said of that bears its id, and counts for no other."""
    folder = ensure_dir(ensure_dir(layout.runtime / "lockdown") / order.host)
    write_atomic(folder / ORDER, json.dumps(order.as_json(), indent=1) + "\n")


def read_order(layout: Layout, host: str) -> Order | None:
    """The order on record, decided or not; None without one. SettingsError when the file is not as we write it."""
    path = layout.lockdown_dir(host) / ORDER
    if not path.exists():
        return None
    try:
        return Order.from_json(json.loads(read_private(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"is not as we write it ({type(error).__name__})", where=str(path), fix="look at it, then remove it"
        ) from None


def decide(layout: Layout, order: Order, decision: str) -> None:
    """Tell the watchdog, and whoever comes later, how it ended."""
    path = layout.lockdown_dir(order.host) / DECISION
    write_atomic(path, json.dumps({"id": order.id, "decision": decision}) + "\n")


def keep_again(layout: Layout, order: Order, *, take_back: str) -> None:
    """Have an earlier order stand again, since what was to take its place did not begin: undecided again, where
    what was said of it is ``take_back``."""
    if decision_of(layout, order) == take_back:
        (layout.lockdown_dir(order.host) / DECISION).unlink(missing_ok=True)
    write_order(layout, order)


def decision_of(layout: Layout, order: Order) -> str:
    """How it ended; "" while nobody has said."""
    return str(_told(layout, order, DECISION).get("decision", ""))


def mark_closing(layout: Layout, order: Order) -> None:
    """From now on the edge may be otherwise than the order has it."""
    write_atomic(layout.lockdown_dir(order.host) / CLOSING, json.dumps({"id": order.id}) + "\n")


def may_be_closed(layout: Layout, order: Order) -> bool:
    """Whether that was said, or was so from the beginning."""
    return order.closing or bool(_told(layout, order, CLOSING))


def _told(layout: Layout, order: Order, name: str) -> Mapping[str, Any]:
    path = layout.lockdown_dir(order.host) / name
    if not path.exists():
        return {}
    try:
        raw = json.loads(read_private(path))
        return raw if raw["id"] == order.id else {}
    except (ValueError, KeyError, TypeError):
        return {}


def unfinished(layout: Layout, host: str) -> Order | None:
    """The order that nobody has decided, if there is one."""
    order = read_order(layout, host)
    return None if order is None or decision_of(layout, order) else order


def put_back(
    cloud: Cloud,
    order: Order,
    *,
    within_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Have the firewall as the order has it, and wait until the server shows it applied; whether anything was changed.

    What is there is looked at before each attempt: nothing is asked for twice that may have been done. A window's label is
    there before its rule and goes after it, once the server shows the rules applied: whoever reads it is the last clock.
    This is the last resort, so whatever the API answers, it is asked again. CloudError after ``within_s``, with what was
    seen last.
    """
    deadline = clock() + within_s
    changed, last = False, "nothing"
    while True:
        try:
            firewall = cloud.firewall(order.firewall)
            if firewall is None or firewall.id != order.firewall_id:
                raise CloudError(f"there is no firewall {order.firewall} with id {order.firewall_id}", where=order.host)
            other_rules = firewall.rules != tuple(sorted(order.rules))
            other_labels = dict(firewall.labels) != dict(order.labels)
            status = "" if other_rules else _status(cloud, order)
            if status == "applied" and not other_labels:
                return changed
            if other_rules or other_labels:
                last = "it was asked for, and the API does not show it"
            if status not in ("", "applied"):
                last = f"its rules are back, and it is {status}"
            if other_labels and (status == "applied" or WINDOW_LABEL in order.labels):
                changed = True
                cloud.set_labels(firewall, order.labels)
            if other_rules:
                changed = True
                cloud.set_rules(firewall, order.rules)
        except ClawdletsError as error:
            last = error.what
        except Exception as error:  # an answer that python-hcloud stumbles over; its text may quote anything
            last = f"the API's answer was not understood ({type(error).__name__})"
        if clock() >= deadline:
            raise CloudError(
                f"not as before within {within_s:g} s: {last}",
                where=f"firewall {order.firewall}",
                fix=f"look at the project's console: its rules should be those in {ORDER} of the runtime dir",
            )
        sleep(order.poll_s)


def _status(cloud: Cloud, order: Order) -> str:
    server = cloud.server(order.host)
    return server.firewalls.get(order.firewall_id, "not attached") if server else "without a server"


def differs(firewall: Firewall, order: Order) -> bool:
    """Whether rules or labels are otherwise than the order has them."""
    return firewall.rules != tuple(sorted(order.rules)) or dict(firewall.labels) != dict(order.labels)
