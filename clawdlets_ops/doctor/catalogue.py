"""The catalogue: every check the doctor runs, with what it stands for. docs/reference/doctor.md is printed from it."""

from __future__ import annotations

from typing import Final

from clawdlets_ops.doctor import doors, of_clone, of_machine
from clawdlets_ops.doctor.judging import WARNINGS, Check
from clawdlets_ops.doctor.snapshot import Scope

_REPO, _BOOTSTRAP, _DEPLOY, _CATTLE = Scope.REPO, Scope.BOOTSTRAP, Scope.DEPLOY, Scope.CATTLE
_ROTATE = "replace the secret where it was issued, then take it out"

CATALOGUE: Final[tuple[Check, ...]] = (
    Check(
        "FLT-01", _REPO, "high", "fleet/clawdlets.json is acceptable",
        "parsed as the strict models have it, every fault with its key path",
        "correct the fleet file where the message points",
        of_clone.fleet_is_acceptable,
    ),
    Check(
        "EXP-08", _REPO, "medium", "public SSH is temporary: no host is declared to stay in bootstrap",
        "sshExposure.mode of each host",
        "set sshExposure.mode to tailnet (or to public, when that is the decision), then lock down",
        of_clone.exposure_is_temporary,
    ),
    Check(
        "GIT-01", _REPO, "critical", "Keep .clawdlets/ gitignored (required)",
        "git check-ignore for samples below .clawdlets/; the rule must be in a tracked .gitignore",
        "add /.clawdlets/ to the project's .gitignore, and commit it",
        of_clone.runtime_dir_is_ignored,
    ),
    Check(
        "GIT-02", _REPO, "critical", "nothing of the runtime dir, no age key, no OpenTofu state is in git",
        "the paths of the index and of every tree that git stores, reachable or not",
        "git rm --cached it; if it was ever pushed, replace what it holds, then rewrite history",
        of_clone.nothing_private_in_git,
    ),
    Check(
        "GIT-03", _REPO, "critical", "no tokens or keys are committed, staged or about to be",
        "the guard's rules over the index and over every file that git does not ignore",
        f"{_ROTATE}; clawdlets guard scan shows each place",
        of_clone.no_secret_in_tree,
    ),
    Check(
        "GIT-04", _REPO, "critical", "no tokens or keys are in history",
        "the guard's rules over every object that git stores, and its configuration and logs; not what GIT-03 has told",
        f"{_ROTATE}: rewrite history and collect garbage; clawdlets guard scan --history shows each place",
        of_clone.no_secret_in_history,
    ),
    Check(
        "GIT-05", _REPO, "critical", "no secret that is known on this machine is in git",
        "the exact values, and their base64, hex, URL- and JSON-escaped forms, over index, work tree and history",
        _ROTATE,
        of_clone.no_known_secret,
    ),
    Check(
        "GIT-06", _REPO, "high", "fleet/clawdlets.json, flake.nix and flake.lock hold no secrets",
        "the guard's rules over these files in index and work tree",
        "put the name of a secret in its place, and replace the secret",
        of_clone.public_files_hold_no_secret,
    ),
    Check(
        "GIT-07", _REPO, "medium", "git asks the guard before it commits and pushes",
        "our pre-commit and pre-push hooks, where git looks for them, can be run",
        "clawdlets guard install",
        of_clone.hooks_are_installed,
    ),
    Check(
        "SOP-01", _REPO, "critical", "everything under secrets/ is encrypted by sops",
        "every file on disk and in the index: parsed, with sops' metadata; links are refused",
        "give the value anew with clawdlets secrets set; treat what was in clear as leaked",
        of_clone.files_are_encrypted,
    ),
    Check(
        "SOP-02", _REPO, "critical", "every value under secrets/ is encrypted, by our rules",
        "every leaf and comment of every file, and sops' own rules in its metadata",
        "restore the file from git, or edit it with sops only; treat the value as leaked",
        of_clone.files_are_wholly_encrypted,
    ),
    Check(
        "SOP-03", _REPO, "critical", "every file is encrypted to exactly its declared readers",
        "recipients in the metadata against operators and host, in both directions",
        "clawdlets secrets reconcile, then replace what somebody could read who may not",
        of_clone.readers_are_exact,
    ),
    Check(
        "SOP-05", _REPO, "high", "every secret that a host needs is there, and no placeholder",
        "the declared needs against the files; values only where they can be decrypted here",
        "clawdlets secrets status says which; clawdlets secrets set NAME --host HOST",
        of_clone.secrets_are_there,
    ),
    Check(
        "SOP-06", _REPO, "medium", "there is no file that no host needs",
        "files under secrets/ against the fleet file",
        "clawdlets secrets reconcile",
        of_clone.nothing_stale,
    ),
    Check(
        "SOP-07", _REPO, "critical", "declared hosts and operators have their public key in the repository, and nobody else has",
        "secrets/keys/ against the fleet file",
        "clawdlets secrets init for a host, clawdlets secrets operator add for an operator; reconcile removes strays",
        of_clone.everybody_has_a_key,
    ),
    Check(
        "SOP-08", _REPO, "medium", "whoever runs sops by hand encrypts to the declared readers",
        "secrets/.sops.yaml against what is generated from the declared readers",
        "clawdlets secrets reconcile",
        of_clone.sops_config_is_current,
    ),
    Check(
        "SSH-09", _REPO, "high", "every host's SSH host key is pinned before the host exists",
        "the public key under secrets/keys/hosts, and the private half where it can be decrypted here",
        "clawdlets secrets init, or restore the file from git",
        of_clone.hosts_are_pinned,
    ),
    Check(
        "STO-07", _REPO, "critical", "no flake reference by path:, which copies ignored private keys into /nix/store",
        "tracked Nix, lock, shell, make and YAML files, comments left out",
        "refer to the checkout as git+file:, or as . within it; nix store delete what was copied, replace the keys",
        of_clone.no_flake_by_path,
    ),
    Check(
        "SUP-01", _REPO, "high", "GitHub Actions are pinned to commit SHAs",
        "every uses: of tracked workflows and composite actions: a full commit, or an image's digest",
        "write the commit in the place of the tag, with the tag as a comment",
        of_clone.actions_are_pinned,
    ),
    Check(
        "SUP-02", _REPO, "medium", "Dependabot looks after the project every week",
        ".github/dependabot.yml, where there are workflows",
        "add what is missing, with interval weekly",
        of_clone.dependabot_is_weekly,
    ),
    Check(
        "SUP-03", _REPO, "medium", "no update is merged by itself",
        "every string of tracked workflows: commands, actions and API calls that merge or approve",
        "take the step out: a person looks at every update",
        of_clone.nothing_merges_by_itself,
    ),
    Check(
        "SUP-05", _REPO, "medium", "every input of the flake is locked",
        "flake.lock is tracked; every node has a narHash, and a revision where its kind has one",
        "nix flake lock, and commit flake.lock",
        of_clone.inputs_are_locked,
    ),
    Check(
        "ENV-01", _BOOTSTRAP, "high", "the operator's settings can be read",
        ".clawdlets/env and .clawdlets/vantages.json",
        "correct the file that the message names",
        of_machine.settings_can_be_read,
    ),
    Check(
        "TOOL-01", _BOOTSTRAP, "high", "the programs that a deployment runs are there and new enough",
        "each on PATH, asked for its version",
        "install what is missing",
        of_machine.programs_are_there,
    ),
    Check(
        "HCL-01", _BOOTSTRAP, "high", "the Hetzner token is accepted",
        "one GET for the first host's server",
        "put HCLOUD_TOKEN=… into .clawdlets/env (mode 0600); make one in the project's console",
        of_machine.token_is_accepted,
    ),
    Check(
        "KEY-01", _BOOTSTRAP, "high", "the operator's SSH key is there, and private",
        "provisioning.sshPubkeyFile of each host, and the private half beside it: a regular file of this user, 0600",
        "ssh-keygen -t ed25519, or chmod 600 the private key",
        of_machine.ssh_keys_are_usable,
    ),
    Check(
        "KEY-02", _BOOTSTRAP, "high", "the operator has an age key here, and is declared with it",
        ".clawdlets/keys/operators: private, one identity, the declared one",
        "clawdlets secrets operator add; then an operator who reads the secrets runs clawdlets secrets reconcile",
        of_machine.operator_has_a_key,
    ),
    Check(
        "SOP-04", _BOOTSTRAP, "high", "the operator decrypts every file, each one intact",
        "each decrypted in memory by sops, which verifies its MAC",
        "restore the file from git, or let an operator who can read it run clawdlets secrets reconcile",
        of_machine.operator_decrypts,
    ),
    Check(
        "SOP-09", _BOOTSTRAP, "high", "each host decrypts every file of its own",
        "each decrypted in memory with the host's age key, which the operator decrypts first",
        "clawdlets secrets reconcile",
        of_machine.hosts_decrypt,
    ),
    Check(
        "RTD-01", _BOOTSTRAP, "critical", "the runtime dir is private: folders 0700, files 0600, this user's, no links out",
        "lstat of everything below .clawdlets",
        "chmod -R go= .clawdlets; put a file in the place of a link",
        of_machine.runtime_dir_is_private,
    ),
    Check(
        "RTD-03", _BOOTSTRAP, "high", "provisioning state is 0600 and holds no tokens",
        "OpenTofu's files below .clawdlets/infra: modes, known secrets, the guard's rules",
        "chmod 600 it; take the value out of the configuration, replace the secret",
        of_machine.state_is_clean,
    ),
    Check(
        "RTD-06", _BOOTSTRAP, "high", "nobody else can change what is deployed",
        "lstat of the project's folder, fleet/ and secrets/: owned by this user or root, not writable for the world",
        "chown and chmod o-w it, then look at what it holds (git diff)",
        of_machine.nobody_else_writes,
    ),
    Check(
        "SYS-01", _BOOTSTRAP, "medium", "2 GiB of disk are free",
        "the file system of the project",
        "free some disk",
        of_machine.disk_has_room,
    ),
    Check(
        "RTD-02", _DEPLOY, "critical", "the install payload holds exactly what this host needs",
        "names, kinds and modes below .clawdlets/extra-files/HOST",
        "remove .clawdlets/extra-files/HOST; the payload stage makes it anew",
        of_machine.payload_is_minimal,
    ),
    Check(
        "RTD-05", _DEPLOY, "high", "no private key is left in clear after it has served",
        "payloads of hosts that are installed and verified; files that interrupted writes left",
        "remove it: the keys stay encrypted in the repository",
        of_machine.nothing_is_left_over,
    ),
    Check(
        "DRF-03", _DEPLOY, "high", "what is declared, in the cloud, on the host and measured agree on who reaches port 22",
        "sshExposure.mode, the attached firewall and its status, the host's own account, and real connections",
        "clawdlets lockdown --host HOST puts all four in line, or says why it cannot",
        doors.accounts_agree,
    ),
    Check(
        "WIN-01", _DEPLOY, "critical", "no breakglass window is open past its end, and no lockdown was left unfinished",
        "the label clawdlets-window of the firewall, the host's own account, and .clawdlets/lockdown",
        "clawdlets close HOST; for a lockdown, run it again: it goes on from what is there",
        doors.nothing_is_overdue,
    ),
    Check(
        "WIN-02", _DEPLOY, "low", "no breakglass window is open",
        "the label clawdlets-window of the firewall",
        "clawdlets close HOST as soon as it is not needed any more",
        doors.no_window_is_open,
    ),
    Check(
        "DRF-01", _DEPLOY, "medium", "repository, payload and host have the same set of secrets",
        "digests of the encrypted files and their wiring: in the repository, in the payload here, as last installed",
        "run the payload stage before an install; deploys/secrets.py compares with a host that runs, and syncs it",
        of_machine.digests_agree,
    ),
    Check(
        "DRF-02", _DEPLOY, "high", "each host was installed with the key that is pinned",
        "the install receipt against secrets/keys/hosts",
        "find out who changed the pin; restore it from git",
        of_machine.installed_with_the_pin,
    ),
    Check(
        "STO-01", _DEPLOY, "critical", "no secret is in the store paths of a host's system",
        "the exact values in every file of the listing given with --closure, within a bound of bytes and time; the search "
        "must find a canary of its own first (STO-02)",
        "use the encrypted file on the host, never builtins.readFile; nix store delete the path, replace the secret",
        of_machine.closure_holds_no_secret,
    ),
    Check(
        "STO-05", _DEPLOY, "critical", "no secret is in what this machine put into its Nix store",
        "as STO-01, in the store paths that cache.nixos.org has not signed",
        "nix store delete the path, replace the secret",
        of_machine.store_holds_no_secret,
    ),
    Check(
        "CAT-01", _CATTLE, "high", "every server of the fleet carries our labels",
        "one GET for each host's server",
        "find out whose server it is before anything is done to it",
        of_machine.labels_are_complete,
    ),
    Check(
        "CAT-02", _CATTLE, "high", "every cattle server carries the full label set",
        "every server of the project whose name or label says that it is cattle, against the nine labels and their forms",
        "find out whose it is; clawdlets never deletes it, so remove it by hand (hcloud server delete ID)",
        of_machine.cattle_labels_are_complete,
    ),
    Check(
        "UD-05", _CATTLE, "high", "cattle joins the tailnet with ephemeral, tagged keys, not with one static key",
        "cattle.tailnet.key; of a static one its age, by sops' note in the encrypted file",
        "set cattle.tailnet.key to minted and give the OAuth client's secret; until then replace the static key often",
        of_machine.cattle_key_is_limited,
    ),
)  # fmt: skip

INCLUDED: Final = {
    Scope.REPO: (Scope.REPO,),
    Scope.BOOTSTRAP: (Scope.REPO, Scope.BOOTSTRAP),
    Scope.DEPLOY: (Scope.REPO, Scope.BOOTSTRAP, Scope.DEPLOY),
    Scope.CATTLE: (Scope.CATTLE,),
}


def checks_of(scope: Scope) -> tuple[Check, ...]:
    """The checks that ``scope`` runs, in the order of the catalogue."""
    return tuple(check for check in CATALOGUE if check.scope in INCLUDED[scope])


def reference() -> str:
    """docs/reference/doctor.md."""
    lines = [
        "# What the doctor checks",
        "",
        "Printed from the catalogue in `clawdlets_ops/doctor/catalogue.py`. A failed check of severity "
        f"{' or '.join(WARNINGS)} is a warning.",
    ]
    for scope in Scope:
        lines += [
            "",
            f"## Scope {scope}",
            "",
            "| id | severity | what holds | looked at | what to do |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {check.id} | {check.severity} | {check.claim} | {check.how} | {check.fix} |"
            for check in CATALOGUE
            if check.scope is scope
        ]
    return "\n".join(lines) + "\n"
