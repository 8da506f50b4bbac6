"""The changes that quantserve makes at run time to the insides of vLLM, torch, Starlette and Python.

`PATCHES` lists all of them. `apply` compares a patch with the source of the installed package before it changes
anything: a patch that no longer fits is skipped, except one for safety, without which the replica does not start.
"""

from __future__ import annotations

import ast
import logging
import os
import pkgutil
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Final

from quantserve.errors import EngineError, UsageError, unknown_name

VARIABLE: Final = "QUANTSERVE_PATCHES"
"""Names of patches to leave out, with commas; ``none`` leaves out all but those for safety."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patch:
    """A change to another package.

    Attributes:
        changes: the attribute or object that is changed.
        apply: ``module:function`` that makes the change.
        relies_on: pairs of ``module:attribute`` of the package and a text that its source must contain.
        why: the fault or the cost that it removes.
        gain: what it gains.
        without: what happens when it is skipped.
        safety: whether the replica must not start when it does not fit.
    """

    changes: str
    apply: str
    relies_on: tuple[tuple[str, str], ...]
    why: str
    gain: str
    without: str
    safety: bool = False


PATCHES: Final[Mapping[str, Patch]] = {
    "spawned-imports": Patch(
        changes="`multiprocessing.spawn.get_command_line`",
        apply="quantserve.serve.replica.vllm.spawned_imports:hurry_children",
        relies_on=(
            ("multiprocessing.spawn:get_command_line", "def get_command_line(**kwds):"),
            ("multiprocessing.spawn:spawn_main", "def spawn_main(pipe_handle, parent_pid=None, tracker_fd=None):"),
            ("multiprocessing.popen_spawn_posix:Popen._launch", "spawn.get_command_line(tracker_fd=tracker_fd,"),
            ("multiprocessing.process:BaseProcess._bootstrap", "self._after_fork()"),
            ("multiprocessing.spawn:_main", "return self._bootstrap(parent_sentinel)"),
        ),
        why="the garbage collector takes a quarter of the time in which a spawned process imports vLLM",
        gain="with `spare-process`, a model starts in 19.5 s instead of 26.3 s",
        without="slower start",
    ),
    "spare-process": Patch(
        changes="`vllm.v1.engine.utils.get_mp_context`",
        apply="quantserve.serve.replica.vllm.spawned_imports:start_engine_core_spare",
        relies_on=(
            ("multiprocessing.popen_fork:Popen.__init__", "self._launch(process_obj)"),
            ("multiprocessing.popen_spawn_posix:Popen._launch", "reduction.dump(prep_data, fp)"),
            ("multiprocessing.popen_spawn_posix:Popen._launch", "reduction.dump(process_obj, fp)"),
            ("multiprocessing.spawn:spawn_main", "def spawn_main(pipe_handle, parent_pid=None, tracker_fd=None):"),
            ("multiprocessing.util:spawnv_passfds", "def spawnv_passfds(path, args, passfds):"),
            ("vllm.v1.engine.utils:CoreEngineProcManager.__init__", "context = get_mp_context()"),
            ("vllm.v1.engine.utils:CoreEngineProcManager.__init__", "context.Process("),
        ),
        why="vLLM starts the engine core's process only when the replica has imported vLLM",
        gain="both import at the same time; see `spawned-imports`",
        without="slower start",
    ),
    "token-ids": Patch(
        changes="`InputProcessor._validate_model_input` of the engine's client",
        apply="quantserve.serve.replica.vllm.token_ids:bound_token_ids",
        relies_on=(
            ("vllm.v1.engine.input_processor:InputProcessor.process_inputs", "self._validate_model_inputs("),
            (
                "vllm.v1.engine.input_processor:InputProcessor._validate_model_inputs",
                'self._validate_model_input(decoder_input, prompt_type="decoder")',
            ),
            (
                "vllm.v1.engine.input_processor:InputProcessor._validate_model_input",
                "( self, prompt_input: SingletonInput, prompt_type:",
            ),
        ),
        why="vLLM accepts every token id of the tokenizer, also one without a row in the embedding",
        gain="such a prompt gets status 400",
        without="such a prompt ends the engine, with all requests",
        safety=True,
    ),
    "structured-outputs": Patch(
        changes="`add_request`, `generate` and `engine_core.add_request_async` of the engine's client",
        apply="quantserve.serve.replica.vllm.structured_outputs:bound_structured_outputs",
        relies_on=(
            ("vllm.v1.engine.async_llm:AsyncLLM.generate", "q = await self.add_request("),
            (
                "vllm.v1.engine.async_llm:AsyncLLM.add_request",
                "async def add_request( self, request_id: str, prompt: EngineCoreRequest",
            ),
            ("vllm.v1.engine.async_llm:AsyncLLM._add_request", "await self.engine_core.add_request_async(request)"),
            ("vllm.sampling_params:SamplingParams.verify", "self._validate_structured_outputs("),
            ("vllm.v1.structured_output:StructuredOutputManager.grammar_init", "self.executor.submit("),
        ),
        why="vLLM parses clients' schemas and grammars on the event loop and compiles them without a limit on time",
        gain="a grammar that takes too long gets status 400",
        without="one grammar can stop all streams of the replica for half a minute, and structured outputs for good",
        safety=True,
    ),
    "error-handlers": Patch(
        changes="exception handlers of vLLM's FastAPI app",
        apply="quantserve.serve.replica.vllm.envelope:install",
        relies_on=(
            ("starlette.applications:Starlette.__call__", "if self.middleware_stack is None:"),
            ("starlette.applications:Starlette.build_middleware_stack", "self.exception_handlers"),
        ),
        why="vLLM's validation errors quote the client's input, and some invalid bodies get status 500",
        gain="OpenAI's errors, with the name of the field",
        without="vLLM's texts in OpenAI's envelope; status 500 for some invalid bodies",
    ),
    "first-errors": Patch(
        changes="validators of the request bodies of vLLM's FastAPI app",
        apply="quantserve.serve.replica.vllm.first_errors:stop_at_first_errors",
        relies_on=(
            ("fastapi._compat.v2:ModelField.validate", "self._type_adapter.validate_python("),
            ("fastapi.dependencies.utils:solve_dependencies", "body_fields=dependant.body_params,"),
            ("pydantic.type_adapter:TypeAdapter.validate_python", "self.validator.validate_python("),
        ),
        why="pydantic collects an error for every invalid item of a list and every branch of a union",
        gain="4 KB of invalid items stop the tokens of other requests for 4 ms instead of 4.8 s",
        without="one invalid body can stop the tokens of all requests of a replica for many seconds",
    ),
    "short-prompts": Patch(
        changes="methods of the engine's renderer that start threads: `_tokenize_prompt_async` and two more",
        apply="quantserve.serve.replica.vllm.short_prompts:render_at_once",
        relies_on=(
            (
                "vllm.renderers.base:BaseRenderer._tokenize_singleton_prompt_async",
                "await self._tokenize_prompt_async(prompt, params)",
            ),
            ("vllm.renderers.base:BaseRenderer.__init__", "self._tokenize_prompt_async = make_async("),
            ("vllm.renderers.hf:HfRenderer.__init__", "self._apply_chat_template_async = make_async("),
            (
                "vllm.renderers.hf:HfRenderer.render_messages_async",
                "await self._render_with_timeout( self._apply_chat_template_async( model_config, tokenizer,",
            ),
        ),
        why="vLLM renders and tokenizes every prompt in a thread; for a short one the switches take longer",
        gain="mean time to first token of 64 chats that begin together: 0.77 instead of 0.91 of that of `vllm serve`",
        without="later first tokens under load",
    ),
    "rule-cache": Patch(
        changes="`XgrammarBackend.compile_grammar` of the engine core",
        apply="quantserve.serve.replica.vllm.rule_cache:compile_without_rule_cache",
        relies_on=(
            (
                "vllm.v1.structured_output.backend_xgrammar:XgrammarBackend.compile_grammar",
                "ctx = self.compiler.compile_json_schema( grammar_spec,",
            ),
            ("xgrammar.compiler:GrammarCompiler", "def compile_builtin_json_grammar(self)"),
        ),
        why="with its cache, xgrammar 0.2.8 cannot compile patterns with more than 128 repetitions in a schema",
        gain="schemas with patterns such as `^.{1,500}$` work",
        without="such schemas get status 400",
    ),
    "exact-scales": Patch(
        changes="the hook that torch calls for every parameter that a module registers",
        apply="quantserve_kernels.vllm.linear_kernels:keep_scales",
        relies_on=(
            (
                "vllm.model_executor.layers.quantization.auto_awq:AutoAWQMarlinLinearMethod.create_weights",
                'layer.register_parameter("scales", scales) self.kernel = kernel_type(',
            ),
            (
                "vllm.model_executor.layers.quantization.auto_gptq:AutoGPTQLinearMethod.create_weights",
                'layer.register_parameter("qzeros", qzeros) self.kernel = kernel_type(',
            ),
            ("torch.nn.modules.module:Module.register_parameter", "_global_parameter_registration_hooks.values():"),
        ),
        why="vLLM makes quantserve's kernel for a layer without telling which, and rounds scales while it loads them",
        gain="scales keep the bits of the file; a layer whose scales never arrive stops the start",
        without="scales are rounded to the model's dtype, and those that never arrive are not noticed",
    ),
    "adapter-rows": Patch(
        changes="`bgmv_shrink`, `bgmv_expand` and `bgmv_expand_slice` of `vllm.lora.ops.torch_ops.lora_ops`",
        apply="quantserve.serve.replica.vllm.adapter_rows:leave_out_other_rows",
        relies_on=(
            *(
                (
                    f"vllm.lora.ops.torch_ops.lora_ops:{name}",
                    "inputs: torch.Tensor, lora_b_weights: torch.Tensor, output_tensor: torch.Tensor, "
                    "lora_indices_tensor: torch.Tensor,",
                )
                for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
            ),
            ("vllm.lora.ops.torch_ops.lora_ops:sgmv_shrink", "bgmv_shrink(inputs, lora_a_weights, output_tensor,"),
            ("vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits", "bgmv_shrink(x, lora_a_stacked,"),
        ),
        why="on a CPU, vLLM computes tokens without a LoRA adapter with the adapter of the last slot",
        gain="each request of a batch has its own adapter, or none",
        without="requests to the model get the tokens of an adapter when both are computed in one batch",
        safety=True,
    ),
    "token-ranks": Patch(
        changes="`vllm.v1.sample.sampler.batched_count_greater_than`",
        apply="quantserve.serve.replica.vllm.token_ranks:count_without_compiler",
        relies_on=(
            ("vllm.v1.sample.sampler", "import batched_count_greater_than"),
            (
                "vllm.v1.sample.sampler:Sampler.gather_logprobs",
                "token_ranks = batched_count_greater_than(logprobs, token_logprobs)",
            ),
            ("vllm.v1.sample.ops.logprobs:batched_count_greater_than", "return (x >= values).sum(-1)"),
        ),
        why="on a CPU, vLLM compiles the ranks of tokens when the first request asks for log-probabilities",
        gain="that request and all others of the model do not wait 8 s and more for the compiler",
        without="one pause of the model's streams, with the first request for log-probabilities",
    ),
    "sched-yield": Patch(
        changes="`vllm.distributed.device_communicators.shm_broadcast.sched_yield`",
        apply="quantserve.serve.replica.vllm.engine_wait:sleep_in_some_turns",
        relies_on=(
            ("vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait", "sched_yield()"),
            ("vllm.distributed.device_communicators.shm_broadcast:MessageQueue.acquire_write", "sched_yield()"),
            ("vllm.distributed.device_communicators.shm_broadcast", "import StatelessProcessGroup, sched_yield"),
        ),
        why="on a CPU, vLLM's processes spin while they wait, which blocks other processes on their cores",
        gain="the process that sends the tokens is not blocked",
        without="on Linux 6.18, pauses of a second and more in streams",
    ),
    "gloo-device": Patch(
        changes="`torch.distributed.ProcessGroupGloo.__init__`",
        apply="quantserve.serve.replica.vllm.engine_wait:share_gloo_device",
        relies_on=(
            (
                "torch.distributed.distributed_c10d:_new_process_group_helper",
                "ProcessGroupGloo( backend_prefix_store, group_rank, group_size,",
            ),
        ),
        why="on a CPU, each of a worker's dozen process groups has a thread that polls 100 times a second",
        gain="an idle worker wakes 100 times a second instead of 1290 times",
        without="idle workers disturb the other models of the machine",
    ),
}


def apply(name: str, *subjects: Any, **options: Any) -> bool:
    """Apply a patch if it fits and is not switched off.

    Args:
        name: in `PATCHES`.
        subjects: arguments of its function.
        options: keyword arguments of its function.

    Returns:
        Whether it is applied.

    Raises:
        EngineError: it is for safety and does not fit.
        UsageError: ``QUANTSERVE_PATCHES`` has an unknown name.
    """
    patch = PATCHES[name]
    if name in switched_off(os.environ):
        logger.warning("%s switches patch %s off: %s", VARIABLE, name, patch.without)
        return False
    reason = misfit(patch)
    if not reason:
        try:
            pkgutil.resolve_name(patch.apply)(*subjects, **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            return True
    if patch.safety:
        fix = f"install the tested vLLM; or set {VARIABLE}={name} and accept it: {patch.without}"
        raise EngineError(f"safety patch {name} cannot be applied: {reason}\n  fix: {fix}")
    logger.warning("skipped: patch %s cannot be applied: %s; %s", name, reason, patch.without)
    return False


def switched_off(environ: Mapping[str, str]) -> frozenset[str]:
    """Names of the patches that ``QUANTSERVE_PATCHES`` leaves out.

    Raises:
        UsageError: a name is unknown.
    """
    given = {name for part in environ.get(VARIABLE, "").split(",") if (name := part.strip())}
    for name in sorted(given - {"none", *PATCHES}):
        raise UsageError(f"{VARIABLE}: {unknown_name('patch', name, ['none', *PATCHES])}")
    usual = {name for name, patch in PATCHES.items() if not patch.safety} if "none" in given else set()
    return frozenset(usual | given - {"none"})


def risks(environ: Mapping[str, str]) -> list[str]:
    """A line for each safety patch that ``QUANTSERVE_PATCHES`` leaves out; raises like `switched_off`."""
    off = [(name, PATCHES[name]) for name in sorted(switched_off(environ)) if PATCHES[name].safety]
    return [f"{VARIABLE} switches the safety patch {name} off: {patch.without}." for name, patch in off]


def misfit(patch: Patch) -> str:
    """Why a patch does not fit the installed packages; empty if it does. Imports none of them."""
    for target, text in patch.relies_on:
        try:
            found = source(target)
        except (ImportError, LookupError, OSError, SyntaxError):
            return f"{_package(target)} has no source of {target}"
        if _one_spaced(text) not in found:
            return f"{_package(target)} has no `{text}` in {target}"
    return ""


@cache
def source(target: str) -> str:
    """The source of ``module:attribute`` or of a whole module, found without an import."""
    module, _, path = target.partition(":")
    root, *parts = module.split(".")
    spec = find_spec(root)
    for part in parts:
        if spec is None:
            break
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations or ())
    if spec is None or not hasattr(spec.loader, "get_source"):
        raise ImportError(module)
    text = str(spec.loader.get_source(spec.name))  # type: ignore[union-attr]
    node: Any = ast.parse(text) if path else None
    for name in filter(None, path.split(".")):
        node = {getattr(child, "name", ""): child for child in node.body}[name]  # the last one follows the overloads
    return _one_spaced((ast.get_source_segment(text, node) or "") if node else text)


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


def _package(target: str) -> str:
    """Name and version of the package of a target."""
    name = target.partition(".")[0]
    for distribution in (name, f"{name}-cpu"):
        try:
            return f"{name} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}"
