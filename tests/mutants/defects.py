"""The defects: in which plugin and file, which text becomes which."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        plugin: rtn8, fp8 or squeezellm.
        file: within the package, or ``pyproject.toml``.
        old: text that is there once at least; "" for a file that is removed.
        new: what the first of them becomes.
    """

    plugin: str
    file: str
    old: str
    new: str = ""


def _in(plugin: str, file: str, *pairs: tuple[str, str]) -> list[Defect]:
    return [Defect(plugin, file, old, new) for old, new in pairs]


_DETECT = 'return (checkpoint.quantization_config or {}).get("quant_method") == "rtn8"'
_KWARGS = 'return {} if checkpoint.torch_dtype else {"dtype": "bfloat16"}'
_REGISTER = "    vllm.register(Rtn8)"
_SCALES = 'scales=tensors["scale"][:, None]'
_SIDE = '\n[project.entry-points."vllm.general_plugins"]\nrtn8 = "quantserve_rtn8:register"\n'
_NAME = '    name = "rtn8"'
_OVERRIDE = _NAME + "\n\n    @classmethod\n    def override_quantization_method(cls, {}):\n        return {}"
_PLAIN = """
    def get_quant_method(self, layer, prefix):
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        return UnquantizedLinearMethod()"""
_BLOCKS = "Part((N(block[0], partial=True), K(block[1], partial=True)), FLOATS)"
_SAID = 'f"activation_scheme is {activations}; vLLM'
_FP8_PACK = 'return from_fp8(tensors["weight"], scales, self.block)'
_TABLE = 'tensors["lookup_table"], sparse'
_CONVERT = "quantserve_squeezellm._convert:convert"
_WRITTEN = 'config["quantization_config"] = {"quant_method": "rtn8"}'
_FP8_KERNEL = "bandwidth_share=((1, 0.7), (64, 0.7), (256, 0.6))"

DEFECTS = [
    # the seam
    *_in(
        "rtn8",
        "plugin.py",
        ("from collections.abc import Mapping", "from collections.abc import Mapping\nimport torch"),
        ("from collections.abc import Mapping", "from collections.abc import Mapping\nimport numpy"),
        ("Linear, Method,", "Linear, Method, ModelConfig,"),
        ("from quantserve_rtn8.format import SCHEME", 'from quantserve_rtn8.format import SCHEME\nprint("loaded")'),
        ("@hookimpl\ndef quantserve_detect", "def quantserve_detect"),
        ("def quantserve_detect", "def quantserve_detekt"),
        ("def quantserve_detect(checkpoint: Checkpoint)", "def quantserve_detect(files: Checkpoint)"),
        ('name="rtn8",', 'name="rtn_8",'),
        ('name="rtn8",', 'name="rtn8", aliases=("awq",),'),
        ("bits=(8,),", 'bits=("8",),'),
        ("bits=(8,),", "bits=(8,), api=2,"),
        ("bits=(8,),", 'bits=(8,), devices=("gpu",),'),
        ('vllm_name="rtn8",', 'vllm_name="rtn9",'),
        ("a scale per output channel", "a scale per\\noutput channel"),
        ("a scale per output channel", "a scale per output channel."),
        (_KWARGS, 'return {"dtype": checkpoint}'),
        (_KWARGS, 'return {"max_num_seq": 4}'),
        (_KWARGS, 'return {"tensor_parallel_size": 1}'),
        (_KWARGS, 'import random; return {"seed": random.randrange(10**9)}'),
        (_KWARGS, 'import os; os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"; return {}'),
        (_KWARGS, 'checkpoint.config["torch_dtype"] = "bfloat16"; return {}'),
        (_KWARGS, 'return {"dtype": checkpoint.config["torch_dtype"]}'),
        ("quantserve_rtn8.quantize:quantize", "quantserve_rtn8.quantise:quantize"),
    ),
    *_in(
        "rtn8",
        "pyproject.toml",
        ('"quantserve>=0.1,<0.2"', '"quantserve>=0.1"'),
        ('"quantserve>=0.1,<0.2"', '"pluggy"'),
        ('name = "quantserve-rtn8"', 'name = "rtn8-plugin"'),
        (_SIDE, ""),
        (_SIDE, _SIDE.replace("rtn8 =", "rtn8_engine =")),
        ('license = "Apache-2.0"\n', ""),
    ),
    Defect("rtn8", "py.typed", ""),
    *_in(
        "rtn8",
        "__init__.py",
        (_REGISTER, f'{_REGISTER}\n    import os\n    os.environ["VLLM_USE_RTN8"] = "1"'),
        (_REGISTER, f'{_REGISTER}\n    import os\n    os.chdir("/")'),
        (_REGISTER, f'    assert not hasattr(Rtn8, "done")\n    Rtn8.done = True\n{_REGISTER}'),
        (
            _REGISTER,
            f"{_REGISTER}\n    from vllm.model_executor.layers.quantization import register_quantization_config\n"
            '    register_quantization_config("awq")(Rtn8)',
        ),
        (_REGISTER, "    pass"),
    ),
    *_in(
        "rtn8",
        "engine.py",
        (_NAME, _OVERRIDE.format("hf_quant_cfg, user_quant", "None")),
        (_NAME, _OVERRIDE.format("hf_quant_cfg, user_quant, hf_config=None", '"rtn8"')),
    ),
    # detection
    *_in(
        "rtn8",
        "plugin.py",
        (_DETECT, "return True"),
        (_DETECT, "return False"),
        (_DETECT, 'return checkpoint.quantization_config["quant_method"] == "rtn8"'),
        (_DETECT, 'return any(name.endswith("weight") for name in checkpoint.tensors)'),
        (_DETECT, 'return any(name.endswith(".qweight") for name in checkpoint.tensors)'),
    ),
    *_in(
        "fp8",
        "plugin.py",
        ('return config.get("quant_method") == "fp8"', 'return config["quant_method"] == "fp8"'),
        ("if config is not None and (config", "if config and not config and (config"),
    ),
    *_in("squeezellm", "plugin.py", ('name.endswith(".lookup_table")', 'name.endswith(".qweight")')),
    # validation
    *_in(
        "rtn8",
        "format.py",
        ("Part((N(), K()), ", "Part((K(), N()), "),
        ("Part((N(), K()), ", "Part((N(), None), "),
        ('("I8",)', '("I8", "U8")'),
        ('("I8",))', '("I8",), optional=True)'),
        ('Part((N(),), ("F32",))', 'Part((N(),), ("F32",), optional=True)'),
        ('Part((N(),), ("F32",))', 'Part((None,), ("F32",))'),
        ('Part((N(),), ("F32",))', 'Part((N(),), ("F32", "I16"))'),
        (', "scale": Part((N(),), ("F32",))', ""),
        ("bits=8", "bits=4"),
    ),
    *_in(
        "fp8",
        "format.py",
        ('WEIGHT = "F8_E4M3"', 'WEIGHT = "F8_E5M2"'),
        (_BLOCKS, "Part((N(block[0], partial=True), None), FLOATS)"),
        ("if not pair or not all(type(one) is int and one > 0 for one in value):", "if not pair:"),
        ("    return value[0], value[1]", "    return 128, 128"),
    ),
    *_in(
        "fp8",
        "plugin.py",
        ('if activations not in ("static", "dynamic"):', "if False:"),
        ("if not stored(checkpoint) and checkpoint.tensors_complete:", "if False:"),
        ('"fp8-block-size"', '"fp8_block_size"'),
        ('"fp8-activation-scheme",\n            f"activation', '"awq-activation-scheme",\n            f"activation'),
        (_SAID, 'f"\\x1b[31mactivation_scheme is {activations}; vLLM'),
        (_SAID, 'f"activation_scheme is {activations}; " + 90 * "vLLM... "  f"'),
    ),
    *_in(
        "squeezellm",
        "format.py",
        ("Part((N(), 2**bits), FLOATS)", "Part((N(), None), FLOATS)"),
        ("Part((N(), 2**bits), FLOATS)", 'Part((N(), 2**bits), (*FLOATS, "I16"))'),
        ("Part((K(Fraction(32, bits)), N()), ", "Part((K(Fraction(32, bits)), None), "),
    ),
    *_in(
        "squeezellm",
        "config.py",
        ("    if declared is None:", "    if False:"),
        ("elif settings.table_bits and declared != settings.bits:", "elif False:"),
    ),
    *_in("squeezellm", "plugin.py", ("if not has_tables(checkpoint) and checkpoint.tensors_complete:", "if False:")),
    # numerics
    *_in(
        "rtn8",
        "engine.py",
        (_SCALES, f"{_SCALES} * 1.0001"),
        (_SCALES, f"{_SCALES}.half().float()"),
        (_SCALES, f"{_SCALES}.flip(0)"),
        (".view(torch.int8).float()", ".float()"),
        (_NAME, f"{_NAME}\n{_PLAIN}"),
    ),
    *_in("fp8", "_vllm.py", (_FP8_PACK, _FP8_PACK.replace("scales,", "scales.flip(0).contiguous(),"))),
    *_in("squeezellm", "_vllm.py", (_TABLE, _TABLE.replace("]", "].half().float()"))),
    # predictions
    *_in(
        "fp8",
        "plugin.py",
        (_FP8_KERNEL, "bandwidth_share=((1, 70), (64, 70), (256, 60))"),
        (_FP8_KERNEL, "bandwidth_share=((64, 0.7), (1, 0.7), (256, 0.6))"),
        (_FP8_KERNEL, "bandwidth_share=((1, 0.007), (64, 0.007), (256, 0.006))"),
        ("bits_per_weight=8.0", "bits_per_weight=1.0"),
        ("bits_per_weight=8.0", 'bits_per_weight=float("nan")'),
        ("uncertainty=0.6", "uncertainty=60.0"),
        ("return KernelProfile(", "return dict("),
    ),
    *_in(
        "squeezellm",
        "speed.py",
        ("{3: 7.75, 4: 7.21}[bits]", "{3: 7.75, 4: 721.0}[bits]"),
        ("{3: 7.75, 4: 7.21}[bits]", "{3: 7.21, 4: 7.75}[bits]"),
        ("{3: 7.75, 4: 7.21}[bits]", "{3: 7.75}[bits]"),
    ),
    # tools
    *_in(
        "fp8",
        "quantizer.py",
        ('"quant_method": "fp8"', '"quant_method": "f8"'),
        ('"weight_scale": scales', '"scale": scales'),
        ('{"weight": values, "weight_scale"', '{"qweight": values, "weight_scale"'),
        ("def begin(self, checkpoint: Checkpoint, linears", "def begin(self, linears"),
        ("class Fp8(Quantizer):", "class Fp8:"),
    ),
    *_in("squeezellm", "quantizer.py", ('"lookup_table": table', '"lookup_table": table[:, 1:]')),
    *_in("squeezellm", "plugin.py", (_CONVERT, f"{_CONVERT}_all")),
    *_in(
        "rtn8",
        "quantize.py",
        (_WRITTEN, _WRITTEN.replace("quantization_config", "quantization")),
        ("amax(dim=1)", "amax(dim=0)"),
        ("raise FileExistsError", "shutil.rmtree(destination) if True else FileExistsError"),
        ("shutil.ignore_patterns(", 'shutil.ignore_patterns("config.json", '),
    ),
]
"""Some hundred."""
