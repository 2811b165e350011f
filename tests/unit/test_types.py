"""Sampling parameters refuse what cannot work, and name it."""

import pytest

from amoe.errors import RequestError
from amoe.types import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", tuple((i, 0.0) for i in range(1025))),
        ("allowed_token_ids", (3, -1)),
        ("allowed_token_ids", (3, 3)),
        ("allowed_token_ids", (2**31,)),
        ("bad_words", ((),)),
        ("bad_words", ((1, -2),)),
        ("bad_words", ((1,),) * 129),
        ("priority", 2**31),
        ("priority", -(2**31) - 1),
        ("cache_salt", "s" * 257),
    ],
)
def test_wrong_values_are_named(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", tuple((i, -100.0) for i in range(1024))),
        ("allowed_token_ids", (2**31 - 1, 0)),
        ("bad_words", ((1, 1), (1, 1)) * 64),
        ("priority", -(2**31)),
        ("cache_salt", "s" * 256),
    ],
)
def test_the_last_right_values_are_taken(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value
