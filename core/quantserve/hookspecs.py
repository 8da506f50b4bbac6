"""The hooks a quantserve plugin may implement, and their contracts.

A plugin is a light module named by an entry point in the group ``quantserve.plugins``. It imports
``quantserve.api``, the standard library and pydantic, never torch, vLLM or Ray: its hooks run in
``quantserve list`` and ``check``, in the driver and in the Serve controller. What needs torch or vLLM
lives in another module of the same distribution, under an entry point *of the same name* in the group
``vllm.general_plugins``; vLLM calls it in every process of a model that composes the plugin.

Hooks return values and the host aggregates them. Every hook is called for one plugin at a time, so an
exception in one plugin never discards what another said; it becomes a ``PluginError`` (exit 3) for the
models that need the plugin. So does a hook that does not end within 10 s (``QUANTSERVE_HOOK_TIMEOUT``), and one
that changes the environment, the working folder or ``sys.path`` of the process. Parameters are positional and may be
left out from the right by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.checkpoint.containers import Reader
    from quantserve.checks.skipped import SkipList
    from quantserve.config import ModelConfig
    from quantserve.finding import Finding
    from quantserve.method import KernelProfile, Method, PerformanceProfile, QualityNote
    from quantserve.model.linear import Linear
    from quantserve.scheme import Scheme
    from quantserve.target import Target

PROJECT = "quantserve"
API_VERSION = 1
"""Rises when a hook or a type of ``quantserve.api`` changes in a way that breaks plugins."""
API_MINOR = 3
"""Rises when something is added; docs/api-changes.md says what."""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""The decorator of every hook that a plugin implements."""

# --- registration ---------------------------------------------------------------------------------


@hookspec
def quantserve_method() -> Method | None:
    """Describe the quantization method this plugin serves.

    Fires once per plugin, when the registry loads it. A plugin that is no method of its own (a house
    policy, a KV-cache dtype) leaves the hook out or returns None; configs name it under ``plugins:``.
    Two plugins that claim one name: the one whose distribution is ``quantserve-NAME`` keeps it. A name
    beats an alias, and an alias of two plugins belongs to neither.
    """


@hookspec
def quantserve_reader() -> Reader | None:
    """Teach the core another container than safetensors: which files, and how their headers are read.

    Fires once per plugin, when the registry loads it. ``Reader.read`` is then called for models whose files have one
    of ``Reader.suffixes``, in ``quantserve check`` and before every deploy; it may take 6 times as long as a hook. It
    opens files through the source that it is given, reads headers only, and raises ``BadContainer`` for a damaged file;
    another exception means that the plugin itself is defective. The plugin joins those that such a model composes. Two
    plugins that claim one suffix: the one whose distribution is ``quantserve-SUFFIX`` keeps it.
    """


# --- check: headers have been read, no GPU touched ---------------------------------------------------


@hookspec
def quantserve_detect(checkpoint: Checkpoint) -> bool | None:
    """Say whether this checkpoint is in this plugin's format.

    Fires for models whose config names no ``quantization``: first for the plugin whose method has the
    name or alias that the checkpoint declares (``quant_method``), and when that one does not claim it,
    for every plugin that has a method. True claims the checkpoint; False and None pass. Of several
    claims that of a method of this project counts; a plugin that claims any checkpoint at all counts
    least; else the model is refused and the claimants are named. Decide from
    ``checkpoint.quantization_config`` and tensor names; never open files.
    """


@hookspec
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """Say how a linear is stored: its tensors by suffix, in terms of N = out_features and K = in_features.

    Fires in ``quantserve check`` and before every deploy, for the method plugin only, for every linear of the model, so
    that widths, groups and targets may differ from one to the next. The experts of a layer that are alike are one
    linear (``linear.experts``); the scheme is that of one expert, also where a tensor stacks them. From the answers
    the core derives the findings of missing, misshapen, mistyped and unexpected tensors, of fused layers that are
    quantized in part, and of words and groups that tensor parallelism would cut; their codes begin with the method's
    name. None means that the linear is stored as a plain ``weight``. Where all are None nothing is derived: say so of
    files that are in no scheme of yours, and give the reason in ``quantserve_validate``.

    ``linear.n`` and ``linear.k`` are 0 where config.json does not tell them, as of lm_head and in unknown families; the
    core then solves the stored shapes for them. What the engine keeps (``Scheme.kept``, else the stored bytes) counts
    in the estimate of memory and in predictions. All calls for a model together may take as long as one hook. Give
    the same object for linears that are alike, and compute once what depends on the checkpoint alone
    (`quantserve.api.once`).
    """


@hookspec
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList | None:
    """Give the quantization config's list of unquantized modules, with how vLLM's method matches it.

    Fires with ``quantserve_scheme``. The core compares it with what the files hold, by the names of the layers that
    vLLM builds. None means that the method has no such list.
    """


@hookspec
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding] | None:
    """Find everything else that would make this model fail, or be served wrong, on this target.

    Fires for every plugin a model composes, in ``quantserve check`` and before every deploy. Findings
    of all plugins are concatenated after the core's own; None means no findings. Report mistakes of
    the checkpoint or the config as findings; an exception means the plugin itself is defective. Codes are
    kebab-case and begin with the name of the method (or of the plugin, where it has none). At most 1000
    findings of a plugin are kept, errors first, with 2000 characters of message and 50 offenders each.
    """


# --- plan ---------------------------------------------------------------------------------------------


@hookspec
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object] | None:
    """Give the vLLM engine arguments (``EngineArgs`` names, JSON values) this plugin needs.

    Fires once per plan for every plugin a model composes. Mappings are merged; two plugins that set
    one key to different values are a conflict that names both, and the user's own ``engine_kwargs``
    win and are shown as such. ``hf_overrides`` are merged field by field, and conflict where two plugins set one
    field. Names are checked like the user's: one that vLLM does not have is a defect of the plugin. Arguments with
    which vLLM runs code from elsewhere (``trust_remote_code``, ``worker_cls``) are set, with a warning that names
    the plugin. ``quantization`` may be set, where the engine's name for the method differs from what checkpoints
    declare. ``model``, ``served_model_name``, ``tokenizer``, ``revision``, ``tensor_parallel_size`` and
    ``max_model_len`` belong to the core. None means nothing to add.
    """


@hookspec
def quantserve_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, str] | None:
    """Give the environment variables that the processes of this model need: replica, engine core and workers.

    Fires once per plan for every plugin a model composes. Mappings are merged like engine arguments: two plugins
    that set one variable to different values are a conflict that names both, and the user's own
    ``engine_config.runtime_env.env_vars`` win and are shown as such. Both win over variables of the shell.
    ``VLLM_PLUGINS``, ``VLLM_WORKER_MULTIPROC_METHOD`` and the names that begin with ``QUANTSERVE_`` belong to the
    core. None means nothing to add.
    """


@hookspec
def quantserve_performance(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """Give the performance to expect of this model on this target.

    Fires once per plan for the method plugin only. None means that nobody measured this; the core then predicts
    it from `quantserve_kernel`, and labels it so.
    """


@hookspec
def quantserve_kernel(
    target: Target, bits: int, engine: str, scheme: Scheme | None, experts: bool
) -> KernelProfile | None:
    """Say what the kernel of this method reaches on this kind of device, as shares of its roofline.

    Fires in ``profile``, ``recommend``, ``plan`` and ``calibrate``, for the method plugin only. ``bits`` is one of
    the method's widths. ``engine`` is ``vllm-0.32``, the engine quantserve serves with, or ``vllm-0.2.2``, that of
    the 2023 tables. ``scheme`` is that of most of the model's weights, for example to tell 8-bit activations from
    16-bit ones; None where no files of the method are at hand. ``experts`` says whether the model is a mixture of
    experts. None means that nothing is predicted.
    """


@hookspec
def quantserve_quality(bits: int) -> QualityNote | None:
    """Give the published cost in quality of so many bits.

    Fires in ``recommend``. None means unknown, which is what is then shown.
    """


# --- tools --------------------------------------------------------------------------------------------


@hookspec
def quantserve_quantizer() -> str | None:
    """Name the callable that quantizes a checkpoint, as ``"module:callable"``; None when there is none.

    Fires when somebody quantizes with this method; the named module may import torch. It is called
    as ``callable(source: Path, destination: Path, **options)`` and writes a whole checkpoint folder. It may also be a
    class, a ``quantserve_quantize.Quantizer``.
    """


@hookspec
def quantserve_converter() -> str | None:
    """Name the callable that converts foreign files, as ``"module:callable"``; None when there is none.

    Fires in ``quantserve convert --method NAME``. It is called as ``callable(source: Path,
    destination: Path, *, base: Path | None, allow_pickle: bool)`` and writes a whole safetensors
    checkpoint folder.
    """
