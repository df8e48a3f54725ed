"""What can be known to fail before anything is paid for: the token, the image, and a server type that can be had."""

from __future__ import annotations

from collections.abc import Iterable

from clawdlets_ops.errors import CloudError, SettingsError
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Cloud, Offer

ARCHITECTURE = {"x86_64-linux": "x86", "aarch64-linux": "arm"}


def require_writable(cloud: Cloud) -> None:
    """SettingsError for a token that may only read. Asked before an order, not when only a plan is shown: the question is
    a change that cannot change anything, and a look asks no such thing."""
    if not cloud.may_write():
        raise SettingsError(
            "the token may only read",
            where="HCLOUD_TOKEN",
            fix="make a token with read and write permission in the project's console, and put it in place",
        )


def preflight(host: str, declared: Host, cloud: Cloud) -> str:
    """The server type to order; CloudError for an order that cannot be met.

    Two requests, answered from memory when they were asked lately. The API does not tell a project's limits: what is
    above them is refused when it is ordered, and then said (resource_limit_exceeded).
    """
    order, architecture = declared.hetzner, ARCHITECTURE[declared.system]
    chosen = choose_type(host, declared, cloud.offers())
    if not cloud.has_image(order.image, architecture):
        raise CloudError(
            f"there is no system image {order.image!r} for {architecture}",
            where=f"hosts.{host}.hetzner.image",
            fix="debian-12 and debian-13 are known to work",
        )
    return chosen


def choose_type(host: str, declared: Host, offers: Iterable[Offer]) -> str:
    """The first of the declared types that can be ordered in the location; CloudError that says why none can. Pure."""
    order, wanted = declared.hetzner, ARCHITECTURE[declared.system]
    by_name = {offer.name: offer for offer in offers}
    where = f"hosts.{host}.hetzner.serverType"
    faults = []
    for name in order.server_types:
        offer = by_name.get(name)
        if offer is None:
            faults.append(f"{name}: there is no such type")
        elif offer.architecture != wanted:
            faults.append(f"{name}: is {offer.architecture}, and {declared.system} needs {wanted}")
        elif order.location not in offer.available_in:
            places = ", ".join(sorted(offer.available_in)) or "nowhere now"
            faults.append(f"{name}: not to be had in {order.location} (in {places})")
        else:
            return name
    known = sorted(
        offer.name
        for offer in by_name.values()
        if offer.architecture == wanted and order.location in offer.available_in
    )
    raise CloudError(
        f"no declared server type can be ordered: {'; '.join(faults)}",
        where=where,
        fix=f"{order.location} has {', '.join(known) or 'nothing for this system'} now: name one in serverType or "
        "serverTypeFallbacks, or choose another location",
    )
