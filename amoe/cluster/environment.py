"""The environment variables of a worker's process: what it gets of the server's, and what is about speed and memory."""

from __future__ import annotations

from collections.abc import Mapping

# What a user has set for the server is meant for its workers too, wherever they run.
COPIED_PREFIXES = ("AMOE_", "GLOO_", "HF_", "NCCL_", "OMP_", "UCX_")
SECRETS = ("AMOE_API_KEY", "AMOE_ADMIN_KEY", "HF_TOKEN")  # of the server: no worker needs them


def tuned(num_threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a worker of so many threads, as far as `environment` does not say otherwise."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        # Spinning at the end of every parallel loop wins microseconds on an idle machine, and loses a time slice
        # whenever a core is taken: by the server, if by nobody else.
        "OMP_WAIT_POLICY": environment.get("OMP_WAIT_POLICY", "PASSIVE"),
        "MKL_NUM_THREADS": str(num_threads),
        # oneDNN keeps what it has compiled for each batch size, 1024 of them, up to hundreds of megabytes: memory that
        # goes on growing for minutes. 64 are as fast.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": environment.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"),
        "LRU_CACHE_CAPACITY": environment.get("LRU_CACHE_CAPACITY", "64"),
        # NCCL's kernels wait for the other side's: fewer queues than streams, and one might stand behind another that
        # waits for it. 32 is what every device has; the default is 8.
        "CUDA_DEVICE_MAX_CONNECTIONS": environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "32"),
        # Else torch.distributed prints a C++ stack trace whenever a peer goes away.
        "TORCH_CPP_LOG_LEVEL": environment.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def inherited(num_threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker on this host gets: all of `environment` but secrets, and `tuned`."""
    return {name: value for name, value in environment.items() if name not in SECRETS} | tuned(num_threads, environment)


def remote(num_threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker on another host gets: of `environment` what is meant for it, and `tuned`."""
    copied = {
        name: value for name, value in environment.items() if name.startswith(COPIED_PREFIXES) and name not in SECRETS
    }
    return copied | tuned(num_threads, environment)
