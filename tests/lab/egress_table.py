"""The table of docs/reference/egress-matrix.md, made from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEAD = """\
# What gets out, measured

Made by `CLAWDLETS_WRITE_DOCS=1 pytest tests/lab/test_egress.py` from real connections on a machine of the lab: web, mail, UDP
and DNS destinations outside it, the metadata service, and each mode of `egress.mode`. *mail* is TCP 25, 465, 587 and 2525, *web* is
443, *other TCP* is 22. The bot has no word of its own in the fleet file, so it is as its host; by way of the proxy it reaches
what is on the list besides. The same test fails when a cell is not what was measured.
"""


@dataclass(frozen=True)
class Cell:
    """One destination as seen by one principal; ``state`` is open or closed."""

    mode: str
    who: str
    kind: str
    family: int
    state: str


def render(cells: Sequence[Cell], modes: Sequence[str], principals: Sequence[str]) -> str:
    """A table for each mode: principals by destinations; several attempts of one kind must agree."""
    kinds = list(dict.fromkeys((cell.kind, cell.family) for cell in cells))
    kinds.sort(key=lambda kind: (["web", "mail", "other TCP", "UDP", "DNS", "metadata"].index(kind[0]), kind[1]))
    lines = [HEAD]
    for mode in modes:
        lines += [f"## {mode}", "", "| | " + " | ".join(f"{kind} v{family}" for kind, family in kinds) + " |"]
        lines.append("|---" * (len(kinds) + 1) + "|")
        for who in principals:
            row = []
            for kind in kinds:
                states = {c.state for c in cells if (c.mode, c.who, c.kind, c.family) == (mode, who, *kind)}
                row.append(states.pop() if len(states) == 1 else "differs")
            lines.append(
                f"| {who} | " + " | ".join(f"**{state}**" if state == "open" else state for state in row) + " |"
            )
        lines.append("")
    return "\n".join(lines)
