"""Two full CUDA graphs for each size of a decode step: one with the kernels of demand, and one without.

Where every row keeps all of its chunks nobody asks for any, and kernels that find nothing to do take time as well: at
short context all steps are of that kind. vLLM captures and replays one graph for each size; here it captures twice,
and what it replays turns to the graph that the step needs.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

logger = init_logger("vllm.lsa")


class Steps(Protocol):
    """What is known of steps. step_demands: of the one that is about to be captured or run. captured: kinds of those
    that were planned for a capture, True with demand; whoever captures empties it before."""

    step_demands: bool
    captured: set[bool]

    @property
    def of_two_kinds(self) -> bool:
        """Whether steps with and without demand differ, now that graphs are captured for good."""
        ...


class TwoGraphs:
    """Stands where vLLM keeps the graph of a size."""

    def __init__(self, steps: Steps, demanding: torch.cuda.CUDAGraph, whole: torch.cuda.CUDAGraph) -> None:
        self._steps = steps
        self._demanding = demanding
        self._whole = whole

    def replay(self) -> None:
        (self._demanding if self._steps.step_demands else self._whole).replay()


def hook(steps_of: Callable[[VllmConfig], Steps | None]) -> None:
    """Have vLLM capture twice where `steps_of` knows of steps of two kinds. Once a process."""
    original = CudaGraphManager.capture

    @functools.wraps(original)
    def capture(self: CudaGraphManager, *args: Any, **kwargs: Any) -> None:
        steps = steps_of(self.vllm_config)
        if steps is None or not steps.of_two_kinds or not isinstance(self, ModelCudaGraphManager):
            original(self, *args, **kwargs)
            return

        def capture_kind(demands: bool) -> None:
            # vLLM warms up by steps of its own, and the last of them may have been of either kind.
            steps.step_demands = demands
            steps.captured.clear()
            original(self, *args, **kwargs)
            if self.graphs and steps.captured != {demands}:
                raise RuntimeError(f"CUDA graphs of steps with demand {demands} hold steps with {steps.captured}")

        capture_kind(True)
        demanding, descriptors = self.graphs, self._capture_descs
        full = CUDAGraphMode.FULL
        self.graphs, self._capture_descs = {}, {full: descriptors[full]} if full in descriptors else {}
        try:
            capture_kind(False)
            both = {desc: TwoGraphs(steps, demanding[desc], whole) for desc, whole in self.graphs.items()}
        finally:
            steps.step_demands = True
            self.graphs, self._capture_descs = demanding, descriptors
        self.graphs.update(both)
        logger.info("LSA: %d CUDA graphs were captured once more, for steps that need no demand", len(both))

    CudaGraphManager.capture = capture
