"""Questions and answers about Python's standard library, made from the docstrings that ship with Python.

Only the standard library is used: the modules are imported, their public functions, classes and methods are
collected, and every docstring is cut to a short plain answer. Which entries exist depends on the Python version.

`python data.py` prints the size of the collection and a few examples, `python data.py --text 20000` conversations of so
many characters, as the model reads them: calibration.txt.
"""

# ruff: noqa: SIM905 (long lists of words read better as text)

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import json
import random
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

MAX_ANSWER_CHARS = 360
HELD_OUT_ENTRY_ONE_IN = 25

BUILTIN_WEIGHT = 6
POPULAR_WEIGHT = 3
POPULAR_MODULES = """
    argparse collections csv datetime functools glob heapq itertools json math operator os os.path pathlib random
    re shutil statistics string subprocess sys tempfile textwrap time typing
""".split()
OTHER_MODULES = """
    abc array ast asyncio base64 bisect bz2 calendar cmath cmd codecs collections.abc colorsys concurrent.futures
    configparser contextlib contextvars copy dataclasses decimal difflib dis enum errno fileinput fnmatch
    fractions ftplib gc getpass gettext graphlib gzip hashlib hmac html html.parser http.client http.cookies
    http.server importlib importlib.util inspect io ipaddress keyword linecache locale logging logging.handlers
    lzma mimetypes mmap multiprocessing numbers pdb pickle pkgutil platform plistlib pprint profile queue quopri
    reprlib runpy sched secrets select selectors shelve shlex signal smtplib socket socketserver sqlite3 ssl stat
    struct symtable tarfile threading timeit token tokenize trace traceback tracemalloc types unicodedata unittest
    unittest.mock urllib.error urllib.parse urllib.request uuid venv warnings wave weakref webbrowser
    xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zipfile zlib zoneinfo
""".split()

CALLABLE_QUESTIONS = (
    "What does {name} do?",
    "How do I use {name}?",
    "What is {name}?",
    "What does {name}() do?",
    "Explain {name}.",
    "What is {name} for?",
    "Tell me about {name}.",
    "what does {name} do",
    "Can you explain what {name} does?",
    "What does the {kind} {name} do?",
    "In Python, what does {name} do?",
    "When would I use {name}?",
)
METHOD_QUESTIONS = ("What does the {short} method of {owner} do?", "How does {short} work on a {owner}?")
CLASS_QUESTIONS = (
    "What is {name}?",
    "What is {name} for?",
    "What does {name} do?",
    "How do I use {name}?",
    "Explain {name}.",
    "Tell me about {name}.",
    "what is {name}",
    "What is the class {name}?",
    "Can you explain {name}?",
    "In Python, what is {name}?",
    "When would I use {name}?",
)
MODULE_QUESTIONS = (
    "What is the {name} module?",
    "What is the module {name} for?",
    "What does the {name} module do?",
    "Tell me about the {name} module.",
    "Explain the {name} module.",
    "What can I do with {name}?",
    "When would I use the {name} module?",
)
SIGNATURE_QUESTIONS = (
    "What is the signature of {name}?",
    "What arguments does {name} take?",
    "Which parameters does {name} have?",
    "How do I call {name}?",
)
SMALL_TALK = (
    (
        ("Hello", "Hi", "Hello!", "Hi there", "Good morning"),
        "Hello! Ask me what something in Python's standard library does.",
    ),
    (
        ("Who are you?", "What are you?", "What can you do?", "Help", "What is your name?", "Tell me about yourself."),
        "I am a very small language model trained on the docstrings of Python's standard library. "
        "Ask me what a function or a class does.",
    ),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot"), "You are welcome!"),
    (("Bye", "Goodbye", "See you"), "Goodbye!"),
)
# First words that make "How do I <first sentence>?" a question in English.
IMPERATIVES = frozenset(
    """
    Add Append Apply Build Calculate Call Capitalize Change Check Clear Close Combine Compare Compile Compute
    Concatenate Convert Copy Count Create Decode Delete Determine Display Divide Encode Escape Evaluate Execute
    Expand Extend Fetch Fill Find Flush Format Generate Get Insert Invert Iterate Join List Load Look Make Move
    Multiply Normalize Open Parse Pop Print Produce Pull Push Put Raise Read Recursively Remove Rename Repeat
    Replace Reverse Rotate Round Run Search Send Set Shuffle Sort Split Start Stop Strip Substitute Swap Terminate
    Test Transform Translate Turn Update Wait Wrap Write
    """.split()
)


@dataclass(frozen=True)
class Entry:
    """One documented thing: its dotted name, what it is, how it is called ("" when unknown), and a short answer."""

    name: str
    kind: str  # "function", "method", "class", "module"
    signature: str
    answer: str
    weight: int  # samples in each epoch

    @property
    def held_out(self) -> bool:
        """True for the entries that training never sees: one in 25, none from the builtins and popular modules."""
        return self.weight == 1 and _digest(self.name) % HELD_OUT_ENTRY_ONE_IN == 0


@dataclass(frozen=True)
class Pair:
    """One question and its answer."""

    question: str
    answer: str


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Cleaning ------------------------------------------------------------------------------------------------------------

_ROLE = re.compile(r":[a-z:]+:`~?([^`]*)`")
_SECTION = re.compile(
    r"^(?::\w+|\.\.|args?:|arguments:|parameters|returns?:|raises:|usage|example|notes?:|[-=*+~^]{3,}|>>>|[$#%] )", re.I
)


def _after_call(text: str, name: str) -> str | None:
    """What follows "S.find(sub[, start])" at the start of the text; None when it does not start with a call of name."""
    head = re.match(rf"(?:\w+\.)*{re.escape(name)}\(", text)
    if not head:
        return None
    depth = 0
    for position in range(head.end() - 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return text[position + 1 :]
    return None


def _without_signature(paragraph: str, name: str) -> str:
    """The paragraph without leading "S.find(sub) -> int" lines; what follows "->" is kept when it says something."""
    while (after := _after_call(paragraph, name)) is not None:
        line, _, below = after.partition("\n")
        rest = line.strip()
        if arrow := re.match(r"-+>\s*", rest):
            rest = rest[arrow.end() :]
            result, comma, text = rest.partition(",")
            if comma and len(result.split()) <= 3:
                rest = text.strip()
            elif len(rest.split()) <= 3:
                rest = ""
            elif not rest[0].isupper():
                rest = "Return " + rest
        rest = re.sub(r"^(?:--?|:|=>?|\.)\s+", "", rest)
        if rest:
            lines = [rest[:1].upper() + rest[1:]]
            for line in below.splitlines():
                if _after_call(line, name) is not None:
                    break
                lines.append(line)
            return "\n".join(lines)
        paragraph = below
    return paragraph


def clean(doc: str, name: str = "") -> str:
    """The docstring of name (without its module) as one short plain paragraph; "" when nothing readable is left."""
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = [line for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        if _SECTION.match(lines[0].strip()) or re.match(r"^[-*] |^\d+[.)] |^\w+ +-- ", lines[0].strip()):
            if kept:
                break
            continue
        if kept and lines[0].startswith(" "):
            break  # an indented example or table
        text = "\n".join(lines)
        if not kept and name:
            text = _without_signature(text, name)
        text = " ".join(text.split())
        text = re.split(r"\s>>> ", text)[0]
        if text:
            kept.append(text if text[-1] in ".:!?" else text + ".")
    text = _ROLE.sub(r"\1", " ".join(kept)).replace("``", "").replace("`", "").replace("\\", "")
    text = re.sub(r"\s+([.,])(?= |$)", r"\1", text).strip()
    text = re.sub(r"(?<!\w)\*(\w+)\*(?!\w)", r"\1", text)
    if len(text) > MAX_ANSWER_CHARS:
        cut = [m.end() for m in re.finditer(r"[.!?](?= [A-Z\"'(])", text[:MAX_ANSWER_CHARS])]
        cut = [
            end
            for end in cut
            if text[:end].count("(") == text[:end].count(")") and text[end - 4 : end] not in ("e.g.", "i.e.")
        ]
        if not cut:
            return ""
        text = text[: cut[-1]]
    text = re.sub(r"[^.!?]*:$", "", text).strip() if "." in text else text.rstrip(":") + "."
    readable = (
        text.isascii()
        and text.isprintable()
        and len(text.split()) >= 3
        and not re.search(r"[|<>{}]{2}|__\w+__ = ", text)
    )
    return text[:1].upper() + text[1:] if readable else ""


# Collecting ----------------------------------------------------------------------------------------------------------


def _signature(thing: object, name: str) -> str:
    with contextlib.suppress(Exception):  # besides ValueError and TypeError, whatever a default value raises
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
        text = re.sub(r"\((?:self|cls)(?:, /)?(?:, )?", "(", text)
        if len(text) <= 90 and " at 0x" not in text and "<" not in text and text.isascii():
            return name + text
    return ""


def _entry(thing: object, name: str, kind: str, weight: int) -> Entry | None:
    doc = getattr(thing, "__doc__", None)
    answer = clean(doc, name.rpartition(".")[2]) if isinstance(doc, str) else ""
    return Entry(name, kind, _signature(thing, name), answer, weight) if answer else None


def _class_entries(cls: type, name: str, weight: int) -> Iterator[Entry | None]:
    yield _entry(cls, name, "class", weight)
    for attribute, raw in sorted(vars(cls).items()):
        if attribute.startswith("_"):
            continue
        thing = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        if callable(thing) and not isinstance(thing, type):
            yield _entry(thing, f"{name}.{attribute}", "method", weight)


def _module_entries(module: types.ModuleType, name: str, weight: int) -> Iterator[Entry | None]:
    builtin = name == "builtins"
    if not builtin:
        yield _entry(module, name, "module", weight)
    exported = getattr(module, "__all__", None)
    for attribute in sorted(exported if exported is not None else vars(module)):
        thing = getattr(module, attribute, None)
        if attribute.startswith("_") or isinstance(thing, types.ModuleType) or thing is None:
            continue
        home = getattr(thing, "__module__", None)
        if (
            not builtin
            and exported is None
            and isinstance(home, str)
            and home.lstrip("_").split(".")[0] != name.split(".")[0]
        ):
            continue
        full = attribute if builtin else f"{name}.{attribute}"
        if isinstance(thing, type):
            exception = issubclass(thing, BaseException)
            yield from [_entry(thing, full, "class", weight)] if exception else _class_entries(thing, full, weight)
        elif callable(thing):
            yield _entry(thing, full, "function", weight)


def entries() -> list[Entry]:
    """All entries in a stable order, from a fresh interpreter: libraries such as torch add to the standard library."""
    done = subprocess.run([sys.executable, "-I", __file__, "--json"], check=True, capture_output=True, text=True)
    return [Entry(**fields) for fields in json.loads(done.stdout)]


def collect() -> list[Entry]:
    """Each name once. The same text for more than three names is kept for three."""
    weights = (
        {"builtins": BUILTIN_WEIGHT} | dict.fromkeys(POPULAR_MODULES, POPULAR_WEIGHT) | dict.fromkeys(OTHER_MODULES, 1)
    )
    found: dict[str, Entry] = {}
    repeats: dict[str, int] = {}
    for name, weight in weights.items():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # an optional part of Python that this build lacks
                continue
            for entry in _module_entries(module, name, weight):
                if entry is None or entry.name in found:
                    continue
                repeats[entry.answer] = repeats.get(entry.answer, 0) + 1
                if repeats[entry.answer] <= 3:
                    found[entry.name] = entry
    return list(found.values())


# Questions -----------------------------------------------------------------------------------------------------------


def _describing(entry: Entry) -> list[str]:
    templates: tuple[str, ...] = {"class": CLASS_QUESTIONS, "module": MODULE_QUESTIONS}.get(
        entry.kind, CALLABLE_QUESTIONS
    )
    owner, _, short = entry.name.rpartition(".")
    if entry.kind == "method":
        templates += METHOD_QUESTIONS
    return [t.format(name=entry.name, kind=entry.kind, short=short, owner=owner) for t in templates]


def held_out_question(entry: Entry) -> str:
    """The one phrasing about this entry that training never sees (never the first, most usual one)."""
    questions = _describing(entry)
    return questions[1 + _digest("phrasing " + entry.name) % (len(questions) - 1)]


def training_pairs(entry: Entry) -> list[Pair]:
    """Every question about an entry but the held-out one; the describing ones come first."""
    held_out = held_out_question(entry)
    pairs = [Pair(question, entry.answer) for question in _describing(entry) if question != held_out]
    if entry.signature and entry.weight > 1:
        pairs += [Pair(t.format(name=entry.name), f"{entry.signature}") for t in SIGNATURE_QUESTIONS]
    first = re.split(r"[.:;,(]", entry.answer)[0].strip()
    if entry.weight > 1 and first.split()[0] in IMPERATIVES and 3 <= len(first.split()) <= 14:
        task = first[0].lower() + first[1:]
        pairs.append(Pair(f"How do I {task}?", f"Use {entry.name}. {entry.answer}"))
    return pairs


def held_out_pairs(collection: Iterable[Entry]) -> dict[str, list[Pair]]:
    """{"phrasing": known entries asked in a way never trained, "entries": entries never trained}."""
    sets: dict[str, list[Pair]] = {"phrasing": [], "entries": []}
    for entry in collection:
        which = "entries" if entry.held_out else "phrasing"
        sets[which].append(Pair(held_out_question(entry), entry.answer))
    return sets


def epoch(collection: Iterable[Entry], rng: random.Random) -> list[list[Pair]]:
    """One pass over the training entries as shuffled conversations of one to six questions."""
    pairs: list[Pair] = []
    for entry in collection:
        if entry.held_out:
            continue
        choices = training_pairs(entry)
        describing = [pair for pair in choices if pair.answer == entry.answer]
        for _ in range(entry.weight):
            pairs.append(rng.choice(choices if rng.random() < 0.3 else describing))
    for questions, answer in SMALL_TALK:
        pairs += [Pair(question, answer) for question in questions]
    rng.shuffle(pairs)
    conversations = []
    while pairs:
        turns = rng.choices((1, 2, 3, 6), (80, 10, 6, 4))[0]
        conversations.append(pairs[-turns:])
        del pairs[-turns:]
    return conversations


def text(collection: Iterable[Entry], size: int) -> str:
    """The beginning of an epoch with the tokens of the chat template, at least `size` characters."""
    made = ""
    for conversation in epoch(collection, random.Random(0)):
        made += "<|bos|>"
        made += "".join(f"<|user|>{pair.question}<|end|><|assistant|>{pair.answer}<|end|>" for pair in conversation)
        made += "\n"
        if len(made) >= size:
            break
    return made


def main() -> None:
    """Print what the collection holds, with --json the whole of it, with --text conversations."""
    collection = collect()
    if sys.argv[1:2] == ["--text"]:
        print(text(collection, int(sys.argv[2])), end="")
        return
    if sys.argv[1:] == ["--json"]:
        print(json.dumps([asdict(entry) for entry in collection]))
        return
    held = held_out_pairs(collection)
    samples = sum(entry.weight for entry in collection if not entry.held_out)
    characters = sum(len(entry.answer) for entry in collection)
    print(f"Python {sys.version.split()[0]}: {len(collection)} entries, {characters} characters of answers")
    print(f"{samples} samples in each epoch; {len(held['entries'])} entries held out")
    for entry in random.Random(0).sample(collection, 12):
        print(f"\n[{entry.kind} x{entry.weight}] {held_out_question(entry)}\n  {entry.signature}\n  {entry.answer}")


if __name__ == "__main__":
    main()
