"""Run as a script: one vLLM engine, greedy generation, tokens and log-probabilities to a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    spec = json.loads(sys.argv[1])
    engine = LLM(spec["model"], skip_tokenizer_init=True, max_model_len=128, max_num_seqs=8, **spec["engine_args"])
    prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True, detokenize=False)
    results = []
    for request in engine.generate(prompts, sampling):
        out = request.outputs[0]
        results.append(
            (
                list(out.token_ids),
                [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)],
            )
        )
    Path(spec["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
