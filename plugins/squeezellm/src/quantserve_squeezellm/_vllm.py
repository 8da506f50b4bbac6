"""SqueezeLLM on vLLM. Only vLLM's own processes import this module."""

from typing import Any

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, from_squeezellm
from quantserve_kernels.vllm import CSR, Entries, Format, Tensors
from quantserve_squeezellm._packing import checked_coordinates
from quantserve_squeezellm.format import SPARSE, scheme, width


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
        made = cls(skipped=config.get("modules_to_not_convert") or (), modules=config.get("sparse"))
        made.bits = width(config)
        return made

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return scheme(self.bits)

    def promised(self, module: str) -> list[str]:
        """The sparse sets that the config counts, see `format.SPARSE`."""
        counts = self.modules.get(module, {})
        return [name for count, names in SPARSE.items() if counts.get(count) for name in names]

    def entries(self, tensors: Tensors, shape: tuple[int, int]) -> Entries:
        """A set of sparse tensors as entries."""
        return Entries(*checked_coordinates(tensors, *shape))

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The kernels know the format."""
        return from_squeezellm(tensors["qweight"], tensors["lookup_table"], sparse)
