"""The tensors of an rtn8 linear, as data: what the checks and vLLM's side both read. Imports no torch."""

from __future__ import annotations

from quantserve.api import K, N, Part, Scheme

SCHEME = Scheme(
    {"qweight": Part((N(), K()), ("I8",)), "scale": Part((N(),), ("F32",))},
    bits=8,
    scales="channel",
)
