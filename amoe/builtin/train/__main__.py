"""Train the built-in model: `python -m amoe.builtin.train --run-dir runs/builtin --budget-s 3600`.

Reads the sources of the running interpreter's standard library, learns a tokenizer, trains for a given wall time on the
CPU, exports now and then, and resumes from the run directory if one is there.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from amoe.builtin.train.batches import write_tokens
from amoe.builtin.train.config import ModelConfig, TrainConfig
from amoe.builtin.train.corpus import KIND_TEST, Corpus, load_corpus
from amoe.builtin.train.export import export
from amoe.builtin.train.parameters import initialise
from amoe.builtin.train.tokenizer import train_tokenizer
from amoe.builtin.train.workers import Shared, worker_main

STATE_BUFFERS = ("master", "first", "second", "load", "control")
POLL_S = 2.0
# Keep freed memory, in huge pages: without this, more than half of a worker's time goes into page faults.
MALLOC_TUNABLES = (
    "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592:"
    "glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"
)


def main() -> None:
    """Parse arguments, prepare the data, train, export."""
    args = _arguments()
    model, config = ModelConfig(), replace(TrainConfig(), budget_s=args.budget_s, max_steps=args.max_steps)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    tokenizer = _tokenizer(args.run_dir / "tokenizer.json", corpus, model.vocab_size)
    tokens_path = args.run_dir / "tokens.npz"
    if not tokens_path.is_file():
        epoch = write_tokens(tokens_path, tokenizer, corpus, config.library_repeats, config.doc_repeats)
        print(f"{len(corpus.train)} training documents, {epoch} tokens an epoch with repeats", flush=True)

    shared = Shared.create(model, config.num_workers)
    if not _restore(shared, args.run_dir / "state.pt"):
        initialise(shared.master, model, config.seed)
    shared.working.copy_(shared.master)
    _train(shared, model, config, tokens_path, tokenizer, args.run_dir, args.output)
    export(shared.master, model, tokenizer, args.output)
    print(f"exported to {args.output}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/builtin"), help="tokenizer, tokens, training state")
    parser.add_argument("--output", type=Path, default=Path("runs/builtin/model"), help="where the checkpoint goes")
    parser.add_argument(
        "--budget-s", type=float, default=TrainConfig.budget_s, help="wall time of the training, seconds"
    )
    parser.add_argument("--max-steps", type=int, default=TrainConfig.max_steps)
    return parser.parse_args()


def _tokenizer(path: Path, corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Load or learn the tokenizer: from all library and documentation texts and every third test."""
    if path.is_file():
        return Tokenizer.from_file(str(path))
    texts = [d.text for number, d in enumerate(corpus.train) if d.kind != KIND_TEST or number % 3 == 0]
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(str(path))
    return tokenizer


def _train(
    shared: Shared,
    model: ModelConfig,
    config: TrainConfig,
    tokens_path: Path,
    tokenizer: Tokenizer,
    run_dir: Path,
    output: Path,
) -> None:
    """Run the workers to the end of the budget; meanwhile save the state and export now and then."""
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC_TUNABLES)  # both are read by the workers when they start
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    context = mp.get_context("spawn")
    barrier, lock = context.Barrier(config.num_workers), context.Lock()
    processes = [
        context.Process(target=worker_main, args=(rank, model, config, shared, barrier, lock, tokens_path))
        for rank in range(config.num_workers)
    ]
    for process in processes:
        process.start()
    next_export = time.monotonic() + config.first_export_s
    signal.signal(signal.SIGTERM, lambda *_: shared.stop.fill_(1))  # end after this step, keep the state
    while any(process.is_alive() for process in processes):
        time.sleep(POLL_S)
        if time.monotonic() >= next_export:
            next_export += config.export_every_s
            export(shared.master, model, tokenizer, output)
            _save(shared, run_dir / "state.pt")
    if any(process.exitcode for process in processes):
        raise RuntimeError("a training worker failed; the last state is in the run directory")
    _save(shared, run_dir / "state.pt")


def _save(shared: Shared, path: Path) -> None:
    """Write the state to resume from. Taken while training goes on: a step may be half applied, which does no harm."""
    temporary = path.with_suffix(".new")
    torch.save({name: getattr(shared, name).clone() for name in STATE_BUFFERS}, temporary)
    os.replace(temporary, path)


def _restore(shared: Shared, path: Path) -> bool:
    if not path.is_file():
        return False
    for name, value in torch.load(path).items():
        getattr(shared, name).copy_(value)
    print(f"resuming at step {int(shared.control[2])}, {float(shared.control[1]):.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
