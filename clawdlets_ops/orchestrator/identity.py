"""Who asks, from the socket's own credentials: SO_PEERCRED (unix(7)) gives the uid of the process that connected, and the kernel
vouches for it. What a body says about its requester counts for nothing.
"""

from __future__ import annotations

import grp
import pwd
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

BOT_USER_PREFIX = "bot-"
REMEMBER_S = 5.0
_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class Who:
    """``name`` is the bot's, or ``operator:<user>``; ``user`` the Unix name."""

    name: str
    user: str
    operator: bool

    @property
    def scope(self) -> str | None:
        """Whose jobs are to be seen: the bot's own, or (None) everyone's."""
        return None if self.operator else self.name


Identify = Callable[[int], Who | None]
"""Who a uid is; None for somebody who is neither a bot nor an operator."""


def peer_uid(connection: socket.socket) -> int:
    """The uid of the process at the other end of a unix socket, as it was when it connected."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


class UnixIdentity:
    """By the host's users and groups: root and members of ``operators_group`` are operators; a user ``bot-<name>`` who is in
    ``bots_group`` is the bot ``<name>``; anybody else is nobody. Answers are remembered for REMEMBER_S."""

    def __init__(
        self, operators_group: str, bots_group: str, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._operators_group = operators_group
        self._bots_group = bots_group
        self._monotonic = monotonic
        self._known: dict[int, tuple[float, Who | None]] = {}

    def __call__(self, uid: int) -> Who | None:
        now = self._monotonic()
        known = self._known.get(uid)
        if known is None or now - known[0] > REMEMBER_S:
            if len(self._known) > 1000:
                self._known.clear()
            known = (now, self._look_up(uid))
            self._known[uid] = known
        return known[1]

    def _look_up(self, uid: int) -> Who | None:
        try:
            user = pwd.getpwuid(uid)
        except KeyError:
            return None
        if uid == 0 or _is_member(user, self._operators_group):
            return Who(f"operator:{user.pw_name}", user.pw_name, operator=True)
        bot = user.pw_name.removeprefix(BOT_USER_PREFIX)
        if bot and bot != user.pw_name and _is_member(user, self._bots_group):
            return Who(bot, user.pw_name, operator=False)
        return None


def _is_member(user: pwd.struct_passwd, group: str) -> bool:
    try:
        found = grp.getgrnam(group)
    except KeyError:
        return False
    return user.pw_gid == found.gr_gid or user.pw_name in found.gr_mem
