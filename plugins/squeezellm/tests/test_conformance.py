"""The SqueezeLLM plugin passes the conformance kit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks, write_llama


def written(folder: Path) -> None:
    """A small Llama with random codes and tables: index k of a channel is the k-th nibble of its column of words."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(write_llama(folder) / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        codes = torch.randint(16, (k // 8, 8, n), generator=random)
        words = sum(codes[:, place] << (4 * place) for place in range(8))
        tensors[name.replace("weight", "qweight")] = (words - ((words >> 31) << 32)).to(torch.int32)
        tensors[name.replace("weight", "lookup_table")] = torch.randn(n, 16, generator=random) * 0.15
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "squeezellm", "wbits": 4}})
    )


def reference(folder: Path) -> Mapping[str, Any]:
    """A weight is the entry of its channel's table that its index names."""
    import torch
    from safetensors.torch import load_file

    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        words, table = tensors[name].long(), tensors[name.replace(".qweight", ".lookup_table")]
        codes = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=1).flatten(0, 1)  # [k, n]
        weights[name.removesuffix(".qweight")] = table.gather(1, codes.t())
    return weights


CASE = Case("squeezellm", checkpoint=written, reference=reference)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
