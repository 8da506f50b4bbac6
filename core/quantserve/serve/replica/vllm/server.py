"""vLLM's engine and its OpenAI server, as an ASGI app inside this process.

The only module that uses internals of vLLM's server; written for vLLM 0.32. vLLM's own app serves the requests, so
clients have all its features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import utils as engine_processes
from vllm.v1.engine.async_llm import AsyncLLM

from quantserve.errors import EngineError
from quantserve.planning.plan import Plan
from quantserve.serve.asgi import ask
from quantserve.serve.replica.vllm import patches
from quantserve.serve.replica.vllm.envelope import Envelope
from quantserve.serve.replica.vllm.short_prompts import ShortPrompts
from quantserve.serve.replica.vllm.spawned_imports import use_spares
from quantserve.serve.replica.vllm.startup_logs import EngineLogs

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class EngineApp:
    """A started engine and its ASGI app.

    Attributes:
        app: vLLM's OpenAI server.
        engine: the engine's client; the engine itself runs in separate processes.
        tasks: supported tasks, e.g. ``generate`` or ``embed``.
        lifespan: background tasks of vLLM's app.
    """

    app: ASGIApp
    engine: AsyncLLM
    tasks: tuple[str, ...]
    lifespan: contextlib.AsyncExitStack = dataclasses.field(default_factory=contextlib.AsyncExitStack)

    @property
    def dead(self) -> bool:
        """Whether the engine has failed for good."""
        return bool(self.engine.errored)

    async def check_health(self) -> None:
        """Raise when the engine is dead."""
        await self.engine.check_health()

    async def ping(self) -> None:
        """Return when the engine core has answered, which it does between two steps."""
        await self.engine.is_sleeping()

    def shutdown(self) -> None:
        """Stop the engine and its processes."""
        self.engine.shutdown(timeout=0)

    async def warm_up(self) -> None:
        """Send the first requests, which take seconds, before the model is ready for clients.

        Raises:
            EngineError: one of them fails with a server error.
        """
        if "generate" not in self.tasks or self.engine.model_config.skip_tokenizer_init:
            return
        model = self.engine.model_config.served_model_name
        short = {"model": model, "max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
        await self._first("/v1/completions", {**short, "prompt": "Hello"})
        await self._first("/v1/completions", {**short, "prompt": "Hello", "stream": True, "temperature": 0.7})
        await self._first("/v1/chat/completions", {**short, "messages": [{"role": "user", "content": "Hello"}]})

    async def _first(self, path: str, body: dict[str, Any]) -> None:
        status, answer = await ask(self.app, "POST", path, body)
        # A client error only means that the model does not support the request (no chat template, say).
        if status >= 500:
            text = answer[:500].decode(errors="replace")
            raise EngineError(f"the warm-up request to {path} failed with status {status}: {text}")


async def start(plan: Plan) -> EngineApp:
    """Start the engine that a plan describes and build vLLM's app in front of it; blocks for the whole start.

    Raises:
        EngineError: the engine failed to start; the message has the cause from its processes' logs.
    """
    # Forking a process with threads is not safe.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    use_spares(engine_processes)
    args, engine = _start_engine(plan)
    try:
        patches.apply("token-ids", engine.input_processor)
        patches.apply("structured-outputs", engine)
        await engine.reset_mm_cache()
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        patches.apply("error-handlers", app)
        patches.apply("first-errors", app)
        await init_app_state(engine, app.state, args, tasks)
    except BaseException:
        engine.shutdown(timeout=0)
        raise
    # vLLM's error handlers stop the HTTP server when the engine has died; here Serve replaces the replica instead.
    app.state.server = SimpleNamespace(should_exit=False)
    started = EngineApp(ShortPrompts(Envelope(app, lambda: engine.errored)), engine, tuple(tasks))
    try:
        await started.warm_up()
        patches.apply("short-prompts", engine.renderer, templates=not args.trust_request_chat_template)
        await started.lifespan.enter_async_context(app.router.lifespan_context(app))
    except BaseException:
        engine.shutdown(timeout=0)
        raise
    return started


def _start_engine(plan: Plan, *, repair: bool = True) -> tuple[Namespace, AsyncLLM]:
    """Start the engine's processes; a compilation cache that a killed process left incomplete is removed once."""
    logs = EngineLogs()
    try:
        args, engine_args = arguments(plan)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        with logs.killing_failed_starts():
            return args, AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
            )
    except Exception as error:
        cause = logs.cause(error)
        broken = _broken_cache(cause)
        if not (repair and broken):
            raise EngineError(cause) from error
    logger.warning("removing the broken compilation cache %s: %s", broken, cause)
    shutil.rmtree(broken, ignore_errors=True)
    return _start_engine(plan, repair=False)


def _broken_cache(cause: str) -> Path | None:
    """The folder of vLLM's compilation cache that an error message mentions."""
    caches = Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache"
    if match := re.search(re.escape(str(caches)) + r"/(?:torch_aot_compile/)?[0-9a-f]{8,}(?=/)", cause):
        return Path(match[0])
    return None


def arguments(plan: Plan) -> tuple[Namespace, AsyncEngineArgs]:
    """The arguments of vLLM's server, as its command line would parse them, and those of the engine.

    Raises:
        EngineError: vLLM does not know an argument, or refuses its value.
    """
    known = {field.name: field.type for field in dataclasses.fields(AsyncEngineArgs)}
    if unknown := sorted(set(plan.engine_args) - set(known)):
        raise EngineError(f"the installed vLLM has no engine argument {', '.join(unknown)}")
    engine_args = AsyncEngineArgs(**{key: _typed(key, value, known[key]) for key, value in plan.engine_args.items()})
    frontend = FrontendArgs(**{"chat_template": plan.chat_template, **plan.frontend_args})
    if frontend.lora_modules:
        frontend.lora_modules = [_typed("lora_modules", one, LoRAModulePath) for one in frontend.lora_modules]
    values = {field.name: getattr(frontend, field.name) for field in dataclasses.fields(frontend)}
    values |= {field.name: getattr(engine_args, field.name) for field in dataclasses.fields(engine_args)}
    args = Namespace(**values, headless=False, grpc=False, api_server_count=1)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_parsed_serve_args(args)
    validate_api_server_args(args)
    return args, engine_args


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A mapping converted to vLLM's config object, as its command line does; other values unchanged.

    Raises:
        EngineError: vLLM refuses the mapping.
    """
    if not isinstance(value, dict):
        return value
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *(str(part) for part in first["loc"] if str(part) in value)])
        raise EngineError(f"engine argument {where}: {first['msg']}") from None
