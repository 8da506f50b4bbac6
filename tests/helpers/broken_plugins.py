"""Broken plugins: each with one defect, by the door through which it comes, and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.dists import METHOD


@dataclass(frozen=True)
class Broken:
    """A plugin of the method ``broken`` that is broken in one way.

    Attributes:
        name: of the test.
        code: of its module, after a method and a detection of ``quant_method: broken`` unless `whole`.
        says: part of what `check` of its own model says.
        exit_code: of that.
        whole: whether the code is the whole module.
        seconds: ``QUANTSERVE_HOOK_TIMEOUT``.
        door: through which it comes: ``check`` of its model, ``quantizer``, ``converter``, ``command`` or ``page``.
        file: of its model, empty, instead of a checkpoint that declares ``quant_method: broken``.
        named: its entry point, where that is not the door's.
    """

    name: str
    code: str
    says: str
    exit_code: int = 3
    whole: bool = False
    seconds: str = "10"
    door: str = "check"
    file: str = ""
    named: str = ""

    @property
    def module(self) -> str:
        own = METHOD.format(name="broken", aliases=()) + (
            "\nfrom quantserve.api import *\n@hookimpl\ndef quantserve_detect(checkpoint):\n"
            "    return (checkpoint.quantization_config or {}).get('quant_method') == 'broken'\n"
        )
        return self.code if self.whole else own + self.code


def hook(text: str) -> str:
    return f"@hookimpl\ndef quantserve_{text}\n"


def validate(body: str) -> str:
    return hook(f"validate(checkpoint, model, target):\n    {body}")


def kwargs(value: str) -> str:
    return hook(f"engine_kwargs(checkpoint): return {value}")


def scheme(rest: str) -> str:
    return hook(f"scheme(checkpoint, linear): return Scheme({{'qweight': PART}}, {rest})")


def environment(value: str) -> str:
    return hook(f"environment(checkpoint): return {value}")


def reader(suffixes: str, body: str = "return Contents()") -> str:
    return f"def read(source, names):\n    {body}\n" + hook(f"reader(): return Reader({suffixes}, read)")


PARTS = "PART = Part((N(), K()), ('I8',))\n"
KERNEL = "KernelProfile(name='k', bits_per_weight=8, bandwidth_share=((1, {0}),), flops_share=((1, 0.5),), source='s')"
WARNING = "Finding.warning('broken-a', 'a')"
LATE = "did not end within"

BROKEN = [
    # importing
    Broken(
        "import-raises", "raise RuntimeError('at import')", "RuntimeError: at import at quantserve_broken", whole=True
    ),
    Broken("import-exits", "import sys\nsys.exit(3)", "SystemExit: 3", whole=True),
    Broken("import-interrupts", "raise KeyboardInterrupt", "KeyboardInterrupt", whole=True),
    Broken("import-recursion", "def f(): f()\nf()", "RecursionError", whole=True),
    Broken("import-syntax", "def f(:", "SyntaxError", whole=True),
    Broken("import-sleeps", "import time\ntime.sleep(60)", f"{LATE} 2.4 s", whole=True, seconds="0.4"),
    Broken("import-loops", "while True: pass", f"{LATE} 2.4 s", whole=True, seconds="0.4"),
    Broken("import-clears-environ", "import os\nos.environ.clear()", "in the environment; put back", whole=True),
    Broken(
        "import-sets-vllm", "import os\nos.environ['VLLM_PLUGINS'] = 'x'", "set VLLM_PLUGINS in the env", whole=True
    ),
    Broken("import-changes-folder", "import os\nos.chdir('/')", "changed the working folder", whole=True),
    Broken("import-empties-path", "import sys\nsys.path.clear()", "from sys.path; put back", whole=True),
    Broken("import-recursion-limit", "import sys\nsys.setrecursionlimit(200)", "the recursion limit", whole=True),
    Broken("import-replaces-a-function", "import json\njson.dumps = str", "replaced json.dumps; put back", whole=True),
    Broken(
        "import-replaces-a-method",
        "from quantserve.api import Finding\nFinding.to_json = str",
        "replaced quantserve.finding.Finding.to_json; put back",
        whole=True,
    ),
    Broken(
        "import-replaces-a-builtin", "import builtins\nbuiltins.len = id", "replaced builtins.len; put back", whole=True
    ),
    Broken(
        "import-removes-modules",
        "import sys\nfor name in ('json', 'quantserve.finding'): del sys.modules[name]",
        "from sys.modules; put back",
        whole=True,
    ),
    Broken("import-removes-finders", "import sys\nsys.meta_path.clear()", "from sys.meta_path; put back", whole=True),
    Broken("import-replaces-stderr", "import sys\nsys.stderr = None", "replaced sys.stderr; put back", whole=True),
    Broken(
        "import-ignores-sigterm",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "changed the handler of SIGTERM; put back",
        whole=True,
    ),
    Broken(
        "100000-aliases",
        "from quantserve.api import *\n"
        + hook("method(): return Method('broken', 's', (8,), None, tuple(map(str, range(100_000))))"),
        "Method.aliases has 100,000 entries; at most 100",
        whole=True,
    ),
    Broken(
        "exception-without-text", "class E(Exception):\n    def __str__(self): 1 / 0\nraise E", ": E at", whole=True
    ),
    Broken(
        "exception-with-a-property-for-notes",
        "class E(Exception): __notes__ = property(lambda self: 1 / 0)\nraise E('x')",
        "E: x at quantserve_broken",
        whole=True,
    ),
    Broken(
        "exception-with-a-number-for-notes",
        "error = ValueError('x')\nerror.__notes__ = 7\nraise error",
        "ValueError: x at quantserve_broken",
        whole=True,
    ),
    Broken(
        "exception-that-exits",
        "class E(Exception):\n    def __getattribute__(self, name): raise SystemExit\nraise E",
        "raised an exception that cannot be read",
        whole=True,
    ),
    Broken("exception-of-10-MB", "raise ValueError('x' * 10_000_000)", "(10,000,000 characters)", whole=True),
    Broken("exception-with-escapes", "raise ValueError('a\\x1b[2Jb')", "a\\x1b[2Jb", whole=True),
    Broken("later-api", "from quantserve.api import AnInventionOf2027", "fix: upgrade quantserve", whole=True),
    Broken(
        "api-2",
        "from quantserve.api import *\n" + hook("method(): return Method('broken', 's', (8,), None, api=2)"),
        "version 2 of the plugin API; quantserve 0.1.0 has version 1",
        whole=True,
    ),
    Broken(
        "method-loops",
        "from quantserve.api import *\n" + hook("method():\n    while True: pass"),
        LATE,
        whole=True,
        seconds="0.2",
    ),
    # detecting
    Broken("detect-raises", hook("detect(checkpoint): raise OSError('disk')"), "OSError: disk at quantserve_broken"),
    Broken("detect-returns-1", hook("detect(checkpoint): return 1"), "returned int, not True, False or None"),
    Broken("detect-loops", hook("detect(checkpoint):\n    while True: pass"), f"{LATE} 0.3 s", seconds="0.3"),
    Broken("detect-claims-all", hook("detect(checkpoint): return True"), "", 0),
    Broken(
        "detect-claims-nothing", hook("detect(checkpoint): return False"), "(quantserve-broken 0.9) does not claim", 1
    ),
    Broken(
        "detect-claims-plain",
        hook("detect(checkpoint): return not checkpoint.quantization_config"),
        "method-not-detected",
        1,
    ),
    # findings
    Broken(
        "validate-replaces-a-method",
        validate("import quantserve.api as api; api.Finding.error = None; return []"),
        "replaced quantserve.finding.Finding.error; put back",
    ),
    Broken("validate-coroutine", "async def later(): pass\n" + validate("return later()"), "returned coroutine"),
    Broken(
        "validate-raises", validate("raise KeyError('weight')"), "KeyError: 'weight' at quantserve_broken_plugin.py:"
    ),
    Broken(
        "validate-raises-late",
        validate(f"yield {WARNING}\n    raise KeyError('w')"),
        "after 1 findings, first warning broken-a: a",
    ),
    Broken("validate-exits", validate("raise SystemExit(1)"), "SystemExit: 1"),
    Broken("validate-interrupts", validate("raise KeyboardInterrupt"), "quantserve_validate': KeyboardInterrupt"),
    Broken("validate-loops", validate("while True: pass"), f"'quantserve_validate': {LATE} 0.3 s", seconds="0.3"),
    Broken("validate-sleeps", validate("import time; time.sleep(100)"), LATE, seconds="0.3"),
    Broken("validate-waits", validate("import threading; threading.Event().wait()"), LATE, seconds="0.3"),
    Broken(
        "validate-never-yields",
        validate("import itertools\n    for n in itertools.count():\n        if n < 0: yield n"),
        LATE,
        seconds="0.3",
    ),
    Broken(
        "validate-swallows-once",
        validate("try:\n        while True: pass\n    except BaseException: return []"),
        LATE,
        seconds="0.3",
    ),
    Broken("regex-backtracks", validate("import re; re.match('(a*)*b', 'a' * 40)"), LATE, seconds="0.3"),
    Broken("endless-findings", validate(f"while True: yield {WARNING}"), "gave 9,000+ more findings", 0),
    Broken("million-findings", validate(f"return [{WARNING}] * 1_000_000"), "gave 999,000 more findings", 0),
    Broken(
        "error-after-2000",
        validate(f"return [{WARNING}] * 2000 + [Finding.error('broken-b', 'the error')]"),
        "the error",
        1,
    ),
    Broken(
        "message-of-10-MB",
        validate("return [Finding.warning('broken-a', 'm' * 10_000_000)]"),
        "(10,000,000 characters)",
        0,
    ),
    Broken(
        "100000-offenders",
        validate("return [Finding.warning('broken-a', 'm', ['o' * 999] * 100_000)]"),
        "and 99,950 more",
        0,
    ),
    Broken(
        "code-of-another",
        validate("return [Finding.error('awq-bits', 'm')]"),
        "'awq-bits' must be kebab-case and begin with broken-",
    ),
    Broken("code-not-kebab", validate("return [Finding.error('broken_Bits', 'm')]"), "must be kebab-case"),
    Broken("code-with-escapes", validate("return [Finding.error('broken-\\x1b[2J', 'm')]"), "must be kebab-case"),
    Broken(
        "findings-of-others", validate("import itertools; return itertools.count()"), "returned int among its findings"
    ),
    Broken(
        "finding-subclass",
        "class F(Finding):\n    def to_json(self): 1 / 0\n" + validate("return [F(Severity.INFO, 'broken-a', 'm')]"),
        "broken-a",
        0,
    ),
    Broken("target-changed", validate("object.__setattr__(target, 'memory_bytes', 0); return []"), "", 0),
    # engine arguments
    Broken("kwargs-nan", kwargs("{'seed': 1, 'watermark': float('nan')}"), "not JSON: watermark: "),
    Broken("kwargs-lambda", kwargs("{'hf_overrides': {'a': [lambda: 0]}}"), "not JSON: hf_overrides: "),
    Broken("kwargs-circular", "x = {}\nx['x'] = x\n" + kwargs("{'hf_overrides': x}"), "not JSON: hf_overrides: "),
    Broken(
        "kwargs-nested",
        "x = {}\nfor _ in range(850): x = {'a': x}\n" + kwargs("{'hf_overrides': x}"),
        "nested more than 100 levels deep for hf_overrides",
    ),
    Broken(
        "kwargs-of-the-core",
        kwargs("{'model': 'x', 'tensor_parallel_size': 2}"),
        "sets model, tensor_parallel_size, which belong to the core",
    ),
    Broken(
        "kwargs-misspelt",
        kwargs("{'max_num_seq': 4}"),
        "vLLM has no engine argument `max_num_seq`; did you mean `max_num_seqs`",
    ),
    Broken("kwargs-of-the-server", kwargs("{'middleware': ['evil.py']}"), "middleware"),
    Broken("kwargs-value", kwargs("{'max_num_seqs': -1}"), "max_num_seqs: must be a whole number of at least 1"),
    Broken("kwargs-parallel", kwargs("{'pipeline_parallel_size': 2}"), "pipeline"),
    Broken("kwargs-secret", kwargs("{'hf_token': 'hf_x'}"), "hf_token"),
    Broken(
        "kwargs-endless",
        "import collections\nclass M(collections.UserDict):\n    def items(self):\n        while True: pass\n"
        + kwargs("M(a=1)"),
        LATE,
        seconds="0.3",
    ),
    Broken("kwargs-trust", kwargs("{'trust_remote_code': True}"), "sets the engine argument trust_remote_code", 0),
    Broken("kwargs-worker", kwargs("{'worker_cls': 'evil.Worker'}"), "sets the engine argument worker_cls", 0),
    Broken(
        "kwargs-executor",
        kwargs("{'distributed_executor_backend': 'evil.Executor'}"),
        "distributed_executor_backend",
        0,
    ),
    Broken(
        "kwargs-connector",
        kwargs("{'kv_transfer_config': {'kv_connector_module_path': 'evil'}}"),
        "kv_transfer_config.kv_connector_module_path",
        0,
    ),
    # predictions
    Broken("performance-text", hook("performance(checkpoint): return 53.4"), "returned float, not PerformanceProfile"),
    Broken(
        "performance-negative",
        hook("performance(checkpoint): return PerformanceProfile('reference', 'c', e2e_ms=-5)"),
        "e2e_ms must be a positive number",
    ),
    Broken(
        "performance-inf",
        hook("performance(checkpoint): return PerformanceProfile('reference', 'c', ttft_ms=1e999)"),
        "ttft_ms must be",
    ),
    Broken("performance-loops", hook("performance(checkpoint):\n    while True: pass"), LATE, seconds="0.3"),
    Broken("kernel-dict", hook("kernel(target, bits, engine): return {}"), "returned dict, not KernelProfile"),
    Broken(
        "kernel-nan",
        hook(f"kernel(target, bits, engine): return {KERNEL.format('float(chr(110)+chr(97)+chr(110))')}"),
        "shares must be above 0",
    ),
    Broken(
        "kernel-negative", hook(f"kernel(target, bits, engine): return {KERNEL.format(-1)}"), "shares must be above 0"
    ),
    Broken("quality-text", hook("quality(bits): return 'good'"), "", 0),
    Broken("kernel-raises", hook("kernel(target, bits, engine): raise KeyError(bits)"), "KeyError: 8"),
    # how linears are stored
    Broken("scheme-text", hook("scheme(checkpoint, linear): return 'int8'"), "returned str, not Scheme or None"),
    Broken("scheme-raises", hook("scheme(checkpoint, linear): raise KeyError(linear.name)"), "KeyError: 'model.layers"),
    Broken("scheme-loops", hook("scheme(checkpoint, linear):\n    while True: pass"), LATE, seconds="0.3"),
    Broken("scheme-empty", hook("scheme(checkpoint, linear): return Scheme({}, bits=8)"), "Scheme.parts must map"),
    Broken(
        "scheme-of-100000-parts",
        PARTS
        + hook("scheme(checkpoint, linear): return Scheme(dict.fromkeys(map(str, range(100_000)), PART), bits=8)"),
        "Scheme.parts must map suffixes to 1 to 100 parts",
    ),
    Broken("scheme-nan", PARTS + scheme("bits=float('nan')"), "Scheme: bits, activation_bits and kept must be numbers"),
    Broken(
        "scheme-groups-of-0", PARTS + scheme("bits=8, group_size=0"), "Scheme.group_size must be a positive integer"
    ),
    Broken(
        "scheme-escapes",
        PARTS + hook("scheme(checkpoint, linear): return Scheme({'\x1b[2J': PART}, bits=8)"),
        "a suffix must be text",
    ),
    Broken(
        "scheme-changes-the-checkpoint",
        hook("scheme(checkpoint, linear): checkpoint.tensors.clear()"),
        "AttributeError: 'mappingproxy' object has no attribute 'clear'",
    ),
    Broken(
        "skip-list-text",
        PARTS + scheme("bits=8") + hook("skip_list(checkpoint): return 'lm_head'"),
        "returned str, not SkipList or None",
    ),
    Broken(
        "skip-list-loops",
        PARTS + scheme("bits=8") + hook("skip_list(checkpoint):\n    while True: pass"),
        LATE,
        seconds="0.3",
    ),
    # variables of the engine
    Broken("environment-list", environment("['A']"), "returned list, not a mapping of names"),
    Broken("environment-of-the-core", environment("{'VLLM_PLUGINS': ''}"), "VLLM_PLUGINS, which belong to the core"),
    Broken("environment-of-quantserve", environment("{'QUANTSERVE_KEYS': ''}"), "QUANTSERVE_KEYS, which belong to"),
    Broken("environment-name", environment("{'A=B': '1'}"), "a variable whose name is not letters, digits"),
    Broken("environment-null", environment("{'A': 'x\\0y'}"), "a value of A that is not text"),
    Broken("environment-of-10-MB", environment("{'A': 'x' * 10_000_000}"), "not text of at most 4096 characters"),
    Broken(
        "environment-of-the-process", environment("__import__('os').environ.update(VLLM_X='1')"), "set VLLM_X in the"
    ),
    Broken("environment-loops", hook("environment(checkpoint):\n    while True: pass"), LATE, seconds="0.3"),
    # readers
    Broken("reader-text", hook("reader(): return '.mine'"), "returned str, not Reader or None"),
    Broken("reader-of-safetensors", reader("('.safetensors',)"), "*.safetensors files are read by the core itself"),
    Broken("reader-of-everything", reader("('',)"), "must be a dot, and lower-case letters"),
    Broken("reader-of-100000", reader("tuple(f'.x{n}' for n in range(100_000))"), "must be a tuple of 1 to 100"),
    Broken("reader-not-callable", hook("reader(): return Reader(('.mine',), 7)"), "Reader.read is int"),
    Broken("reader-loops", hook("reader():\n    while True: pass"), LATE, seconds="0.2"),
    Broken("reader-of-gguf", reader("('.gguf',)"), "", 0),
    Broken("read-raises", reader("('.mine',)", "raise KeyError('head')"), "KeyError: 'head'", file="model.mine"),
    Broken("read-exits", reader("('.mine',)", "raise SystemExit"), "SystemExit", file="model.mine"),
    Broken("read-loops", reader("('.mine',)", "while True: pass"), f"{LATE} 1.2 s", seconds="0.2", file="model.mine"),
    Broken("read-nothing", reader("('.mine',)", "return {}"), "returned dict, not Contents", file="model.mine"),
    Broken("read-elsewhere", reader("('.mine',)", "source.open('/etc/passwd')"), "has no file", file="model.mine"),
    Broken(
        "read-endless",
        reader("('.mine',)", "import itertools; return Contents({}, (n for n in itertools.count()))"),
        "returned int among its tensors",
        file="model.mine",
    ),
    # tools; `quantserve convert` and `quantserve quantize` run them
    Broken("quantizer-number", hook("quantizer(): return 7"), "is not 'module:callable'", door="quantizer"),
    Broken("quantizer-nowhere", hook("quantizer(): return 'no_such_module:run'"), "no_such_module", door="quantizer"),
    Broken("quantizer-raises", hook("quantizer(): raise OSError('disk')"), "OSError: disk", door="quantizer"),
    Broken("quantizer-loops", hook("quantizer():\n    while True: pass"), LATE, seconds="0.3", door="quantizer"),
    Broken("converter-number", hook("converter(): return 7"), "is not 'module:callable'", door="converter"),
    Broken("converter-no-function", hook("converter(): return 'os:name'"), "os:name", door="converter"),
    # commands and pages have no plugin beside them
    Broken("command-raises", "raise ValueError('not today')", "ValueError: not today", door="command"),
    Broken("command-exits", "import sys; sys.exit(0)", "SystemExit: 0", door="command"),
    Broken("command-loops", "while True: pass", f"{LATE} 0.6 s", seconds="0.1", door="command"),
    Broken("command-function", "def command(): ...", "is a function, not a click command", door="command"),
    Broken("command-escapes", "raise ValueError('\\x1b[2J')", "\\x1b[2J", door="command"),
    Broken(
        "command-patches",
        "import click, json\njson.dumps = str\ncommand = click.Command('x')",
        "replaced json.dumps",
        door="command",
    ),
    Broken("page-raises", "raise ValueError('not today')", "ValueError: not today", door="page"),
    Broken("page-exits", "raise SystemExit(3)", "SystemExit: 3", door="page"),
    Broken("page-loops", "while True: pass", f"{LATE} 0.6 s", seconds="0.1", door="page"),
    Broken("page-text", "page = '<html>'", "is a str, not a callable page(settings)", door="page"),
    Broken("page-of-another-name", "def page(settings): ...", "the only page is 'explorer'", door="page", named="mine"),
    Broken(
        "page-environment",
        "import os\nos.environ['VLLM_PLUGINS'] = 'x'\ndef page(settings): ...",
        "set VLLM_PLUGINS",
        door="page",
    ),
]
