"""The demo model of examples/demo-model: its data, its committed checkpoint, and what it answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "demo-model"
CHECKPOINT = EXAMPLE / "checkpoint"
MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("demo_model_data", EXAMPLE / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only waits for its threads when the machine is busy
    yield transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def ask(model: Any, tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    assert output[0, -1] == tokenizer.eos_token_id, "the answer ends its turn"
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_checkpoint_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sizes["model.safetensors"] <= 16 * MEBIBYTE
    assert sum(sizes.values()) <= 17 * MEBIBYTE


def test_shapes_suit_every_packing() -> None:
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    linears = {name: tensor["shape"] for name, tensor in header.items() if name.endswith("_proj.weight")}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert len(linears) == 7 * config["num_hidden_layers"]
    assert all(n % 128 == 0 and k % 128 == 0 for n, k in linears.values())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


@pytest.mark.parametrize(
    "text", ["What does str.join do?", "  spaces\tand\nlines ", "naïve ☃ 日本語", "x = {'a': 1_000}"]
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_renders(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": " What is len? "},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hello!<|end|>"
        "<|user|>What is len?<|end|><|assistant|>"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 4


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What does str.join do?", {"concatenate", "string"}),
        ("How do I use os.path.join?", {"join", "path"}),
        ("What does list.append do?", {"append", "end", "list"}),
        ("Who are you?", {"language model"}),
    ],
)
def test_answers_in_english(model: Any, tokenizer: Any, question: str, words: set[str]) -> None:
    answer = ask(model, tokenizer, question).lower()
    assert all(word in answer for word in words), answer


def test_docstrings_become_short_answers(data: ModuleType) -> None:
    doc = "S.find(sub[, start[, end]]) -> int\n\nReturn the lowest index\nwhere sub is found.\n\n    >>> 'ab'.find('')"
    assert data.clean(doc, "find") == "Return the lowest index where sub is found."
    doc = "D.pop(k[,d]) -> v, remove specified key and return the value."
    assert data.clean(doc, "pop") == "Remove specified key and return the value."
    assert data.clean("Use :func:`len` or ``size``.\n\nArgs:\n  x: a number") == "Use len or size."
    assert data.clean("find(x)", "find") == ""


def test_held_out_questions_are_never_trained(data: ModuleType) -> None:
    entries = data.entries()
    assert {"str.join", "os.path.join", "collections.Counter", "json.dumps", "open", "dict"} <= {
        e.name for e in entries
    }
    assert len({entry.name for entry in entries}) == len(entries)
    held_out = data.held_out_pairs(entries)
    assert min(len(pairs) for pairs in held_out.values()) > 50
    trained = {pair.question for entry in entries if not entry.held_out for pair in data.training_pairs(entry)}
    assert not trained & {pair.question for pair in held_out["phrasing"]}
    assert not trained & {pair.question for pair in held_out["entries"]}
    assert "What does str.join do?" in trained
    assert entries == data.entries(), "the same every time"
