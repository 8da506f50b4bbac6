"""Headers between gateway and replica that clients neither send nor see."""

from __future__ import annotations

from typing import Final

MAX_TOKENS_HEADER: Final = b"x-quantserve-max-tokens"
"""From the gateway: the cap on tokens, also for requests that set none of the token fields."""
DRAINING_HEADER: Final = b"x-quantserve-draining"
"""From the replica: it refuses new requests; another replica may take this one."""
