"""The HQQ plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks

DATA = Path(__file__).parent / "data"


def reference(folder: Path) -> Mapping[str, Any]:
    """What hqq itself dequantized."""
    from safetensors.torch import load_file

    return load_file(folder.with_name(f"{folder.name}-dequantized.safetensors"))


TEXTS = ("compute_dtype", "packing", "unpack_view_dtype")
SETTINGS = (
    *TEXTS, "shape", "axis", "group_size", "nbits", "channel_wise", "encoded_state_dict", "offload_meta", "optimize",
    "quant_scale", "quant_zero", "round_zero", "stores_quant_config", "view_as_float",
)  # fmt: skip
HARMLESS = {
    **{f"tensor {name} missing": "config.json tells it as well" for name in SETTINGS},
    **{f"tensor {name} wrong shape": "a text of any length" for name in TEXTS},
    "config *offload_meta *": "where hqq keeps scales on a GPU",
    "config *optimize *": "how the scales were found",
    "config *round_zero *": "how the zeros were found; they are stored",
    "config *channel_wise removed": "true is hqq's default",
    "config skip_modules *": "the files tell what is unquantized",
}
TOLERANCE = 2**-9  # hqq computes in float16
UNIFORM = Case(
    "hqq",
    checkpoint=DATA / "uniform4",
    reference=reference,
    tolerance=TOLERANCE,
    harmless={
        **HARMLESS,
        **{f"config *view_as_float {how}": "false is the default" for how in ("removed", "wrong type")},
    },
)
MIXED = Case(
    "hqq",
    checkpoint=DATA / "mixed",
    reference=reference,
    tolerance=TOLERANCE,
    harmless={
        **HARMLESS,
        "config *self_attn*view_as_float removed": "false is the default",
        "config *self_attn*view_as_float wrong type": "false is the default",
    },
)


@parametrize_with_checks(MIXED)  # `quantserve plugin check` takes both
def test_conformance(check: Callable[[], None]) -> None:
    check()
