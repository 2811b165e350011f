"""Choosing replicas by shares: against a slow oracle, and what must hold of any choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.core.replica_shares import ReplicaShares
from amoe.policy.placement import replicate_experts
from amoe.policy.replicas import (
    choose_replicas,
    cumulative_shares,
    even_shares,
    present_first,
    primary_shares,
    split_counts,
)


@st.composite
def layers(draw):
    """Owners [E, R], shares [E, R] of them, some zero, and a generator for the rest."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_owners = draw(st.integers(1, 6))
    num_experts = draw(st.integers(num_owners, 24))
    slots = -(-num_experts // num_owners) + draw(st.integers(0, 6))
    owners = replicate_experts(rng.lognormal(0, 1.5, (1, num_experts)), num_owners, slots)[0]
    shares = np.where(owners >= 0, rng.choice([0.0, 1.0, 1.0, 0.01, rng.random()], owners.shape), 0.0)
    shares[..., 0] += shares.sum(axis=-1) == 0
    return owners, shares / shares.sum(axis=-1, keepdims=True), rng


def draw_tokens(rng, num_tokens, num_experts):
    top_k = min(4, num_experts)
    scores = rng.random((num_tokens, num_experts)) + np.linspace(0, 1, num_experts)
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.int64)


def choose_slowly(topk_ids, owners, shares, phase):
    """Pair by pair: the r-th pair of an expert belongs to the replica in whose part of all its pairs r lies."""
    counts = np.bincount(topk_ids.ravel(), minlength=len(owners))
    parts = split_counts(counts, shares, phase)
    queues = [
        [owner for owner, part in zip(*row, strict=True) for _ in range(part)]
        for row in zip(owners, parts, strict=True)
    ]
    return np.array([[queues[expert].pop(0) for expert in token] for token in topk_ids.tolist()])


@given(layers(), st.integers(1, 70))
def test_equals_the_oracle(layer, num_tokens):
    owners, shares, rng = layer
    topk_ids = draw_tokens(rng, num_tokens, len(owners))
    phase = rng.random(len(owners))
    is_split = (shares > 0).sum(axis=1) > 1
    chosen = choose_replicas(topk_ids, owners, cumulative_shares(shares, owners), is_split, phase)
    assert chosen.shape == topk_ids.shape
    assert chosen.dtype == np.int16
    assert chosen.tolist() == choose_slowly(topk_ids, owners, shares, phase).tolist()


@given(layers(), st.integers(0, 5))
def test_pairs_go_to_replicas_that_have_a_share(layer, rank):
    owners, shares, rng = layer
    replicas = ReplicaShares(owners[None], rank, int(owners.max()) + 1)
    replicas.set(shares[None])
    for num_tokens in (0, 1, 3, 40):
        topk_ids = draw_tokens(rng, num_tokens, len(owners))
        chosen = replicas.choose(0, topk_ids)
        allowed = (owners[topk_ids] == chosen[..., None]) & (shares[topk_ids] > 0)
        assert (allowed.sum(axis=-1) == 1).all()


@given(layers(), st.integers(0, 5), st.sampled_from([1, 7]))
def test_the_mean_follows_the_shares(layer, rank, num_tokens):
    """Batches of one token each are as fair as large ones: nothing is lost in rounding."""
    owners, shares, _ = layer
    replicas = ReplicaShares(owners[None], rank, int(owners.max()) + 1)
    replicas.set(shares[None])
    topk_ids = np.tile(np.arange(len(owners)), (num_tokens, 1))
    counts = np.zeros(owners.shape)
    for _ in range(100):
        counts += (replicas.choose(0, topk_ids)[..., None] == owners[topk_ids]).sum(axis=0)
    assert np.abs(counts / (100 * num_tokens) - shares).max() < 0.05


def test_one_awake_replica_is_a_lookup():
    owners = np.array([[[0, 1], [1, 0], [1, -1]]], np.int16)
    replicas = ReplicaShares(owners, 0, 4)
    topk_ids = np.array([[0, 1], [2, 0]])
    assert replicas.choose(0, topk_ids).tolist() == [[0, 1], [1, 0]]
    replicas.set(np.array([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]]))
    assert replicas.choose(0, topk_ids).tolist() == [[1, 1], [1, 1]]
    assert replicas._tables[0] is not None


@pytest.mark.parametrize(
    "shares", [[[0.5, 0.5]], [[0.5, 0.4], [1, 0]], [[1.5, -0.5], [1, 0]], [[1, 0], [0.5, 0.5]], [[np.nan, 1], [1, 0]]]
)
def test_wrong_shares_are_refused(shares):
    owners = np.array([[0, 1], [1, -1]], np.int16)
    with pytest.raises(ValueError, match="share"):
        cumulative_shares(np.array(shares, np.float64), owners)


def test_shares_begin_at_the_primaries():
    owners = replicate_experts(np.ones((2, 8)), 4, 3)
    assert (np.bincount(owners[0, :, 0]) == 2).all()
    assert (ReplicaShares(owners, 0, 4).shares == primary_shares(owners)).all()


def test_only_those_that_are_there_count():
    owners = np.array([[2, 0, 1], [1, -1, -1], [0, 1, -1]], np.int16)
    order, here = present_first(owners, np.array([True, False, True]))
    assert here.tolist() == [[2, 0, -1], [-1, -1, -1], [0, -1, -1]]
    assert np.take_along_axis(owners, order, axis=-1).tolist() == [[2, 0, 1], [1, -1, -1], [0, 1, -1]]
    order, here = present_first(owners, np.array([False, True, False]))
    assert here.tolist() == [[1, -1, -1], [1, -1, -1], [1, -1, -1]]
    assert order[0].tolist() == [2, 0, 1]
    assert even_shares(present_first(owners, np.zeros(3, np.bool_))[1]).tolist() == [[0.0] * 3] * 3
