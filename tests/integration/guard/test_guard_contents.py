"""The guard on real git repositories: what is committed is what is scanned, wherever it hides."""

import json
import os
import subprocess
import sys

import pytest

from clawdlets_ops import age
from clawdlets_ops.guard import report
from clawdlets_ops.guard.run import Request, run
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops
from tests.guard_corpus import Maker, innocents, leaks
from tests.integration.guard.desk import ENVIRON, LARGE_BYTES, MAX_RSS_BYTES, RUNNER, Git, rules

pytestmark = pytest.mark.integration


def test_the_table_of_planted_leaks_and_look_alikes_staged_tracked_and_in_history(git, capsys):
    planted, innocent = leaks(), [case for case in innocents() if case.path != ".clawdlets-guard.toml"]
    for case in (*planted, *innocent):
        git.write(case.path, case.content, link=case.link)
    git("add", "-f", ".")
    shown = {case.path: case.path.encode().decode("utf-8") for case in planted}
    table, missed = [], []
    outcomes = {"staged": git.scan("staged"), "tracked": git.scan("tracked")}
    git("commit", "-q", "-m", "all")
    git("rm", "-q", "-r", "--cached", ".")
    git("commit", "-q", "-m", "none", "--allow-empty")
    outcomes["history"] = git.scan("history")
    assert git.scan("tracked").exit_code == 0
    for case in planted:
        seen = [
            any(leak.path == shown[case.path] and leak.rule == case.rule for leak in outcome.leaks)
            for outcome in outcomes.values()
        ]
        table.append(f"{case.name:36} {case.rule:26} {' '.join('caught' if each else 'MISSED' for each in seen)}")
        missed += [case.name] if not all(seen) else []
    passed = {case.path for case in innocent}
    false = [(leak.path, leak.rule) for outcome in outcomes.values() for leak in outcome.leaks if leak.path in passed]
    with capsys.disabled():
        if os.environ.get("GUARD_TABLE"):
            print("\n" + "\n".join(table))  # noqa: T201 - the table is what is shown
        figures = f"{len(planted)} planted x {len(outcomes)} scopes: {len(missed)} missed"
        print(f"\n{figures}; {len(innocent)} look-alikes: {len(false)} false")  # noqa: T201
    assert (missed, false) == ([], [])
    assert all(outcome.exit_code == 1 for outcome in outcomes.values())
    secret = Maker().hetzner()
    for form in (report.text, report.as_json, report.sarif):
        assert secret not in form(outcomes["tracked"])


HIDING = (
    "history",
    "branch",
    "amended",
    "stash",
    "tag message",
    "commit message",
    "note",
    "staged only",
    "forced",
    "remote URL",
    "untracked",
)


@pytest.mark.parametrize("place", HIDING)
def test_nothing_hides_in_git(git, place):
    make = Maker()
    token = make.tailscale()
    line = f"key: {token}\n"
    git.commit()
    if place == "history":
        git.commit("a.yaml", line)
        git.commit("a.yaml", "key: none\n")
    elif place == "branch":
        git("checkout", "-q", "-b", "other")
        git.commit("a.yaml", line)
        git("checkout", "-q", "main")
    elif place == "amended":
        git.commit("a.yaml", line)
        git.write("a.yaml", "key: none\n")
        git("commit", "-q", "-a", "--amend", "-m", "m")
    elif place == "stash":
        git.write("README.md", line)
        git("stash", "-q")
        git("stash", "drop", "-q")
    elif place == "tag message":
        git("tag", "-a", "v1", "-m", line)
    elif place == "commit message":
        git("commit", "-q", "--allow-empty", "-m", line)
    elif place == "note":
        git("notes", "add", "-m", line)
    elif place == "staged only":
        git.write("a.yaml", line)
        git("add", "a.yaml")
        git.write("a.yaml", "key: none\n")
    elif place == "forced":
        git.commit(".gitignore", "*.log\n")
        git.commit("a.log", line)
    elif place == "remote URL":
        git("remote", "add", "origin", f"https://bot:{make.some(24)}@cache.invalid/x.git")
    else:
        git.write("a.yaml", line)
    expected = "password-in-url" if place == "remote URL" else "tailscale-key"
    outcome = git.scan("paths", git.folder) if place == "untracked" else git.scan("history")
    assert expected in rules(outcome)
    assert outcome.exit_code == 1
    assert token not in report.text(outcome)


def test_the_index_counts_and_not_the_work_tree(git):
    git.commit()
    git.write("a.txt", Maker().tailscale())
    assert git.scan("staged").exit_code == 0
    git("add", "a.txt")
    git.write("a.txt", "clean now\n")
    outcome = git.scan("staged")
    assert rules(outcome) == ["tailscale-key"]
    git("add", "a.txt")
    assert git.scan("staged").exit_code == 0
    assert rules(git.scan("history")) == ["tailscale-key"]  # git add keeps what was added once


def test_no_commits_nothing_staged_binary_names_submodules_and_links(git, tmp_path):
    assert git.scan("staged").exit_code == 0
    assert git.scan("history").exit_code == 0
    other = Git(tmp_path / "other")
    other.commit("a.txt", Maker().tailscale())
    git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other.folder), "sub")
    git.write("odd\n\x1b[2J.txt", Maker().github())
    (git.folder / os.fsdecode(b"caf\xe9.txt")).write_text(Maker().github("ghs_"))
    git.write("dangling", "/nowhere", link=True)
    git("add", "-A")
    outcome = git.scan("staged")
    assert rules(outcome) == ["github-token", "github-token"]
    assert any("sub is a submodule" in note for note in outcome.notes)
    assert "\x1b" not in report.text(outcome)
    assert "caf\\xe9" in report.text(outcome)
    assert sorted(rules(git.scan("paths", git.folder))) == ["github-token", "github-token"]


def test_what_cannot_be_read_is_unknown_and_never_clean(git, tmp_path):
    git.commit("a.txt", "x" * 300)
    oid = git("rev-parse", "HEAD:a.txt").stdout.strip()
    (git.folder / ".git" / "objects" / oid[:2] / oid[2:]).unlink()
    outcome = git.scan("tracked")
    assert outcome.exit_code == 2
    assert [leak.rule for leak in outcome.leaks] == ["unreadable"]
    os.mkfifo(tmp_path / "pipe")
    assert run(Request(tmp_path, "paths", (tmp_path / "pipe",)), runner=RUNNER, environ={}).exit_code == 2
    shallow = tmp_path / "shallow"
    source = Git(tmp_path / "source")
    source.commit()
    source.commit("b", "y\n")
    source("clone", "-q", "--depth", "1", f"file://{source.folder}", str(shallow))
    assert run(Request(shallow, "history"), runner=RUNNER, environ={}).exit_code == 2


def test_a_cut_off_object_is_unknown(git):
    git.commit("a.txt", "x" * 300_000 + "\n")
    oid = git("rev-parse", "HEAD:a.txt").stdout.strip()
    path = git.folder / ".git" / "objects" / oid[:2] / oid[2:]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-40])
    assert git.scan("tracked").exit_code == 2


def test_200_megabytes_and_thousands_of_files_in_bounded_memory(git, program):
    with (git.folder / "large.txt").open("wb") as handle:
        block = b"lorem ipsum dolor sit amet\n" * 40_000
        for _ in range(LARGE_BYTES // len(block)):
            handle.write(block)
        handle.write(Maker().tailscale().encode() + b"\n")
    for number in range(3000):
        git.write(f"many/{number % 50}/{number}.txt", f"file {number}\n")
    git("-c", "core.compression=0", "-c", "core.bigFileThreshold=1m", "add", ".")
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=open('out.json', 'w'))\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    words = [sys.executable, "-c", script, str(program), "guard", "scan", "--staged", "--format", "json"]
    done = subprocess.run(words, cwd=git.folder, env=ENVIRON, capture_output=True, text=True, check=True)
    code, peak_kib = map(int, done.stdout.split())
    outcome = json.loads((git.folder / "out.json").read_text())
    assert code == 1
    assert [(leak["rule"], leak["path"]) for leak in outcome["leaks"]] == [("tailscale-key", "large.txt")]
    assert outcome["contents"] == 3001
    assert outcome["sizeBytes"] > 190_000_000
    assert peak_kib * 1024 < MAX_RSS_BYTES


def test_secrets_must_be_encrypted_to_whom_the_index_declares(git):
    operator, host, other, stranger = (age.generate().recipient for _ in range(4))
    sops = Sops(RUNNER, find_sops(RUNNER))

    def sealed(*readers):
        return sops.encrypt({"token": Secret("canary-canary")}, recipients=readers, filename="token.yaml")

    git.write("secrets/keys/operators/ann.age.pub", operator + "\n")
    git.write("secrets/keys/hosts/alpha.age.pub", host + "\n")
    git.write("secrets/keys/hosts/beta.age.pub", other + "\n")
    good = sealed(operator, host)
    git.write("secrets/hosts/alpha/token.yaml", good)
    git("add", ".")
    assert git.scan("staged").leaks == []
    bad = {
        "plain.yaml": "token: canary\n",
        "partly.yaml": good.replace("sops:", "added: canary\nsops:", 1),
        "foreign.yaml": sealed(operator, host, stranger),
        "shared.yaml": sealed(operator, host, other),
    }
    for name, content in bad.items():
        git.write(f"secrets/hosts/alpha/{name}", content)
    git.write("secrets/hosts/alpha/link.yaml", "token.yaml", link=True)
    git("add", ".")
    outcome = git.scan("staged")
    assert {leak.path.rpartition("/")[2]: leak.rule for leak in outcome.leaks} == {
        "plain.yaml": "secrets-not-encrypted",
        "partly.yaml": "secrets-partly-encrypted",
        "foreign.yaml": "secrets-foreign-recipient",
        "shared.yaml": "secrets-foreign-recipient",
        "link.yaml": "secrets-not-encrypted",
    }
    assert "host beta" in next(leak.what for leak in outcome.leaks if leak.path.endswith("shared.yaml"))
    for name in (*bad, "link.yaml"):
        (git.folder / "secrets/hosts/alpha" / name).unlink()
    git("add", "-A")
    git("commit", "-q", "-m", "good")
    # an operator who goes: every file that he could read is a finding of the commit that removes him
    git("rm", "-q", "--cached", "secrets/keys/operators/ann.age.pub")
    assert [leak.path for leak in git.scan("staged").leaks if leak.rule == "secrets-foreign-recipient"] == [
        "secrets/hosts/alpha/token.yaml"
    ]
    assert git.scan("staged").exit_code == 1


def test_known_secrets_are_found_and_only_their_digest_is_shown(git):
    value = "canary correct horse/battery"
    git.write(".gitignore", "/.clawdlets/\n")
    git.write(".clawdlets/env", f"CLAWDLETS_OPERATOR=ann-with-a-long-name\nNETRC_PASSWORD={value}\n")
    identity = age.generate()
    git.write(".clawdlets/keys/operators/ann.agekey", age.to_key_file(identity).reveal())
    git.write("a.txt", "ann-with-a-long-name\n" + identity.recipient)
    git.write("b.txt", f"x {value.encode().hex()}\n")
    git.write("c.txt", "correct%20horse canary%20correct%20horse%2Fbattery\n")
    git("add", ".")
    outcome = git.scan("staged")
    assert [(leak.path, leak.rule) for leak in outcome.leaks] == [("b.txt", "known-secret"), ("c.txt", "known-secret")]
    assert outcome.needles == 2
    assert "NETRC_PASSWORD" in report.text(outcome)
    assert value not in report.text(outcome)
    git.write(".clawdlets/values.json", json.dumps({"alpha": {"token": "canary in a values file"}}))
    git.write(".clawdlets/env", "CLAWDLETS_SECRETS_FILE=.clawdlets/values.json\n")
    git.write("d.txt", "a canary in a values file\n")
    git("add", "d.txt")
    assert [leak.path for leak in git.scan("staged").leaks] == ["d.txt"]
    (git.folder / ".clawdlets/env").write_bytes(b"\xff\xfe=\n")
    assert git.scan("staged").leaks[-1].unknown


def test_an_allowance_is_tracked_reasoned_shown_and_missed_when_unused(git):
    git.write("a.txt", Maker().tailscale() + "\n")
    git("add", ".")
    (leak,) = git.scan("tracked").leaks
    entry = f'[[allow]]\npath = "*.txt"\nrule = "{leak.rule}"\nfingerprint = "{leak.fingerprint}"\nreason = "a trial"\n'
    git.write(".clawdlets-guard.toml", entry)
    untracked = git.scan("tracked")
    assert "allow-list" in rules(untracked)
    git("add", ".")
    outcome = git.scan("tracked")
    assert outcome.exit_code == 0
    assert "a trial" in report.text(outcome)
    (result,) = json.loads(report.sarif(outcome))["runs"][0]["results"]
    assert result["suppressions"][0]["justification"] == "a trial"
    git.write("a.txt", Maker(9).tailscale() + "\n")
    git("add", ".")
    changed = git.scan("tracked")
    assert rules(changed) == ["tailscale-key"]
    assert [unused.reason for unused in changed.unused] == ["a trial"]
    git.write(".clawdlets-guard.toml", entry.replace("a trial", ""))
    git("add", ".")
    assert "allow-list" in rules(git.scan("tracked"))
