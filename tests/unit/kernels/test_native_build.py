"""A build of other sources, or one that cannot be loaded, counts as none; and whoever asks is told why."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from amoe.kernels import native

NAME = native.__name__


def imported_with(monkeypatch: pytest.MonkeyPatch, extension: Any) -> Any:
    """The package as it would be if that were its extension; None: there is none."""
    package = ModuleType(NAME)
    if extension is not None:
        package._native = extension  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, NAME, package)
    monkeypatch.delitem(sys.modules, f"{NAME}._native", raising=False)
    spec = importlib.util.spec_from_file_location(NAME, native.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


@pytest.mark.parametrize("interface", [{}, {"INTERFACE": native.INTERFACE - 1}])
def test_a_build_of_other_sources_is_none(monkeypatch: pytest.MonkeyPatch, interface: dict[str, int]) -> None:
    fresh = imported_with(monkeypatch, SimpleNamespace(Context=object, supported=lambda: ["avx2"], **interface))
    assert not fresh.is_available()
    assert fresh.instruction_sets() == []
    assert "built from other sources" in fresh.fault()
    assert "make venv" in fresh.fault()


def test_a_build_of_these_sources_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = SimpleNamespace(Context=object, supported=lambda: ["avx2"], INTERFACE=native.INTERFACE)
    fresh = imported_with(monkeypatch, extension)
    assert fresh.is_available()
    assert fresh.fault() == ""
    assert fresh.instruction_sets() == ["avx2"]


def test_no_build_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = imported_with(monkeypatch, None)
    assert not fresh.is_available()
    assert fresh.fault().startswith("have not been built: install GCC")


def test_a_file_that_the_system_cannot_load_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ImportError("no symbol xyz", name=f"{NAME}._native")

    monkeypatch.setattr(sys.modules[__name__], "ModuleType", Broken)
    fresh = imported_with(monkeypatch, None)
    assert not fresh.is_available()
    assert fresh.fault() == "cannot be loaded (no symbol xyz)"
