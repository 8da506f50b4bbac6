"""Draw docs/check.svg: what `quantserve check` prints for three checkpoints of Llama-2-7B, one of them unfit.

    .venv/bin/python scripts/draw_check.py

The checkpoints are synthetic: real config.json and safetensors headers of the published shapes, holes for weights.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from quantserve.cli.check_command import print_report
from quantserve.cli.sources import outcomes
from quantserve.config import load_object
from quantserve.plugins.registry import Registry
from quantserve.target import find_target

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 112
MODELS = {"llama-2-7b": ("fp16", 1), "llama-2-7b-sqllm": ("squeezellm", 1), "llama-2-7b-awq": ("awq", 4)}


def main() -> None:
    """Write the picture."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.checkpoints import LLAMA_7B, make_llama

    shape: dict[str, Any] = dict(LLAMA_7B)
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for name, (method, workers) in MODELS.items():
            make_llama(Path(folder) / name, method, **shape)
            engine = {"model_id": name, "hf_model_id": str(Path(folder) / name), "max_total_tokens": 4096}
            models.append({"engine_config": engine, "scaling_config": {"num_workers": workers}})
        app = load_object({"models": models}, "app.yaml")
        target = find_target("a10g")
        results = list(outcomes(app.models, Registry.load(), target))
        console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
        console.print("[bold]$[/] quantserve check app.yaml --target a10g\n")
        print_report(console, results, target, app.notes)
        console.print()  # renderers cut the descenders of a last line
    svg = console.export_svg(title="quantserve check", unique_id="check")
    # The picture must not fetch fonts: whoever looks at it uses their own.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (ROOT / "docs" / "check.svg").write_text(svg)
    print("wrote docs/check.svg")


if __name__ == "__main__":
    main()
