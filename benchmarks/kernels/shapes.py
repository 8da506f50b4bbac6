"""The linears of the Llama-2 models, as vLLM fuses them, and one of few output features."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.console import BenchError


@dataclass(frozen=True)
class Shape:
    """One linear: `n` output features, `k` input features."""

    model: str
    layer: str
    n: int
    k: int

    @property
    def name(self) -> str:
        """What progress and tables call it."""
        return f"{self.model} {self.layer}"

    def __str__(self) -> str:
        return f"{self.name} {self.n}x{self.k}"


MODELS = {
    model: tuple(Shape(model, layer, n, k) for layer, n, k in linears)
    for model, linears in {
        "7b": (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate_up", 22016, 4096), ("down", 4096, 11008)),
        "13b": (("qkv", 15360, 5120), ("o", 5120, 5120), ("gate_up", 27648, 5120), ("down", 5120, 13824)),
        "70b": (("qkv", 10240, 8192), ("o", 8192, 8192), ("gate_up", 57344, 8192), ("down", 8192, 28672)),
        "narrow": (("kv", 1024, 4096),),
    }.items()
}
# For the errors: few output features, and the input features of a short and a long row.
ERROR_SHAPES = ((512, 4096), (512, 11008))
ERROR_BATCHES = (1, 4, 16, 64)


def choose(names: str) -> list[Shape]:
    """The shapes of a comma list of models, or of `all`.

    Raises:
        BenchError: an unknown model; lists the known ones.
    """
    wanted = list(MODELS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in MODELS]
    if unknown or not wanted:
        known = ", ".join([*MODELS, "all"])
        raise BenchError(f"unknown model {', '.join(unknown) or '(none given)'}; known: {known}")
    return [shape for name in MODELS if name in wanted for shape in MODELS[name]]
