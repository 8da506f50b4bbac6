"""Run as a script: a vLLM engine for each model, greedy generation, tokens and log-probabilities to a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Read the models and prompts from the first argument."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from mixtures import Nibbles
    from quantserve_kernels.vllm import linear_kernels, register

    register(Nibbles)
    linear_kernels.register()
    linear_kernels.keep_scales()
    spec = json.loads(sys.argv[1])
    sampling = SamplingParams(temperature=0, max_tokens=20, logprobs=0, ignore_eos=True, detokenize=False)
    results = {}
    for name, options in spec["models"].items():
        engine = LLM(skip_tokenizer_init=True, max_model_len=64, max_num_seqs=8, **options)
        found = []
        for request in engine.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], sampling):
            out = request.outputs[0]
            steps = zip(out.logprobs, out.token_ids, strict=True)
            found.append((list(out.token_ids), [step[token].logprob for step, token in steps]))
        results[name] = found
        del engine
        cleanup_dist_env_and_memory()
    Path(spec["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
