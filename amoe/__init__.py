"""amoe: serve Mixture-of-Experts language models with asynchronous expert parallelism."""

__version__ = "0.1.0"
