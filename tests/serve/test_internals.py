"""Names and texts of Ray and vLLM that quantserve relies on without a patch are still in the installed versions.

Nothing fails at run time when one is gone: a setting is ignored, a cause is not found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from quantserve.serve.driver import ray_cluster as cluster
from quantserve.serve.replica.vllm import envelope
from quantserve.serve.replica.vllm import startup_logs as engine_logs
from quantserve.serve.replica.vllm.patches import source

RAY = Path(next(iter(find_spec("ray").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
PROGRAM = RAY / "core" / "src" / "ray" / "raylet" / "raylet"
"""The executable of Ray's node process; `cluster.RayProcesses` knows the process by this name."""


def settings() -> set[str]:
    """The variables that `cluster.start_ray` sets for Ray."""
    text = Path(cluster.__file__).read_text()
    return {*re.findall(r'"(RAY_\w+)"', text)} - {"RAY_ADDRESS", "RAY_TMPDIR"}


def test_ray_knows_the_settings() -> None:
    names = settings()
    assert names >= {*cluster.IDLE, *cluster.CONNECT, "RAY_worker_niceness", "RAY_memory_monitor_refresh_ms"}
    native = PROGRAM.read_bytes()
    python = source("ray.serve._private.constants") + source("ray._common.usage.usage_constants")
    unknown = {name for name in names if f"{name}\0".encode() not in native and f'"{name}"' not in python}
    assert unknown == set()
    assert b"RAY_no_such_setting\0" not in native


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("ray._private.worker", "_global_node = None"),
        ("ray._private.node:Node.get_logs_dir_path", "def get_logs_dir_path(self):"),
        ("ray.experimental.internal_kv:_internal_kv_put", "overwrite: bool = True"),
        ("ray.experimental.internal_kv:_internal_kv_get", "def _internal_kv_get("),
        ("ray.serve._private.replica", 'SERVE_BUILD_ASGI_APP_METHOD = "__serve_build_asgi_app__"'),
        ("ray.serve._private.replica", "self._callable, SERVE_BUILD_ASGI_APP_METHOD"),
        ("ray.serve._private.replica", 'self._callable, "record_autoscaling_stats", None'),
        ("ray.serve.config:AutoscalingContext", "def aggregated_metrics("),
        ("ray.serve.config:AutoscalingContext", "def total_num_requests("),
        ("ray.serve.config:AutoscalingContext.__init__", "self.policy_state = ("),
        ("ray.serve.config:AutoscalingContext.__init__", "self.config ="),
        # `progress.Progress` tells "to be scheduled" from "to initialize".
        ("ray.serve._private.deployment_state", 'have taken more than {SLOW_STARTUP_WARNING_S}s to be scheduled. "'),
        ("ray.serve._private.deployment_state", '{SLOW_STARTUP_WARNING_S}s to " "initialize.'),
        ("ray.serve.schema:ApplicationStatus", 'RUNNING = "RUNNING"'),
        ("ray.serve.schema:ApplicationStatus", 'DEPLOY_FAILED = "DEPLOY_FAILED"'),
        ("ray.serve.schema:ApplicationStatus", 'UNHEALTHY = "UNHEALTHY"'),
    ],
)
def test_ray_has_what_serving_reads(target: str, text: str) -> None:
    assert text in source(target)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vllm.v1.engine.core", f'logger.exception("{engine_logs._FAILED}'),
        ("vllm.v1.engine.utils", f'"{engine_logs._VAGUE[0]}'),
        ("vllm.v1.executor.multiproc_executor", f'"{engine_logs._VAGUE[1]}'),
        ("vllm.v1.executor.multiproc_executor", f'RuntimeError("{engine_logs._VAGUE[2]}'),
        # `vllm_app._broken_cache` removes a broken folder below these.
        ("vllm.compilation.decorators", '"torch_compile_cache", "torch_aot_compile",'),
        ("vllm.compilation.backends", 'envs.VLLM_CACHE_ROOT, "torch_compile_cache", hash_key'),
    ],
)
def test_vllm_logs_what_engine_logs_looks_for(module: str, text: str) -> None:
    assert text in source(module)


def test_vllm_and_fastapi_have_the_functions_that_read_requests() -> None:
    files = {
        "solve_dependencies": "fastapi.dependencies.utils",
        "_parse_chat_message_content_part": "vllm.renderers.chat_utils",
        "construct_chat_messages_with_tool_call": "vllm.entrypoints.openai.responses.utils",
    }
    assert {name for name, _ in envelope.READERS} == set(files)
    for name, module in files.items():
        assert f"def {name}(" in source(module)


@pytest.mark.vllm
def test_the_processes_of_vllm_have_the_names_by_which_they_are_killed() -> None:
    code = (
        "import psutil; from vllm.utils.system_utils import set_process_title; set_process_title('EngineCore'); "
        "print(psutil.Process().name())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PROCESS_NAME_PREFIX"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1].startswith(engine_logs._ENGINE)
