"""The README says what the package does: its code runs, its functions are those there are.

`test_vllm_format` runs the code for vLLM.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

import quantserve_kernels as kernels

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_give_what_their_format_means() -> None:
    linear, experts, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(linear, names)
    weight, x, y = names["weight"], names["x"], names["y"]
    assert isinstance(weight, kernels.PackedWeight)
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), x.float() @ weight.dequantize().t() + 1, rtol=0.02, atol=0.5)
    exec(experts, names)
    assert isinstance(names["y"], torch.Tensor)
    assert names["y"].shape == (3, 64)


def test_every_format_is_listed_with_its_parameters() -> None:
    listed = dict(re.findall(r"\| `(\w+)\(([^)]*)\)` \|", README.read_text()))
    assert set(listed) == {name for name in kernels.__all__ if name.startswith("from_")} | {"pack"}
    for name, parameters in listed.items():
        names = [parameter.partition("=")[0] for parameter in parameters.split(", ") if parameter != "*"]
        assert names == list(inspect.signature(getattr(kernels, name)).parameters), name
