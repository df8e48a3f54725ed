"""The API's answers, as python-hcloud gives them, as plain values."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from hcloud import APIException

from clawdlets_ops.cloud import Firewall, FirewallRule, Offer, PlacementGroup, PrimaryIp, Server, SshKey, Volume
from clawdlets_ops.errors import CloudError


@contextmanager
def understood(what: str, endpoint: str, kind: type[CloudError] = CloudError) -> Iterator[None]:
    """What python-hcloud stumbles over (a gateway's answer, half of one) becomes an error of ours, without its text."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, requests.exceptions.RequestException):
            raise
        raise kind(f"{what}: the API's answer was not understood ({type(error).__name__})", where=endpoint) from None


def server(found: Any) -> Server:
    """A server, as the API shows it."""
    public = found.public_net
    ipv6 = None
    if public and public.ipv6:
        ipv6 = str(ipaddress.ip_network(public.ipv6.ip)[1])  # Hetzner gives a /64; the machine takes the first address
    return Server(
        id=found.id,
        name=found.name,
        status=found.status,
        labels=dict(found.labels or {}),
        server_type=found.server_type.name,
        location=found.location.name if getattr(found, "location", None) else "",
        ipv4=public.ipv4.ip if public and public.ipv4 else None,
        ipv6=ipv6,
        firewalls={part.firewall.id: part.status for part in (public.firewalls if public else ())},
        protected=is_protected(found, "delete") and is_protected(found, "rebuild"),
        volumes=frozenset(int(volume.id) for volume in found.volumes or ()),
        primary_ips={
            family: int(address.id)
            for family, address in (("ipv4", public and public.primary_ipv4), ("ipv6", public and public.primary_ipv6))
            if address
        },
        placement_group=int(found.placement_group.id) if found.placement_group else None,
        image=found.image.name if found.image else None,
        private_addresses=tuple(str(network.ip) for network in found.private_net or ()),
        created=found.created.isoformat() if found.created else "",
    )


def is_protected(found: Any, protection: str) -> bool:
    """Whether it is protected against ``protection``."""
    return bool((found.protection or {}).get(protection))


def ssh_key(found: Any) -> SshKey:
    """An SSH key."""
    return SshKey(
        int(found.id or 0), found.name or "", dict(found.labels or {}), found.fingerprint or "", found.public_key or ""
    )


def placement_group(found: Any) -> PlacementGroup:
    """A placement group."""
    members = frozenset(int(member) for member in found.servers or ())
    return PlacementGroup(int(found.id or 0), found.name or "", dict(found.labels or {}), members)


def volume(found: Any) -> Volume:
    """A volume."""
    attached = int(found.server.id) if found.server else None
    return Volume(
        int(found.id), found.name, dict(found.labels or {}), int(found.size), attached, is_protected(found, "delete")
    )


def primary_ip(found: Any) -> PrimaryIp:
    """A primary IP."""
    return PrimaryIp(
        id=int(found.id),
        name=found.name,
        labels=dict(found.labels or {}),
        family=found.type,
        server=int(found.assignee_id) if found.assignee_id else None,
        auto_delete=bool(found.auto_delete),
        protected=is_protected(found, "delete"),
    )


def offer(found: Any) -> Offer:
    """``available`` is of each location since April 2026; one that is deprecated there takes no new orders."""
    here = [place for place in found.locations or () if place.deprecation is None]
    places = frozenset(place.location.name for place in here if getattr(place, "available", None) is not False)
    return Offer(found.name, found.architecture, places)


def firewall(found: Any) -> Firewall:
    """A firewall, its rules sorted."""
    return Firewall(
        id=found.id,
        name=found.name,
        labels=dict(found.labels or {}),
        rules=tuple(
            sorted(
                FirewallRule(
                    direction=rule.direction,
                    protocol=rule.protocol,
                    port=rule.port,
                    networks=tuple(sorted(rule.source_ips if rule.direction == "in" else rule.destination_ips)),
                    description=rule.description or "",
                )
                for rule in found.rules or ()
            )
        ),
    )


def code(error: APIException) -> str:
    """Why something was refused, with what Hetzner's support asks for."""
    return f"{error.code}, correlation id {error.correlation_id}" if error.correlation_id else str(error.code)
