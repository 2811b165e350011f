"""What stands in for hardware and weights: device and link profiles, model shapes, block costs, routing models."""
