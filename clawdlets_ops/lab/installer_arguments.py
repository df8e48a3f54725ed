"""The command line of ``nixos-anywhere`` as its 1.13 understands it, for the lab's stand-in; pure.

What the stand-in has no use for is taken and remembered, so that a command line for the real program is one for the
stand-in too. ``tests/contract/nixos_anywhere_cases.json`` holds what the real one made of each form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

PHASES: Final = ("kexec", "disko", "install", "reboot")

# Options with the number of words that follow; those with a name are kept under it.
_WORDS: Final = {
    "-f": (1, "flake"),
    "--flake": (1, "flake"),
    "--target-host": (1, "target"),
    "-i": (1, "identity"),
    "-p": (1, "port"),
    "--ssh-port": (1, "port"),
    "--ssh-option": (1, ""),
    "--kexec": (1, ""),
    "--kexec-extra-flags": (1, ""),
    "--ssh-store-setting": (2, ""),
    "--post-kexec-ssh-port": (1, ""),
    "--disko-mode": (1, ""),
    "--build-on": (1, ""),
    "--extra-files": (1, "extra_files"),
    "--chown": (2, ""),
    "--disk-encryption-keys": (2, ""),
    "--phases": (1, ""),
    "--from": (1, ""),
    "--option": (2, ""),
    "--generate-hardware-config": (2, ""),
    "-s": (2, ""),
    "--store-paths": (2, ""),
}
_FLAGS: Final = frozenset(
    ("-L", "--print-build-logs", "-t", "--tty", "--copy-host-keys", "--show-trace", "--debug", "--no-disko-deps",
     "--no-substitute-on-destination", "--no-use-machine-substituters", "--build-on-remote", "--env-password",
     "--no-reboot", "--stop-after-disko")
)  # fmt: skip
_CHOICES: Final = {"--disko-mode": ("disko", "mount", "format"), "--build-on": ("auto", "local", "remote")}
_ONLY: Final = {"--no-reboot": PHASES[:3], "--stop-after-disko": PHASES[:2]}
# What changes what is done to the target in a way that the stand-in cannot play.
_NOT_PLAYED: Final = frozenset(
    ("-s", "--store-paths", "--generate-hardware-config", "--vm-test", "--env-password", "--chown",
     "--disk-encryption-keys", "--force-kexec", "--copy-host-keys")
)  # fmt: skip


class Abort(Exception):
    """The program's own refusal: ``aborted: …`` and exit status 1."""


@dataclass(frozen=True)
class Arguments:
    """What a command line comes to. ``phases`` are in the program's order, whatever the order given."""

    flake: str = ""
    target: str = ""
    identity: str = ""
    port: str = ""
    extra_files: str = ""
    phases: tuple[str, ...] = PHASES
    ssh_options: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    @property
    def user(self) -> str:
        """Who logs in: without the kexec phase always root."""
        name, at, _ = self.target.rpartition("@")
        return name if at and "kexec" in self.phases else "root"

    @property
    def address(self) -> str:
        """The target without its user."""
        return self.target.rpartition("@")[2]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read ``argv`` as the real program does; Abort."""
    named: dict[str, str] = {}
    phases, options, ignored = set(PHASES), [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in _NOT_PLAYED:
            raise Abort(f"the lab's stand-in does not play {word}")
        if word in _WORDS:
            count, name = _WORDS[word]
            if len(words) < count:
                raise Abort(f"{word} needs {count} more")
            values, words = words[:count], words[count:]
            if word in _CHOICES and values[0] not in _CHOICES[word]:
                raise Abort(f"{word}: unknown mode {values[0]}")
            if word == "--phases":
                phases = _phases(values[0])
            elif word == "--ssh-option":
                options += values
            elif name:
                named[name] = values[0]
            else:
                ignored += [word, *values]
        elif word in _FLAGS:
            phases = set(_ONLY.get(word, phases))
            ignored.append(word)
        elif not named.get("target"):
            named["target"] = word
        else:
            raise Abort(f"one target too many: {word}")
    if not named.get("target"):
        raise Abort("ssh-host must be set")
    if "#" not in named.get("flake", "") or named["flake"].endswith("#"):
        raise Abort("--flake or --store-paths must be set" if not named.get("flake") else "the flake has no #attribute")
    ordered = tuple(phase for phase in PHASES if phase in phases)
    return Arguments(**named, phases=ordered, ssh_options=tuple(options), ignored=tuple(ignored))


def _phases(text: str) -> set[str]:
    chosen = set(text.removesuffix(",").split(",")) if text else set()
    if unknown := sorted(chosen - set(PHASES)):
        raise Abort(f"Unknown phase: {unknown[0]}")
    return chosen
