"""Paths that must never be committed, whatever they hold. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SAMPLE = r"(?:example|sample|template|tmpl|dist|defaults?)"
_PUBLIC_PEM = re.compile(
    rb"-----BEGIN (?:CERTIFICATE|TRUSTED CERTIFICATE|PUBLIC KEY|RSA PUBLIC KEY|X509 CRL|DH PARAMETERS)-----"
)
_PRIVATE_PEM = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
HEAD_BYTES = 65_536
"""How much of a file's beginning ``PathRule.matches`` wants to see."""


@dataclass(frozen=True)
class PathRule:
    """A forbidden kind of path; ``pattern`` is searched in the lower-cased path with a slash in front.

    ``unless`` acquits a path, ``public_content_acquits`` a file that is evidently a certificate or a public key.
    """

    id: str
    what: str
    pattern: re.Pattern[str]
    unless: re.Pattern[str] | None = None
    public_content_acquits: bool = False
    fix: str = "git rm --cached it, add it to .gitignore; if it was ever pushed, replace what it holds"

    def matches(self, path: str, head: bytes) -> bool:
        """Whether ``path``, whose content begins with ``head``, is forbidden."""
        low = f"/{path.lower()}"
        if not self.pattern.search(low) or (self.unless and self.unless.search(low)):
            return False
        return not (self.public_content_acquits and _is_public(head))


def _is_public(head: bytes) -> bool:
    if head.startswith(b"PK\x03\x04"):  # a presentation, which has the same suffix
        return True
    return _PUBLIC_PEM.search(head) is not None and _PRIVATE_PEM.search(head) is None


def _rule(
    name: str, what: str, pattern: str, unless: str | None = None, *, public_content_acquits: bool = False
) -> PathRule:
    return PathRule(
        f"path-{name}", what, re.compile(pattern), re.compile(unless) if unless else None, public_content_acquits
    )


PATH_RULES: tuple[PathRule, ...] = (
    _rule("runtime-dir", "is in the runtime directory, which holds keys and state", r"/\.clawdlets(?:/|$)"),
    _rule("age-key", "is named as a private age key", r"\.agekey$|/keys?\.txt$|/age[-_]?keys?\.txt$", r"/docs?/"),
    _rule(
        "tofu-state",
        "is OpenTofu state, which holds every value of its resources in clear",
        r"\.tfstate(?:\.|$)|/\.terraform/(?!modules/modules\.json$)|/terraform\.tfstate",
    ),
    _rule(
        "tofu-plan",
        "is a saved plan, which holds every variable in clear",
        r"\.(?:tfplan|tofuplan)(?:\.json)?$|/(?:tf|tofu)?plan\.(?:out|bin|tfplan)$",
    ),
    _rule(
        "tofu-variables", "holds OpenTofu variables", r"\.tfvars(?:\.json)?$", rf"{_SAMPLE}\.tfvars|\.tfvars\.{_SAMPLE}"
    ),
    _rule(
        "env-file",
        "is an environment file",
        r"/\.env(?:[._-][^/]*)?$|/[^/]+\.env$",
        rf"[._-]{_SAMPLE}(?:\.env)?$|/{_SAMPLE}\.env$",
    ),
    _rule(
        "private-key",
        "is named as a private key",
        r"/(?:id_(?:rsa|dsa|ecdsa|ed25519|xmss|ecdsa_sk|ed25519_sk)|ssh_host_[a-z0-9]+_key)(?:\.(?:bak|old|orig))?$",
    ),
    _rule(
        "key-file",
        "is named as a private key and is not evidently a public one",
        r"\.(?:pem|key|ppk|p8)$",
        r"/[^/]*(?:public|\.pub)[^/]*\.(?:pem|key)$",
        public_content_acquits=True,
    ),
    _rule("key-store", "is a key store", r"\.(?:p12|pfx|jks|keystore|kdbx?|bks|keychain|keychain-db|snk)$"),
    _rule(
        "credentials",
        "is a file that programs keep credentials in",
        r"/(?:\.netrc|_netrc|\.git-credentials|\.pgpass|\.my\.cnf|\.npmrc|\.pypirc|\.htpasswd|\.dockercfg|shadow-?|gshadow-?"
        r"|\.vault[-_]pass(?:word)?|credentials\.tfrc\.json|hcloud\.toml|netrc)$"
        r"|/\.aws/credentials$|/\.docker/config\.json$|/\.kube/config$|/kubeconfig(?:\.ya?ml)?$|/\.config/hcloud/"
        r"|/\.ssh/(?!(?:config|known_hosts|authorized_keys)$|[^/]+\.pub$)|/\.gnupg/",
    ),
    _rule(
        "shell-history", "is a shell's history", r"/\.(?:bash|zsh|sh|psql|mysql|python|node_repl)_history$|/\.zhistory$"
    ),
)

_ANY = re.compile("|".join(f"(?:{rule.pattern.pattern})" for rule in PATH_RULES))


def may_be_forbidden(path: str) -> bool:
    """A quick answer for the many paths that no rule is about."""
    return _ANY.search(f"/{path.lower()}") is not None
