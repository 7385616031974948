"""Demand of a step's rows against the rule, for every form of its kernels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tests.device_state import State
from tests.kernels import DEVICE
from vllm_lsa.device.state import PAGE
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops import resident_rows as ops
from vllm_lsa.residency.replacement import Replacement

FORMS = ["triton", "cuda"] if DEVICE.type == "cuda" else ["triton"]
"""What `pick` and `settle` run here; test_demand_on_cpu.py has the CUDA kernels where there is no GPU."""
LAYER, DECAY = 1, 0.7


class Case:
    """Rows with random scores. most, threshold, sink, recency: see `Replacement`. max_chunks: that scratch is for."""

    def __init__(
        self, geometry: KVGeometry, lengths: list[int], budget: list[bool], most: int, threshold: float, seed: int = 0,
        max_chunks: int = 1024, sink: int = 1, recency: int = 2, spare: int = 3,
    ) -> None:  # fmt: skip
        g = self.geometry = geometry
        self.state = State(g, lengths, budget, seed=seed, spare=max(spare, most))
        self.rule = Replacement(most, threshold, sink, recency)
        self.scratch = ops.DemandScratch.empty(len(lengths), most, len(self.state.sets.chunk), g, DEVICE, max_chunks)
        random = torch.Generator().manual_seed(seed)
        self.scratch.logits.copy_(torch.randn(self.scratch.logits.shape, generator=random) * 3)
        for x in (self.scratch.page, self.scratch.slot):
            x.fill_(-7)
        if seed % 2:  # lanes with less room than a step may bring
            room = np.random.default_rng(seed).integers(1, most + 1, tuple(self.state.sets.room.shape))
            self.state.sets.room.copy_(self.state.put(room.astype(np.int32)))
        self.pool, self.host = self.state.pools(g.dtype)
        self.host.copy_(torch.randn(self.host.shape, generator=random))

    @property
    def sparse(self) -> list[int]:
        """Rows on a budget."""
        return [i for i, length in enumerate(self.state.lengths) if self.state.budget[i] and length]

    def options(self) -> dict[str, float]:
        return dict(threshold=self.rule.threshold, decay=DECAY)

    def arguments(self) -> tuple:
        """What `pick` and `demand_arguments` begin with."""
        return self.state.rows, self.state.sets, self.scratch, LAYER, self.geometry, self.pool, self.host

    def pick(self, form: ops.Form) -> None:
        ops.pick(*self.arguments(), **self.options(), block=64, form=form)

    def forced(self) -> dict[str, int]:
        return dict(sink=self.rule.sink, recency=self.rule.recency)

    def settle(self, form: ops.Form) -> None:
        ops.settle(self.state.rows, self.state.sets, self.scratch, self.geometry, **self.forced(), block=64, form=form)

    def choose(
        self, chunks: np.ndarray, mass: np.ndarray, used: np.ndarray, cap: int, room: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """(chunks that leave, chunks that come, how many of these stay), as the rule has it, but that kernels let go of
        one more than `most` at a time, and that of equals the lowest entry leaves and the oldest chunk comes.
        """
        rule, tail = replace(self.rule, most=min(self.rule.most, room)), chunks[-1]
        wanted = np.setdiff1d(np.flatnonzero(mass > rule.threshold), chunks)
        picked = wanted[np.argsort(-mass[wanted], kind="stable")][: rule.most]
        over = max(0, len(chunks) + len(picked) - cap)
        may = chunks[:-1][(chunks[:-1] >= rule.sink) & (chunks[:-1] < tail - rule.recency)]
        left = may[np.argsort(used[may], kind="stable")][: min(over, self.rule.most + 1)]
        kept = max(0, len(picked) - (over - len(left)))
        if over <= self.rule.most + 1:
            order = np.append(tail, chunks[:-1])  # the rule has the tail first
            entries, its_picked = rule.choose(order, mass, used, cap)
            np.testing.assert_array_equal(np.sort(used[order[entries]]), np.sort(used[left]))
            np.testing.assert_array_equal(mass[its_picked], mass[picked[:kept]])
        return left, picked, kept

    def check(self, pick: Callable[[], None], settle: Callable[[], None]) -> tuple[int, int]:
        """Calls both; compares all that they must change, and must not. Returns how many chunks came, and left."""
        s, g, scratch = self.state, self.geometry, self.scratch
        lanes, per_lane = g.layer_lanes, g.num_q_heads // g.layer_lanes
        logits, usage = scratch.logits.clone(), s.sets.usage.clone()
        lists = [x.clone() for x in (s.sets.counts, s.sets.chunk, s.sets.slot)]
        before = {(i, lane): s.read_lane(i, lane) for i in self.sparse for lane in range(g.num_lanes)}
        pick()
        for got, was in zip((s.sets.counts, s.sets.chunk, s.sets.slot), lists, strict=True):
            assert torch.equal(got, was)
        rules = {}
        came = gone = 0
        for i in range(len(s.lengths)):
            if i not in self.sparse:
                assert (scratch.slot[i] == -1).all() and (scratch.page[i] == -1).all()
                assert (scratch.picked[i] == -1).all()
                continue
            full = (s.lengths[i] - 1) // g.chunk_tokens
            for lane in range(g.num_lanes):
                chunks, slots, owned = before[i, lane]
                used, local = s.by_chunk(usage, i, lane, full), lane - LAYER * lanes
                mass = np.zeros_like(used)
                if local >= 0:
                    heads = [s.by_chunk(logits, i, h, full) for h in range(local * per_lane, (local + 1) * per_lane)]
                    mass = torch.from_numpy(np.stack(heads)).double().softmax(-1).mean(0).float().numpy()
                    used = np.maximum(used * np.float32(DECAY), mass)
                np.testing.assert_allclose(s.by_chunk(s.sets.usage, i, lane, full), used, rtol=1e-5)
                cap, room = (int(x[int(s.rows.state[i]), lane]) for x in (s.sets.caps, s.sets.room))
                left, picked, kept = rules[i, lane] = self.choose(chunks, mass, used, cap, room)
                count = len(picked)
                assert (
                    scratch.picked[i, lane].cpu().numpy()
                    == np.pad(picked, (0, self.rule.most - count), constant_values=-1)
                ).all()
                held = s.by_chunk(s.sets.held, i, lane, full + 1)
                assert (held == np.isin(np.arange(full + 1), [*chunks, *picked])).all()
                if local < 0:
                    assert not count
                    continue
                copied, page = scratch.slot[i, local].cpu().numpy(), scratch.page[i, local].cpu().numpy()
                assert (copied[:count] == owned[len(chunks) : len(chunks) + count]).all() and (
                    copied[count:] == -1
                ).all()
                assert (page[:count] == s.page(i, picked, lane)).all() and (page[count:] == -1).all()
                assert torch.equal(self.pool[copied[:count]].cpu(), self.host[page[:count]])
                self.pool[copied[:count]] = float("nan")
                came += count
        assert int(scratch.demanded) == came
        assert self.pool.isnan().all()  # and nothing else was copied
        used = s.sets.usage.clone()
        settle()
        torch.testing.assert_close(s.sets.usage, used, rtol=0, atol=0, equal_nan=True)
        for (i, lane), (left, picked, kept) in rules.items():
            chunks, slots, owned = before[i, lane]
            got, got_slots, got_owned = s.read_lane(i, lane)
            assert got[-1] == chunks[-1] and got_slots[-1] == slots[-1]
            assert set(got) == set(chunks) - set(left) | set(picked[:kept]) and len(got) == len(set(got))
            assert sorted(got_owned) == sorted(owned)
            slot_of = dict(zip(got, got_slots, strict=True))
            gone_chunks = set(left)
            for chunk, slot in zip(chunks, slots, strict=True):
                assert chunk in gone_chunks or slot_of[chunk] == slot
            assert [slot_of[c] for c in picked[:kept]] == list(owned[len(chunks) :][:kept])
            held = s.by_chunk(s.sets.held, i, lane, chunks[-1] + 1)
            assert (held == np.isin(np.arange(chunks[-1] + 1), got)).all()
            gone += len(left)
        return came, gone

    def with_ties(self) -> "Case":
        """Few numbers are scores, and usage, the same for all heads: masses and usages have equals, and some are 0."""
        random, usage = np.random.default_rng(5), self.state.sets.usage
        scores = random.choice(np.float32([-1000, 0, 1, 2]), (len(self.scratch.logits), 1, PAGE))
        self.scratch.logits.copy_(self.state.put(scores))
        few = self.state.put(random.choice(np.float32([0.0, 0.3, 0.6]), tuple(usage.shape)))
        usage.copy_(torch.where(usage.isnan(), usage, few))
        return self

    def with_caps(self, least: int, most: int | None = None) -> "Case":
        """Lanes may hold so many more chunks than they do, or fewer: the same for all, or at random."""
        counts = self.state.sets.counts
        spare = np.random.default_rng(3).integers(least, (least if most is None else most) + 1, tuple(counts.shape))
        self.state.sets.caps.copy_(counts + self.state.put(spare.astype(np.int32)))
        return self
