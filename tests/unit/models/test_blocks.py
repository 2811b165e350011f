"""The blocks, run as the engine runs them, against the reference and against transformers."""

from __future__ import annotations

import pytest
import torch

from amoe.kernels.native import instruction_sets
from amoe.models import reference
from amoe.models.loader import Blocks, load_model
from tests.checkpoints import ARCHES, hf_greedy, hf_logits
from tests.unit.models.block_runner import BlockRunner

PROMPT = [5, 17, 99, 3, 42, 6, 6, 90, 11, 64, 28, 50, 77]
NATIVE = instruction_sets()
# What the families can differ in beyond their defaults: each must change the answer in the same way everywhere.
VARIANTS = [
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True, "clip_qkv": 0.7}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "num_hidden_layers": 3, "decoder_sparse_step": 2}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "head_dim": 32, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
]


def whole(path):
    from amoe.models.config import load_model_config

    config = load_model_config(path)
    return load_model(path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_reference_equals_transformers(checkpoint_factory, arch, overrides, seed):
    path = checkpoint_factory(arch, seed, **overrides)
    with torch.inference_mode():
        ours = reference.forward(whole(path), PROMPT)
    assert (ours - hf_logits(path, PROMPT)).abs().max() < 1e-4


@pytest.mark.parametrize(("arch", "overrides"), VARIANTS)
@pytest.mark.parametrize(("num_workers", "isa"), [(1, None), (2, None), (3, None), *((2, isa) for isa in NATIVE)])
def test_blocks_equal_transformers_with_chunks_and_cache(checkpoint_factory, arch, overrides, num_workers, isa):
    path = checkpoint_factory(arch, 0, **overrides)
    runner = BlockRunner(path, num_workers, isa=isa)
    expected = hf_logits(path, PROMPT)
    logits = [runner.step({}, {0: PROMPT[:5]})[0], runner.step({}, {0: PROMPT[5:6]})[0]]
    logits.append(runner.step({}, {0: PROMPT[6:11]})[0])
    logits += [runner.step({0: token}, {})[0] for token in PROMPT[11:]]
    assert (torch.cat(logits) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("isa", [None, *NATIVE[-1:]])
@pytest.mark.parametrize("arch", ARCHES)
def test_greedy_of_a_mixed_batch_equals_transformers(checkpoint_factory, arch, isa):
    """Sequences that start at different times decode and prefill in one batch, as if each were alone."""
    path = checkpoint_factory(arch, 2)
    prompts = [PROMPT, PROMPT[3:5], PROMPT[::-1] * 2]
    expected = hf_greedy(path, prompts, 12)
    runner, outputs = BlockRunner(path, 2, isa=isa), [[], [], []]
    logprobs = [[], [], []]
    pending = {0: [prompts[0]], 1: [prompts[1]], 2: [prompts[2][:9], prompts[2][9:]]}
    for step in range(40):
        decodes = {s: out[-1] for s, out in enumerate(outputs) if out and len(out) < 12 and not pending[s]}
        chunks = {s: parts.pop(0) for s, parts in pending.items() if parts and step >= 2 * s}
        if not decodes and not chunks and not any(pending.values()):
            break
        if not decodes and not chunks:
            continue
        for sequence, logits in runner.step(decodes, chunks).items():
            if not pending[sequence]:
                best = torch.log_softmax(logits[-1], dim=-1).max(dim=-1)
                outputs[sequence].append(int(best.indices))
                logprobs[sequence].append(float(best.values))
    for sequence, answer in enumerate(expected):
        assert outputs[sequence] == answer.token_ids, answer.margins
        assert logprobs[sequence] == pytest.approx(answer.logprobs, abs=1e-4)


@pytest.mark.parametrize("arch", ARCHES)
def test_reference_greedy_stops_at_a_stop_id(checkpoint_factory, arch):
    path = checkpoint_factory(arch, 2)
    answer = hf_greedy(path, [PROMPT], 6)[0].token_ids
    model = whole(path)
    assert reference.greedy(model, PROMPT, 6) == answer
    assert reference.greedy(model, PROMPT, 6, stop_ids=(answer[2],)) == answer[: answer.index(answer[2]) + 1]


@pytest.mark.parametrize("isa", [None, *NATIVE])
@pytest.mark.parametrize("arch", ARCHES)
def test_bfloat16_stays_near_float32(checkpoint_factory, arch, isa):
    path = checkpoint_factory(arch, 0, dtype=torch.bfloat16, initializer_range=0.05)
    exact = hf_logits(path, PROMPT)
    runner = BlockRunner(path, 2, dtype=torch.bfloat16, isa=isa)
    assert runner.home.dtype == torch.bfloat16
    rough = torch.cat([runner.step({}, {0: PROMPT[:9]})[0], *(runner.step({0: t}, {})[0] for t in PROMPT[9:])])
    assert rough.dtype == torch.float32
    assert torch.cosine_similarity(rough, exact, dim=-1).min() > 0.99
