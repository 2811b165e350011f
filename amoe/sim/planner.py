"""What one deployment would do: memory, prefill, sequences in flight, and the figures of a run by counts.

`amoe.sim.plan_search` tries many of them. All functions are pure; all times are seconds, all sizes bytes.

Memory. A device holds its share of the weights; of what is then free, `DEVICE_SHARE` is KV cache, as in the engine.
A sequence needs room for its full length, although half of the answer is the mean: nobody is preempted then.

Prefill. The prompt tokens of a request cost their floating-point operations at the speed that kernels reach, shared by
all devices (apart: attention's by the attention workers, experts' by the others; the busier kind counts). This time is
missing for decoding, evenly: a token takes ITL / (1 - rate · P) instead of ITL, where P is that time per request.

Little's law. C sequences in flight, each of which makes O tokens at an interval of ITL(C), leave at C / (O · ITL(C))
per second. So a rate R keeps C = R · O · ITL(C) of them in flight, or more than there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from amoe.errors import ConfigError
from amoe.policy.placement import place_experts, replicate_experts
from amoe.profiles.devices import DeviceProfile
from amoe.profiles.links import Fabric
from amoe.profiles.models import ModelSizes
from amoe.sim.flow.bound import bound
from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.sim.flow.result import FlowResult
from amoe.sim.flow.systems import BASELINES, WAVES, Case, System, simulate
from amoe.sim.memory import DEVICE_SHARE
from amoe.types import Int16Array

SCHEDULES = {system.name: system for system in (WAVES, *BASELINES)}
RATE_TOLERANCE = 0.01  # of the sequences in flight
MAX_RATE_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is to be served, and on what.

    Attributes:
        popularity: [L, E] where tokens go; rows sum to one.
        believed: [L, E] loads by which replicas are placed.
        input_len, output_len: tokens of a request.
        prefill: prompts are computed by the same devices.
        slow: factor by device of those that are slower than the profile says.
        num_iterations: of a simulation.
    """

    sizes: ModelSizes
    device: DeviceProfile
    popularity: FloatArray
    believed: FloatArray
    fabric: Fabric = field(default_factory=Fabric)
    input_len: int = 512
    output_len: int = 256
    prefill: bool = True
    slow: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    num_iterations: int = 6

    def __post_init__(self) -> None:
        if self.input_len < 1 or self.output_len < 1:
            raise ConfigError("a request needs at least one token of prompt and one of answer")
        for name in ("popularity", "believed"):
            if getattr(self, name).shape != (self.sizes.num_layers, self.sizes.num_experts):
                raise ConfigError(f"{name} must be [{self.sizes.num_layers}, {self.sizes.num_experts}]")

    @property
    def context(self) -> int:
        """Tokens in the cache of a sequence, the mean."""
        return self.input_len + self.output_len // 2

    @property
    def kv_bytes(self) -> float:
        """Of a sequence at its full length."""
        return (self.input_len + self.output_len) * self.sizes.num_layers * self.sizes.kv_bytes

    def slow_of(self, num_devices: int, of: int) -> dict[int, float]:
        """Factors of the `num_devices` fastest of `of` devices, counted anew from 0 in their old order."""
        by_speed = sorted(range(of), key=lambda device: (self.slow.get(device, 1.0), device))
        kept = sorted(by_speed[:num_devices])
        return {new: self.slow[old] for new, old in enumerate(kept) if old in self.slow}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to use devices.

    Attributes:
        num_devices: N.
        attention_devices: A of them hold attention only, the others experts only; 0: all hold both (colocated).
        redundant: experts of each layer that an owner holds beside its share.
        schedule: a name of `SCHEDULES`.
        waves: in flight; None: chosen by `policy.wave_count`, or what the schedule has.
    """

    num_devices: int
    attention_devices: int = 0
    redundant: int = 0
    schedule: str = WAVES.name
    waves: int | None = None

    @property
    def num_homes(self) -> int:
        return self.attention_devices or self.num_devices

    @property
    def num_owners(self) -> int:
        return self.num_devices - self.attention_devices

    @property
    def placement(self) -> str:
        """For people."""
        if self.attention_devices:
            return f"{self.attention_devices} attention + {self.num_owners} experts"
        return f"{self.num_devices} colocated"

    def system(self) -> System:
        """For the simulator; the deployment says which devices hold what."""
        system = SCHEDULES[self.schedule]
        if self.schedule != WAVES.name:
            return replace(system, attention_devices=0)
        system = replace(system, waves=self.waves)
        return system if self.redundant else replace(system, replicas="none", mode="primary")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What an option does under a load.

    Attributes:
        sequences: C in flight.
        waves: in flight.
        throughput: output tokens per second, all devices together.
        mean_itl, p99_itl: seconds between two tokens of a sequence, prefill included.
        busy: share of the time in which devices compute, without prefill.
        bound_share: of the most tokens per second that any schedule could decode; None: unknown.
        prefill_share: of the devices' time.
        memory_bytes: of the fullest device with C sequences of full length.
        sustained: the load leaves as fast as it comes; otherwise the figures are those of a full memory.
    """

    option: Option
    sequences: int
    waves: int
    throughput: float
    mean_itl: float
    p99_itl: float
    busy: float
    bound_share: float | None
    prefill_share: float
    memory_bytes: float
    sustained: bool = True

    @property
    def per_device(self) -> float:
        """Tokens per second and device."""
        return self.throughput / self.option.num_devices

    def meets(self, slo_itl: float | None) -> bool:
        """It keeps up, and the p99 ITL is at most `slo_itl` seconds."""
        return self.sustained and (slo_itl is None or self.p99_itl <= slo_itl)


# ---- memory


def weight_bytes(sizes: ModelSizes, option: Option) -> tuple[float, float]:
    """Of an attention worker and of an expert worker; the same device twice where they are colocated."""
    slots = -(-sizes.num_experts // option.num_owners) + option.redundant
    experts = slots * sizes.num_sparse_layers * sizes.expert_bytes
    if option.attention_devices:
        return sizes.attention_bytes, experts
    return sizes.attention_bytes + experts, sizes.attention_bytes + experts


def most_sequences(scenario: Scenario, option: Option) -> int:
    """For which there is room on all homes together; 0 where the weights alone do not fit."""
    home, owner = weight_bytes(scenario.sizes, option)
    memory = scenario.device.memory_bytes
    if max(home, owner) > memory:
        return 0
    return int((memory - home) * DEVICE_SHARE / scenario.kv_bytes) * option.num_homes


def used_bytes(scenario: Scenario, option: Option, sequences: int) -> float:
    """Of the fullest device."""
    home, owner = weight_bytes(scenario.sizes, option)
    return max(owner, home + -(-sequences // option.num_homes) * scenario.kv_bytes)


def is_possible(sizes: ModelSizes, option: Option) -> bool:
    """Every owner has an expert, and replicas have somewhere to live, whatever the memory."""
    if not 1 <= option.num_owners <= sizes.num_experts:
        return False
    slots = -(-sizes.num_experts // option.num_owners) + option.redundant
    return option.redundant == 0 or (option.num_owners > 1 and slots <= sizes.num_experts)


def least_devices(scenario: Scenario, sequences: int = 1) -> int | None:
    """Fewest devices with room for the weights and so many sequences; None: there is no such number."""
    sizes, memory = scenario.sizes, scenario.device.memory_bytes
    if sizes.attention_bytes + scenario.kv_bytes / DEVICE_SHARE > memory:
        return None
    for num_devices in range(1, 2 * sizes.num_experts + sequences):
        options = (Option(num_devices=num_devices, attention_devices=a) for a in range(num_devices))
        if any(is_possible(sizes, o) and most_sequences(scenario, o) >= max(sequences, o.num_homes) for o in options):
            return num_devices
    return None


# ---- prefill and Little's law


def prefill_seconds(scenario: Scenario, option: Option, slowdown: FloatArray) -> float:
    """Time of the busier kind of devices per request, shared by all of them. slowdown: [N]."""
    if not scenario.prefill:
        return 0.0
    sizes, tokens, flops = scenario.sizes, scenario.input_len, scenario.device.flops
    params = sum(sizes.block_params(layer) for layer in range(sizes.num_layers))
    pairs = tokens * (tokens + 1) / 2  # causal
    attention = (2 * params * tokens + sizes.attention_flops * pairs * sizes.num_layers) / flops
    experts = 2 * sizes.expert_params * sizes.top_k * sizes.num_sparse_layers * tokens / flops
    speed = 1 / slowdown
    if not option.attention_devices:
        return (attention + experts) / float(speed.sum())
    split = option.attention_devices
    return max(attention / float(speed[:split].sum()), experts / float(speed[split:].sum()))


def sequences_in_flight(
    tokens_per_s: float, itl: Callable[[int], float], *, least: int, most: int, guess: int | None = None
) -> int | None:
    """C with C = tokens_per_s · itl(C), to about 1 %; `least` if fewer would do, None if `most` are not enough.

    Args:
        itl: seconds at C sequences; asked a few times only, as a simulation may be behind it.
        guess: to begin with.
    """
    low, high = least, most
    count = min(max(guess or least, least), most)
    last: tuple[int, float] | None = None
    for _ in range(MAX_RATE_STEPS):
        wanted = tokens_per_s * itl(count)
        target = wanted if last is None else _crossing(last, (count, wanted), most)
        # Not how far `wanted` is: near saturation both hardly differ over a wide range.
        close = abs(target - count) <= (1.0 if last is None else max(1.0, RATE_TOLERANCE * count))
        if close or (count == least and wanted < count):
            return count
        if wanted > count:
            if count == most:
                return None
            low = max(low, count)
        else:
            high = min(high, count)
        last = (count, wanted)
        count = min(max(round(min(target, most)), least), most)
        if not low < count < high and count not in (least, most):
            count = (low + high) // 2
        if count == last[0]:
            count = (low + high) // 2
        if count == last[0]:
            return high
    return high


def _crossing(first: tuple[int, float], second: tuple[int, float], most: int) -> float:
    """Where the line through two points (C, wanted) has wanted = C; twice `most` where it never has."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return 2.0 * most if slope >= 1 else (second[1] - slope * second[0]) / (1 - slope)


# ---- figures


@dataclass(frozen=True, kw_only=True)
class PlacedCase(Case):
    """A case whose experts have been placed once for all loads. placed: [L, E, R]."""

    placed: Int16Array

    def owners(self, replicas: str) -> Int16Array:
        """[L, E, R]."""
        return self.placed


class Evaluator:
    """Runs options of a scenario, and keeps placements and runs that may be asked for again.

    Args:
        num_devices: there are in all; an option with fewer leaves out the slowest.
    """

    def __init__(self, scenario: Scenario, num_devices: int) -> None:
        self.scenario = scenario
        self.num_devices = num_devices
        self._placed: dict[tuple[int, int, str], Int16Array] = {}
        self._runs: dict[tuple[Option, int], Outcome] = {}

    def deployment(self, option: Option, sequences: int) -> Deployment:
        """Raises `ConfigError` where there are fewer sequences than homes."""
        scenario = self.scenario
        return Deployment(
            sizes=scenario.sizes,
            device=scenario.device,
            fabric=scenario.fabric,
            num_devices=option.num_devices,
            attention_devices=option.attention_devices,
            num_sequences=sequences,
            context=scenario.context,
            slow=scenario.slow_of(option.num_devices, self.num_devices),
        )

    def closed(self, option: Option, sequences: int) -> Outcome:
        """So many sequences, always; whoever has finished is followed by the next, after its prefill."""
        key = (option, sequences)
        if key not in self._runs:
            self._runs[key] = self._run(option, sequences)
        return self._runs[key]

    def at_rate(self, option: Option, rate: float, guess: int | None = None) -> Outcome:
        """So many requests per second; see Little's law above. Not sustained: figures of a full memory."""
        most, offered = most_sequences(self.scenario, option), rate * self.scenario.output_len
        found = sequences_in_flight(
            offered, lambda c: self.closed(option, c).mean_itl, least=option.num_homes, most=most, guess=guess
        )
        outcome = self.closed(option, most if found is None else found)
        if found is None:
            return replace(outcome, sustained=False)
        return replace(outcome, throughput=offered)

    def _run(self, option: Option, sequences: int) -> Outcome:
        deployment = self.deployment(option, sequences)
        case = PlacedCase(
            deployment=deployment,
            popularity=self.scenario.popularity,
            believed=self.scenario.believed,
            slots=-(-self.scenario.sizes.num_experts // option.num_owners) + option.redundant,
            placed=self._owners(option),
        )
        run = simulate(option.system(), case, seed=self.scenario.seed, num_iterations=self.scenario.num_iterations)
        return self._outcome(option, deployment, run)

    def _outcome(self, option: Option, deployment: Deployment, run: FlowResult) -> Outcome:
        sequences = deployment.num_sequences
        prefill = prefill_seconds(self.scenario, option, deployment.slowdown) / self.scenario.output_len
        decode_itl = sequences / (run.throughput * option.num_devices)
        itl = decode_itl + sequences * prefill
        return Outcome(
            option=option,
            sequences=sequences,
            waves=run.num_waves,
            throughput=sequences / itl,
            mean_itl=itl,
            p99_itl=itl * max(1.0, run.p99_itl / run.mean_itl),
            busy=run.busy,
            bound_share=self._bound_share(deployment, run),
            prefill_share=sequences * prefill / itl,
            memory_bytes=used_bytes(self.scenario, option, sequences),
        )

    def _bound_share(self, deployment: Deployment, run: FlowResult) -> float | None:
        if deployment.num_sequences < deployment.num_devices:
            return None  # the bound is of colocated devices, which would not have a sequence each
        colocated = replace(deployment, attention_devices=0)
        return float(run.throughput / bound(colocated, self.scenario.popularity).throughput(colocated))

    def _owners(self, option: Option) -> Int16Array:
        sizes, replicas = self.scenario.sizes, option.system().replicas
        key = (option.num_owners, option.redundant, replicas)
        if key not in self._placed:
            if replicas == "none" or not option.redundant:
                self._placed[key] = place_experts(sizes.num_layers, sizes.num_experts, option.num_owners)
            else:
                slots = -(-sizes.num_experts // option.num_owners) + option.redundant
                anchored = replicas == "anchored"
                self._placed[key] = replicate_experts(
                    self.scenario.believed, option.num_owners, slots, anchored=anchored
                )
        return self._placed[key]
