"""The native kernels; everything else about the package is in pyproject.toml.

The extension is optional: where it cannot be built (no GCC: Clang ignores the `#pragma GCC target` of each instruction
set), `amoe` is installed without it and computes with torch. It chooses its instruction set at run time, so a wheel
built on one machine serves any of its architecture.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = Path("amoe/kernels/native/src")
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-Wno-ignored-attributes"]

native = Pybind11Extension(
    "amoe.kernels.native._native",
    sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
    depends=sorted(str(path) for path in SOURCES.glob("*.h")),
    cxx_std=20,
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    optional=True,
)

ParallelCompile("AMOE_BUILD_JOBS", default=min(8, os.cpu_count() or 1)).install()
setup(ext_modules=[] if sys.platform == "win32" else [native])  # the vector types are those of GCC
