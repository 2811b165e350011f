"""Numerical kernels, each with a slow, readable oracle beside it. They know nothing of models, workers or queues."""
