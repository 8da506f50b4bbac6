"""SqueezeLLM on vLLM. Only vLLM's own processes import this module.

`sparse` in the quantization config, {module: {"nnz": int, "full_rows": int}}, comes from our converter and quantizer.
Tensors that it counts and that are missing stop the engine, and vLLM's compile cache sees that checkpoints differ.
"""

from typing import Any

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, from_squeezellm
from quantserve_kernels.vllm import CSR, Entries, Format, Tensors
from quantserve_squeezellm._packing import coordinates, sparse_problem
from quantserve_squeezellm.format import BITS, SPARSE, scheme


class SqueezeLLM(Format):
    """A codebook per output channel, and perhaps sparse parts."""

    name = "squeezellm"
    config_files = ("quant_config.json",)
    ragged = tuple(SPARSE.values())
    ignored = ("sparse_threshold.", ".startrows")  # counts that original files keep beside the tensors; thread starts
    bits: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SqueezeLLM":
        """Read the quantization config; ValueError when `wbits` is absent or unknown."""
        bits: Any = config.get("wbits", config.get("bits"))
        if bits not in BITS:
            raise ValueError(f'squeezellm: the quantization config has "wbits" {bits!r}. Fix: make it 3 or 4')
        made = cls(skipped=config.get("modules_to_not_convert") or (), modules=config.get("sparse"))
        made.bits = bits
        return made

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return scheme(self.bits)

    def promised(self, module: str) -> list[str]:
        """The sparse sets that the config counts."""
        counts = self.modules.get(module, {})
        return [name for count, names in SPARSE.items() if counts.get(count) for name in names]

    def entries(self, tensors: Tensors, shape: tuple[int, int]) -> Entries:
        """A set of sparse tensors as entries."""
        if problem := sparse_problem(tensors, *shape):
            raise ValueError(problem)
        return Entries(*coordinates(tensors))

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The kernels know the format."""
        return from_squeezellm(tensors["qweight"], tensors["lookup_table"], sparse)
