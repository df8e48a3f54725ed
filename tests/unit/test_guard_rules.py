"""The guard's rules on planted leaks and innocent look-alikes, and the values that they are made of."""

import re

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdlets_ops.guard import allow, sopsfiles, tokens
from clawdlets_ops.guard.candidate import Candidate
from clawdlets_ops.guard.engine import PIECE_BYTES, Engine
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.guard.paths import PATH_RULES
from clawdlets_ops.guard.rules import RULES
from clawdlets_ops.guard.scan import Ground, Item, scan
from clawdlets_ops.sensitive import Secret
from tests.guard_corpus import Case, Maker, innocents, leaks

LEAKS, INNOCENTS = leaks(), innocents()
AGE = "age1" + "q" * 58


@pytest.fixture(scope="module")
def ground():
    return Ground(Engine())


def found(ground, case: Case):
    return scan([Item("x", [case.content], (case.path,))], ground, "tracked").leaks


@pytest.mark.parametrize("case", LEAKS, ids=[case.name for case in LEAKS])
def test_a_planted_leak_is_caught_by_its_rule_and_never_shown(ground, case):
    caught = found(ground, case)
    assert case.rule in {leak.rule for leak in caught}
    for leak in caught:
        shown = f"{leak.masked} {leak.what} {leak.fingerprint} {leak.fix}"
        assert not [word for word in re.findall(rb"[A-Za-z0-9+/_-]{12,}", case.content) if word.decode() in shown]


@pytest.mark.parametrize("case", INNOCENTS, ids=[case.name for case in INNOCENTS])
def test_an_innocent_look_alike_passes(ground, case):
    assert found(ground, case) == []


def test_enough_is_planted_and_every_rule_has_a_leak_of_its_own():
    assert len(LEAKS) >= 40
    assert len(INNOCENTS) >= 40
    assert {case.rule for case in LEAKS} == {rule.id for rule in (*RULES, *PATH_RULES)}


def test_other_seeds_are_caught_as_well(ground):
    missed = [
        (seed, case.name)
        for seed in range(100, 103)
        for case in leaks(seed)
        if len(case.content) < 100_000 and case.rule not in {leak.rule for leak in found(ground, case)}
    ]
    assert missed == []


def test_a_rule_that_cannot_see_stops_the_scan():
    blind = next(rule for rule in RULES if rule.id == "tailscale-key")
    broken = type(blind)(**{**vars(blind), "pattern": rb"(tskey\\.never)"})
    with pytest.raises(Exception, match="does not catch its own sample"):
        Engine(rules=[broken])


@given(st.integers(min_value=0, max_value=2 * PIECE_BYTES), st.integers(min_value=1, max_value=PIECE_BYTES))
@settings(max_examples=25, deadline=None)
def test_a_token_is_found_once_wherever_it_stands_and_however_it_arrives(ground, offset, size):
    token = Maker().age().encode()
    text = b"a line\n" * (offset // 7) + token + b"\n" + b"more\n" * 40_000
    hits = list(ground.engine.scan(text[at : at + size] for at in range(0, len(text), size)))
    assert [(hit.rule, hit.line) for hit in hits] == [("age-secret-key", offset // 7 + 1)]


@given(st.binary(max_size=2000))
@settings(max_examples=60, deadline=None)
def test_no_input_breaks_the_engine_or_a_confirmation(ground, noise):
    list(ground.engine.scan([noise]))
    for rule in RULES:
        for match in re.finditer(rule.pattern, noise + rule.sample + noise):
            rule.confirm(Candidate(noise + rule.sample + noise, match.start(1), match.end(1), match.start()))


@given(st.text(alphabet="abcXYZ019 /+=&%\"'\\\n\tüß€𝄞", min_size=10, max_size=300).map(lambda value: f"c{value}y"))
@settings(max_examples=25, deadline=None)
def test_a_known_secret_is_found_in_every_form_and_named_by_digest_only(value):
    needle = Needle(".clawdlets/env:NAME", Secret(value))
    engine = Engine([needle])
    for form in needle.forms():
        hits = [hit for hit in engine.scan([b"before ", form, b" after"]) if hit.rule == "known-secret"]
        assert len(hits) == 1
        assert needle.digest in hits[0].what
        assert value not in hits[0].what + hits[0].masked


def test_checksums_are_those_of_the_programs_that_make_the_tokens():
    assert all(tokens.is_bech32(str(pyrage.x25519.Identity.generate())) for _ in range(20))
    key = str(pyrage.x25519.Identity.generate())
    assert not tokens.is_bech32(key[:-1] + ("Q" if key[-1] != "Q" else "P"))
    # the published example of a token's checksum
    assert tokens.base62_crc32(b"zQWBuTSOoRi4A9sp" + b"HcVY5ncnsDkxkJ") == b"0mLq17"


def sops_file(body: str, recipients=(AGE, "age1host"), extra: str = "") -> bytes:
    listed = "".join(f"        - recipient: {each}\n          enc: canary\n" for each in recipients)
    return f"{body}sops:\n    age:\n{listed}    mac: canary\n    version: 3.11.0\n{extra}".encode()


ENC = "ENC[AES256_GCM,data:Y2FuYXJ5,iv:Y2FuYXJ5,tag:Y2FuYXJ5,type:str]"
GOOD = f"token: {ENC}\n"
BOTH = (AGE, "age1host")


@pytest.mark.parametrize(
    ("path", "content", "rule"),
    [
        ("hosts/alpha/token.yaml", sops_file(GOOD), None),
        ("hosts/alpha/token.yaml", sops_file(GOOD + 'empty: ""\nnothing: null\n'), None),
        ("hosts/alpha/token.yaml", sops_file(f"#ENC[AES256_GCM,data:x]\n{GOOD}"), None),
        (".sops.yaml", b"creation_rules: []\n", None),
        ("keys/operators/ann.age.pub", b"canary\n", "secrets-not-encrypted"),
        ("keys/hosts/alpha.ssh_host_ed25519_key.pub", b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 canary\n", None),
        ("keys/hosts/alpha.ssh_host_ed25519_key.pub", Maker().key().encode(), "secrets-not-encrypted"),
        ("hosts/alpha/token.yaml", b"token: canary\n", "secrets-not-encrypted"),
        ("hosts/alpha/token.yaml", b"token: canary\nsops: later ENC[\n", "secrets-not-encrypted"),
        ("hosts/alpha/token.json", b'{"token": "canary"}', "secrets-not-encrypted"),
        ("hosts/alpha/token.yaml", b"\xff\xfe\x00", "secrets-not-encrypted"),
        ("hosts/alpha/token.yaml", b"a: [", "secrets-not-encrypted"),
        ("hosts/alpha/token.yaml", b"", "secrets-not-encrypted"),
        ("hosts/alpha/token.yaml", sops_file(GOOD + "added: canary\n"), "secrets-partly-encrypted"),
        ("hosts/alpha/token.yaml", sops_file(GOOD + "list:\n    - {a: 7}\n"), "secrets-partly-encrypted"),
        ("hosts/alpha/token.yaml", sops_file(GOOD + "a: ENC[canary]\n"), "secrets-partly-encrypted"),
        ("hosts/alpha/token.yaml", sops_file(GOOD + "x_unencrypted: canary\n"), "secrets-partly-encrypted"),
        ("hosts/alpha/token.yaml", sops_file(f"# was canary\n{GOOD}"), "secrets-partly-encrypted"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, extra="    encrypted_regex: ^x\n"), "secrets-foreign-rules"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, extra="    unencrypted_suffix: _x\n"), "secrets-foreign-rules"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, extra="    kms: [{arn: x}]\n"), "secrets-foreign-rules"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, ["age1host"]), "secrets-missing-recipient"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, [AGE]), "secrets-missing-recipient"),
        ("keys/hosts/alpha.agekey.yaml", sops_file(GOOD, [AGE]), None),
        ("hosts/beta/token.yaml", sops_file(GOOD, [AGE, "age1host"]), "secrets-foreign-recipient"),
        ("keys/hosts/alpha.agekey.yaml", sops_file(GOOD, [AGE, "age1host"]), "secrets-foreign-recipient"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, [*BOTH, "age1stranger"]), "secrets-foreign-recipient"),
        ("hosts/alpha/token.yaml", sops_file(GOOD, []), "secrets-foreign-recipient"),
    ],
)
def test_a_file_of_secrets_is_wholly_encrypted_to_whom_it_should_be(path, content, rule):
    declared = sopsfiles.Declared(frozenset({AGE}), {"alpha": "age1host"})
    faults = sopsfiles.judge(path, content, declared)
    assert [fault.rule for fault in faults] == ([rule] if rule else [])
    assert "canary" not in "".join(fault.what for fault in faults)


def test_an_allowance_needs_a_reason_and_covers_one_line():
    text = b'[[allow]]\npath = "docs/*"\nrule = "r"\nfingerprint = "f"\nreason = "why"\n'
    (entry,), faults = allow.parse(text)
    assert faults == []
    assert entry.covers(path="docs/a/b.md", rule="r", fingerprint="f")
    assert not entry.covers(path="src/a.md", rule="r", fingerprint="f")
    assert not entry.covers(path="docs/a.md", rule="r", fingerprint="g")
    assert allow.parse(text.replace(b"why", b" "))[1] == ["entry 1 lacks reason"]
    assert allow.parse(text.replace(b'reason = "why"\n', b""))[1] == ["entry 1 lacks reason"]
    assert allow.parse(b"[[allow]]\npath = 7\n")[1]
    assert allow.parse(b"not toml")[1]
    assert allow.parse(b"[[alow]]\n")[1] == ["has the unknown key 'alow'"]


def test_a_trigger_is_in_every_text_that_its_pattern_matches():
    for rule in RULES:
        for text in (rule.sample, *(case.content for case in LEAKS if len(case.content) < 100_000)):
            for match in re.finditer(rule.pattern, text):
                assert re.search(rule.trigger or rule.pattern, match.group()), (rule.id, match.group()[:20])
                assert not rule.long_run or re.search(rb"[A-Za-z0-9+/]{43}", match.group())
