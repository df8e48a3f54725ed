"""Records that tell when they change, so that storing a change costs as much as the change and not as much as the cloud."""

from __future__ import annotations

from collections.abc import Callable


class Tracked:
    """A dataclass whose fields are set, and never changed in place: their types (Sequence, Mapping) have no way to."""

    __slots__ = ("_on_change",)

    _on_change: Callable[[Tracked], None] | None

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if (tell := getattr(self, "_on_change", None)) is not None:
            tell(self)

    def watch(self, on_change: Callable[[Tracked], None] | None) -> None:
        """Have ``on_change`` called after every change from now on, or nobody (None)."""
        object.__setattr__(self, "_on_change", on_change)
