"""google-re2 against the standard library's re: the same findings; and the packaged scanner as we run it."""

import os
import shutil

import pytest

from clawdlets_ops.errors import ToolMissingError
from clawdlets_ops.guard import engine as engines
from clawdlets_ops.guard import kingfisher
from clawdlets_ops.guard.engine import Engine
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.guard.rules import RULES
from clawdlets_ops.guard.scan import Ground, Item, scan
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.sensitive import Secret
from tests.guard_corpus import innocents, leaks

pytestmark = pytest.mark.contract
needs_re2 = pytest.mark.skipif(engines.re2 is None, reason="google-re2 is not installed")
KNOWN = Needle("canary", Secret("canary with spaces/ünd=signs"))


@needs_re2
def test_both_engines_find_the_same_on_every_planted_leak_and_look_alike():
    fast, plain = Engine([KNOWN]), Engine([KNOWN], plain=True)
    assert (fast.name, plain.name) == ("re2", "re")
    texts = [case.content for seed in (4, 11) for case in (*leaks(seed), *innocents(seed))]
    texts += [b"x " + form + b" y" for form in KNOWN.forms()]
    assert sum(len(list(fast.scan([text]))) for text in texts) > len(RULES)
    for text in texts:
        assert list(fast.scan([text])) == list(plain.scan([text]))


@needs_re2
def test_a_set_finds_what_stands_first_in_a_long_text_and_every_rule_that_matches_at_once():
    everything = b"\n".join(rule.sample for rule in RULES)
    text = everything + b"\n" + b"lorem ipsum dolor\n" * 50_000
    assert {hit.rule for hit in Engine().scan([text])} >= {rule.id for rule in RULES}


def test_a_keyword_is_in_every_text_that_its_pattern_matches():
    cases = [*leaks(), *innocents()]
    for rule in RULES:
        pattern = engines.re.compile(rule.pattern)
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
