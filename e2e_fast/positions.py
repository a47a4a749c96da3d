"""Names of positions: TransformerLens' ``blocks.6.hook_resid_pre``, in parts or in full.

>>> resolve_positions("hook_resid_pre", ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"])
['blocks.0.hook_resid_pre']
"""

import difflib
from collections.abc import Sequence


def resolve_positions(names: str | Sequence[str], available: Sequence[str]) -> list[str]:
    """Full position names, in the network's order: exact names, or every position that contains a name as a part.

    Raises ValueError for a name that matches nothing.
    """
    chosen = set()
    for name in [names] if isinstance(names, str) else names:
        matches = [name] if name in available else [a for a in available if name in a]
        if not matches:
            near = difflib.get_close_matches(name, available, n=3) or available[-3:]
            raise ValueError(f"position {name!r} is not in this model; near it are {', '.join(near)}")
        chosen.update(matches)
    return [a for a in available if a in chosen]


def hyphenated(position: str) -> str:
    """The module name of a position: torch allows no dots in it."""
    return position.replace(".", "-")
