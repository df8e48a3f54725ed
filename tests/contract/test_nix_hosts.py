"""The NixOS modules, evaluated by a real Nix without nixpkgs, and what they render given to the programs that will read it.

STAND-INS: nixpkgs' lib and module system, pkgs, sops-nix and disko (nix/eval); how NixOS writes units and sshd_config (here).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import egress, hostfiles
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.lab import host_orchestrator
from clawdlets_ops.layout import secret_file_on_server
from clawdlets_ops.orchestrator import daemon
from clawdlets_ops.secrets.plan import needs
from tests.contract.test_egress_referees import with_users
from tests.contract.test_nix_fleet import WHOLE
from tests.egress_fleet import BOTS
from tests.nix_side import NIX, ROOT, needs_nix, nix, nix_run

pytestmark = [pytest.mark.contract, needs_nix]

WORST_SCORE = 2.5
OURS = ("bot", "egress-proxy", "clf-orchestrator")


def _fleet() -> dict[str, Any]:
    """Hosts in every mode there is, by name."""
    fleet = copy.deepcopy(WHOLE)
    base = {
        "provisioning": {"adminCidrs": ["203.0.113.0/24"]},
        "sshAuthorizedKeys": WHOLE["hosts"]["alpha"]["sshAuthorizedKeys"],
    }
    for mode in ("smtp-only", "proxy-allowlist", "none"):
        rules = {"mode": mode, "allowedDomains": [".example.org", "api.example.net"]}
        fleet["hosts"][mode] = {**base, "egress": rules, "bots": BOTS}
    fleet["hosts"]["public"] = {**base, "sshExposure": {"mode": "public"}, "tailnet": {"mode": "none"}}
    fleet["hosts"]["bootstrap"] = {**base, "sshExposure": {"mode": "bootstrap"}, "hetzner": {"ipv6": False}}
    return fleet


FLEET = _fleet()
SHOWN = """
let
  e = import ./eval/host.nix;
  show = host: let c = host.config; in {
    inherit (host) failed;
    inherit (c) systemd users services networking;
    security = c.security or null;
    grub = c.boot.loader.grub;
    disk = c.disko.devices.disk.main;
    etc = builtins.mapAttrs (_: file: file.text or (toString file.source)) c.environment.etc;
    sops = c.sops or null;
    platform = c.nixpkgs.hostPlatform or null;
    mounts = c.fileSystems or null;
  };
  it = e.fleet.fill fleet;
in builtins.mapAttrs (name: _: show (e.host ../. it name)) it.hosts // { cattle = show e.cattle; }
"""


@cache
def _hosts() -> str:
    return json.dumps(nix(SHOWN, fleet=FLEET))


@pytest.fixture
def hosts() -> dict[str, Any]:
    """Every host of FLEET, and the cattle image, as the modules make them."""
    found: dict[str, Any] = json.loads(_hosts())
    return found


def test_every_file_parses() -> None:
    files = sorted([*NIX.rglob("*.nix"), ROOT / "flake.nix"])
    assert len(files) > 15
    done = subprocess.run(["nix-instantiate", "--parse", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert nix_run("{ x = 1; x = 2; }").returncode != 0


def test_no_assertion_fails_and_arm_and_x86_boot_each_in_its_way(hosts: dict[str, Any]) -> None:
    assert {name: host["failed"] for name, host in hosts.items()} == {name: [] for name in hosts}
    x86, arm = hosts["alpha"], hosts["beta"]
    assert (x86["platform"], arm["platform"]) == ("x86_64-linux", "aarch64-linux")
    assert set(x86["disk"]["content"]["partitions"]) == {"bios", "esp", "root"}
    assert set(arm["disk"]["content"]["partitions"]) == {"esp", "root"}
    assert arm["grub"]["devices"] == ["nodev"]
    assert x86["grub"]["devices"] is None  # disko names it
    assert x86["disk"]["device"] == WHOLE["hosts"]["alpha"]["diskDevice"]


def test_users_admin_is_not_in_wheel_and_breakglass_is_with_a_hash_of_its_own(hosts: dict[str, Any]) -> None:
    users = hosts["alpha"]["users"]
    assert users["mutableUsers"] is False
    admin, breakglass = users["users"]["admin"], users["users"]["breakglass"]
    assert "wheel" not in admin["extraGroups"]
    assert "wheel" in breakglass["extraGroups"]
    assert admin["hashedPasswordFile"] != breakglass["hashedPasswordFile"]
    assert users["users"]["root"]["hashedPassword"] == "!"
    assert "openssh" not in breakglass
    assert hosts["alpha"]["security"]["sudo"]["execWheelOnly"] is False


@pytest.mark.parametrize("name", sorted(FLEET["hosts"]))
def test_secrets_are_those_that_python_ships_where_it_ships_them(hosts: dict[str, Any], name: str) -> None:
    declared = parse_fleet(json.dumps(FLEET)).host(name)
    sops = hosts[name]["sops"]
    assert (sops["age"]["sshKeyPaths"], sops["gnupg"]["sshKeyPaths"], sops["validateSopsFiles"]) == ([], [], False)
    assert sops["useSystemdActivation"] is True
    assert set(sops["secrets"]) == {need.name for need in needs(name, declared)}
    for need in needs(name, declared):
        made = sops["secrets"][need.name]
        assert made["sopsFile"] == str(secret_file_on_server(name, need.name).path)
        if need.kind == "password-hash":
            assert made["neededForUsers"] is True
        else:
            assert (made["owner"], made["mode"]) == (need.wiring.owner, need.wiring.mode)
            assert made.get("group") == need.wiring.group
    for owner in {need.wiring.owner for need in needs(name, declared)} - {"root"}:
        assert hosts[name]["users"]["users"][owner]["isSystemUser"] is True


def test_a_secret_restarts_the_bot_that_reads_it(hosts: dict[str, Any]) -> None:
    assert hosts["alpha"]["sops"]["secrets"]["token"]["restartUnits"] == ["clawdlets-bot-maren.service"]
    assert hosts["alpha"]["sops"]["secrets"]["guest"]["restartUnits"] == []


def test_the_orchestrator_reads_what_nixos_lays_down_as_what_the_lab_lays_down(
    hosts: dict[str, Any], tmp_path: Path
) -> None:
    fleet, etc = parse_fleet(json.dumps(FLEET)), hosts["alpha"]["etc"]
    for name in ("orchestrator.json", "cattle.json"):
        (tmp_path / name).write_text(etc[f"clf/{name}"])
    read = daemon.read_config(tmp_path / "orchestrator.json")
    lab = host_orchestrator.config_of(fleet.host("alpha").orchestrator, fleet.host("alpha").ssh_authorized_keys)
    assert read == daemon.Config.model_validate_json(json.dumps(lab))
    (tmp_path / "with.json").write_text(json.dumps({"cattleFile": str(tmp_path / "cattle.json")}))
    assert daemon.read_config(tmp_path / "with.json").cattle == fleet.cattle
    laid = host_orchestrator.cattle_files(fleet, "alpha", ROOT / "fleet" / "personas")
    ours = {name.removeprefix("etc/").split("/rex/")[0]: content.decode() for name, (_, content) in laid.items()}
    assert etc["clawdlets/tailnet-ports"] == ours["clawdlets/tailnet-ports"] == "18337\n"
    assert etc["clf/cattle-personas"] == str(ROOT / "fleet" / "personas")
    assert "clf/cattle-personas" in ours
    for name in set(FLEET["hosts"]) - {"alpha"}:
        assert {"clf/cattle.json", "clf/cattle-personas", "clawdlets/tailnet-ports"}.isdisjoint(hosts[name]["etc"])


@pytest.mark.parametrize("name", sorted(FLEET["hosts"]))
def test_the_egress_files_are_byte_for_byte_those_of_python(hosts: dict[str, Any], name: str) -> None:
    ours = egress.etc_files(parse_fleet(json.dumps(FLEET)).host(name))
    theirs = {
        path.removeprefix("clawdlets/egress/"): text
        for path, text in hosts[name]["etc"].items()
        if path.startswith("clawdlets/egress/")
    }
    assert theirs == ours


@pytest.mark.parametrize("name", sorted(FLEET["hosts"]))
def test_the_units_of_egress_and_bots_say_what_pythons_say(hosts: dict[str, Any], name: str) -> None:
    declared = parse_fleet(json.dumps(FLEET)).host(name)
    ours = egress.units(declared, nft="/nix/store/nftables/bin/nft", squid="/nix/store/squid/bin/squid", left_open="-")
    for unit, text in ours.items():
        theirs = _parsed(_unit(hosts[name]["systemd"]["services"][unit.removesuffix(".service")]))
        expected = _parsed(text)
        if expected["Service"]["ExecStart"] == ["-"]:  # left to the user's own configuration
            del expected["Service"]["ExecStart"]
        assert theirs == expected, unit


@pytest.mark.parametrize("name", ["alpha", "beta", "public", "bootstrap", "cattle"])
def test_sshd_takes_its_configuration_and_lets_in_by_key_alone(
    hosts: dict[str, Any], name: str, tmp_path: Path
) -> None:
    said = _sshd(hosts[name]["services"]["openssh"], tmp_path)
    assert "passwordauthentication no" in said
    assert "kbdinteractiveauthentication no" in said
    assert "permitrootlogin no" in said
    assert "authenticationmethods publickey" in said
    assert "allowusers admin" in said
    keys = "/run/clawdlets/authorized_keys" if name == "cattle" else "/etc/ssh/authorized_keys.d/%u"
    assert f"authorizedkeysfile {keys}" in said
    assert hosts[name]["services"]["openssh"]["openFirewall"] is False


def test_the_lab_and_nixos_run_the_same_sshd(hosts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "lab").write_text(hostfiles.sshd_config())
    lab = _effective(tmp_path / "lab", tmp_path)
    assert _sshd(hosts["alpha"]["services"]["openssh"], tmp_path) == lab
    assert len(lab) > 60
    (tmp_path / "wrong").write_text("PasswordAuthentification no\n")
    with pytest.raises(AssertionError):
        _effective(tmp_path / "wrong", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: names of users are put in place in a namespace")
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["alpha", "beta", "cattle"])
def test_systemd_takes_every_unit_and_scores_ours_as_little_exposed(
    hosts: dict[str, Any], name: str, tmp_path: Path
) -> None:
    made = hosts[name]["systemd"]
    texts = {
        f"{unit}.service": _unit(said)
        for unit, said in made["services"].items()
        if said and "ExecStart" in said["serviceConfig"]
    }
    texts |= {f"{unit}.socket": _unit(said) for unit, said in (made.get("sockets") or {}).items() if said}
    texts |= {f"{unit}.timer": _unit(said) for unit, said in (made.get("timers") or {}).items() if said}
    assert "clawdlets-firewall.service" in texts
    for unit, text in texts.items():
        (tmp_path / unit).write_text(re.sub(r"(?m)^(Exec\w+=-?)/(?:nix|run)\S+", r"\1/bin/true", text))
    for other in ("sops-install-secrets", "tailscaled", "userborn"):
        if f"{other}.service" not in texts:
            (tmp_path / f"{other}.service").write_text("[Service]\nExecStart=/bin/true\n")
    users = tuple(user for user in hosts[name]["users"]["users"] if user not in ("root",))
    done = with_users(users, tmp_path, "systemd-analyze verify ./*.service ./*.timer ./*.socket 2>&1 || true")
    complaints = [
        line for line in done.stdout.splitlines() if str(tmp_path) in line or "clawdlets" in line or "clf-" in line
    ]
    assert complaints == []
    for unit in sorted(texts):
        if unit.endswith(".service") and any(word in unit for word in OURS):
            scored = with_users((), tmp_path, f"systemd-analyze security --offline=true ./{unit} | tail -n 1").stdout
            print(name, scored.strip())  # noqa: T201 - a figure for whoever runs with -s
            assert float(scored.split(":")[1].split()[0]) <= WORST_SCORE, scored


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: names of users are put in place in a namespace")
@pytest.mark.skipif(not shutil.which("nft") or not shutil.which("squid"), reason="needs nft and squid")
@pytest.mark.parametrize("name", ["alpha", "smtp-only", "proxy-allowlist", "none"])
def test_nft_and_squid_take_what_is_in_etc(hosts: dict[str, Any], name: str, tmp_path: Path) -> None:
    files = {
        path.rpartition("/")[2]: text
        for path, text in hosts[name]["etc"].items()
        if path.startswith("clawdlets/egress/")
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text.replace("/etc/clawdlets/egress", str(tmp_path)))
    users = tuple(user for user in hosts[name]["users"]["users"] if user.startswith(("bot-", "clawdlets-")))
    done = with_users(users, tmp_path, "nft -c -f rules.nft")
    assert (done.returncode, done.stderr) == (0, "")
    if "squid.conf" in files:
        done = subprocess.run(["squid", "-k", "parse", "-f", tmp_path / "squid.conf"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "ERROR" not in done.stderr


def _visudo() -> list[str]:
    if found := shutil.which("visudo"):
        return [found]
    base = ROOT / ".cache" / "lab" / "base"
    if os.geteuid() == 0 and (base / "usr/sbin/visudo").exists():
        return ["chroot", str(base), "/usr/sbin/visudo"]
    return []


@pytest.mark.skipif(not _visudo(), reason="needs visudo, or the lab's base image and root")
def test_visudo_takes_the_sudoers_of_both_sides_and_no_rule_has_a_glob(hosts: dict[str, Any]) -> None:
    text = hosts["alpha"]["security"]["sudo"]["extraConfig"]
    assert text == hostfiles.text("sudoers")
    done = subprocess.run([*_visudo(), "-c", "-f", "-"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run(
        [*_visudo(), "-c", "-f", "-"], input="admin ALL=(root NOPASSWD\n", capture_output=True, text=True
    ).returncode
    rules = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not any(re.search(r"clawdlets-\S+ [^^\n]*[*?]", line) for line in rules)


def test_exposure_at_install_and_the_ports_come_from_the_declaration(hosts: dict[str, Any]) -> None:
    said = {name: host["etc"]["clawdlets/exposure-at-install"] for name, host in hosts.items()}
    assert (said["public"], said["alpha"], said["cattle"]) == ("public\n", "bootstrap\n", "tailnet\n")
    assert all(host["networking"]["firewall"]["enable"] is False for host in hosts.values())
    assert hosts["public"]["services"].get("tailscale") is None
    assert hosts["bootstrap"]["systemd"]["services"]["clawdlets-ipv6"] is None
    assert hosts["alpha"]["systemd"]["services"]["clawdlets-ipv6"]["serviceConfig"]["Type"] == "oneshot"


def test_the_tailnet_key_is_on_no_command_line_and_joining_is_tried_again(hosts: dict[str, Any]) -> None:
    join = hosts["alpha"]["systemd"]["services"]["tailscaled-autoconnect"]
    assert hosts["alpha"]["services"]["tailscale"].get("authKeyFile") is None
    assert join["serviceConfig"]["ExecStart"].endswith("/bin/clawdlets-join alpha /run/secrets/tailscale_auth_key")
    assert (join["serviceConfig"]["Restart"], join["unitConfig"]["StartLimitIntervalSec"]) == ("on-failure", 0)


def test_cattle_keeps_user_data_in_memory_and_lets_cloud_init_do_little(hosts: dict[str, Any]) -> None:
    cattle = hosts["cattle"]
    assert cattle["mounts"]["/var/lib/cloud"]["fsType"] == "tmpfs"
    settings = cattle["services"]["cloud-init"]["settings"]
    modules = {*settings["cloud_init_modules"], *settings["cloud_config_modules"], *settings["cloud_final_modules"]}
    assert modules == {"seed_random", "write-files", "update_hostname", "runcmd", "scripts_user"}
    assert (settings["users"], settings["disable_root"], cattle["services"]["cloud-init"]["network"]["enable"]) == (
        [],
        True,
        False,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sshExpsure": {}}, "sshExpsure"),
        ({"egress": {"mode": "smtp"}}, "egress.mode"),
        ({"tailnet": {"mode": "none"}}, "nobody can reach"),
        ({"bots": {"x": {"limits": {"memory": 1}}}}, "limits.memory"),
    ],
)
def test_a_host_that_python_refuses_does_not_evaluate_by_the_modules_alone(change: dict[str, Any], said: str) -> None:
    host = {**WHOLE["hosts"]["beta"], **change}
    done = nix_run(
        'let h = (import ./eval/host.nix).host ../. { hosts.beta = host; cattle.enabled = false; } "beta"; in { inherit (h) failed; mode = h.config.clawdlets; }',
        host=host,
    )
    assert said in done.stderr + done.stdout


def test_mkhosts_refuses_a_fleet_with_each_key_path(tmp_path: Path) -> None:
    fleet = copy.deepcopy(WHOLE)
    fleet["hosts"]["alpha"]["tailnet"]["mod"] = 1
    fleet["hosts"]["beta"]["diskDevice"] = "sda"
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    expression = f"(import ./default.nix {{ sops-nix.nixosModules.sops = {{ }}; disko.nixosModules.disko = {{ }}; }}).mkHosts (x: x) {tmp_path}/fleet.json"
    done = nix_run(f"builtins.attrNames ({expression})")
    assert done.returncode != 0
    assert "hosts.alpha.tailnet.mod: unknown key" in done.stderr
    assert "hosts.beta.diskDevice: does not match" in done.stderr


def test_the_operators_key_is_taken_from_the_repository_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0t ada"
    (tmp_path / "keys" / "ada.pub").write_text(other + "\n")
    host = {**WHOLE["hosts"]["beta"], "provisioning": {"adminCidrs": ["203.0.113.7"], "sshPubkeyFile": "keys/ada.pub"}}
    expression = f"""let e = import ./eval/host.nix; beta = ((e.fleet.fill {{ schemaVersion = 1; hosts.beta = host; }}).hosts.beta);
      it = {{ hosts = {{ inherit beta; }}; cattle.enabled = false; }}; h = e.host {tmp_path} it "beta"; in {{ inherit (h) failed; keys = h.config.users.users.admin.openssh.authorizedKeys.keys; }}"""
    assert nix(expression, host=host) == {"failed": [], "keys": [*host["sshAuthorizedKeys"], other]}
    host = {
        **host,
        "sshAuthorizedKeys": [],
        "provisioning": {"adminCidrs": ["203.0.113.7"], "sshPubkeyFile": ".clawdlets/x.pub"},
    }
    found = nix(expression, host=host)
    assert (found["keys"], len(found["failed"])) == ([], 1)


@pytest.mark.skipif(
    nix_run("<nixpkgs>").returncode != 0,
    reason="there is no nixpkgs here: .github/workflows/nix.yml runs nix flake check with one",
)
def test_flake_check_with_nixpkgs() -> None:
    done = subprocess.run(
        ["nix", "--extra-experimental-features", "nix-command flakes", "flake", "check", f"git+file://{ROOT}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _unit(said: dict[str, Any]) -> str:
    """STAND-IN for how NixOS writes a unit."""
    config = dict(said.get("unitConfig") or {})
    for key in ("description", "wants", "requires", "after", "before"):
        if said.get(key):
            config[key.capitalize()] = said[key]
    if said.get("wantedBy"):
        said = {**said, "install": {"WantedBy": said["wantedBy"]}}
    sections = {"Unit": config}
    for section, key in (
        ("Service", "serviceConfig"),
        ("Socket", "socketConfig"),
        ("Timer", "timerConfig"),
        ("Install", "install"),
    ):
        if said.get(key):
            sections[section] = said[key]
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            for one in value if isinstance(value, list) else [value]:
                lines.append(f"{key}={str(one).lower() if isinstance(one, bool) else one}")
    return "\n".join((*lines, ""))


def _parsed(unit: str) -> dict[str, dict[str, list[str]]]:
    sections: dict[str, dict[str, list[str]]] = {}
    for line in unit.splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line:
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return sections


def _sshd(openssh: dict[str, Any], folder: Path) -> list[str]:
    """STAND-IN for how NixOS writes sshd_config; what sshd makes of it."""
    files = openssh.get("authorizedKeysFiles") or ["/etc/ssh/authorized_keys.d/%u"]
    assert openssh["authorizedKeysInHomedir"] is False
    lines = [f"HostKey {key['path']}" for key in openssh["hostKeys"]]
    lines += [f"AuthorizedKeysFile {' '.join(files)}", f"Subsystem sftp {openssh['sftpServerExecutable']}"]
    for key, value in openssh["settings"].items():
        if isinstance(value, list):
            value = ("," if key in ("Ciphers", "Macs", "KexAlgorithms") else " ").join(value)
        lines.append(f"{key} {('yes' if value else 'no') if isinstance(value, bool) else value}")
    (folder / "nixos").write_text("\n".join([*lines, ""]))
    return _effective(folder / "nixos", folder)


def _effective(config: Path, folder: Path) -> list[str]:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # Debian's sshd wants it, for -T too
    key = folder / "host_key"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config.write_text(config.read_text().replace(hostfiles.data("sshd.json")["hostKey"], str(key)))
    done = subprocess.run(
        [shutil.which("sshd") or "/usr/sbin/sshd", "-T", "-f", config], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())
