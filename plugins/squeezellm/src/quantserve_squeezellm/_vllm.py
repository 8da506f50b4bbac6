"""SqueezeLLM on vLLM. Only vLLM's own processes import this module.

Config: `"quantization_config": {"quant_method": "squeezellm", "wbits": 4}` in config.json, or a quant_config.json with
`{"wbits": 4}` and `quantization="squeezellm"`. Optional keys: `modules_to_not_convert` (parts of module names), and
`sparse` ({module: {"nnz": int, "full_rows": int}}), which our converter and quantizer write: an entry whose tensors are
missing stops the engine, and vLLM's compile cache sees that two checkpoints differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, from_squeezellm
from quantserve_kernels.vllm import CSR, Entries, Format
from quantserve_squeezellm._format import coordinates, sparse_problem
from quantserve_squeezellm.format import BITS, SPARSE, scheme


class SqueezeLLM(Format):
    """A codebook per output channel, and perhaps sparse parts."""

    name = "squeezellm"
    config_files = ("quant_config.json",)
    ragged = SPARSE
    ignored = ("sparse_threshold.", ".startrows")  # counts that original files keep beside the tensors; thread starts

    def __init__(self, bits: int, **known: Any) -> None:
        super().__init__(**known)
        self.bits = bits

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SqueezeLLM:
        """Read the quantization config; ValueError when `wbits` is absent or unknown."""
        bits = config.get("wbits", config.get("bits"))
        if bits not in BITS:
            raise ValueError(f'squeezellm: the quantization config has "wbits" {bits!r}. Fix: make it 3 or 4')
        return cls(bits, skipped=config.get("modules_to_not_convert") or (), modules=config.get("sparse"))

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return scheme(self.bits)

    def promised(self, module: str) -> Iterable[str]:
        """The sparse sets that the config counts."""
        counts = self.modules.get(module, {})
        sets = zip(("nnz", "full_rows"), SPARSE, strict=True)
        return [name for count, names in sets if counts.get(count) for name in names]

    def entries(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Entries:
        """A set of sparse tensors as entries."""
        if problem := sparse_problem(tensors, *shape):
            raise ValueError(problem)
        return Entries(*coordinates(tensors))

    def pack(self, tensors: Mapping[str, Tensor], sparse: CSR | None) -> PackedWeight:
        """The kernels know the format."""
        return from_squeezellm(tensors["qweight"], tensors["lookup_table"], sparse)
