"""Lookahead by chance: the floor of every comparison."""

import numpy as np
import torch

from vllm_lsa.residency.policies.base import LookaheadPolicy, ScoreInput


class RandomPolicy(LookaheadPolicy):
    """Score: uniform, the same for a request and cycle in every process and on every device."""

    name = "random"

    def score(self, x: ScoreInput) -> torch.Tensor:
        generator = np.random.default_rng([x.request_seed % 2**64, x.cycle])
        return torch.from_numpy(generator.random((x.num_lanes, x.num_chunks), np.float32)).to(x.device)
