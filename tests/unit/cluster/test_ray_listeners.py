"""What Ray asks its head of, where Ray has no such thing any more."""

from __future__ import annotations

import pytest
from ray import _raylet

from amoe.cluster.ray_cluster import listeners


def test_another_version_of_ray_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(_raylet, "GcsLogSubscriber")
    monkeypatch.setattr(_raylet, "GcsErrorSubscriber", listeners._ErrorSubscriber)
    listeners.be_patient()
    assert not hasattr(_raylet, "GcsLogSubscriber")
    assert _raylet.GcsErrorSubscriber is listeners.PatientErrorSubscriber
    assert "this version of Ray has no GcsLogSubscriber" in caplog.text
