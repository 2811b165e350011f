"""Workers that compute nothing, for tests of the front: they repeat the prompt, or say what a script says.

`byte_tokenizer` comes with them: a byte-level BPE tokenizer with few merges, so that characters often span tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from amoe.config import EngineConfig, FailureConfig, PlacementConfig, SchedulerConfig, SchedulingPolicy
from amoe.engine.async_engine import AsyncEngine, ModelInfo
from amoe.engine.messages import AbortRequests, AddRequest, Heartbeat, Outputs, ToServer, ToWorker
from amoe.engine.tokenizer import Tokenizer
from amoe.stats import WorkerStats
from amoe.types import CapacityUsage, SequenceOutput, TokenLogprobs

EOS = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}{{ m.role[0] }}:{{ m.content }}|{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}a:{%- endif -%}"
)
SAMPLE = "the quick brown fox jumps over the lazy dog. Grüße, 你好 world! 🙂🙃 " * 4


def make_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a small byte-level tokenizer into `directory`. Token 0 ends a text."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": EOS} | ({} if chat_template is None else {"chat_template": chat_template})
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": 0}), encoding="utf-8")
    return directory


Script = Callable[[AddRequest], Sequence[int]]


def repeat_prompt(request: AddRequest) -> list[int]:
    """The prompt again and again, up to max_tokens."""
    times = request.params.max_tokens // len(request.prompt_token_ids) + 1
    return (request.prompt_token_ids * times)[: request.params.max_tokens]


class FakeWorker:
    """One worker and its control channel in one. Each open request gets one token per turn of the event loop.

    Attributes:
        script: answer of a request. Token 0 (end of text) ends it, unless it says `ignore_eos`.
        runs: cleared, nobody gets a token.
        received: all messages, in order.
        capacity: what every output says that capacity has done; None: it is off.
        open: requests that have not ended here: what would hold slots and KV cache.
    """

    def __init__(self, rank: int = 0, role: str = "colocated") -> None:
        self.stats = WorkerStats(rank=rank, role=role)
        self.script: Script = repeat_prompt
        self.capacity: CapacityUsage | None = None
        self.runs = asyncio.Event()
        self.runs.set()
        self.received: list[ToWorker] = []
        self.open: dict[int, asyncio.Task[None]] = {}
        self._outbox: asyncio.Queue[ToServer | None] = asyncio.Queue()

    def send(self, message: ToWorker) -> None:
        """What the server has to say to this worker."""
        self.received.append(message)
        if isinstance(message, AddRequest):
            self.open[message.request_id] = asyncio.create_task(self._serve(message))
        elif isinstance(message, AbortRequests):
            for request_id in message.request_ids:
                if (task := self.open.pop(request_id, None)) is not None:
                    task.cancel()
                    self.say(Outputs([SequenceOutput(request_id, [], finish_reason="abort")]))

    def say(self, message: ToServer) -> None:
        """Send the server a message."""
        self._outbox.put_nowait(message)

    def beat(self) -> None:
        """Send a heartbeat."""
        self.say(Heartbeat(self.stats))

    def die(self) -> None:
        """Close the channel."""
        for task in self.open.values():
            task.cancel()
        self._outbox.put_nowait(None)

    async def has_open(self, count: int) -> None:
        """Returns once so many requests are open here."""
        while len(self.open) != count:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
            await asyncio.sleep(0)

    async def __aiter__(self) -> AsyncIterator[ToServer]:
        while (message := await self._outbox.get()) is not None:
            yield message

    @property
    def aborted(self) -> list[int]:
        """Ids that the server has aborted."""
        return [i for message in self.received if isinstance(message, AbortRequests) for i in message.request_ids]

    @property
    def requests(self) -> list[AddRequest]:
        """Requests that the server has sent."""
        return [message for message in self.received if isinstance(message, AddRequest)]

    def _say_prompt_logprobs(self, request: AddRequest) -> None:
        """In two parts, as of a prompt of two chunks. A request that wants nothing else ends here."""
        k = request.params.prompt_logprobs
        if k is None or request.num_generated:
            return
        tokens = request.prompt_token_ids[1:]
        logprobs = [TokenLogprobs(-2.5, [token, 5, 6][:k], [-2.5, -3.5, -4.5][:k]) for token in tokens]
        half = len(logprobs) // 2
        self.say(Outputs([SequenceOutput(request.request_id, [], prompt_logprobs=logprobs[:half])]))
        self.say(Outputs([SequenceOutput(request.request_id, [], prompt_logprobs=logprobs[half:])]))
        if request.params.max_tokens == 0:
            del self.open[request.request_id]
            self.say(Outputs([SequenceOutput(request.request_id, [], finish_reason="length")]))

    async def _serve(self, request: AddRequest) -> None:
        num_prompt = len(request.prompt_token_ids) - request.num_generated
        first = msgspec.structs.replace(request, prompt_token_ids=request.prompt_token_ids[:num_prompt])
        tokens = list(self.script(first))[: request.params.max_tokens]
        assert request.prompt_token_ids[num_prompt:] == tokens[: request.num_generated], "others than it has been told"
        self._say_prompt_logprobs(request)
        num_routed = request.num_routed
        for index in range(request.num_generated, len(tokens)):
            token = tokens[index]
            await asyncio.sleep(0)
            await self.runs.wait()
            output = SequenceOutput(request.request_id, [token], capacity=self.capacity)
            if request.params.return_routed_experts:  # of every token before this one: its place
                output.routed_experts = np.arange(num_routed, num_prompt + index, dtype="<i2").tobytes()
                num_routed = num_prompt + index
            k = request.params.logprobs
            if k is not None:
                output.logprobs = [TokenLogprobs(-0.5, [token, 5, 6][:k], [-0.5, -1.5, float("-inf")][:k])]
            stops = token in request.params.stop_token_ids or (token == 0 and not request.params.ignore_eos)
            if stops:
                output.finish_reason, output.stop_token = "stop", token
            elif index == len(tokens) - 1:
                output.finish_reason = "length"
            if output.finish_reason is not None:
                del self.open[request.request_id]
            self.say(Outputs([output]))
            if output.finish_reason is not None:
                return


def make_engine(
    directory: Path,
    *,
    num_workers: int = 1,
    max_model_len: int = 64,
    max_num_seqs: int = 4,
    max_waiting: int = 2,
    max_waiting_tokens: int | None = None,
    scheduling_policy: SchedulingPolicy = "fcfs",
    heartbeat_timeout_s: float = 1e6,  # they send no sign of life unless told
    stall_timeout_s: float = 1e5,
    supervised: bool = False,
    max_crashes: int = 5,
) -> tuple[AsyncEngine, list[FakeWorker]]:
    """A running engine over fake workers, with the tokenizer in `directory`. To be called within an event loop."""
    workers = [FakeWorker(rank) for rank in range(num_workers)]
    config = EngineConfig(
        model=str(directory),
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        placement=PlacementConfig(colocated=num_workers),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, scheduling_policy=scheduling_policy),
        failure=FailureConfig(max_crashes=max_crashes),
    )
    model = ModelInfo(name="fake", max_model_len=max_model_len, vocab_size=300)
    timeouts = {"heartbeat_timeout_s": heartbeat_timeout_s, "stall_timeout_s": stall_timeout_s}
    engine = AsyncEngine(workers, config, Tokenizer(directory), model, **timeouts, supervised=supervised)
    engine.run()
    return engine, workers
