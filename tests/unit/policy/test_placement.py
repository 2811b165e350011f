"""Shares of experts: every expert has one owner, shares are contiguous and differ by at most one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import PlacementConfig
from amoe.errors import ConfigError
from amoe.policy.placement import experts_of, place_experts, replicate_experts


@given(st.integers(1, 6), st.integers(1, 256), st.data())
def test_shares_are_contiguous_and_as_equal_as_can_be(num_layers, num_experts, data):
    num_owners = data.draw(st.integers(1, num_experts))
    owners = place_experts(num_layers, num_experts, num_owners)
    assert owners.shape == (num_layers, num_experts, 1)
    for layer in owners[..., 0].tolist():
        assert layer == owners[0, :, 0].tolist()
        assert layer == sorted(layer)
        sizes = Counter(layer)
        assert sorted(sizes) == list(range(num_owners))
        assert max(sizes.values()) - min(sizes.values()) <= 1


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 64), st.data())
def test_every_expert_of_a_sparse_layer_lives_at_one_worker(sparse_layers, num_experts, data):
    num_owners = data.draw(st.integers(1, num_experts))
    owners = place_experts(len(sparse_layers), num_experts, num_owners)
    shares = [experts_of(owners, owner, sparse_layers) for owner in range(num_owners)]
    for layer, sparse in enumerate(sparse_layers):
        held = [expert for share in shares for expert in share.get(layer, ())]
        assert sorted(held) == (list(range(num_experts)) if sparse else [])
        for share in shares:
            assert (layer in share) == sparse
            assert list(share.get(layer, ())) == sorted(share.get(layer, ()))


def test_more_owners_than_experts_is_a_configuration_error():
    with pytest.raises(ConfigError, match="5 workers cannot share 4 experts"):
        place_experts(2, 4, 5)


@pytest.mark.parametrize(
    ("placement", "attention", "experts"),
    [
        (PlacementConfig(), (0,), (0,)),
        (PlacementConfig(colocated=1), (0,), (0,)),
        (PlacementConfig(colocated=3), (0, 1, 2), (0, 1, 2)),
        (PlacementConfig(attention_workers=1, expert_workers=1), (0,), (1,)),
        (PlacementConfig(attention_workers=3, expert_workers=2), (0, 1, 2), (3, 4)),
    ],
)
def test_ranks_of_a_placement(placement, attention, experts):
    assert placement.attention_ranks == attention
    assert placement.expert_ranks == experts
    assert placement.num_workers == len({*attention, *experts})


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_workers": 0},
        {"expert_workers": -1},
        {"colocated": -1},
        {"colocated": 2, "expert_workers": 1},
        {"colocated": 2, "attention_workers": 2},
        {"attention_workers": 2},
    ],
)
def test_placements_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        PlacementConfig(**wrong)


@given(st.integers(1, 6), st.integers(0, 9), st.data())
def test_replicas_live_beside_the_primaries(num_owners, spare, data):
    num_experts = data.draw(st.integers(num_owners, 32))
    load = np.random.default_rng(data.draw(st.integers(0, 99))).lognormal(0, 1.5, (2, num_experts))
    slots = -(-num_experts // num_owners) + spare
    owners = replicate_experts(load, num_owners, slots)
    plain = place_experts(2, num_experts, num_owners)
    assert sorted(owners[..., 0].ravel()) == sorted(plain.ravel())
    held = [experts_of(owners, owner, [True, False]) for owner in range(num_owners)]
    assert all(len(share[0]) <= min(slots, num_experts) for share in held)
    assert sum(len(share[0]) for share in held) == (owners[0] >= 0).sum()
    for places in owners.reshape(-1, owners.shape[-1]).tolist():
        there = [owner for owner in places if owner >= 0]
        assert len(set(there)) == len(there)
        assert places[: len(there)] == there
