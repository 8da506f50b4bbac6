"""Values that must not be shown, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

HIDDEN: Final = "(hidden)"
_SECRET: Final = re.compile(
    r"(?:^|[^a-z])(?:api|access|private)?"
    r"(?:tokens?|keys?|secrets?|pass(?:word|wd|phrase)?|pw|pwd|credentials?|auth|authorization|cookie)(?:[^a-z]|$)",
    re.IGNORECASE,
)
_USER: Final = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(value: Any, name: str = "") -> Any:
    """A plain value in which texts under names such as ``HF_TOKEN`` and users in URLs are ``(hidden)``.

    Args:
        value: JSON; numbers and truth values are no secrets, whatever their name (``max_num_batched_tokens``).
        name: what the value is called.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one, name) for one in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _SECRET.search(name) else _USER.sub(f"{HIDDEN}@", value)
