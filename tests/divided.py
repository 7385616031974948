"""An engine beside the ranks of a tensor-parallel group that do the same work, each with its own heads."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tests import test_engine as simulated
from vllm_lsa.config import LsaConfig
from vllm_lsa.host_engine import HostEngine
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.residency.peers import Peers

Sets = dict[tuple[int, str], set[int]]
"""By lane and request."""


class Comparison(simulated.Simulation):
    """A simulation in which every rank must attend to the whole engine's sets, and give its heads' output.

    same_sets: whether it should; with more ranks than KV heads a set per head is another on each of them.
    """

    def __init__(self, *args: Any, ranks: int = 2, same_sets: bool = True, **kwargs: Any) -> None:
        self.ranks, self.same_sets = ranks, same_sets
        super().__init__(*args, **kwargs)

    def make_engine(self, geometry: KVGeometry, slots: int) -> Any:
        return Divided(self, geometry, slots)

    def trace(self, lane, request, chunks):
        super().trace(lane, request, chunks)
        self.engine.chosen[lane, request.id] = set(chunks.tolist())

    def leak_check(self) -> None:
        super().leak_check()
        assert all(part.pool.num_pinned == 0 and not part.mirror.requests for part in self.engine.parts)


class Divided:
    """Stands for `whole`; every call is made on the ranks as well, one thread each."""

    def __init__(self, simulation: Comparison, geometry: KVGeometry, slots: int) -> None:
        config, self.ranks, self.same_sets = simulation.config, simulation.ranks, simulation.same_sets
        self.whole = self.make(config, geometry, slots, simulation.device)
        self.chosen: Sets = {}
        heads = max(1, geometry.num_kv_heads // self.ranks)
        self.parts = []
        for rank in range(self.ranks):
            own = dataclasses.replace(
                geometry, num_q_heads=geometry.num_q_heads // self.ranks, num_kv_heads=heads,
                layer_lanes=config.layer_lanes(heads), rank=rank, ranks=self.ranks,
            )  # fmt: skip
            room = slots * own.num_lanes // geometry.num_lanes
            self.parts.append(self.make(config, own, room, simulation.device))
        self.gathers = 0
        self._given: list[Any] = [None] * self.ranks
        # A rank that does not come is a disagreement: fail instead of waiting.
        self._barrier = threading.Barrier(self.ranks, timeout=30)
        for rank, part in enumerate(self.parts):
            part.peers = Peers(self._gather(rank))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @staticmethod
    def make(config: LsaConfig, geometry: KVGeometry, slots: int, device: torch.device) -> Any:
        return HostEngine(config, geometry, simulated.SCALE, slots, 32, device)

    @staticmethod
    def watch(part: Any, sets: Sets) -> None:
        """From here on put what a rank's decodes attend to there."""
        part.attention.tracer = lambda lane, request, chunks: sets.update({(lane, request.id): set(chunks.tolist())})

    def turn(self) -> AbstractContextManager[Any]:
        """What a rank does outside exchanges it does in here."""
        return nullcontext()

    def aside(self) -> AbstractContextManager[Any]:
        """What a rank waits for in an exchange it waits for in here."""
        return nullcontext()

    def _gather(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def gather(x: torch.Tensor) -> torch.Tensor:
            self.gathers += rank == 0
            self._given[rank] = x
            with self.aside():
                self._barrier.wait()
                every = torch.stack(self._given)
                self._barrier.wait()
            return every

        return gather

    def _on_ranks(self, call: Callable[[int, Any], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            try:
                with self.turn():
                    return call(rank, self.parts[rank])
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.ranks)]
        # A broken barrier only says that another rank failed.
        futures.sort(key=lambda f: isinstance(f.exception(), threading.BrokenBarrierError))
        return [future.result() for future in futures]

    def attach(self, num_blocks: int, cells: list[torch.Tensor]) -> None:
        self.whole.attach(num_blocks, cells)
        for part in self.parts:
            assert part.layout.cell_bytes == self.whole.layout.cell_bytes
            part.attach(num_blocks, [cell[:, : part.geometry.num_kv_heads].clone() for cell in cells])

    def open_step(self, update: Any) -> None:
        self.whole.open_step(update)
        self._on_ranks(lambda rank, part: part.open_step(update))

    def close_step(self) -> None:
        self.whole.close_step()
        self._on_ranks(lambda rank, part: part.close_step())

    def plan(self, rows: Any) -> Any:
        plan = self.whole.plan(rows)
        plans = self._on_ranks(lambda rank, part: (rank, part.plan(rows)))
        self._plans = [found for _, found in sorted(plans, key=lambda pair: pair[0])]
        return plan

    def attend(
        self, plan: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        self.chosen.clear()
        self.whole.attend(plan, layer, q, k, v, out)
        lanes = self.whole.geometry.layer_lanes

        def attend(rank: int, part: Any) -> None:
            g = part.geometry
            mine = slice(rank * g.num_q_heads, (rank + 1) * g.num_q_heads)
            first = rank * self.whole.geometry.num_kv_heads // self.ranks
            kv = slice(first, first + g.num_kv_heads)
            sets: Sets = {}
            self.watch(part, sets)
            result = torch.full_like(out[:, mine], float("nan"))
            part.attend(self._plans[rank], layer, *(x.contiguous() for x in (q[:, mine], k[:, kv], v[:, kv])), result)
            assert not result.isnan().any()
            if not self.same_sets:
                return
            for (lane, name), chunks in sets.items():
                head = lane - layer * g.layer_lanes + (first if lanes > 1 else 0)
                assert chunks == self.chosen[layer * lanes + head, name], (rank, lane, name)
            torch.testing.assert_close(result, out[:, mine], atol=1e-5, rtol=1e-4)

        self._on_ranks(attend)
