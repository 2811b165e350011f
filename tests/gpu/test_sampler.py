"""The sampler on an accelerator: the same tokens as the oracle on the CPU."""

import numpy as np
import pytest
import torch

from amoe.engine.sampler import sample
from amoe.engine.sampler_reference import sample_reference
from amoe.engine.sampling_table import SamplingTable
from amoe.types import SamplingParams

pytestmark = pytest.mark.gpu

PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, top_k=20),
    SamplingParams(temperature=1.2, top_k=200, top_p=0.8, min_p=0.001),
    SamplingParams(temperature=0.7, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25),
    SamplingParams(temperature=0.0, min_tokens=9, max_tokens=20, logprobs=3),
    SamplingParams(temperature=0.9, logit_bias=((5, 3.5), (40, -2.0)), bad_words=((7,), (8,), (9, 10))),
    SamplingParams(temperature=0.0, allowed_token_ids=tuple(range(64, 900, 3)), logprobs=1),
]


@pytest.mark.parametrize("vocab_size", [4096, 32_000])
@pytest.mark.parametrize("copies", [1, 9])
def test_tokens_equal_the_oracle(vocab_size, copies, device):
    params = PARAMS * copies
    rng = np.random.default_rng(0)
    table = SamplingTable(len(params), vocab_size)
    for row, row_params in enumerate(params):
        table.set(row, row_params, default_seed=row, eos_token_ids=(2,))
    tokens = rng.integers(0, vocab_size, size=(len(params), 40)).astype(np.int32)
    prompt_lens, lens = np.full(len(params), 32), np.full(len(params), 40)
    logits = torch.randn(len(params), vocab_size, generator=torch.Generator().manual_seed(1)) * 4
    rows = np.arange(len(params))
    sampled = sample(logits.clone().to(device), table, rows, lens - prompt_lens, tokens, prompt_lens, lens)
    for row, row_params in enumerate(params):
        prompt, output = tokens[row, :32].tolist(), tokens[row, 32:].tolist()
        expected = sample_reference(logits[row], row_params, seed=row, prompt=prompt, output=output, eos_token_ids=(2,))
        assert sampled.token_ids[row] == expected
    assert np.isfinite(sampled.logprobs[6])
    assert sampled.ranks[6] == 1
    assert (sampled.top_ids[6] >= 0).all()
