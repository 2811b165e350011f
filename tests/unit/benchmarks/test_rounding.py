"""Sums of rounded outputs do not depend on who adds up which of them; sums that are rounded on the way do."""

from __future__ import annotations

import pytest

from benchmarks import rounding


def test_only_sums_of_rounded_outputs_are_the_same_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounding, "CHUNK", 20_000)
    assert rounding.main(["--millions", "1"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert counts["sums in bfloat16"] > 1000 > counts["sums in float32"]
    assert counts["outputs in bfloat16, sums in float32"] == 0
