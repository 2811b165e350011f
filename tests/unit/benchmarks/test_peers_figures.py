"""What `python -m benchmarks.peers` makes of its measurements."""

import asyncio
import json
import math
import mmap
import os

import numpy as np
import pytest

from amoe.errors import AmoeError
from amoe.models.config import load_model_config
from benchmarks.make_checkpoint import SIZES
from benchmarks.peers import memory
from benchmarks.peers.__main__ import main
from benchmarks.peers.http_client import Exchange
from benchmarks.peers.report import Results, markdown
from benchmarks.peers.results import ceiling, middle, ratio
from benchmarks.peers.roofline import Machine, distinct_experts, step_cost, uniform_shares
from benchmarks.peers.timing import Point, Sample, Timing, timing_of


@pytest.fixture
def config(tmp_path):
    """Of the model that the benchmark makes."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES["full"].as_config()))
    return load_model_config(str(tmp_path))


class TestTiming:
    def test_decoding_is_while_all_sequences_do_nothing_else(self):
        point = Point(batch=2, input_len=10, output_len=4)
        # The second sequence starts late, when the first has two tokens, and is alone at the end.
        timing = timing_of(point, 1.0, [[2.0, 3.0, 5.0, 6.0], [4.0, 5.0, 6.0, 7.0]])
        assert timing == Timing(prefill_tokens=20, prefill_s=3.0, decode_tokens=4, decode_s=2.0, total_s=6.0)
        assert (timing.prefill_rate, timing.decode_rate) == (pytest.approx(20 / 3), 2.0)

    def test_sequences_that_never_decode_together_have_no_rate(self):
        timing = timing_of(Point(2, 10, 2), 1.0, [[2.0, 3.0], [4.0, 5.0]])
        assert math.isnan(timing.decode_rate)
        assert timing.total_s == 4.0

    def test_in_step_all_tokens_but_the_first_are_decoded(self):
        times = [1.0 + 0.1 * step for step in range(64)]
        timing = timing_of(Point(8, 64, 64), 0.5, [times] * 8)
        assert timing.decode_tokens == 8 * 63
        assert timing.decode_s == pytest.approx(6.3)

    def test_an_answer_of_another_length_is_no_measurement(self):
        with pytest.raises(AmoeError, match=r"2 sequences of \[2, 3\] tokens"):
            timing_of(Point(2, 10, 3), 0.0, [[1.0, 2.0, 3.0], [1.0, 2.0]])
        with pytest.raises(AmoeError, match="1 sequences"):
            timing_of(Point(2, 10, 1), 0.0, [[1.0]])

    def test_one_token_each_is_prefill_only(self):
        timing = timing_of(Point(1, 512, 1), 0.0, [[0.5]])
        assert timing.prefill_rate == 1024
        assert math.isnan(timing.decode_rate)

    def test_end_to_end_includes_the_prefill(self):
        assert _sample("a", 0, decode_s=3.0).end_to_end == pytest.approx(8 * 64 / 4.0)


def _sample(system, number, *, decode_s, point=Point(8, 64, 64), bandwidth=50e9):  # noqa: B008
    timing = Timing(prefill_tokens=512, prefill_s=1.0, decode_tokens=8 * 63, decode_s=decode_s, total_s=1.0 + decode_s)
    return Sample(system=system, point=point, round=number, timing=timing, memory_bandwidth=bandwidth)


class TestResults:
    def test_a_ratio_is_taken_within_a_round(self):
        # The machine is half as fast in the second round, for both: the ratio does not feel it.
        samples = [_sample("a", 0, decode_s=1.0), _sample("b", 0, decode_s=2.0)]
        samples += [_sample("a", 1, decode_s=2.0), _sample("b", 1, decode_s=4.0)]
        found = ratio(samples, ("a", "b"), Point(8, 64, 64), lambda s: s.timing.decode_rate)
        assert (found.median, found.least, found.greatest, found.count) == (2.0, 2.0, 2.0, 2)

    def test_a_round_that_one_of_them_has_missed_does_not_count(self):
        samples = [_sample("a", 0, decode_s=1.0), _sample("a", 1, decode_s=1.0), _sample("b", 1, decode_s=3.0)]
        assert ratio(samples, ("a", "b"), Point(8, 64, 64), lambda s: s.timing.decode_s).count == 1

    def test_the_median_is_over_all_runs(self):
        samples = [_sample("a", number, decode_s=seconds) for number, seconds in enumerate((1.0, 5.0, 2.0))]
        assert middle(samples, "a", Point(8, 64, 64), lambda s: s.timing.decode_s).median == 2.0
        assert middle(samples, "b", Point(8, 64, 64), lambda s: s.timing.decode_s).count == 0


class TestRoofline:
    def test_experts_that_are_hit(self, config):
        even = uniform_shares(config)
        assert distinct_experts(even, 4, 1) == pytest.approx(4.0)
        rng = np.random.default_rng(0)
        drawn = [len({*np.argsort(rng.random((8, 32)), axis=1)[:, :4].ravel()}) for _ in range(4000)]
        assert distinct_experts(even, 4, 8) == pytest.approx(np.mean(drawn), rel=0.01)
        hot = [[0.25] * 4 + [0.0] * 28]  # all tokens to the same four
        assert distinct_experts(hot, 4, 1000) == 4.0

    def test_bytes_are_those_of_the_checkpoint_when_all_experts_are_hit(self, config):
        cost = step_cost(config, num_tokens=4096, context=0, shares=uniform_shares(config), num_logits=1)
        shape = SIZES["full"]
        embedding = shape.vocab_size * shape.hidden_size
        assert cost.weight_bytes == pytest.approx(2 * (1.341e9 - embedding), rel=0.001)

    def test_a_small_batch_is_bound_by_memory_and_a_prompt_by_arithmetic(self, config):
        machine = Machine(bandwidth=86e9, peak=1.0e12)
        decode = [ceiling(config, machine, Point(n, 64, 64), uniform_shares(config)).decode for n in (1, 8, 32)]
        # As computed by hand from 4, 21 and 31.6 experts of 4.7 MB in each of 16 layers, and 0.2 GB besides.
        assert decode == pytest.approx([169, 379, 994], rel=0.05)
        prefill = ceiling(config, machine, Point(64, 64, 64), uniform_shares(config)).prefill
        doubled = Machine(bandwidth=86e9, peak=2.0e12)
        assert ceiling(config, doubled, Point(64, 64, 64), uniform_shares(config)).prefill > 1.8 * prefill
        faster = Machine(bandwidth=172e9, peak=1.0e12)
        assert ceiling(config, faster, Point(1, 64, 64), uniform_shares(config)).decode == pytest.approx(2 * decode[0])


class TestReport:
    def test_every_system_has_its_rows_and_the_missing_are_told(self, config):
        results = Results(
            config=config,
            decode_points=[Point(8, 64, 64)],
            prefill_points=[],
            machine=Machine(bandwidth=50e9, peak=1e12),
            best_bandwidth=80e9,
            shares=uniform_shares(config),
            offline=[_sample("amoe", 0, decode_s=1.0), _sample("vLLM", 0, decode_s=2.0)],
            missing={"llama.cpp": "build it"},
        )
        text = markdown(results)
        assert "| amoe | 504 | 512 |" in text
        assert "| vLLM | 252 | 512 |" in text
        assert "| amoe / vLLM | 2.00 | 1.00 |" in text
        assert "llama.cpp was not found: build it." in text
        assert "nan" not in text


_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
_USAGE = b'3f\r\ndata: {"usage": {"prompt_tokens": 64, "completion_tokens": 2}}\n\n\r\n'
_USAGE += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class _Sink(asyncio.WriteTransport):
    """Where a request goes."""

    def __init__(self):
        super().__init__()
        self.written = b""

    def write(self, data):
        self.written += data


class TestHttpClient:
    async def test_the_first_event_ends_the_wait_whatever_pieces_it_comes_in(self):
        answer, sink = Exchange(b"GET"), _Sink()
        answer.connection_made(sink)
        assert sink.written == b"GET"
        answer.data_received(_HEAD + b"3a\r\nda")
        assert not answer.first_at
        answer.data_received(b'ta: {"choices": [{"text": "a"}]}\n\n\r\n')
        first = answer.first_at
        assert first >= answer.sent_at > 0
        answer.data_received(_USAGE)
        answer.connection_lost(None)
        await answer.done
        assert answer.first_at == first <= answer.last_at
        assert answer.num_tokens() == 2

    @pytest.mark.parametrize(
        "stream",
        [
            b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}",
            _HEAD + b'data: {"choices": [{"text": "a"}]}\n\n',  # broken off
            _HEAD + b"data: [DONE]\n\n",  # says nothing of tokens
        ],
    )
    async def test_an_answer_that_is_no_complete_stream_is_told(self, stream):
        answer = Exchange(b"")
        answer.connection_made(_Sink())
        answer.data_received(stream)
        with pytest.raises(AmoeError, match="the server answered"):
            answer.num_tokens()


class TestMemory:
    def test_of_this_process(self):
        found = memory.usage(os.getpid())
        assert 0 < found.pss <= found.rss
        with mmap.mmap(-1, 16 << 20) as held:  # not from a heap, which may have it lying about from other tests
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            assert memory.usage(os.getpid()).pss - found.pss > 0.9 * len(held)

    def test_a_process_that_is_gone_is_told(self):
        with pytest.raises(AmoeError, match="nothing is known"):
            memory.usage(2**22 + 1)  # more than Linux gives

    def test_reads_are_counted(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(bytes(1 << 20))
        before = memory.usage(os.getpid()).read_calls
        path.read_bytes()
        assert memory.usage(os.getpid()).read_calls - before >= 1 << 20
        assert memory.forget_pages([path]) == 1 << 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--systems", "amoe,ollama"], "no system ollama"),
        (["--batches", "1,x"], "no list of numbers"),
        (["--batches", "0"], "no list of numbers"),
        (["--parts", "online"], "must be of offline, served, memory"),
        (["--rounds", "0"], "must be at least 1"),
        (["--model", "/nonexistent"], "there is no config.json"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--cache", str(tmp_path), "--out", str(tmp_path), *flags])
    assert message in f"{refusal.value} {capsys.readouterr().err}"
