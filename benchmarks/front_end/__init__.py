"""What the HTTP front end costs by itself: `python -m benchmarks.front_end`."""
