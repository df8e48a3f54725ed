"""What the models of ``fleet/clawdlets.json`` have in common: they are strict, and names have one form each."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic.alias_generators import to_camel

# RFC 1123 label, as systemd and Hetzner take it: at most 63 characters, letters, digits and inner dashes.
HostName = Annotated[str, StringConstraints(pattern=r"^[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?$")]
SecretName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
ResourceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")]
# docs.hetzner.cloud, "Labels": an optional DNS prefix, then at most 63 characters; the same for a value, which may be empty.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, StringConstraints(pattern=rf"^(?:[a-z0-9.-]{{1,253}}/)?{_LABEL}$")]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^(?:{_LABEL})?$")]


class Model(BaseModel):
    """Frozen; an unknown key and a value of another type are faults; keys are camelCase in JSON."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=to_camel,
        validate_by_name=False,
        validate_by_alias=True,
    )
