"""The architectures that amoe serves. How to add one is told in `README.md` beside this file."""

from __future__ import annotations

from amoe.models import mixtral, olmoe, qwen2_moe, qwen3_moe
from amoe.models.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE for module in (mixtral, olmoe, qwen2_moe, qwen3_moe)
}
