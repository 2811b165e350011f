"""Imports go one way, and what touches the world is kept where it belongs: read from the source, not by importing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# Low to high. A part imports from lower rows, and from itself; parts of one row do not know each other.
LAYERS = (
    ("config", "types", "errors", "clock", "stats", "logs"),
    ("policy",),
    ("core",),
    ("models", "kernels", "transport", "metrics", "profiles"),
    ("engine", "sim"),
    ("cluster",),
    ("server",),
    ("bench",),
    ("cli", "__main__"),
)
SIBLINGS = {("models", "kernels")} | {(above, below) for above in LAYERS[0] for below in LAYERS[0]}
BUILTIN_READERS = ("server", "bench", "cli")  # `builtin` is data: it stands beside the layers

# Modules that wire the layers, like the command line, though Ray Serve's users look for them elsewhere.
ENTRY_POINTS = {"amoe.cluster.ray_serve": "cli"}

# What the deterministic layers must not touch: they are told the time, and draw nothing.
IMPURE = {"time", "random", "os", "asyncio", "ray", "torch", "socket", "subprocess", "threading", "multiprocessing"}
PURE = ("policy", "core")

# Where each of these may be imported: prefixes of module names.
CONFINED = {
    "asyncio": (
        *("amoe.engine.async_engine", "amoe.engine.async_generation", "amoe.engine.control", "amoe.engine.channels"),
        *("amoe.engine.steering", "amoe.engine.vigil"),
        *("amoe.server", "amoe.cluster", "amoe.bench"),
    ),
    "ray": ("amoe.cluster.ray_cluster", "amoe.cluster.ray_serve"),
    "transformers": ("amoe.builtin.train",),
    "prometheus_client": ("amoe.metrics",),
    "fastapi": ("amoe.server",),
    "uvicorn": ("amoe.server",),
    "safetensors": ("amoe.models", "amoe.builtin.train"),
    "zmq": ("amoe.transport",),
    "torch.distributed": ("amoe.transport",),
}


class Import(NamedTuple):
    """One imported name."""

    importer: str
    imported: str
    line: int
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def is_in(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def part_of(module: str) -> str:
    """`amoe.core.join` is of `core`; the package itself is of no part."""
    return ENTRY_POINTS.get(module) or module.partition(".")[2].partition(".")[0]


def read_imports(source: str, importer: str, is_package: bool = False) -> Iterator[Import]:
    """All imports of a module, also those inside functions, as absolute names."""
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = importer.split(".") if is_package else importer.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            # `from amoe import core` imports amoe.core; of other packages the parent says enough.
            names = [f"{parent}.{alias.name}" for alias in node.names] if parent == "amoe" else [parent]
        for name in names:
            yield Import(importer, name, node.lineno, id(node) in typing_only)


def all_imports() -> list[Import]:
    imports = []
    for path in sorted((ROOT / "amoe").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        importer = ".".join(parts[:-1] if is_package else parts)
        imports += read_imports(path.read_text(encoding="utf-8"), importer, is_package)
    return imports


def against_the_layers(item: Import) -> bool:
    """The import goes up, or sideways where it must not."""
    above, below = part_of(item.importer), part_of(item.imported)
    row_of = {part: row for row, parts in enumerate(LAYERS) for part in parts}
    if not is_in(item.imported, "amoe") or above == below or below in ("", "__version__"):
        return False
    if below == "builtin":
        return above not in BUILTIN_READERS
    if above not in row_of or below not in row_of:  # `builtin` and the package itself import nothing of ours
        return True
    return row_of[below] > row_of[above] or (row_of[below] == row_of[above] and (above, below) not in SIBLINGS)


def against_purity(item: Import) -> bool:
    """policy and core stay free of the world and of tensors; of `types`, only a type checker sees torch."""
    root = item.imported.partition(".")[0]
    if part_of(item.importer) in PURE:
        return root in IMPURE or item.imported == "numpy.random"
    return root == "torch" and part_of(item.importer) in LAYERS[0] and not item.for_types_only


def against_confinement(item: Import) -> bool:
    """The import is of something that has its own place, elsewhere."""
    homes = CONFINED.get(item.imported.partition(".")[0])
    return homes is not None and not any(is_in(item.importer, home) for home in homes)


@pytest.mark.parametrize("rule", [against_the_layers, against_purity, against_confinement])
def test_imports_follow_the_rules(rule):
    assert [str(item) for item in all_imports() if rule(item)] == []


def test_every_module_has_its_layer():
    known = {part for parts in LAYERS for part in parts} | {"builtin", ""}
    assert {part_of(item.importer) for item in all_imports()} <= known


def test_the_reader_sees_every_way_to_import():
    source = """
import os.path
from typing import TYPE_CHECKING
from amoe import metrics
from . import join
from .. import config
from ..policy.scheduler import fcfs
if TYPE_CHECKING:
    import torch
def late():
    from amoe.engine import worker
"""
    found = {(item.imported, item.for_types_only) for item in read_imports(source, "amoe.core.worker")}
    assert found == {
        ("os.path", False),
        ("typing", False),
        ("amoe.metrics", False),
        ("amoe.core", False),
        ("amoe.config", False),
        ("amoe.policy.scheduler", False),
        ("torch", True),
        ("amoe.engine", False),
    }


@pytest.mark.parametrize(
    ("rule", "importer", "imported"),
    [
        (against_the_layers, "amoe.core.worker", "amoe.engine.worker"),
        (against_the_layers, "amoe.policy.scheduler", "amoe.core.join"),
        (against_the_layers, "amoe.kernels.permute", "amoe.models.moe"),
        (against_the_layers, "amoe.sim.simulator", "amoe.engine.worker"),
        (against_the_layers, "amoe.engine.worker", "amoe.sim.simulator"),
        (against_the_layers, "amoe.transport.wire", "amoe.metrics"),
        (against_the_layers, "amoe.engine.build", "amoe.builtin"),
        (against_the_layers, "amoe.builtin.train.export", "amoe.models.config"),
        (against_purity, "amoe.core.join", "torch"),
        (against_purity, "amoe.policy.scheduler", "time"),
        (against_purity, "amoe.types", "torch"),
        (against_confinement, "amoe.engine.worker", "asyncio"),
        (against_confinement, "amoe.cluster.local", "ray"),
        (against_the_layers, "amoe.cluster.local", "amoe.cluster.ray_serve"),
        (against_the_layers, "amoe.server.run", "amoe.cluster.ray_serve"),
        (against_confinement, "amoe.models.loader", "transformers"),
    ],
)
def test_every_rule_catches_what_it_forbids(rule, importer, imported):
    assert rule(Import(importer, imported, 1, False))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("amoe.models.moe", "amoe.kernels.permute"),
        ("amoe.core.worker", "amoe.policy.scheduler"),
        ("amoe.types", "amoe.errors"),
        ("amoe.server.cli", "amoe.builtin"),
        ("amoe.cluster.ray_cluster", "ray"),
        ("amoe.cluster.ray_serve", "amoe.server.embedded"),
        ("amoe.builtin.train.network", "transformers"),
    ],
)
def test_every_rule_lets_pass_what_is_right(importer, imported):
    item = Import(importer, imported, 1, False)
    assert not any(rule(item) for rule in (against_the_layers, against_purity, against_confinement))
