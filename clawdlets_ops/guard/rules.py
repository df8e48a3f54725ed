"""The content rules: a pattern that finds candidates, and a question that confirms or drops each. Pure.

Patterns are bytes in the common ground of RE2 and ``re`` (no look-around, no back-reference, no ``\\s``, every repetition
bounded), so that both engines find the same. Group 1 is the secret.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass

from clawdlets_ops.guard import tokens
from clawdlets_ops.guard.candidate import REACH, Candidate


@dataclass(frozen=True)
class Rule:
    """``keywords``: one of them is in the lower-cased text wherever ``pattern`` matches; none means no such word.

    ``trigger`` matches something wherever ``pattern`` does, and needs little memory to look for; by default it is the
    pattern. An unbounded start with a long count after it (``[MNO].{23}``) would make RE2's automaton grow without end.
    ``long_run``: the match holds LONG_RUN letters, digits, ``+`` or ``/`` in a row, which is quicker to look for.
    ``sample`` is a text that must be caught; the engine proves itself on it before every scan.
    """

    id: str
    what: str
    pattern: bytes
    confirm: Callable[[Candidate], bool]
    sample: bytes
    keywords: tuple[bytes, ...] = ()
    trigger: bytes = b""
    long_run: bool = False
    fix: str = "take it out, replace it where it was issued (git keeps what was once committed), and keep the new one in secrets/"


_RANDOM = (
    b"q7Zx2Kd9Lw4Tn6Rb1Yc8Vm3Jh5Gs0PfAeUiXoQrDtNyBkMzCvHgFjWlEpSaIuO"  # 64 letters and digits, all different but two
)


def _digits(count: int) -> bytes:
    return (_RANDOM * 3)[:count]


def _lively(floor: float) -> Callable[[Candidate], bool]:
    return lambda found: tokens.entropy(found.secret) >= floor and not tokens.is_placeholder(found.secret)


def _alone(floor: float, joined: bytes = b"_-") -> Callable[[Candidate], bool]:
    return lambda found: found.stands_alone(joined) and _lively(floor)(found)


def _is_github(found: Candidate) -> bool:
    body = found.secret[4:]
    if len(body) != 36:  # the longer forms have no published checksum
        return _alone(3.5)(found)
    return found.stands_alone(b"_") and tokens.base62_crc32(body[:30]) == body[30:]


def _is_age(found: Candidate) -> bool:
    return tokens.is_bech32(found.secret.decode("ascii"))


def _is_discord(found: Candidate) -> bool:
    return found.stands_alone(b"_-.") and tokens.is_snowflake(found.secret.partition(b".")[0])


def _is_hetzner(found: Candidate) -> bool:
    if found.after[:1] in b"+/=_-" and found.after[:1]:
        return False
    if not found.stands_alone(b"+/_-.") or not tokens.mixes_cases(found.secret) or _is_wrapped(found):
        return False
    named = re.search(rb"(?i)hcloud|hetzner", found.line_before) is not None
    return tokens.entropy(found.secret) >= (3.0 if named else 4.6) and not tokens.is_placeholder(found.secret)


_BASE64_LINE = re.compile(rb"[A-Za-z0-9+/]{64,76}")


def _is_wrapped(found: Candidate) -> bool:
    """True within a longer piece of base64: what sops wrote, an armoured file, or lines broken at 64 characters."""
    if found.line_before.rfind(b"ENC[") > found.line_before.rfind(b"]"):
        return True
    before, after = found.before, found.after
    for end in (b"\\n", b"\r\n"):
        before, after = before.replace(end, b"\n"), after.replace(end, b"\n")
    above, below = before.split(b"\n")[:-1], after.split(b"\n")[1:]
    full: list[bytes] = []
    for line in reversed(above):
        bare = line.strip(b" \t\"',+#*/;:|\\")
        if bare.startswith(b"-----BEGIN "):
            return True
        if not _BASE64_LINE.fullmatch(line.strip(b" \t\"',")):
            break
        full.append(line.strip(b" \t\"',"))
    for line in below:
        bare = line.strip(b" \t\"',")
        if full and re.fullmatch(rb"[A-Za-z0-9+/]{1,63}={0,2}", bare):
            full.append(bare)  # a last, shorter line
        if not _BASE64_LINE.fullmatch(bare):
            break
        full.append(bare)
    return any(b"+" in line or b"/" in line or line.endswith(b"=") for line in full)


def _is_private_key(found: Candidate) -> bool:
    """A header alone is talk about keys; a key has a body."""
    body = found.after[:700].replace(b"\\n", b"\n").replace(b"\\r", b"")
    runs = re.findall(rb"[A-Za-z0-9+/]{24,}", body.partition(b"-----END")[0])
    return any(tokens.entropy(run) >= 2.5 and not tokens.is_placeholder(run) for run in runs)


def _is_named_value(found: Candidate) -> bool:
    name = re.search(rb"[A-Za-z0-9_.-]*[\"']?[ \t]*[:=]{1,2}>?[ \t]*[\"']?\Z", found.line_before)
    if name and re.search(
        rb"(?i)hash|sha_?\d|digest|sum|public|pub_?key|fingerprint|_id\b|integrity|file|path", name.group()
    ):
        return False
    return (
        found.stands_alone(b"+/_") and tokens.entropy(found.secret) >= 3.0 and not tokens.is_placeholder(found.secret)
    )


def _is_password_in_url(found: Candidate) -> bool:
    secret = found.secret
    words = rb"(?i)pass(?:word|wd)?|pwd|secret|token|user(?:name)?|key|guest|test|admin|root|postgres|x-oauth-basic|git"
    if re.fullmatch(words, secret) or tokens.is_placeholder(secret):
        return False
    return not re.search(rb"[${}<>%()\[\]\"'`,\\*]|\A[.:]|\A\d{1,5}/", secret) and len(set(secret)) > 3


def _is_encoded(found: Candidate) -> bool:
    """Decode what stands around it, and ask the rules whose markers these are."""
    return any(
        rule.confirm(Candidate(text, match.start(1), match.end(1), match.start()))
        for text in tokens.decoded_runs(found.text, found.start, found.end, reach=REACH)
        for rule in _ENCODABLE
        for match in re.finditer(rule.pattern, text)
    )


def _encoded_markers() -> tuple[list[bytes], list[bytes]]:
    """Every base64 form (three alignments) and the hex of what the encodable secrets begin with."""
    forms: list[bytes] = []
    for marker in (
        b"AGE-SECRET-KEY-",
        b"PRIVATE KEY-----",
        b"tskey-auth-",
        b"tskey-client-",
        b"tskey-api-",
        b"sk-ant-",
        b"github_pat_",
    ):
        for shift in range(3):
            encoded = base64.b64encode(bytes(shift) + marker)
            forms.append(encoded[-(-shift * 8 // 6) : (shift + len(marker)) * 8 // 6])
    hexed = [marker.hex().encode() for marker in (b"AGE-SECRET-KEY-", b"PRIVATE KEY-----", b"tskey-")]
    return forms, hexed


_AGE_SAMPLE = b"AGE-SECRET-" + f"KEY-1{'q' * 52}{tokens.bech32_checksum('age-secret-key-', 'q' * 52)}".upper().encode()
_BASE64_MARKERS, _HEX_MARKERS = _encoded_markers()
_NAMES = rb"(?i:secret|token|passwo?r?d|passphrase|api[_-]?key|private[_-]?key|auth[_-]?key|preshared[_-]?key|psk|credentials?)"
_ASSIGNED = rb"[A-Za-z0-9_]{0,24}[\"']?[ \t]{0,8}(?::|=|:=|=>|==)[ \t]{0,8}[\"']?"

_AGE = Rule(
    "age-secret-key",
    "an age private key",
    rb"(?i:(AGE-SECRET-KEY-(?:PQ-)?1[0-9A-Z]{58,200}))",
    _is_age,
    _AGE_SAMPLE,
    (b"age-secret-key-",),
    fix="rotate it: secrets rotate; every file that was encrypted to it must be encrypted anew",
    trigger=rb"(?i:AGE-SECRET-KEY-)",
)
_TAILSCALE = Rule(
    "tailscale-key",
    "a Tailscale key",
    rb"(tskey-(?:auth|client|api|webhook|scim)-[A-Za-z0-9]{6,40}(?:-[A-Za-z0-9]{16,64})?)",
    _alone(3.4),
    b"tskey-" + b"auth-" + _digits(17) + b"-" + _digits(32),
    (b"tskey-",),
    trigger=rb"tskey-[a-z]",
)
_ANTHROPIC = Rule(
    "anthropic-key",
    "an Anthropic key",
    rb"(sk-ant-[a-z]{3,6}[0-9]{2}-[A-Za-z0-9_-]{20,200})",
    _lively(3.5),
    b"sk-" + b"ant-api03-" + _digits(60),
    (b"sk-ant-",),
    trigger=rb"sk-ant-[a-z]",
)
_GITHUB_FINE = Rule(
    "github-fine-grained-token",
    "a GitHub token",
    rb"(github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})",
    _alone(3.8),
    b"github_" + b"pat_" + _digits(22) + b"_" + _digits(59),
    (b"github_pat_",),
    trigger=rb"github_pat_",
)
_PEM = Rule(
    "private-key",
    "a private key",
    rb"(-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-[23]: )",
    _is_private_key,
    b"-----BEGIN OPENSSH " + b"PRIVATE KEY-----\n" + _digits(48),
    (b"private key", b"putty-user-key-file"),
    trigger=rb"PRIVATE KEY|PuTTY-User-Key",
)
_ENCODABLE = (_AGE, _TAILSCALE, _ANTHROPIC, _GITHUB_FINE, _PEM)

RULES: tuple[Rule, ...] = (
    Rule(
        "hetzner-api-token",
        "a Hetzner Cloud API token",
        rb"(?:\A|[^A-Za-z0-9+/_.-])([A-Za-z0-9]{64})",
        _is_hetzner,
        b"HCLOUD_TOKEN=" + _digits(64),
        trigger=rb"[A-Za-z0-9]{64}",
        long_run=True,
    ),
    *_ENCODABLE,
    Rule(
        "discord-bot-token",
        "a Discord bot token",
        rb"([MNO][A-Za-z0-9_-]{22,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,45})",
        _is_discord,
        base64.b64encode(b"110000000000000000").rstrip(b"=") + b".Gq7Zx2." + _digits(38),
        trigger=rb"(?:[MNO][DTjz][AEIMQUYcgk][w-z0-5]){5}",
    ),
    Rule(
        "discord-webhook",
        "a Discord webhook's address, which is its password",
        rb"discord(?:app)?\.com/api/(?:v[0-9]{1,2}/)?webhooks/[0-9]{17,20}/([A-Za-z0-9_-]{60,80})",
        _lively(3.5),
        b"https://discord.com/api/" + b"webhooks/110000000000000000/" + _digits(64),
        (b"/webhooks/",),
        trigger=rb"/webhooks/[0-9]",
    ),
    Rule(
        "telegram-bot-token",
        "a Telegram bot token",
        rb"([0-9]{8,10}:AA[A-Za-z0-9_-]{32,34})",
        _alone(3.5),
        b"1234098765:AA" + _digits(33),
        (b":aa",),
        trigger=rb"[0-9]:AA[A-Za-z0-9_-]{4}",
    ),
    Rule(
        "openai-key",
        "an OpenAI key",
        rb"(sk-(?:(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{32,250}|[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}|[A-Za-z0-9]{48}))",
        _alone(3.8),
        b"sk-" + b"proj-" + _digits(48),
        (b"sk-",),
        trigger=rb"sk-(?:proj|svcacct|admin|None)-|sk-[A-Za-z0-9]{20}",
    ),
    Rule(
        "provider-key",
        "a model provider's key",
        rb"(sk-or-v1-[0-9a-f]{64}|gsk_[A-Za-z0-9]{52}|xai-[A-Za-z0-9]{80}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{34})",
        _alone(3.3),
        b"gs" + b"k_" + _digits(52),
        (b"sk-or-v1-", b"gsk_", b"xai-", b"aiza", b"hf_"),
        trigger=rb"sk-or-v1-|gsk_[A-Za-z0-9]{4}|xai-[A-Za-z0-9]{4}|AIza[A-Za-z0-9_-]{4}|hf_[A-Za-z0-9]{8}",
    ),
    Rule(
        "github-token",
        "a GitHub or npm token",
        rb"((?:gh[pousr]|npm)_[A-Za-z0-9]{36,255})",
        _is_github,
        b"gh" + b"p_" + _digits(30) + tokens.base62_crc32(_digits(30)),
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"npm_"),
        trigger=rb"(?:gh[pousr]|npm)_[A-Za-z0-9]{8}",
    ),
    Rule(
        "gitlab-token",
        "a GitLab token",
        rb"(glpat-[A-Za-z0-9_-]{20,50})",
        _alone(3.3),
        b"glp" + b"at-" + _digits(20),
        (b"glpat-",),
        trigger=rb"glpat-",
    ),
    Rule(
        "slack-token",
        "a Slack token",
        rb"(xox[abeoprs]-(?:[0-9]{1,14}-){1,3}[A-Za-z0-9-]{10,80}|xapp-[0-9]-[A-Z0-9]{8,14}-[0-9]{8,14}-[a-f0-9]{32,80})",
        _lively(3.0),
        b"xox" + b"b-110000000000-120000000000-" + _digits(24),
        (b"xox", b"xapp-"),
        trigger=rb"xox[abeoprs]-[0-9]|xapp-[0-9]",
    ),
    Rule(
        "slack-webhook",
        "a Slack webhook's address, which is its password",
        rb"hooks\.slack\.com/(?:services|workflows)/T[A-Z0-9]{8,12}/[AB][A-Z0-9]{8,12}/([A-Za-z0-9]{20,30})",
        _lively(3.3),
        b"https://hooks.slack.com/" + b"services/T0000AAAA/B0000AAAA/" + _digits(24),
        (b"hooks.slack.com",),
        trigger=rb"hooks\.slack\.com/",
    ),
    Rule(
        "crypt-hash",
        "a password's hash, which can be guessed offline",
        rb"(\$(?:6\$(?:rounds=[0-9]{1,9}\$)?[./A-Za-z0-9]{1,16}\$[./A-Za-z0-9]{86}|5\$(?:rounds=[0-9]{1,9}\$)?[./A-Za-z0-9]{1,16}\$[./A-Za-z0-9]{43}"
        rb"|g?y\$[./A-Za-z0-9]{2,12}\$[./A-Za-z0-9]{1,86}\$[./A-Za-z0-9]{43}|2[abxy]\$[0-9]{2}\$[./A-Za-z0-9]{53}"
        rb"|argon2(?:id|i|d)\$v=[0-9]{1,3}\$m=[0-9]{1,9},t=[0-9]{1,4},p=[0-9]{1,4}\$[A-Za-z0-9+/]{11,64}\$[A-Za-z0-9+/]{16,90}))",
        lambda found: tokens.entropy(found.secret.rpartition(b"$")[2]) >= 3.3,
        b"$6" + b"$saltsalt$" + _digits(86),
        (b"$6$", b"$5$", b"$y$", b"$gy$", b"$2a$", b"$2b$", b"$2x$", b"$2y$", b"$argon2"),
        fix="take it out, set another password, and keep the hash in secrets/",
        trigger=rb"\$(?:6|5|g?y|2[abxy]|argon2(?:id|i|d))\$[./A-Za-z0-9]",
    ),
    Rule(
        "named-hex-secret",
        "a 32-byte secret in hex, by its name",
        _NAMES + _ASSIGNED + rb"([0-9a-fA-F]{64})",
        _is_named_value,
        b"session_" + b"secret = " + b"7f3a9c05d2e8b641" * 4,
        (b"secret", b"token", b"passw", b"passphrase", b"key", b"psk", b"credential"),
        long_run=True,
    ),
    Rule(
        "named-base64-secret",
        "a 32-byte secret in base64, by its name (WireGuard's keys look so)",
        _NAMES + _ASSIGNED + rb"([A-Za-z0-9+/]{43}=)",
        _is_named_value,
        b"Private" + b"Key = " + _digits(43) + b"=",
        (b"secret", b"token", b"passw", b"passphrase", b"key", b"psk", b"credential"),
        long_run=True,
    ),
    Rule(
        "aws-secret-key",
        "an AWS secret key",
        rb"(?i:aws_?secret_?(?:access_?)?key)" + _ASSIGNED + rb"([A-Za-z0-9+/]{40})",
        _alone(4.0, b"+/="),
        b"aws_secret_" + b"access_key = " + _digits(40),
        (b"aws",),
        trigger=rb"(?i:aws_?secret)",
    ),
    Rule(
        "netrc-password",
        "a password in netrc form",
        rb"machine[ \t\n]{1,8}[A-Za-z0-9._-]{1,128}[ \t\n]{1,8}login[ \t\n]{1,8}[^ \t\n]{1,128}[ \t\n]{1,8}password[ \t\n]{1,8}([^ \t\n]{8,200})",
        _is_password_in_url,
        b"machine cache.invalid login canary pass" + b"word " + _digits(20),
        (b"machine",),
        trigger=rb"[ \t\n]login[ \t\n]",
    ),
    Rule(
        "password-in-url",
        "a password in a URL",
        rb"[a-z0-9+]{2,16}://[^/:@ \t\n\"'<>]{0,64}:([^/@ \t\n\"'<>]{6,200})@",
        _is_password_in_url,
        b"https://canary:" + _digits(20) + b"@cache.invalid/",
        (b"://",),
        trigger=rb"://[^/:@ \t\n\"'<>]{0,64}:[^/@ \t\n\"'<>]{6}",
    ),
    Rule(
        "encoded-secret",
        "a private key or token in base64 or hex",
        b"(" + b"|".join([*_BASE64_MARKERS, *(b"(?i:" + form + b")" for form in _HEX_MARKERS)]) + b")",
        _is_encoded,
        base64.b64encode(b"key " + _AGE_SAMPLE),
        tuple(form.lower() for form in (*_BASE64_MARKERS, *_HEX_MARKERS)),
        fix="base64 and hex hide nothing: take it out, and replace the key",
    ),
)
BY_ID = {rule.id: rule for rule in RULES}
