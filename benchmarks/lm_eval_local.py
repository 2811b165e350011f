"""lm-eval's `local-completions` against a running server, held against the dense oracle on the same windows.

    python3 -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm_eval[api]' transformers
    python -m benchmarks.lm_eval_local --lm-eval /tmp/lm-eval/bin/lm_eval

lm-eval lives in an environment of its own: amoe needs nothing of it. The text is what the built-in model has never
seen. lm-eval sends token ids with `echo`, `logprobs` 1 and `max_tokens` 1, in windows; every token is scored once. The
exit status is 1 where the two differ by more than `TOLERANCE` of the nats per token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tokenizers import Tokenizer

from amoe.builtin import builtin_model_path
from amoe.builtin.train.corpus import Document, load_corpus
from amoe.errors import ConfigError
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model
from amoe.models.model import Model
from amoe.models.reference import forward

TASK = "amoe_held_out"
TASKS = Path(__file__).parent / "lm_eval"
TOLERANCE = 1e-3
END_OF_TEXT = 0  # what lm-eval puts before the first token of a document: the tokenizer has no other
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[str]:
    """The URL of a server of the built-in model that is up within."""
    command = [sys.executable, "-m", "amoe.cli", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            urls = (match[1] for line in process.stdout if (match := re.match(r"ready at (\S+)", line)))
            url = next(urls, None)
            if url is None:
                raise ConfigError("the server has not started: what it wrote above says why")
            yield url
        finally:
            process.terminate()
            process.stdout.read()


def windows(token_ids: Sequence[int], length: int) -> Iterator[tuple[list[int], int]]:
    """lm-eval's windows of a document: the tokens that go in, and how many of the last of them are scored.

    Each is scored once. All windows but the last one of a long document have one token of context.

    Args:
        length: tokens that are scored in a window at most.
    """
    done = 0
    while done < len(token_ids):
        count = min(len(token_ids) - done, length)
        end = done + count
        tokens = list(token_ids[max(0, end - length - 1) : end])
        yield (tokens if done else [END_OF_TEXT, *tokens]), count
        done = end


def dense_loss(model: Model, documents: Sequence[Sequence[int]], length: int) -> float:
    """Nats of all documents by the dense oracle."""
    total = 0.0
    for token_ids in documents:
        for tokens, count in windows(token_ids, length):
            logprobs = torch.log_softmax(forward(model, tokens[:-1])[-count:], dim=-1)
            targets = torch.tensor(tokens[-count:]).unsqueeze(1)
            total -= float(logprobs.gather(1, targets).double().sum())
    return total


def run_lm_eval(url: str, model: Path, documents: Sequence[Document], args: argparse.Namespace) -> float:
    """Nats of all documents by lm-eval; its own log goes to stderr.

    Raises:
        subprocess.CalledProcessError: lm-eval has failed.
    """
    with tempfile.TemporaryDirectory(prefix="amoe-lm-eval-") as directory:
        lines = (json.dumps({"text": document.text}) + "\n" for document in documents)
        Path(directory, "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
        settings = {
            "model": args.served_model_name,
            "base_url": f"{url}/v1/completions",
            "tokenizer": model,
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "max_length": args.max_length,
            "num_concurrent": args.num_concurrent,
        }
        model_args = ",".join(f"{name}={value}" for name, value in settings.items())
        flags = ["--model", "local-completions", "--model_args", model_args, "--tasks", TASK]
        flags += ["--include_path", str(TASKS), "--output_path", "out"]
        environment = os.environ | OFFLINE | {"HF_HOME": directory}
        subprocess.run([args.lm_eval.absolute(), *flags], cwd=directory, env=environment, stdout=sys.stderr, check=True)
        (result,) = Path(directory, "out").rglob("results_*.json")
        metrics = json.loads(result.read_text(encoding="utf-8"))["results"][TASK]
    return math.log(metrics["byte_perplexity,none"]) * bytes_of(documents)


def bytes_of(documents: Sequence[Document]) -> int:
    """UTF-8 bytes, as lm-eval counts them."""
    return sum(len(document.text.encode()) for document in documents)


def report(told: float, dense: float, num_tokens: int, num_bytes: int) -> bool:
    """Print the nats of both, per token and per byte. Returns whether they agree."""
    print(f"{num_tokens:,} tokens, {num_bytes:,} bytes\n")
    print("| | nats/token | perplexity (token) | perplexity (byte) |\n|---|---:|---:|---:|")
    for name, nats in (("lm-eval, local-completions", told), ("dense oracle, float32", dense)):
        per_token = nats / num_tokens
        print(f"| {name} | {per_token:.6f} | {math.exp(per_token):.4f} | {math.exp(nats / num_bytes):.6f} |")
    difference = abs(told / dense - 1)
    print(f"\nrelative difference of the nats per token: {difference:.2e} (at most {TOLERANCE:g})")
    return difference <= TOLERANCE


def main() -> int:
    """Exit status: 0 if both agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="the lm_eval command")
    parser.add_argument("--base-url", help="a running server of the built-in model; default: start one")
    parser.add_argument("--served-model-name", default="amoe-builtin", help="of that server")
    parser.add_argument("--serve-flags", default="--dtype float32 --colocated 2", help="of a server that is started")
    parser.add_argument("--max-length", type=int, default=1024, help="lm-eval's: tokens of a window and two more")
    parser.add_argument("--num-concurrent", type=int, default=4, help="requests that lm-eval has under way at once")
    parser.add_argument("--num-documents", type=int, help="of the held-out text; default: all of them")
    args = parser.parse_args()
    model_path = builtin_model_path()
    documents = load_corpus().held_out[: args.num_documents]
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    token_ids = [tokenizer.encode(document.text, add_special_tokens=False).ids for document in documents]
    with serving(args.serve_flags.split()) if args.base_url is None else nullcontext(args.base_url) as url:
        told = run_lm_eval(url, model_path, documents, args)
    config = load_model_config(model_path)
    model = load_model(model_path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        # lm-eval keeps one token free for the answer and one for the context.
        dense = dense_loss(model, token_ids, args.max_length - 2)
    return 0 if report(told, dense, sum(map(len, token_ids)), bytes_of(documents)) else 1


if __name__ == "__main__":
    sys.exit(main())
