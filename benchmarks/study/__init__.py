"""When is asynchrony worth it? `make study` runs all of it: `python -m benchmarks.study --help`."""
