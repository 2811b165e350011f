"""What a benchmark asks for, and when. The same seed gives the same requests and the same arrivals."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.types import Int64Array

Float64Array = npt.NDArray[np.float64]

CHARS_PER_TOKEN = 3.5  # of Python source, roughly: for servers whose tokenizer is not at hand


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSpec:
    """One request to send.

    Attributes:
        prompt: token ids, or text where the tokenizer is the server's secret.
        max_tokens: tokens to generate.
    """

    prompt: list[int] | str
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRange:
    """Lengths uniform in [mean (1 - ratio), mean (1 + ratio)], rounded, at least 1.

    Raises:
        ConfigError: if the mean is below 1 or the ratio outside [0, 1].
    """

    mean: int
    ratio: float

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise ConfigError(f"a length must be at least 1, not {self.mean}")
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"--range-ratio must be in [0, 1], not {self.ratio}")

    @property
    def bounds(self) -> tuple[int, int]:
        """Shortest and longest."""
        return max(1, round(self.mean * (1 - self.ratio))), max(1, round(self.mean * (1 + self.ratio)))

    def draw(self, rng: np.random.Generator, count: int) -> Int64Array:
        """[count] lengths."""
        low, high = self.bounds
        return rng.integers(low, high, size=count, endpoint=True)


def poisson_arrivals(rng: np.random.Generator, count: int, rate: float) -> Float64Array:
    """[count] seconds after the start, of a Poisson process of `rate` requests per second; the first is at 0.

    Raises:
        ConfigError: if the rate is not positive.
    """
    if not rate > 0:
        raise ConfigError(f"--request-rate must be greater than 0, not {rate}")
    gaps = rng.exponential(1.0 / rate, size=count)
    gaps[:1] = 0.0
    return gaps.cumsum()


def random_prompts(rng: np.random.Generator, lengths: Int64Array, vocab_size: int) -> list[list[int]]:
    """Prompts of random token ids in [0, vocab_size)."""
    return [rng.integers(0, vocab_size, size=length).tolist() for length in lengths]


def text_prompts(
    rng: np.random.Generator, lengths: Int64Array, text: str, encode: Callable[[str], Sequence[int]] | None
) -> list[list[int] | str]:
    """Prompts that are windows of `text`, from random starts.

    Args:
        rng: source of the starts.
        lengths: [n] tokens of the prompts.
        text: long enough for the longest of them.
        encode: text to ids, which makes the lengths exact; without it, prompts are text of about that length.

    Raises:
        ConfigError: if `text` is too short.
    """
    return [_window(rng, int(length), text, encode) for length in lengths]


def _window(
    rng: np.random.Generator, length: int, text: str, encode: Callable[[str], Sequence[int]] | None
) -> list[int] | str:
    chars = max(1, round(length * CHARS_PER_TOKEN))
    while chars <= len(text):
        start = int(rng.integers(0, len(text) - chars, endpoint=True))
        window = text[start : start + chars]
        if encode is None:
            return window
        ids = encode(window)
        if len(ids) >= length:
            return list(ids[:length])
        chars *= 2
    raise ConfigError(f"the corpus of {len(text)} characters is too short for a prompt of {length} tokens")


def make_requests(
    prompts: Sequence[list[int] | str], rng: np.random.Generator, output: LengthRange
) -> list[RequestSpec]:
    """Prompts with output lengths drawn from `output`."""
    lengths = output.draw(rng, len(prompts))
    return [RequestSpec(prompt=prompt, max_tokens=int(length)) for prompt, length in zip(prompts, lengths, strict=True)]


def standard_library_text(rng: np.random.Generator, num_chars: int) -> str:
    """At least `num_chars` characters of the standard library's source, whole files in random order.

    The one function here that reads files. Real text makes some experts hot; random ids do not, or not the same ones.

    Raises:
        ConfigError: if the standard library is smaller than that.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    # Top-level modules and packages only: no tests, no installed packages.
    paths = [path for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")) if not _is_apart(path, root)]
    texts: list[str] = []
    size = 0
    for index in rng.permutation(len(paths)):
        if size >= num_chars:
            return "\n".join(texts)
        texts.append(paths[index].read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
    raise ConfigError(f"the standard library has fewer than {num_chars} characters: ask for shorter prompts")


def _is_apart(path: Path, root: Path) -> bool:
    return path.relative_to(root).parts[0] in {"test", "site-packages", "dist-packages", "lib2to3", "idlelib"}
