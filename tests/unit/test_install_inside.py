"""What is looked at on the target and on this machine, against scripted answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.errors import BusyError, InstallRefused
from clawdlets_ops.install import inside, shipment
from clawdlets_ops.lab import real_installer
from clawdlets_ops.secrets.payload import Entry, Manifest
from clawdlets_ops.testing import FakeRunner

SHIPPED = Manifest(
    (
        Entry(".", "directory", 0o755),
        Entry("etc", "directory", 0o755),
        Entry("var/lib/sops-nix", "directory", 0o700),
        Entry("var/lib/sops-nix/key.txt", "file", 0o400, "0" * 64),
    )
)
LAID = "755 0 0 /mnt\n755 0 0 /mnt/etc\n700 0 0 /mnt/var/lib/sops-nix\n400 0 0 /mnt/var/lib/sops-nix/key.txt\n"


@dataclass
class FakeSession:
    """A stand-in for a login: answers by the first words of the command."""

    answers: dict[str, tuple[int, str]]
    ran: list[str] = field(default_factory=list)

    def run(self, command: str, **_: Any) -> ssh.Answer:
        self.ran.append(command)
        code, said = next((answer for words, answer in self.answers.items() if command.startswith(words)), (1, ""))
        return ssh.Answer(code, said, "" if code == 0 else said)

    def check(self, command: str, **_: Any) -> str:
        answer = self.run(command)
        assert answer.ok
        return answer.stdout


def session(**answers: tuple[int, str]) -> Any:
    return FakeSession({words.replace("_", " "): answer for words, answer in answers.items()})


def test_a_payload_that_lies_as_it_was_shipped_is_taken() -> None:
    inside.check_laid(session(stat=(0, LAID)), "alpha", SHIPPED)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (LAID.replace("400 0 0", "400 1000 1000"), "key.txt: 400 1000 1000"),
        (LAID.replace("400 0 0", "444 0 0"), "key.txt: 444 0 0"),
        (LAID.replace("755 0 0 /mnt\n", "700 0 0 /mnt\n"), "/mnt: 700 0 0"),
        (LAID.replace("400 0 0 /mnt/var/lib/sops-nix/key.txt\n", ""), "key.txt: not there"),
        ("", "/mnt: not there"),
    ],
)
def test_a_payload_that_lies_otherwise_stops_before_the_reboot(found: str, says: str) -> None:
    with pytest.raises(InstallRefused, match=says):
        inside.check_laid(session(stat=(1, found)), "alpha", SHIPPED)


def test_a_target_that_answers_nothing_is_unknown_in_every_field() -> None:
    host = SimpleNamespace(disk_device="/dev/sda")
    standing = inside.read_standing(session(), host)  # type: ignore[arg-type]
    assert standing.facts == inside.Target("", "", None, "", "", "")
    assert (standing.mounted, standing.laid, standing.done) == (False, False, frozenset())


def test_memory_is_read_in_bytes() -> None:
    host = SimpleNamespace(disk_device="/dev/sda")
    standing = inside.read_standing(session(awk=(0, "2035260\n")), host)  # type: ignore[arg-type]
    assert standing.facts.memory_bytes == 2035260 * 1024


def test_whose_turn_it_is_stands_on_the_target() -> None:
    inside.take_lease(session(mkdir=(0, "olive on box\n")), "alpha", "olive on box")
    with pytest.raises(BusyError, match="bob on \ufffd") as caught:
        inside.take_lease(session(mkdir=(0, "bob on \x1bbox\n")), "alpha", "olive on box")
    assert "lease" in caught.value.fix


def test_a_mount_that_cannot_be_undone_asks_for_a_reset() -> None:
    inside.clear_mounts(session(umount=(0, "")), "alpha")
    inside.clear_mounts(session(umount=(1, "not mounted"), findmnt=(1, "")), "alpha")
    with pytest.raises(InstallRefused, match="target is busy") as caught:
        inside.clear_mounts(session(umount=(1, "umount: /mnt: target is busy."), findmnt=(0, "/mnt")), "alpha")
    assert "reset" in caught.value.fix


def asked(runner: FakeRunner, root: Path) -> tuple[tuple[str, ...] | None, str]:
    return shipment._configurations(SimpleNamespace(layout=SimpleNamespace(root=root)), runner)  # type: ignore[arg-type]


def test_the_flake_is_asked_for_names_and_nothing_is_evaluated(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("nix",), (0, '["alpha", "beta"]'))])
    assert asked(runner, tmp_path) == (("alpha", "beta"), "")
    assert runner.ran[0].argv[-2:] == ("--apply", "builtins.attrNames")
    assert f"git+file://{tmp_path}#nixosConfigurations" in runner.ran[0].argv


def test_a_flake_that_nix_cannot_read_has_no_configuration(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("nix",), (1, "error: syntax error"))])
    names, why = asked(runner, tmp_path)
    assert names == ()
    assert "syntax error" in why


def test_without_nix_the_flake_is_unknown_and_what_git_knows_is_said(tmp_path: Path) -> None:
    for tracked, says in (("flake.nix\n", "git tracks a flake.nix"), ("", "git tracks no flake.nix")):
        runner = FakeRunner(script=[(("git",), (0, tracked))], programs=frozenset({"git"}))
        names, why = asked(runner, tmp_path)
        assert names is None
        assert says in why


def test_the_labs_nix_answers_the_script_and_refuses_the_rest(tmp_path: Path) -> None:
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "clawdlets.json").write_text((Path(__file__).parents[2] / "fleet/clawdlets.json").read_text())
    flake = f'git+file://{tmp_path}#nixosConfigurations."alpha".config'

    def answer(*words: str) -> str:
        return real_installer.answer(list(words), lab_dir=tmp_path, runner=FakeRunner(), environ={})

    assert answer("--extra-experimental-features", "nix-command flakes", "config", "show", "extra-platforms") == ""
    assert answer("eval", "--raw", f"{flake}.pkgs.system") == "x86_64-linux"
    assert (
        answer("eval", "--json", f"git+file://{tmp_path}#nixosConfigurations", "--apply", "builtins.attrNames")
        == '["alpha"]\n'
    )
    assert answer("build", f"{flake}.system.build.toplevel").startswith("/nix/store/")
    assert answer("build", f"{flake}.system.build.diskoScript") != answer("build", f"{flake}.system.build.toplevel")
    with pytest.raises(real_installer.LabError, match="only knows"):
        answer("flake", "update")
