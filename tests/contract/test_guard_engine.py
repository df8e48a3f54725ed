"""hyperscan, google-re2 and the standard library's re: the same findings; and the packaged scanner as we run it."""

import os
import re
import shutil

import pytest

from clawdlets_ops.errors import ToolMissingError
from clawdlets_ops.guard import kingfisher, matchers
from clawdlets_ops.guard.engine import PIECE_BYTES, Engine
from clawdlets_ops.guard.matchers import HyperscanMatcher, Re2Matcher, ReMatcher
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.guard.rules import RULES
from clawdlets_ops.guard.scan import Ground, Item, scan
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.sensitive import Secret
from tests.guard_corpus import innocents, leaks

pytestmark = pytest.mark.contract
KNOWN = Needle("canary", Secret("canary with spaces/ünd=signs"))
FAST = [
    pytest.param(
        HyperscanMatcher,
        marks=pytest.mark.skipif(not (matchers.hyperscan and matchers.re2), reason="hyperscan is not installed"),
    ),
    pytest.param(Re2Matcher, marks=pytest.mark.skipif(not matchers.re2, reason="google-re2 is not installed")),
]


@pytest.mark.parametrize("matcher", FAST)
def test_all_engines_find_the_same_on_every_planted_leak_and_look_alike(matcher):
    fast, plain = Engine([KNOWN], matcher=matcher), Engine([KNOWN], matcher=ReMatcher)
    assert (fast.name, plain.name) == (matcher.name, "re")
    texts = [case.content for seed in (4, 11) for case in (*leaks(seed), *innocents(seed))]
    texts += [b"x " + form + b" y" for form in KNOWN.forms()]
    assert sum(len(list(fast.scan([text]))) for text in texts) > len(RULES)
    for text in texts:
        assert list(fast.scan([text])) == list(plain.scan([text]))


@pytest.mark.parametrize("matcher", FAST)
def test_what_stands_first_in_a_long_text_is_found_and_every_rule_that_matches_at_once(matcher):
    everything = b"\n".join(rule.sample for rule in RULES)
    text = everything + b"\n" + b"lorem ipsum dolor\n" * 50_000
    assert {hit.rule for hit in Engine(matcher=matcher).scan([text])} >= {rule.id for rule in RULES}


@pytest.mark.parametrize("matcher", [*FAST, ReMatcher])
def test_many_small_texts_are_silent_together_only_when_each_is(matcher):
    engine = Engine([KNOWN], matcher=matcher)
    small = [case.content for case in (*leaks(), *innocents()) if len(case.content) < PIECE_BYTES]
    loud = [text for text in small if list(engine.scan([text]))]
    silent = [text for text in small if engine.is_silent([text])]
    assert len(loud) > len(RULES)
    assert len(silent) > 20
    assert engine.is_silent(silent)
    for text in loud:
        assert not engine.is_silent([*silent, text, *silent])


def test_the_fastest_that_is_here_is_taken_and_an_unknown_processor_falls_back(monkeypatch):
    if not (matchers.re2 and matchers.hyperscan):
        pytest.skip("hyperscan and google-re2 are not installed")

    class Refusing(matchers.HyperscanMatcher):
        def __init__(self, *_):
            raise matchers.hyperscan.ArchitectureError

    assert Engine().name == "hyperscan+re2"
    monkeypatch.setattr(matchers, "HyperscanMatcher", Refusing)
    assert Engine().name == "re2"
    monkeypatch.setattr(matchers, "hyperscan", None)
    assert Engine().name == "re2"
    monkeypatch.setattr(matchers, "re2", None)
    assert Engine().name == "re"


def test_a_keyword_is_in_every_text_that_its_pattern_matches():
    cases = [*leaks(), *innocents()]
    for rule in RULES:
        pattern = re.compile(rule.pattern)
        for case in cases:
            if len(case.content) < 500_000 and rule.keywords and pattern.search(case.content):
                assert any(word in case.content.lower() for word in rule.keywords), (rule.id, case.name)


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not there")
def test_the_second_opinion_looks_at_everything_offline_and_shows_no_secret():
    runner = LocalRunner(os.environ)
    try:
        kingfisher.find(runner)
    except ToolMissingError:
        pytest.skip("kingfisher is not installed")
    cases = [case for case in leaks() if case.content != b"canary\n" and len(case.content) < 100_000]
    ground = Ground(Engine())
    with kingfisher.aside(runner) as other:
        items = [Item("x", [case.content], (case.path,)) for case in cases]
        outcome = scan(other.copying(items), ground, "tracked")
        found = other.leaks([])
        folder = other.folder
    assert not folder.exists()
    assert not [leak for leak in found if leak.unknown], other.said
    assert other.said.startswith(f"kingfisher looked at {len(cases)} of {len(cases)}")
    assert {leak.path for leak in found} <= {case.path for case in cases}
    assert len({leak.path for leak in found}) >= len(cases) // 2
    assert all(leak.masked == "" for leak in found)
    assert {leak.path for leak in outcome.leaks} == {case.path for case in cases}
