"""What `python -m benchmarks.growth` makes of its measurements."""

import pytest

from benchmarks.growth import Step, cliffs, main, middles, plot, report, shape_of, sweeps


def steps(sweep, times):
    """A step per place, of so many milliseconds; the roofline is 1 ms and grows by a tenth from place to place."""
    found = []
    for index, (place, step_ms) in enumerate(times.items()):
        roofline_s = 1e-3 * 1.1**index
        found.append(
            Step(
                sweep=sweep,
                place=place,
                round=0,
                step_s=step_ms * 1e-3,
                roofline_s=roofline_s,
                prefill_rate=1000.0,
                memory_bandwidth=50e9,
            )
        )
    return found


def test_a_cliff_is_growth_beyond_that_of_the_roofline():
    line = middles(steps("batch", {1: 2.0, 2: 2.2, 4: 4.0, 8: 4.4}), "batch")
    assert cliffs(line) == {4}


def test_medians_are_over_the_rounds_of_a_place():
    measured = [*steps("batch", {1: 2.0}), *steps("batch", {1: 9.0}), *steps("batch", {1: 3.0})]
    measured += steps("context", {1: 50.0})
    assert [m.step_ms for m in middles(measured, "batch")] == [3.0]


def test_every_sweep_is_reported_and_drawn(tmp_path):
    measured = [step for sweep in sweeps() for step in steps(sweep.title, dict.fromkeys(sweep.places, 4.0))]
    text = report(measured, sweeps())
    for sweep in sweeps():
        assert f"| {sweep.unit} |" in text
        assert f"| {sweep.places[-1]:,} | 4.00 |" in text
    plot(measured, sweeps(), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_experts_change_nothing_else():
    few, many = shape_of("small-8-experts"), shape_of("small-128-experts")
    assert (few.num_experts, many.num_experts) == (8, 128)
    assert (few.top_k, few.hidden_size) == (many.top_k, many.hidden_size)


@pytest.mark.parametrize("asked", ["batches", "batch,contexts", ""])
def test_a_sweep_that_does_not_exist_is_refused(asked, capsys):
    with pytest.raises(SystemExit):
        main(["--sweeps", asked])
    assert "must be of batch, context, experts" in capsys.readouterr().err
