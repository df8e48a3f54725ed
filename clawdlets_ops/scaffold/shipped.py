"""What this repository has at its top and every project needs too: in a wheel it lies in this package, in a checkout where
it always lay. One text each, wherever it is read from."""

from __future__ import annotations

from pathlib import Path

from clawdlets_ops.errors import SettingsError

_PACKAGED = Path(__file__).parent / "shipped"
_CHECKOUT = Path(__file__).resolve().parents[2]


def shipped(name: str) -> Path:
    """The file or folder ``name`` (such as ``deploys``, ``tools/prepare``); SettingsError when this installation lacks it."""
    for place in (_PACKAGED, _CHECKOUT):
        if (place / name).exists():
            return place / name
    raise SettingsError(
        f"has no {name}: it is neither a checkout nor a whole wheel",
        where=str(_CHECKOUT),
        fix="pip install clawdlets-ops from a wheel, or make setup in a checkout",
    )


def texts(folder: str, suffix: str) -> dict[str, str]:
    """Path below the project and content of every file of ``folder`` with that suffix, in the order of names."""
    found = sorted(path for path in shipped(folder).iterdir() if path.suffix == suffix)
    return {f"{folder}/{path.name}": path.read_text(encoding="utf-8") for path in found}
