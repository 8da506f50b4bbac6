"""Compiles csrc/ into one library of torch operators; everything else is in pyproject.toml.

Each instruction set is a source file with flags of its own, which torch's build helper does not know, so the compiler is
called here. OpenMP is compiled in and not linked: the library then uses the one runtime torch has loaded, never a second
one. Where nothing can be compiled the package is installed all the same: it works in plain torch, slowly, and
`quantserve doctor` says so with the reason, which is kept in build-failure.txt.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall"]
# GCC 12 takes its own intrinsics' undefined operands for mistakes.
KERNEL = [*COMMON, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
SOURCES = {
    "csrc/ops.cpp": [*COMMON, "-fopenmp"],
    # Plain loops in many variants: what -O3 unrolls here only takes time to compile.
    "csrc/isa_portable.cpp": [*KERNEL, "-O2"],
}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES |= {
        "csrc/isa_avx2.cpp": [*KERNEL, "-mavx2", "-mfma", "-mf16c"],
        "csrc/isa_avx512.cpp": [*KERNEL, *AVX512],
        "csrc/isa_avx512bf16.cpp": [*KERNEL, *AVX512, "-mavx512bf16"],
    }


class Build(build_ext):
    """One object per source, compiled side by side."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; on failure leave a note for `quantserve_kernels.status` instead."""
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_name("build-failure.txt")
        note.unlink(missing_ok=True)
        try:
            self.compile_and_link(target)
        except Exception as error:
            target.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{type(error).__name__}: {error}\n"[-2000:])
            print(f"quantserve-kernels: no compiled operators, plain torch is used: {error}", file=sys.stderr)

    def compile_and_link(self, target: Path) -> None:
        """Raises whatever the compiler, the linker or a missing torch raise."""
        from torch.utils import cpp_extension

        root = Path(self.build_temp).resolve()
        extra = os.environ.get("QUANTSERVE_KERNELS_CFLAGS", "").split()

        def compile_one(source: str) -> str:
            return self.compiler.compile(
                [source],
                output_dir=str(root),
                include_dirs=[*cpp_extension.include_paths(), "csrc"],
                extra_preargs=SOURCES[source] + extra,
            )[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        libraries = ["torch", "torch_cpu", "c10"]
        draft = target.with_suffix(".tmp")
        self.compiler.link_shared_object(
            objects,
            str(draft),
            libraries=libraries,
            library_dirs=cpp_extension.library_paths(),
            extra_postargs=extra,
            target_lang="c++",
        )
        draft.replace(target)  # whole or not at all


setup(
    ext_modules=[Extension("quantserve_kernels._C", list(SOURCES), optional=True)],
    cmdclass={"build_ext": Build},
)
