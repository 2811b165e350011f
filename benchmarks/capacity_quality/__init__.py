"""What capacity costs in quality, on held-out text of the built-in model: `python -m benchmarks.capacity_quality`.

For another benchmark, which has a speed and wants the quality beside it: `benchmarks.capacity_quality.measure.compare`.
"""
