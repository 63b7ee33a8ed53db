"""Some of the call sites of a weight: by role, by module scope, or both."""

from __future__ import annotations

import dataclasses
from typing import Literal

Role = Literal["lookup", "projection", "other"]


LOOKUP: Role = "lookup"


PROJECTION: Role = "projection"


OTHER: Role = "other"


@dataclasses.dataclass(frozen=True)
class SiteFilter:
    """Some of the call sites of a weight: by role, by module scope, or both; or all but some.

    Attributes:
      role: of the sites, or None for any.
      scope: module path that the sites are in, or its last parts, without a method's name; None for
        any.
      others: filters whose sites are left out; of these, role and scope are None.
    """

    role: str | None = None
    scope: str | None = None
    others: tuple[SiteFilter, ...] = ()

    def __call__(self, role: str, scope: str) -> bool:
        if self.role not in (None, role):
            return False
        if self.scope is not None and f"/{self.scope}/" not in f"/{module_path(scope)}/":
            return False
        return not any(other(role, scope) for other in self.others)


def module_path(scope: str) -> str:
    """Returns a scope without methods: ``Model/embed.attend`` is in ``Model/embed``.

    A method that a module calls of itself is on the name stack once more: ``Model/Model.encode``
    is in ``Model``, as ``Model.encode`` is.
    """
    parts: list[str] = []
    for part in scope.split("/"):
        module, method, _ = part.partition(".")
        if not (method and parts and parts[-1] == module):
            parts.append(module)
    return "/".join(parts)
