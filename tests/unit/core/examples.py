"""How many examples a property test draws: its own number in `make test`, in proportion more in `make test-all`."""

from __future__ import annotations

from hypothesis import Phase, settings


def examples(count: int, **other) -> settings:
    """`count` examples where the profile says 100."""
    return settings(max_examples=max(1, count * settings.default.max_examples // 100), **other)


def clusters(count: int) -> settings:
    """The same for scenarios, which do not shrink to anything that is easier to read, and would take minutes to."""
    return examples(count, phases=[Phase.explicit, Phase.generate])
