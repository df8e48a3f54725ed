"""Where operators can look from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Vantage:
    """A place to look from. ``via`` is put before a probe's command line; ``controls`` maps the address family
    (4, 6) to an ``address, port`` that this vantage can reach when its network works at all: without that positive
    control a closed port proves nothing. ``bash``: the place has no Python, the probe is a bash script there."""

    name: str
    side: Literal["internet", "tailnet"]
    via: tuple[str, ...] = ()
    controls: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    bash: bool = False
