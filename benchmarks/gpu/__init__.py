"""On an NVIDIA GPU: the kernels of quantserve-kernels beside cuBLAS, layer by layer and in a decode loop.

    python -m benchmarks.gpu [--models 7b,13b,70b] [--parts decode,kernels] [--seconds 80]

Everything that is compared runs in one process and alternates. Calls are replayed from CUDA graphs, on copies of the
weight that together exceed three times the L2 cache. Reported are medians over the rounds, and medians of the ratios
within a round. It ends after --seconds with what it has.
"""
