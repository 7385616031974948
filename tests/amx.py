"""A mark for tests that CPUs with AMX tiles are left out of."""

import pytest
import torch

without_amx = pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(),
    reason="with AMX tiles stock vLLM's own results depend on what is in a step, and two ranks end (docs/log.md)",
)
"""For tests that need results, or a schedule, that are the same however prompts are cut."""
