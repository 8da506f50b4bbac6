"""What a plan tells about a model beside how it is run: width, dtype and quality."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from quantserve.checkpoint.quality import measured_quality
from quantserve.errors import PluginError
from quantserve.model.dtypes import DTYPE_BYTES, served_dtype
from quantserve.planning.compose import with_kwargs
from quantserve.planning.expectation import quality_of, width_of
from quantserve.predict.shape import stored_bits_per_weight

if TYPE_CHECKING:
    from quantserve.planning.compose import Composition


def facts(composition: Composition) -> dict[str, Any]:
    """Plain data.

    Returns:
        ``bits``: width of the quantized weights; ``bits_per_weight``: what the engine keeps of one, scales included;
        ``dtype``: of activations; ``quality``: see `quality`. None for what is unknown.
    """
    plugin = composition.method_plugin
    stored = stored_bits_per_weight(composition.checkpoint, composition.stored)
    bits = width_of(plugin.method, stored) if plugin and plugin.method and stored is not None else None
    served = with_kwargs(composition.model, composition.engine_kwargs)
    dtype = served_dtype(composition.checkpoint, served, composition.target).name
    return {
        "bits": bits,
        "bits_per_weight": None if stored is None else round(stored, 2),
        "dtype": dtype if dtype in DTYPE_BYTES else None,
        "quality": quality(composition, bits),
    }


def quality(composition: Composition, bits: int | None) -> dict[str, Any] | None:
    """What the checkpoint lost: measured of these files, else as published for the method; None when neither is known.

    Returns:
        ``perplexity_ratio`` (quantized / reference), ``kl_mean`` (nats), ``same_top`` (share of tokens), ``reference``,
        ``text``, ``measured`` and ``source``.
    """
    if found := measured_quality(composition.checkpoint):
        return {
            "perplexity_ratio": round(1 + found.increase, 6),
            "kl_mean": found.kl_mean,
            "same_top": found.same_top,
            "reference": found.reference,
            "text": found.text,
            "measured": True,
            "source": f"{found.measured_on}, {found.date}",
        }
    note = None
    if composition.method_plugin and bits is not None:
        with suppress(PluginError):  # a defect of this hook changes nothing for serving
            note = quality_of(composition.method_plugin, bits)
    if note is None:
        return None
    return {
        "perplexity_ratio": round(1 + note.increase, 6),
        "kl_mean": None,
        "same_top": None,
        "reference": None,
        "text": note.measured_on,
        "measured": False,
        "source": note.source,
    }
