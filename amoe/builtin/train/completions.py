"""Greedy completions of the held-out kind: slow (the whole prefix again for each token), for a handful of samples."""

from __future__ import annotations

import torch

from amoe.builtin.train.batches import END_OF_TEXT_ID
from amoe.builtin.train.checkpoint import Checkpoint
from amoe.builtin.train.network import Network

PROMPTS: tuple[str, ...] = (
    'def factorial(n):\n    """Return the factorial of n."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "    try:\n        with open(filename, 'rb') as f:\n",
    'def count_words(text):\n    """Return the number of',
    "class TestQueue(unittest.TestCase):\n\n    def test_empty(self):\n",
)


@torch.no_grad()
def complete(checkpoint: Checkpoint, prompt: str, max_new_tokens: int = 64) -> str:
    """The greedy continuation of `prompt`, without the prompt."""
    network = Network(checkpoint.config)
    start = [END_OF_TEXT_ID, *checkpoint.tokenizer.encode(prompt).ids]
    ids = list(start)
    for _ in range(max_new_tokens):
        states, _ = network.hidden(checkpoint.params, torch.tensor([ids]))
        best = int((states[-1] @ checkpoint.params["head"].t()).argmax())
        if best == END_OF_TEXT_ID:
            break
        ids.append(best)
    text: str = checkpoint.tokenizer.decode(ids[len(start) :])
    return text
