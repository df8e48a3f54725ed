"""The check catalogue, read from the suite's own markers: what ``verify --explain`` and the reports know of a check."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

from clawdlets_ops.errors import VerifyError
from clawdlets_ops.verify import suite


@dataclass(frozen=True)
class Check:
    """One check. ``claim`` is the line of the security model it stands for; ``how`` says what is looked at; ``vantage`` is
    host, client, outside, api or repository; ``expect`` is what must be seen."""

    id: str
    severity: str
    claim: str
    fix: str
    vantage: str
    how: str
    expect: str = ""

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.id} ({self.severity})",
                f"  claim    {self.claim}",
                f"  seen by  {self.vantage}",
                *([f"  expected {self.expect}"] if self.expect else []),
                *([f"  how      {self.how}"] if self.how else []),
                f"  to do    {self.fix}",
            ]
        )


def catalogue() -> tuple[Check, ...]:
    """Every check of the shipped suite, by id."""
    found = []
    for module in pkgutil.iter_modules(suite.__path__, f"{suite.__name__}."):
        if not module.name.rpartition(".")[2].startswith("test_"):
            continue
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            for mark in getattr(function, "pytestmark", []):
                if name.startswith("test_") and mark.name == "check":
                    found.append(
                        Check(
                            id=mark.kwargs["id"],
                            severity=mark.kwargs["severity"],
                            claim=mark.kwargs["claim"],
                            fix=mark.kwargs["fix"],
                            vantage=mark.kwargs.get("vantage", "host"),
                            expect=mark.kwargs.get("expect", ""),
                            how=" ".join((function.__doc__ or "").split()),
                        )
                    )
    return tuple(sorted(found, key=lambda check: check.id))


def find(ident: str, checks: Sequence[Check] | None = None) -> Check:
    """The check called ``ident``, in any case; VerifyError with the nearest id when there is none."""
    known = {check.id: check for check in (catalogue() if checks is None else checks)}
    if (check := known.get(ident.upper())) is not None:
        return check
    near = difflib.get_close_matches(ident.upper(), known, n=1)
    raise VerifyError(
        f"there is no check {ident!r}" + (f"; did you mean {near[0]}?" if near else ""),
        fix=f"there are {', '.join(known)}",
    )
