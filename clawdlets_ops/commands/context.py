"""What commands are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.project import load_project

hosts_option = click.option("--host", "hosts", multiple=True, help="Default: every host of the fleet.")


def with_project(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the loaded project as its first argument."""

    @click.pass_context
    @wraps(function)
    def wrapped(context: click.Context, /, *arguments: Any, **options: Any) -> Any:
        return function(load_project(context.obj, context.meta[ENVIRON]), *arguments, **options)

    return wrapped
