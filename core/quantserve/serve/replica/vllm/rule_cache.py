"""Compiles a schema without xgrammar's cache of rules where the cache is at fault; one of `patches.PATCHES`.

With its cache, xgrammar 0.2.8 cannot compile a schema that has a pattern with more than 128 repetitions, such as
``^.{1,500}$``. Without it, it can.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Final

FAULT: Final = "per_rule_fsm_hashes"
"""In the message of the error."""
KEPT: Final = 32
"""Compiled schemas that are kept, because the compiler without its cache keeps none."""
THREADS: Final = 8
"""As many as vLLM's compiler has."""


def compile_without_rule_cache() -> None:
    """Make vLLM's xgrammar backend compile a schema again, without the cache, where the cache is at fault."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    compile_grammar = XgrammarBackend.compile_grammar

    def compile_with_either(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return compile_grammar(self, *args, **kwargs)
        except RuntimeError as error:
            if FAULT not in str(error):
                raise
        if "uncached" not in vars(self):
            self.uncached = copy.copy(self)
            self.uncached.compiler = _uncached(self.compiler)
        return compile_grammar(self.uncached, *args, **kwargs)

    XgrammarBackend.compile_grammar = compile_with_either


def _uncached(compiler: Any) -> Any:
    """A compiler for the same tokenizer."""
    import xgrammar

    info = compiler.compile_builtin_json_grammar().tokenizer_info
    plain = xgrammar.GrammarCompiler(info, max_threads=THREADS, cache_enabled=False)
    kept = {
        name: lru_cache(KEPT)(getattr(plain, f"compile_{name}")) for name in ("json_schema", "regex", "grammar", "lark")
    }
    return SimpleNamespace(
        **{f"compile_{name}": function for name, function in kept.items()},
        compile_structural_tag=plain.compile_structural_tag,
    )
