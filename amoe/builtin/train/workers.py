"""The training loop: single-threaded workers take micro-batches from a shared counter, and sum gradients once a step.

Two processes of one thread each beat one process of two threads on a shared machine: they meet once a step instead of
at every operation, and the one whose core is busy simply takes fewer micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amoe.builtin.train import optimizer
from amoe.builtin.train.batches import Batches
from amoe.builtin.train.config import ModelConfig, TrainConfig
from amoe.builtin.train.network import Network, Routing
from amoe.builtin.train.parameters import num_parameters, owned_names, parameter_shapes, views

BARRIER_TIMEOUT_S = 900.0
LOAD_DECAY = 0.8  # of the running expert load, per step
REPORT_EVERY_S = 15.0
WARMUP_STEPS = 100  # at least


class Mode(IntEnum):
    """What the workers do next."""

    TRAIN = 0
    EVALUATE = 1
    STOP = 2


def _shared(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).share_memory_()


@dataclass
class Shared:
    """Everything that the workers share, in shared memory. P parameters, W workers, L layers, E experts."""

    master: Tensor  # [P] fp32
    first: Tensor  # [P] fp32, momentum
    second: Tensor  # [P] fp32, second moment
    working: Tensor  # [P] bf16, what the network reads
    grads: Tensor  # [W, P] fp32
    load: Tensor  # [L, E] running share of pairs
    counts: Tensor  # [W, L, E] pairs of this step
    sums: Tensor  # [W, 2] float64: summed loss (nats), tokens
    control: Tensor  # [6] float64: mode, elapsed_s, step, micro-batches taken in all, long phase's first, held-out loss
    counter: Tensor  # [1] int64: next micro-batch of this round
    stop: Tensor  # [1] int64: not 0 where the run was asked to end early

    @classmethod
    def create(cls, model: ModelConfig, num_workers: int) -> Shared:
        """Zeroed buffers."""
        size, layers, experts = num_parameters(parameter_shapes(model)), model.num_hidden_layers, model.num_experts
        shared = cls(
            master=_shared(size),
            first=_shared(size),
            second=_shared(size),
            working=_shared(size, dtype=torch.bfloat16),
            grads=_shared(num_workers, size),
            load=_shared(layers, experts),
            counts=_shared(num_workers, layers, experts),
            sums=_shared(num_workers, 2, dtype=torch.float64),
            control=_shared(6, dtype=torch.float64),
            counter=_shared(1, dtype=torch.int64),
            stop=_shared(1, dtype=torch.int64),
        )
        shared.load.fill_(1.0 / experts)
        return shared


def learning_rate(config: TrainConfig, elapsed_s: float, step: int) -> float:
    """Share of the peak rate: warm-up, plateau, linear fall to 0 at the end of the budget (or of the steps)."""
    done = max(elapsed_s / config.budget_s, step / config.max_steps)
    fall = (1.0 - done) / (1.0 - config.decay_from)
    return max(0.0, min(1.0, done / config.warmup, step / WARMUP_STEPS, fall))


def balance_coefficient(config: TrainConfig, elapsed_s: float) -> float:
    """Weight of the load-balancing loss of one layer: high while experts are still alike, then low."""
    share = min(1.0, elapsed_s / config.budget_s / config.aux_until)
    return config.aux_start + share * (config.aux_end - config.aux_start)


@dataclass
class Worker:
    """One training process. Rank 0 also decides what all do next."""

    rank: int
    model: ModelConfig
    config: TrainConfig
    shared: Shared
    barrier: Barrier
    lock: Lock
    tokens_path: Path
    _reported: tuple[float, float] = field(default=(0.0, 0.0))  # time, micro-batches at the last report
    _evaluated_s: float = -1e9

    def __post_init__(self) -> None:
        shapes = parameter_shapes(self.model)
        self.network = Network(self.model)
        self.batches = Batches(self.tokens_path, self.config.seed)
        self.params = {name: view.requires_grad_() for name, view in views(self.shared.working, shapes).items()}
        self.grad_views = [views(grad, shapes) for grad in self.shared.grads]
        state = [views(buffer, shapes) for buffer in (self.shared.master, self.shared.first, self.shared.second)]
        master, first, second = state
        self.slots = {
            name: optimizer.Slot(master[name], first[name], second[name], self.params[name].detach()) for name in shapes
        }
        self.owned = list(owned_names(shapes, self.rank, self.config.num_workers))
        self.started = time.monotonic() - float(self.shared.control[1])

    def run(self) -> None:
        """Until rank 0 says stop."""
        while True:
            if self.rank == 0:
                self._decide()
            self._meet()
            mode = Mode(int(self.shared.control[0]))
            if mode == Mode.STOP:
                return
            if mode == Mode.EVALUATE:
                self._evaluate()
            else:
                self._train_step()

    def _meet(self) -> None:
        self.barrier.wait(BARRIER_TIMEOUT_S)

    def _decide(self) -> None:
        """Rank 0, while the others wait: what comes next, and what to say about what was."""
        control, config = self.shared.control, self.config
        elapsed = time.monotonic() - self.started
        self._report(elapsed)
        self.shared.sums.zero_()
        self.shared.counter.zero_()
        counts = self.shared.counts.sum(0)
        if counts.sum() > 0:
            self.shared.load.lerp_(counts / counts.sum(-1, keepdim=True), 1 - LOAD_DECAY)
            self.shared.counts.zero_()
        control[1] = elapsed
        if self.shared.stop[0] or elapsed >= config.budget_s or control[2] >= config.max_steps:
            control[0] = Mode.STOP
        elif elapsed - self._evaluated_s > config.eval_every_s:
            self._evaluated_s = elapsed
            control[0] = Mode.EVALUATE
        else:
            control[0] = Mode.TRAIN
            control[2] += 1
            if elapsed <= config.long_from * config.budget_s:
                control[4] = 0  # also where a finished run is resumed with a larger budget
            elif control[4] == 0:
                control[4] = control[3] + 1

    def _take(self, num: int) -> Iterator[int]:
        """Indices of micro-batches of this round, shared out among the workers as they become free."""
        while True:
            with self.lock:
                index = int(self.shared.counter[0])
                self.shared.counter[0] += 1
            if index >= num:
                return
            yield index

    def _train_step(self) -> None:
        config, control = self.config, self.shared.control
        first = int(control[3])
        long = control[4] > 0
        length = config.long_seq_len if long else config.seq_len
        offset = first - int(control[4]) + 1 if long else first
        self.shared.grads[self.rank].zero_()
        for index in self._take(config.micro_batches_per_step):
            self._micro_batch(self.batches.micro_batch(offset + index, config.micro_batch_tokens, length))
        self._meet()
        self._update(learning_rate(config, float(control[1]), int(control[2])), int(control[2]))
        self._meet()
        if self.rank == 0:
            control[3] += config.micro_batches_per_step

    def _micro_batch(self, tokens: Tensor) -> None:
        """Loss and gradient of `tokens [B, T + 1]`, added to this worker's buffer."""
        total, routings = self.network.loss(self.params, tokens)
        num_tokens = tokens.shape[0] * (tokens.shape[1] - 1)
        (total / num_tokens + self._router_loss(routings)).backward()
        mine = self.grad_views[self.rank]
        for name, param in self.params.items():
            assert param.grad is not None
            mine[name].add_(param.grad)
            param.grad = None
        self.shared.sums[self.rank] += torch.tensor([total.item(), num_tokens], dtype=torch.float64)

    def _router_loss(self, routings: list[Routing]) -> Tensor:
        """Balance by the *running* load, not this micro-batch's, so that a domain may keep its own experts; z loss."""
        experts = self.model.num_experts
        coefficient = balance_coefficient(self.config, float(self.shared.control[1]))
        loss = torch.zeros(())
        for layer, routing in enumerate(routings):
            counts = torch.bincount(routing.topk_ids.reshape(-1), minlength=experts)
            self.shared.counts[self.rank, layer] += counts
            balance = experts * (self.shared.load[layer] * routing.mean_probs).sum()
            loss = loss + coefficient * balance + self.config.z_coef * routing.z_loss
        return loss

    @torch.no_grad()
    def _update(self, rate: float, step: int) -> None:
        """Sum the workers' gradients of the owned parameters and step."""
        query_width = self.model.num_attention_heads * self.model.head_dim
        for name in self.owned:
            grad = self.grad_views[0][name]  # overwritten below: it is zeroed before the next step anyway
            for other in self.grad_views[1:]:
                grad += other[name]
            optimizer.update(name, self.slots[name], grad, self.config, rate, step, query_width)

    @torch.no_grad()
    def _evaluate(self) -> None:
        config = self.config
        for index in self._take(config.eval_tokens // config.micro_batch_tokens):
            tokens = self.batches.held_out(index, config.micro_batch_tokens, config.seq_len)
            total, _ = self.network.loss(self.params, tokens)
            num_tokens = tokens.shape[0] * (tokens.shape[1] - 1)
            self.shared.sums[self.rank] += torch.tensor([total.item(), num_tokens], dtype=torch.float64)
        self._meet()
        if self.rank == 0:
            total_loss, num_tokens = self.shared.sums.sum(0).tolist()
            self.shared.control[5] = total_loss / num_tokens
            _say(f"held-out loss {total_loss / num_tokens:.4f} nats/token at {self.shared.control[1]:.0f} s")
            self.shared.sums.zero_()
        self._meet()

    def _report(self, elapsed: float) -> None:
        since, taken = elapsed - self._reported[0], float(self.shared.control[3]) - self._reported[1]
        total, num_tokens = self.shared.sums.sum(0).tolist()
        if since < REPORT_EVERY_S or num_tokens == 0:
            return
        self._reported = (elapsed, float(self.shared.control[3]))
        tokens = taken * self.config.micro_batch_tokens
        load = self.shared.load * self.model.num_experts
        step = int(self.shared.control[2])
        _say(
            f"step {step} loss {total / num_tokens:.3f} held-out {self.shared.control[5]:.3f} "
            f"rate {learning_rate(self.config, elapsed, step):.2f} {tokens / since:.0f} tok/s "
            f"epoch {self.shared.control[3] * self.config.micro_batch_tokens / self.batches.epoch_tokens:.2f} "
            f"load max/mean {load.max():.2f} min/mean {load.min():.2f} ETA {self.config.budget_s - elapsed:.0f} s"
        )


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def worker_main(rank: int, model: ModelConfig, config: TrainConfig, shared: Shared, *rest: Any) -> None:
    """Entry point of a worker process. `rest`: barrier, lock, path of the tokens."""
    torch.set_num_threads(1)
    Worker(rank, model, config, shared, *rest).run()
