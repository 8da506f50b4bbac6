"""Values that must not be shown, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

HIDDEN: Final = "(hidden)"
_NAMES: Final = frozenset({"token", "key", "keys", "secrets", "credential", "credentials", "auth", "authorization",
                           "cookie", "pw", "pwd"})  # fmt: skip
_ENDS: Final = ("password", "passwd", "passphrase", "secret", "apikey")
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_USER: Final = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(value: Any, name: str = "") -> Any:
    """A plain value in which texts under names such as ``HF_TOKEN`` and users in URLs are ``(hidden)``.

    Args:
        value: JSON; numbers and truth values are no secrets, whatever their name.
        name: what the value is called.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one, name) for one in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _is_secret(name) else _USER.sub(f"{HIDDEN}@", value)


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _NAMES or word.endswith(_ENDS) for word in words)
