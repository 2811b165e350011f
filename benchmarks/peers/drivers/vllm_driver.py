"""vLLM's `LLM` class, engine core in the same process: `python -m benchmarks.peers.drivers.vllm_driver MODEL`."""

from __future__ import annotations

import argparse
import itertools
import time

from benchmarks.peers.drivers.protocol import Arrivals, Line


def main() -> None:
    """Load the model, then answer the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--max-num-batched-tokens", type=int, required=True)
    args = parser.parse_args()
    line = Line()

    import vllm  # type: ignore[import-not-found]
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    engine = LLM(
        model=args.model,
        dtype="bfloat16",
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=False,
    ).llm_engine
    numbers = itertools.count()

    def generate(prompts: list[list[int]], output_len: int) -> Arrivals:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        arrivals: dict[str, list[float]] = {}
        for prompt in prompts:
            name = str(next(numbers))
            arrivals[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.monotonic()
            for output in outputs:
                arrivals[output.request_id].extend(now for _ in output.outputs[0].token_ids)
        return list(arrivals.values())

    line.serve(generate, version=vllm.__version__, platform=type(current_platform).__name__)


if __name__ == "__main__":
    main()
