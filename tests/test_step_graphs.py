"""Which of a size's two CUDA graphs a step runs. Capturing itself needs a GPU (tests/test_step_graphs_gpu.py): here
vLLM's manager keeps what it would have captured."""

from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from vllm_lsa.plugin import step_graphs

SIZES = [4, 2, 1]


class Steps:
    of_two_kinds = True

    def __init__(self):
        self.step_demands = True
        self.captured = set()


class Graph:
    """Of a size, with what the step that was captured is."""

    def __init__(self, size, demands, replayed):
        self.of, self.replayed = (size, demands), replayed

    def replay(self):
        self.replayed.append(self.of)


@pytest.fixture
def captured(monkeypatch):
    """(steps, manager, what was replayed) after a capture. forget: of a step that does not look at its kind."""

    def capture(steps, replayed, forget=False):
        def original(self, _, name="Capturing"):
            assert name == "now"
            for size in self._capture_descs[CUDAGraphMode.FULL]:
                demands = True if forget else steps.step_demands
                steps.captured.add(demands)
                assert size not in self.graphs
                self.graphs[size] = Graph(size, demands, replayed)

        monkeypatch.setattr(CudaGraphManager, "capture", original)
        step_graphs.hook(lambda config: steps if config == "ours" else None)
        manager = object.__new__(ModelCudaGraphManager)
        manager.vllm_config, manager.graphs = "ours", {}
        manager._capture_descs = {CUDAGraphMode.PIECEWISE: [8], CUDAGraphMode.FULL: SIZES}
        CudaGraphManager.capture(manager, None, "now")
        return manager

    return capture


@pytest.mark.parametrize("before", [True, False])
def test_a_step_runs_the_graph_of_its_kind(captured, before):
    steps, replayed = Steps(), []
    steps.step_demands = before  # of the last step by which vLLM warmed up
    manager = captured(steps, replayed)
    assert list(manager.graphs) == SIZES and len(manager._capture_descs) == 2
    for size in SIZES:
        for steps.step_demands in (True, False, True):
            manager.graphs[size].replay()
    assert replayed == [(size, kind) for size in SIZES for kind in (True, False, True)]


def test_where_steps_are_of_one_kind_vllm_captures_once(captured):
    steps, replayed = Steps(), []
    steps.of_two_kinds = False
    manager = captured(steps, replayed)
    assert all(isinstance(graph, Graph) for graph in manager.graphs.values())


def test_a_graph_that_holds_another_step_than_it_should_is_refused(captured):
    with pytest.raises(RuntimeError, match="demand False hold steps with {True}"):
        captured(Steps(), [], forget=True)


def test_managers_of_others_are_left_alone(captured):
    steps = SimpleNamespace(of_two_kinds=True, step_demands=True, captured=set())
    captured(steps, [])
    other = object.__new__(ModelCudaGraphManager)
    other.vllm_config, other.graphs, other._capture_descs = "theirs", {}, {CUDAGraphMode.FULL: [1]}
    CudaGraphManager.capture(other, None, "now")
    assert isinstance(other.graphs[1], Graph)
