"""What the emulated cloud sells: locations, server types, images and ISOs with prices, in the API's own JSON shape.

Names, sizes and most ids are those of the public catalogue (November 2026). Prices are round figures of the lab, never a
quote. For each image name x86 comes before arm: old clients take the first match of a name and ask for no architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

Json = dict[str, Any]

_TRAFFIC_BYTES: Final = 20 * 1024**4
_VAT: Final = Decimal("1.19")


def _location(location_id: int, name: str, country: str, city: str, latitude: float, longitude: float) -> Json:
    return {
        "id": location_id,
        "name": name,
        "description": f"{city} DC Park 1",
        "country": country,
        "city": city,
        "latitude": latitude,
        "longitude": longitude,
        "network_zone": "eu-central",
    }


LOCATIONS: Final[Sequence[Json]] = (
    _location(1, "fsn1", "DE", "Falkenstein", 50.47612, 12.370071),
    _location(2, "nbg1", "DE", "Nuremberg", 49.452102, 11.076665),
    _location(3, "hel1", "FI", "Helsinki", 60.169855, 24.938379),
)


def _price(net: Decimal) -> Json:
    return {"net": f"{net:.10f}", "gross": f"{net * _VAT:.10f}"}


def _server_type(
    type_id: int, name: str, category: str, cores: int, memory_gb: int, disk_gb: int, monthly: str, arch: str = "x86"
) -> Json:
    price = Decimal(monthly)
    return {
        "id": type_id,
        "name": name,
        "description": name.upper(),
        "category": category,
        "cores": cores,
        "memory": float(memory_gb),
        "disk": disk_gb,
        "storage_type": "local",
        "cpu_type": "shared",
        "architecture": arch,
        "deprecated": False,
        "deprecation": None,
        "included_traffic": None,
        "prices": [
            {
                "location": location["name"],
                "price_hourly": _price(price / 624),
                "price_monthly": _price(price),
                "included_traffic": _TRAFFIC_BYTES,
                "price_per_tb_traffic": _price(Decimal(1)),
            }
            for location in LOCATIONS
        ],
        "locations": [
            {
                "id": location["id"],
                "name": location["name"],
                "available": True,
                "recommended": True,
                "deprecation": None,
            }
            for location in LOCATIONS
        ],
    }


SERVER_TYPES: Final[Sequence[Json]] = (
    _server_type(45, "cax11", "cost_optimized", 2, 4, 40, "4", "arm"),
    _server_type(110, "cpx22", "regular_purpose", 2, 4, 80, "7"),
    _server_type(114, "cx23", "cost_optimized", 2, 4, 40, "4"),
    _server_type(115, "cx33", "cost_optimized", 4, 8, 80, "6"),
    _server_type(116, "cx43", "cost_optimized", 8, 16, 160, "10"),
)


def _image(image_id: int, name: str, arch: str, created: str, deprecated: str | None = None) -> Json:
    flavor, version = name.split("-")
    return {
        "id": image_id,
        "type": "system",
        "status": "available",
        "name": name,
        "description": f"{flavor.capitalize()} {version}",
        "image_size": None,
        "disk_size": 5,
        "created": created,
        "created_from": None,
        "bound_to": None,
        "os_flavor": flavor,
        "os_version": version,
        "architecture": arch,
        "rapid_deploy": True,
        "protection": {"delete": False},
        # The provider still reads `deprecated`, python-hcloud since 2.24 `deprecation`.
        "deprecated": deprecated,
        "deprecation": None if deprecated is None else {"announced": deprecated, "unavailable_after": deprecated},
        "deleted": None,
        "labels": {},
    }


IMAGES: Final[Sequence[Json]] = (
    _image(45557056, "debian-11", "x86", "2021-08-16T11:12:01+00:00", "2026-08-31T00:00:00+00:00"),
    _image(114690387, "debian-12", "x86", "2023-06-13T06:00:02+00:00"),
    _image(114690389, "debian-12", "arm", "2023-06-13T06:00:03+00:00"),
    _image(161547269, "ubuntu-24.04", "x86", "2024-04-25T13:26:27+00:00"),
    _image(161547270, "ubuntu-24.04", "arm", "2024-04-25T13:26:51+00:00"),
    _image(310557660, "debian-13", "x86", "2025-08-11T06:00:02+00:00"),
    _image(310557661, "debian-13", "arm", "2025-08-11T06:00:03+00:00"),
)


def _iso(iso_id: int, name: str, description: str, arch: str | None) -> Json:
    return {
        "id": iso_id,
        "name": name,
        "description": description,
        "type": "public",
        "architecture": arch,
        "deprecated": None,
        "deprecation": None,
    }


ISOS: Final[Sequence[Json]] = (
    _iso(8637, "virtio-win-0.1.248.iso", "virtio 0.1.248", None),
    _iso(122630, "nixos-minimal-25.05-x86_64-linux.iso", "NixOS 25.05 (amd64/minimal)", "x86"),
    _iso(122631, "nixos-minimal-25.05-aarch64-linux.iso", "NixOS 25.05 (arm64/minimal)", "arm"),
)

CATALOGUE: Final[dict[str, Sequence[Json]]] = {
    "locations": LOCATIONS,
    "server_types": SERVER_TYPES,
    "images": IMAGES,
    "isos": ISOS,
}

_BY_ID: Final = {kind: {row["id"]: row for row in rows} for kind, rows in CATALOGUE.items()}


def find(kind: str, row_id: int) -> Json | None:
    """A row of the catalogue, if there is one."""
    return _BY_ID[kind].get(row_id)


def by_id(kind: str, row_id: int) -> Json:
    """A row of the catalogue; KeyError."""
    return _BY_ID[kind][row_id]


def price(net: str) -> Json:
    """A sum in EUR and what it is with tax, in the API's shape."""
    return _price(Decimal(net))


def pricing() -> Json:
    """GET /pricing: round figures of the lab, never a quote."""
    everywhere = [location["name"] for location in LOCATIONS]
    return {
        "currency": "EUR",
        "vat_rate": "19.000000",
        "image": {"price_per_gb_month": price("0.01")},
        "volume": {"price_per_gb_month": price("0.05")},
        "floating_ip": {"price_monthly": price("3")},
        "floating_ips": [],
        "primary_ips": [
            {
                "type": family,
                "prices": [
                    {"location": name, "price_hourly": price(hourly), "price_monthly": price(monthly)}
                    for name in everywhere
                ],
            }
            for family, hourly, monthly in (("ipv4", "0.001", "0.5"), ("ipv6", "0", "0"))
        ],
        "server_backup": {"percentage": "20.000000"},
        "server_types": [{key: row[key] for key in ("id", "name", "prices")} for row in SERVER_TYPES],
        "load_balancer_types": [],
        "traffic": {"price_per_tb": price("0")},
    }


def datacenters() -> list[Json]:
    """GET /datacenters as it was before the API dropped it, for old clients: one per location."""
    types = [row["id"] for row in SERVER_TYPES]
    return [
        {
            "id": location["id"] + 1,
            "name": f"{location['name']}-dc{number}",
            "description": f"{location['city']} {number} virtual DC {number}",
            "location": location,
            "server_types": {"supported": types, "available": types, "available_for_migration": types},
        }
        for location, number in zip(LOCATIONS, (14, 3, 2), strict=True)
    ]
