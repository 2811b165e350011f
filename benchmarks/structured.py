"""What structured output costs beside the kernels: compiling, masks, tokens taken, masks applied.

    python -m benchmarks.structured [--rows 1,16,64] [--steps 100] [--large DIR] [--json FILE]

Every row walks through a text of its grammar, drawn evenly from what is admitted. CPU times per step of all rows, on
one thread: *masks* is what the worker computes beside its loop while a token goes through the model; *take* and *apply*
are in the loop. Vocabularies: the built-in one, and with `--large DIR` the one of 151,936 tokens in that directory,
which is trained first, on the sources of Python, torch and transformers, if it is not there (about a minute).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from llguidance import LLMatcher

from amoe.builtin import builtin_model_path
from amoe.engine.grammar_compiler import GrammarVocabulary, compile_grammar, fill_masks
from amoe.engine.token_masks import apply_masks, ids_of, num_words
from amoe.errors import RequestError

LARGE_SIZE = 151_936
Grammar = tuple[str, str]  # name, and what llguidance reads


def json_grammar(schema: dict[str, Any]) -> str:
    """Compact JSON of a schema, as the server asks for it."""
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def grammars() -> list[Grammar]:
    """What people send, and what somebody might."""
    strings = {"type": "string"}
    record = {"name": strings, "age": {"type": "integer"}, "tags": {"type": "array", "items": strings}}
    person = {"type": "object", "properties": record, "required": list(record), "additionalProperties": False}
    fields = {f"p{i}": {"enum": [f"v{i}_{k}" for k in range(20)]} for i in range(20)}
    wide = {f"field_{i}": {"type": "object", "properties": fields} for i in range(100)}
    kinds = [{"type": "object", "properties": {"kind": {"const": f"k{i}"}, f"x{i}": strings}} for i in range(128)]
    rng = random.Random(0)
    choices = ["".join(rng.choice("abcdefgh ") for _ in range(30)) for _ in range(10_000)]
    terminal = "start: C\nC: " + " | ".join(map(json.dumps, choices))
    return [
        ("small schema", json_grammar(person)),
        ("any JSON object", json_grammar({"type": "object"})),
        ("regex: e-mail", LLMatcher.grammar_from_regex(r"[a-z]+@[a-z]+\.(com|org)")),
        ("10,000 choices", LLMatcher.grammar_from_lark(terminal)),
        ("100 objects of 20 enums", json_grammar({"type": "object", "properties": wide})),
        ("anyOf 128 objects", json_grammar({"anyOf": kinds})),
        ("nasty: {1,100} thrice", LLMatcher.grammar_from_regex("((a{1,100}){1,100}){1,100}")),
        ("nasty: ambiguous", LLMatcher.grammar_from_lark('start: e\ne: e e | "a" | "b" | ')),
    ]


def large_vocabulary(folder: Path) -> Path:
    """A byte-level BPE tokenizer of `LARGE_SIZE` tokens in `folder`, trained if it is not there."""
    if (folder / "tokenizer.json").exists():
        return folder
    sources = [Path(sysconfig.get_paths()["stdlib"]), *(_sources_of(name) for name in ("torch", "transformers"))]
    files = sorted({file for source in sources for file in source.rglob("*.py")})

    def texts() -> Iterator[str]:
        return (file.read_text(errors="ignore") for file in files)

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=LARGE_SIZE,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _sources_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return Path(spec.origin).parent


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `call` returns, and the microseconds of this thread that it took, whoever else is busy."""
    start = time.thread_time()
    result = call(*arguments)
    return result, (time.thread_time() - start) * 1e6


def take(matchers: list[LLMatcher], tokens: list[int]) -> None:
    """Every matcher gets its token."""
    for matcher, token in zip(matchers, tokens, strict=True):
        matcher.consume_token(token)


def measure(
    vocabulary: GrammarVocabulary, vocab_size: int, grammar: Grammar, num_rows: int, steps: int
) -> dict[str, Any]:
    """Microseconds of one grammar at one number of rows; `error`: where it met a limit."""
    rng = random.Random(1)
    row: dict[str, Any] = {"grammar": grammar[0], "vocabulary": vocab_size, "rows": num_rows}
    try:
        compiled, row["compile_us"] = timed(compile_grammar, vocabulary, grammar[1])
    except RequestError as refused:
        return row | {"error": str(refused)}
    matchers = [compiled.matcher.deep_copy() for _ in range(num_rows)]
    masks = np.zeros((num_rows, len(compiled.mask)), np.uint32)
    logits = torch.zeros(num_rows, vocab_size)
    times: dict[str, list[float]] = {"masks": [], "take": [], "apply": []}
    error = ""
    for _ in range(steps):
        times["masks"].append(timed(fill_masks, matchers, masks)[1])
        here = masks[:, : num_words(vocab_size)]
        times["apply"].append(timed(apply_masks, logits, np.arange(num_rows), here)[1])
        tokens = [int(rng.choice(ids)) if len(ids := ids_of(mask)) else 0 for mask in here]
        times["take"].append(timed(take, matchers, tokens)[1])
        for index, matcher in enumerate(matchers):
            error = error or matcher.get_error().split("<")[0].strip()
            if matcher.is_stopped():
                matchers[index] = compiled.matcher.deep_copy()  # the next text
    row["error"] = error
    for name, values in times.items():
        row |= {f"{name}_p50": statistics.median(values), f"{name}_max": max(values)}
    return row


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [row["grammar"], f"{row['vocabulary']:,}", str(row["rows"])]
    if "compile_us" not in row:
        return f"| {' | '.join(cells)} | | | | | {row['error']} |"
    cells.append(f"{row['compile_us'] / 1e3:.1f} ms")
    for name in ("masks", "take", "apply"):
        cells.append(f"{row[f'{name}_p50']:,.0f} / {row[f'{name}_max']:,.0f}")
    return f"| {' | '.join(cells)} | {row['error'][:60]} |"


def main() -> None:
    """Measure, print a table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--large", type=Path, metavar="DIR", help="also a vocabulary of 151,936 tokens, kept in DIR")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    print("| grammar | tokens | rows | compile | masks µs p50 / max | take | apply | limit met |\n|" + "---|" * 8)
    sizes = [(builtin_model_path(), 4096)]
    if options.large:
        sizes.append((large_vocabulary(options.large), LARGE_SIZE))
    reading = {}
    for path, size in sizes:
        vocabulary = GrammarVocabulary(path, size, (0,))
        reading[size] = timed(vocabulary.get)[1]
        for grammar in grammars():
            for num_rows in options.rows:
                found.append(measure(vocabulary, size, grammar, num_rows, options.steps))
                print(show(found[-1]), flush=True)
    for size, microseconds in reading.items():
        print(f"reading a vocabulary of {size:,} tokens: {microseconds / 1e3:.0f} ms")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
