"""Pages for people: a template of this package as HTML, everything that is put into it escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined


def render(
    package: str, template: str, *, filters: Mapping[str, Callable[..., str]] | None = None, **values: object
) -> str:
    """``template`` (a file in ``package``) with ``values``; jinja2's UndefinedError for one that is missing."""
    text = resources.files(package).joinpath(template).read_text(encoding="utf-8")
    environment: Any = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters or {})
    page: str = environment.from_string(text).render(**values)
    return page
