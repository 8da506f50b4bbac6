"""Ray Serve LLM as its documentation starts it: `python -m benchmarks.serving.ray_llm SPEC.json PORT`.

Runs in the virtual environment of `ray_venv`. SPEC is a list of models: id, source, engine_kwargs, env_vars. Whether it
streams directly is decided by the variables its process is started with.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

LOGICAL_CPUS = 16
"""For Ray's bookkeeping only: its two ingress replicas per model and the engine's bundle fit on any machine."""


def main(spec: list[dict[str, Any]], port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    done = threading.Event()
    ray.init(address="local", namespace="serve", include_dashboard=False, num_cpus=LOGICAL_CPUS, log_to_driver=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    configs = [
        LLMConfig(
            model_loading_config={"model_id": model["id"], "model_source": model["source"]},
            engine_kwargs=model["engine_kwargs"],
            accelerator_config={"kind": "cpu"},
            runtime_env={"env_vars": model["env_vars"]},
            deployment_config={"num_replicas": 1},
        )
        for model in spec
    ]
    app: Any = build_openai_app({"llm_configs": configs})
    serve.run(app, blocking=False)
    done.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
