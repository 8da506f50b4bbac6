"""vLLM's side of a weight-only format, written once. Only vLLM's own processes import this package (vLLM 0.32).

    class MyFormat(Format):
        name = "myformat"

        def scheme(self, module): ...                # the stored tensors of this linear; None where it is plain

        def pack(self, tensors, sparse): ...         # from these tensors to the kernels' codes and codebook

    register(MyFormat)

The rest is here: which layers are quantized, parameters and their loading for fused layers and ranks, checks of what
arrives, and the kernel. A format that vLLM reads itself needs `register_linear_kernel` only.
"""

from quantserve_kernels.vllm.asked import register_linear_kernel, serves_cpus
from quantserve_kernels.vllm.format import Format, Packed, register
from quantserve_kernels.vllm.ragged import CSR, Entries, Tensors

__all__ = ["CSR", "Entries", "Format", "Packed", "Tensors", "register", "register_linear_kernel", "serves_cpus"]
