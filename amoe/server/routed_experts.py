"""Which experts each token took, as a client gets it."""

from __future__ import annotations

import base64
import io

import numpy as np


def npy_base64(raw: bytes, num_layers: int, pairs_per_token: int) -> str:
    """base64 of the .npy file of an int16 array [num_tokens, num_layers, pairs_per_token].

    Args:
        raw: that array, little-endian, in C order: the `routed_experts` of all outputs of a sequence.
        num_layers: MoE layers of the model.
        pairs_per_token: experts that a token takes in each of them.
    """
    array = np.frombuffer(raw, dtype="<i2").reshape(-1, num_layers, pairs_per_token)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")
