"""Parts of the study that the count-level simulator answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amoe.sim.flow.systems import ABLATIONS, BASELINES, WAVES, System
from amoe.sim.flow.waves import HostModel
from benchmarks.study.points import SETTINGS, Point, Setting, load_of, loads_of, measure
from benchmarks.study.task import Task

SIGMAS = (0.0, 0.5, 1.0, 1.25)
# It knows that a device is slow, which no engine in use does: how much of the gain is just that?
SPEED_AWARE = replace(BASELINES[4], name="llep, knows speeds", mode="level-home")


def grid(seeds: int) -> list[Task]:
    """Models × skew × load × placement × systems."""
    tasks = []
    for name, setting in SETTINGS.items():
        for sigma in SIGMAS:
            for load in loads_of(setting):
                for stale in (False, True) if sigma else (False,):
                    labels = {"model": name, "sigma": sigma, "load": load, "placement": "stale" if stale else "fresh"}
                    for seed in range(1 if setting.devices > 8 else seeds):
                        point = Point(
                            setting=setting, sequences=load_of(setting, load), sigma=sigma, stale=stale, seed=seed
                        )
                        iterations = 6 if setting.devices > 8 else 8
                        tasks.append(Task("grid", measure, (point, (*BASELINES, WAVES), labels, iterations)))
    return tasks


def slow_device(seeds: int) -> list[Task]:
    """One device of eight is 1.5 times slower."""
    tasks = []
    for name, setting in SETTINGS.items():
        if setting.devices > 8:
            continue
        for sigma in (0.0, 1.0):
            for load in loads_of(setting):
                labels = {"model": name, "sigma": sigma, "load": load}
                for seed in range(max(1, seeds - 1)):
                    point = Point(
                        setting=setting, sequences=load_of(setting, load), sigma=sigma, seed=seed, slow={3: 1.5}
                    )
                    systems = (*BASELINES[:6], SPEED_AWARE, WAVES, ABLATIONS[0])
                    tasks.append(Task("slow", measure, (point, systems, labels)))
    return tasks


def ablations(seeds: int) -> list[Task]:
    """What each part of the scheduler is worth."""
    points = (
        ("Mixtral top-1", "high", 1.25, True),
        ("Mixtral top-1", "saturated", 1.25, True),
        ("Mixtral top-2", "saturated", 1.0, False),
        ("Qwen3-30B-A3B", "high", 1.25, False),
        ("gpt-oss-120b", "high", 1.25, True),
        ("Mixtral top-1", "low", 1.0, False),
    )
    tasks = []
    for name, load, sigma, stale in points:
        setting = SETTINGS[name]
        labels = {"model": name, "sigma": sigma, "load": load, "placement": "stale" if stale else "fresh"}
        fixed = tuple(replace(WAVES, name=f"W = {waves}", waves=waves) for waves in (1, 2, 3, 4, 6, 8))
        for seed in range(max(1, seeds - 1)):
            point = Point(setting=setting, sequences=load_of(setting, load), sigma=sigma, stale=stale, seed=seed)
            tasks.append(Task("ablations", measure, (point, (*BASELINES[:6], WAVES, *ABLATIONS, *fixed), labels)))
    return tasks


def sensitivity() -> list[Task]:
    """Host time, correlated layers, grouped-query attention, long contexts."""
    hosts = (
        ("hidden", 0.0),
        ("serial", 3e-6),
        ("serial", 30e-6),
        ("serial", 100e-6),
        ("ahead", 30e-6),
        ("ahead", 1e-4),
    )
    systems = tuple(
        replace(WAVES, name=f"host {kind} {seconds * 1e6:g} µs", host=HostModel(seconds, kind))  # type: ignore[arg-type]
        for kind, seconds in hosts
    )
    tasks = []
    for name, load in (
        ("Mixtral top-1", "low"),
        ("Mixtral top-1", "high"),
        ("Qwen3-30B-A3B", "low"),
        ("Qwen3-30B-A3B", "high"),
    ):
        point = Point(setting=SETTINGS[name], sequences=load_of(SETTINGS[name], load), sigma=1.0)
        labels = {"what": "host time", "model": name, "load": load}
        tasks.append(Task("sensitivity", measure, (point, (*BASELINES[:6], *systems), labels)))
    for name, stale, correlated in (("Mixtral top-1", False, True), ("Mixtral top-1", True, True)):
        point = Point(
            setting=SETTINGS[name],
            sequences=load_of(SETTINGS[name], "high"),
            sigma=1.25,
            stale=stale,
            correlated=correlated,
        )
        labels = {
            "what": "same hot experts in all layers",
            "model": name,
            "load": "high",
            "placement": "stale" if stale else "fresh",
        }
        tasks.append(Task("sensitivity", measure, (point, (*BASELINES[:6], WAVES), labels)))
    variants: tuple[tuple[str, Setting], ...] = (
        ("Mixtral top-2, grouped-query attention", Setting(model="mixtral-8x7b", slots=2)),
        ("Mixtral top-2, context 4096", replace(SETTINGS["Mixtral top-2"], context=4096)),
        ("Qwen3-30B-A3B, context 4096", replace(SETTINGS["Qwen3-30B-A3B"], context=4096)),
    )
    for name, setting in variants:
        for stale in (False, True):
            point = Point(setting=setting, sequences=load_of(setting, "high"), sigma=1.25, stale=stale)
            labels = {"what": "attention", "model": name, "load": "high", "placement": "stale" if stale else "fresh"}
            tasks.append(Task("sensitivity", measure, (point, (*BASELINES[:6], WAVES), labels)))
    return tasks


def scaling(largest: int) -> list[Task]:
    """8 to 1,024 devices, the load growing with them."""
    tasks = []
    for devices in (8, 16, 32, 64, 128, 256, 512, 1024):
        if devices > largest:
            continue
        # As many slots as the memory of 32 devices needs, at least one replica each where there are more devices.
        slots = max(1, -(-256 // devices)) + 1
        setting = Setting(model="deepseek-v3", devices=devices, slots=slots, device="h200")
        systems: tuple[System, ...] = (
            BASELINES[0],
            BASELINES[3],
            replace(WAVES, waves=2, mode="even", balance_homes=False),
        )
        if devices > 256:
            systems = systems[1:]
        labels: dict[str, Any] = {"model": "DeepSeek-V3", "devices": devices}
        point = Point(setting=setting, sequences=256 * devices, sigma=1.25)
        tasks.append(Task("scaling", measure, (point, systems, labels, 5 if devices > 64 else 7)))
    return tasks


def cross_check() -> list[Task]:
    """The first study's main table with its assumptions: H100 × 8, context 512, host time hidden."""
    tasks = []
    for name in ("Mixtral top-1", "Qwen3-30B-A3B"):
        for sigma in (0.0, 1.0):
            for sequences in (512, 2048, 8192, 16384):
                point = Point(setting=SETTINGS[name], sequences=sequences, sigma=sigma, seed=1)
                labels = {"model": name, "sigma": sigma, "placement": "fresh"}
                tasks.append(Task("cross-check", measure, (point, (*BASELINES[:6], WAVES), labels)))
    for sequences in (8192, 16384):
        point = Point(setting=SETTINGS["Mixtral top-1"], sequences=sequences, sigma=1.25, seed=1, stale=True)
        labels = {"model": "Mixtral top-1", "sigma": 1.25, "placement": "stale"}
        tasks.append(Task("cross-check", measure, (point, (*BASELINES[:6], WAVES), labels)))
    return tasks
