"""The sampler against its oracle, and what must hold of it whatever the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amoe.engine import sampler
from amoe.engine.sampler import SampledTokens, sample, score, uniforms
from amoe.engine.sampler_reference import (
    penalised_reference,
    sample_reference,
    uniform_reference,
    weights_reference,
)
from amoe.engine.sampling_table import FINISH_LENGTH, FINISH_STOP, GO_ON, SamplingTable, finish_reasons
from amoe.engine.token_masks import mask_of
from amoe.types import SamplingParams

EOS = (2,)


class Batch:
    """A batch to sample from: rows are shuffled over a larger table, as they are in a worker.

    Args:
        sequences: (params, prompt, output) each.
        grammars: ids that the grammar of each admits, None where there is none.
    """

    def __init__(self, vocab_size, sequences, grammars=None):
        self.sequences = sequences
        self.grammars = grammars or [None] * len(sequences)
        order = np.random.default_rng(len(sequences)).permutation(len(sequences) + 3)
        self.rows = order[: len(sequences)].astype(np.int64)
        self.table = SamplingTable(len(order), vocab_size)
        width = max((len(p) + len(o) for _, p, o in sequences), default=0) + 1
        self.tokens = np.full((len(order), width), -7, np.int32)
        self.prompt_lens = np.zeros(len(order), np.int64)
        self.lens = np.zeros(len(order), np.int64)
        for row, (params, prompt, output) in zip(self.rows, sequences, strict=True):
            self.table.set(int(row), params, default_seed=int(row), eos_token_ids=EOS)
            self.tokens[row, : len(prompt) + len(output)] = [*prompt, *output]
            self.prompt_lens[row], self.lens[row] = len(prompt), len(prompt) + len(output)

    def sample(self, logits, subset=slice(None)) -> SampledTokens:
        rows = self.rows[subset]
        step = self.lens[rows] - self.prompt_lens[rows]
        logits = logits[subset].clone()
        masks = {
            int(row): mask_of(ids, logits.shape[1])
            for row, ids in zip(self.rows, self.grammars, strict=True)
            if ids is not None
        }
        return sample(logits, self.table, rows, step, self.tokens, self.prompt_lens, self.lens, masks)

    def expected(self, logits):
        """The oracle's tokens; None where there is none."""
        cases = zip(self.rows, self.sequences, self.grammars, strict=True)
        return [
            sample_reference(
                logits[i],
                params,
                seed=int(row),
                prompt=prompt,
                output=output,
                eos_token_ids=EOS,
                grammar=grammar,
            )
            for i, (row, (params, prompt, output), grammar) in enumerate(cases)
        ]


def draw(logits, params, num_draws):
    """Tokens of `num_draws` seeds for the same logits [V]."""
    table = SamplingTable(num_draws, len(logits))
    for row in range(num_draws):
        table.set(row, params, default_seed=row, eos_token_ids=())
    rows = np.arange(num_draws)
    zeros = np.zeros(num_draws, np.int64)
    logits = logits.repeat(num_draws, 1)
    return sample(logits, table, rows, zeros, np.zeros((num_draws, 1), np.int32), zeros, zeros).token_ids


@st.composite
def batches(draw_from):
    """(batch, logits [n, V]); penalties are dyadic, so that the order of float operations does not matter."""
    vocab_size = draw_from(st.integers(4, 70))  # one to three words of a mask
    ids = st.integers(0, vocab_size - 1)
    params = st.builds(
        SamplingParams,
        max_tokens=st.just(64),
        min_tokens=st.integers(0, 6),
        temperature=st.sampled_from([0.0, 1e-6, 1e-4, 0.3, 0.7, 1.0, 1.5, 30.0, 1e30]),
        top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
        top_k=st.sampled_from([0, 1, 2, 5, 1000]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        seed=st.none() | st.integers(-(2**70), 2**70),
        presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
        repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
        stop_token_ids=st.lists(ids, max_size=2).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, 0, 3]),
        logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.0, 0.5, 100.0]), max_size=3).map(
            lambda biases: tuple(biases.items())
        ),
        allowed_token_ids=st.just(()) | st.lists(ids, max_size=5, unique=True).map(tuple),
        bad_words=st.just(()) | st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
        grammar=st.sampled_from([None, None, "some"]),
    )
    sequence = st.tuples(params, st.lists(ids, min_size=1, max_size=6), st.lists(ids, max_size=6))
    sequences = draw_from(st.lists(sequence, min_size=1, max_size=6))
    admitted = st.lists(ids, min_size=1, max_size=6)
    grammars = [None if params.grammar is None else draw_from(admitted) for params, _, _ in sequences]
    seed = draw_from(st.integers(0, 2**32 - 1))
    scale = draw_from(st.sampled_from([0.0, 1.0, 4.0, 100.0]))
    logits = torch.randn(len(sequences), vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    if draw_from(st.booleans()):
        logits = logits.round()  # many ties
    return Batch(vocab_size, sequences, grammars), logits


@given(batches())
def test_every_row_equals_the_oracle(case):
    batch, logits = case
    sampled, expected = batch.sample(logits), batch.expected(logits)
    stuck = sampled.stuck if sampled.stuck is not None else np.zeros(len(expected), np.bool_)
    told = [None if gone else int(token) for gone, token in zip(stuck, sampled.token_ids, strict=True)]
    assert told == expected
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < logits.shape[1])).all()


@given(batches())
def test_a_row_does_not_depend_on_the_rest_of_the_batch(case):
    batch, logits = case
    together = batch.sample(logits)
    for i in range(len(batch.rows)):
        alone = batch.sample(logits, slice(i, i + 1))
        assert alone.token_ids[0] == together.token_ids[i]


@given(batches())
def test_logprobs_are_those_of_the_raw_logits(case):
    batch, logits = case
    sampled = batch.sample(logits)
    expected = torch.log_softmax(logits, dim=-1)
    wanted = [params.logprobs for params, _, _ in batch.sequences]
    if all(count is None for count in wanted):
        assert sampled.logprobs is None
        assert sampled.top_ids is None
        return
    for i, count in enumerate(wanted):
        if count is None:
            assert np.isnan(sampled.logprobs[i])
            assert (sampled.top_ids[i] == -1).all()
            assert sampled.ranks[i] == 0
            continue
        better = torch.log_softmax(logits[i], dim=-1)
        assert sampled.ranks[i] == 1 + int((better > better[sampled.token_ids[i]]).sum())
        np.testing.assert_allclose(sampled.logprobs[i], expected[i, sampled.token_ids[i]], rtol=1e-5)
        top = sampled.top_ids[i, :count]
        np.testing.assert_allclose(sampled.top_logprobs[i, :count], expected[i].sort(descending=True).values[:count])
        np.testing.assert_allclose(sampled.top_logprobs[i, :count], expected[i][top])


def test_large_batches_are_cut_into_chunks_that_agree():
    vocab_size, num_rows = 40_000, 40  # 13 rows to a chunk
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(3)) * 4
    params = [
        SamplingParams(temperature=0.9, top_p=0.9),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.2),
        SamplingParams(temperature=0.8, top_k=50, min_p=0.01),
    ]
    batch = Batch(vocab_size, [(params[i % 4], [1], [3] * (i % 5)) for i in range(num_rows)])
    together = batch.sample(logits).token_ids
    alone = [batch.sample(logits, slice(i, i + 1)).token_ids[0] for i in range(num_rows)]
    assert together.tolist() == alone


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])  # flat: the nucleus is wide; peaked: it is a few tokens
def test_wide_and_narrow_nuclei_of_a_large_vocabulary_equal_the_oracle(scale):
    vocab_size = 20_000
    options = (
        {"top_p": 0.9},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_k": 40, "top_p": 0.5},
        {"top_p": 0.01, "min_p": 0.1},
    )
    params = [SamplingParams(seed=i, **option) for option in options for i in range(2)]
    logits = torch.randn(len(params), vocab_size, generator=torch.Generator().manual_seed(5)) * scale
    logits[::2] = logits[::2].round()  # ties at the threshold
    sampled = Batch(vocab_size, [(p, [1], []) for p in params]).sample(logits).token_ids
    for i, p in enumerate(params):
        assert sampled[i] == sample_reference(logits[i], p, seed=0, prompt=[1], output=[], eos_token_ids=EOS)


def chi_square_limit(degrees):
    """A bound that a right sampler exceeds once in some 100,000 seed sets (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.3 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.2, top_p=0.9, top_k=10),
    ],
)
def test_tokens_follow_the_truncated_distribution(params):
    logits = torch.linspace(-2, 2, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    weights = np.asarray(weights_reference(logits, params), np.float64)
    num_draws = 20_000
    expected = weights / weights.sum() * num_draws
    observed = np.bincount(draw(logits, params, num_draws), minlength=16)
    support = expected > 0
    assert (observed[~support] == 0).all()
    chi_square = ((observed[support] - expected[support]) ** 2 / expected[support]).sum()
    assert chi_square < chi_square_limit(max(1, support.sum() - 1))


@pytest.mark.parametrize(
    ("params", "support"),
    [
        (SamplingParams(top_k=3), {0, 1, 2}),
        (SamplingParams(top_k=1), {0}),
        (SamplingParams(top_p=0.5), {0}),  # exactly the mass asked for
        (SamplingParams(top_p=0.51), {0, 1}),
        (SamplingParams(top_p=0.75), {0, 1}),
        (SamplingParams(top_p=0.76), {0, 1, 2}),
        (SamplingParams(min_p=0.25), {0, 1, 2}),
        (SamplingParams(min_p=0.26), {0, 1}),
        (SamplingParams(min_p=1.0), {0}),
        (SamplingParams(top_k=2, top_p=0.67), {0, 1}),  # of the two, the first has 2/3
        (SamplingParams(top_k=2, top_p=0.66), {0}),
        (SamplingParams(min_p=0.5, top_k=5, top_p=0.66), {0}),
    ],
)
def test_supports_of_the_truncations(params, support):
    # Probabilities 1/2, 1/4, 1/8 ... are exact in every step of the computation.
    logits = torch.log(torch.tensor([2.0**-i for i in range(1, 12)] + [2.0**-11]))
    assert set(draw(logits, params, 2000).tolist()) == support


def test_ties_at_the_threshold_are_all_kept():
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    for params in (SamplingParams(top_k=1), SamplingParams(top_k=2), SamplingParams(top_p=0.1)):
        assert set(draw(logits, params, 500).tolist()) == {1, 2, 3}


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert draw(torch.tensor([0.0, 5.0, 5.0]), SamplingParams(temperature=0), 1).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e-5, 1e-4])
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.tensor([-1e4, 3.0, 3.5, 1e4, 9_000.0])
    assert set(draw(logits, SamplingParams(temperature=temperature), 100).tolist()) == {3}


def test_huge_temperatures_are_uniform():
    logits = torch.tensor([-50.0, 0.0, 80.0, 3.0])
    for temperature in (1e30, 1e300):
        counts = np.bincount(draw(logits, SamplingParams(temperature=temperature), 4000), minlength=4)
        assert (abs(counts - 1000) < 150).all()


@pytest.mark.parametrize("bad", [float("-inf"), float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_give_a_valid_id(bad, temperature):
    logits = torch.full((8,), bad)
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=4, min_p=0.1)
    assert 0 <= draw(logits, params, 1)[0] < 8


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.lists(st.integers(0, 9), max_size=12),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.1, 3),
)
def test_penalties_equal_a_naive_count(prompt, output, presence, frequency, repetition):
    params = SamplingParams(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    logits = torch.linspace(-3, 3, 10).unsqueeze(0)
    batch = Batch(10, [(params, prompt, output)])
    changed = logits.clone()
    step = np.asarray([len(output)])
    sample(changed, batch.table, batch.rows, step, batch.tokens, batch.prompt_lens, batch.lens)
    expected = penalised_reference(logits[0], params, prompt, output, range(10))
    torch.testing.assert_close(changed[0], expected)


def test_no_stop_before_min_tokens():
    logits = torch.zeros(10)
    logits[2], logits[5], logits[7] = 50.0, 40.0, 30.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(5, 99), max_tokens=9)
    for output, expected in (([], 7), ([7], 7), ([7, 7], 2)):
        assert Batch(10, [(params, [1], output)]).sample(logits.unsqueeze(0)).token_ids.tolist() == [expected]


def test_a_bad_word_is_not_completed_and_its_beginning_is_free():
    logits = torch.zeros(10)
    logits[4], logits[5], logits[6] = 30.0, 20.0, 10.0
    params = SamplingParams(temperature=0, bad_words=((3,), (7, 8, 4), (8, 5)))
    cases = [([], 4), ([7], 4), ([7, 8], 6), ([8], 4), ([1, 8], 4), ([7, 8, 1], 4), ([1, 7, 8], 6)]
    for output, expected in cases:
        batch = Batch(10, [(params, [7, 8], output)])  # what the prompt ends with does not count
        assert batch.sample(logits.unsqueeze(0)).token_ids.tolist() == [expected], output


def test_the_end_is_taken_where_nothing_else_is_left():
    logits = torch.linspace(0, 1, 10).unsqueeze(0)
    params = SamplingParams(temperature=0, min_tokens=5, max_tokens=9, grammar="some")
    for extra in ({}, {"ignore_eos": True}):
        both = Batch(10, [(replace(params, **extra), [1], [])], [[2, 1]])
        assert both.sample(logits).token_ids.tolist() == [1]
        alone = Batch(10, [(replace(params, **extra), [1], [])], [[2]])
        assert alone.sample(logits).token_ids.tolist() == [2]
        assert alone.sample(logits).stuck is None


def test_rules_that_contradict_each_other_stop_only_their_row():
    logits = torch.linspace(0, 1, 40).repeat(4, 1)
    plain = (SamplingParams(temperature=0), [1], [])
    never = (SamplingParams(temperature=0, allowed_token_ids=(3, 35), bad_words=((3,), (35,))), [1], [])
    other = (SamplingParams(temperature=0, allowed_token_ids=(3,), grammar="some"), [1], [])
    sampled = Batch(40, [plain, never, plain, other], [None, None, None, [4, 39]]).sample(logits)
    assert sampled.stuck.tolist() == [False, True, False, True]
    assert sampled.token_ids[[0, 2]].tolist() == [39, 39]


def test_ids_that_the_vocabulary_does_not_have_are_nobodys():
    params = SamplingParams(
        temperature=0, logit_bias=((99, 5.0),), allowed_token_ids=(3, 99), bad_words=((99,), (1, 99), (99, 3))
    )
    assert Batch(10, [(params, [1], [1])]).sample(torch.zeros(1, 10)).token_ids.tolist() == [3]


def test_a_bias_comes_before_the_penalties():
    params = SamplingParams(temperature=0, logit_bias=((1, 4.0), (3, -1.0)), repetition_penalty=2.0)
    batch, changed = Batch(5, [(params, [1, 3], [])]), torch.ones(1, 5)
    zeros = np.zeros(1, np.int64)
    sample(changed, batch.table, batch.rows, zeros, batch.tokens, batch.prompt_lens, batch.lens)
    assert changed[0].tolist() == [1.0, 2.5, 1.0, 0.0, 1.0]  # (1 + 4) / 2


def test_finish_reasons():
    table = SamplingTable(4, 100)
    table.set(0, SamplingParams(max_tokens=3, stop_token_ids=(7, 8)), 0, EOS)
    table.set(1, SamplingParams(max_tokens=3, ignore_eos=True), 0, EOS)
    table.set(3, SamplingParams(max_tokens=9, min_tokens=4), 0, EOS)
    cases = [  # row, token, tokens generated, expected
        (0, 5, 1, GO_ON),
        (0, 7, 1, FINISH_STOP),
        (0, 2, 1, FINISH_STOP),
        (0, 8, 3, FINISH_STOP),
        (0, 5, 3, FINISH_LENGTH),
        (1, 2, 2, GO_ON),
        (1, 2, 3, FINISH_LENGTH),
        (3, 2, 3, GO_ON),
        (3, 2, 4, FINISH_STOP),
    ]
    rows, tokens, generated, expected = (np.asarray(column) for column in zip(*cases, strict=True))
    assert finish_reasons(table, rows, tokens, generated).tolist() == expected.tolist()


def test_rows_are_reused_without_traces():
    table = SamplingTable(1, 50)
    table.set(0, SamplingParams(stop_token_ids=tuple(range(10)), min_tokens=3, logprobs=5, min_p=0.5), 7, EOS)
    table.set(0, SamplingParams(allowed_token_ids=(3,), logit_bias=((1, 1.0),)), 7, EOS)
    table.set(0, SamplingParams(temperature=0), 7, EOS)
    fresh = SamplingTable(1, 50)
    fresh.set(0, SamplingParams(temperature=0), 7, EOS)
    assert table.needs[0] == fresh.needs[0] == 0
    assert not table.rules
    assert not table.bias
    assert table.num_logprobs[0] == -1
    assert table.stop_ids[0].tolist() == [2] + [-1] * 9


def test_an_empty_batch():
    batch = Batch(8, [])
    assert batch.sample(torch.empty(0, 8)).token_ids.shape == (0,)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniforms_equal_the_oracle(seed, step):
    assert uniforms(np.asarray([seed], np.uint64), np.asarray([step]))[0] == uniform_reference(seed, step)


def test_uniforms_are_uniform_and_uncorrelated():
    seeds, steps = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(500))
    values = uniforms(seeds.ravel(), steps.ravel())
    counts = np.bincount((values * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < chi_square_limit(99)
    grid = values.reshape(500, 200)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.015


def test_a_sequence_draws_the_same_tokens_after_a_restart():
    logits = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(seed=1234, temperature=1.0)
    first = [int(Batch(64, [(params, [1], [3] * i)]).sample(logits[i : i + 1]).token_ids[0]) for i in range(30)]
    others = [(SamplingParams(seed=i), [1], []) for i in range(5)]
    for i in (0, 7, 29):
        batch = Batch(64, [*others, (params, [1], [3] * i)])
        crowd = torch.cat([torch.randn(5, 64), logits[i : i + 1]])
        assert batch.sample(crowd).token_ids[-1] == first[i]
    assert len(set(first)) > 10


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_known_tokens_are_scored_slice_by_slice(monkeypatch, rows_at_a_time):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 3
    token_ids = np.arange(7, dtype=np.int64)
    asked = []

    def part(where):
        asked.append(where.stop - where.start)
        return logits[where].clone()

    monkeypatch.setattr(sampler, "_SCORE_CHUNK", 11 * rows_at_a_time + 5)
    scored = score(part, token_ids, 4, 11)
    expected = torch.log_softmax(logits, dim=-1)
    assert sum(asked) == 7
    assert max(asked) == min(7, rows_at_a_time)
    np.testing.assert_allclose(scored.logprobs, expected[range(7), range(7)].numpy(), rtol=1e-6)
    np.testing.assert_allclose(scored.top_logprobs, expected.topk(4).values.numpy(), rtol=1e-6)
    assert scored.top_ids.tolist() == expected.topk(4).indices.tolist()
    assert scored.ranks.tolist() == [1 + int((row > row[i]).sum()) for i, row in enumerate(expected)]


def test_no_more_best_tokens_than_there_are():
    scored = score(lambda where: torch.zeros(2, 3), np.zeros(2, np.int64), 20, 3)
    assert scored.top_ids.shape == (2, 3)
