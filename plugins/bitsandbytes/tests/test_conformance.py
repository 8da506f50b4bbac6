"""The bitsandbytes plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks

DATA = Path(__file__).parent / "data"


def reference(folder: Path) -> Mapping[str, Any]:
    """What bitsandbytes itself dequantized."""
    from safetensors.torch import load_file

    return load_file(folder.with_name(f"{folder.name}-dequantized.safetensors"))


READS_NOTHING = {
    "config _load_in_*": "transformers writes it and reads the key without the underscore",
    "config bnb_4bit_compute_dtype *": "the engine's dtype counts",
    "config llm_int8_*": "how bitsandbytes computes; what is unquantized the files tell",
}
NF4 = Case(
    "bitsandbytes",
    checkpoint=DATA / "nf4",
    reference=reference,
    tolerance=2**-22,  # float32 in another order
    harmless={
        **READS_NOTHING,
        "config load_in_?bit removed": "the tensors tell the width",
        "config bnb_4bit_quant_storage removed": "uint8 is the default",
        "tensor weight.quant_state* wrong shape": "a text in JSON, of any length",
    },
)


def int8_reference(folder: Path) -> Mapping[str, Any]:
    """Codes times the largest value of their row, over 127; of one layer as bitsandbytes itself computed it."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
    made = {one: tensors[f"{one}.weight"].float() * tensors[f"{one}.SCB"].float()[:, None] / 127 for one in modules}
    return {**made, **reference(folder)}


INT8 = Case(
    "bitsandbytes",
    checkpoint=DATA / "int8",
    reference=int8_reference,
    tolerance=2**-22,
    harmless={
        **READS_NOTHING,
        "config load_in_?bit removed": "the keys with an underscore say the same",
        "config bnb_4bit_*": "settings of 4 bits",
        "tensor weight_format missing": "row by row is the only order",
    },
)


@parametrize_with_checks(NF4)  # `quantserve plugin check` takes both
def test_conformance(check: Callable[[], None]) -> None:
    check()
