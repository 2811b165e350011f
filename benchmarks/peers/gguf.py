"""Converts a checkpoint to GGUF with the converter of a llama.cpp source tree.

    python -m benchmarks.peers.gguf CONVERTER MODEL OUTFILE

The converter knows tokenizers by a hash and refuses others. The benchmark sends token ids and measures no text, so here
it takes GPT-2's rules for any that it does not know.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

UNKNOWN_TOKENIZER = "gpt-2"


def main() -> None:
    """Patch the converter in this process, then run it."""
    converter, model, outfile = sys.argv[1:]
    tree = str(Path(converter).resolve().parent)
    sys.path[:0] = [tree, str(Path(tree) / "gguf-py")]
    base: Any = importlib.import_module("conversion.base")
    known = base.TextModel.get_vocab_base_pre

    def name_of_rules(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return UNKNOWN_TOKENIZER

    base.TextModel.get_vocab_base_pre = name_of_rules
    sys.argv = [converter, model, "--outfile", outfile, "--outtype", "bf16"]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main()
