"""Translates vLLM's `SchedulerOutput` into the mirror's terms."""

from typing import Any

from vllm_lsa.residency.requests import NewRequest, RequestUpdate, StepUpdate


def step_update(output: Any, group: int = 0) -> StepUpdate:
    """group: the KV cache group whose blocks the host store follows; dense models have one.

    vLLM's sets of names come in another order in every process, and the order in which requests leave decides what the
    next ones get, the steps in which they select included: ranks that exchange scores would wait for different ones.
    """
    cached = output.scheduled_cached_reqs
    return StepUpdate(
        finished=sorted(output.finished_req_ids),
        preempted=sorted(output.preempted_req_ids or ()),
        new=[
            NewRequest(r.req_id, r.block_ids[group], r.num_computed_tokens, r.prompt_len)
            for r in output.scheduled_new_reqs
        ],
        cached=[
            RequestUpdate(name, blocks[group] if blocks else [], computed, name in cached.resumed_req_ids)
            for name, blocks, computed in zip(
                cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
            )
        ],
        block_copies=[(c.src_block_id, c.dst_block_id) for c in output.kv_cache_block_copies or ()],
        num_scheduled=dict(output.num_scheduled_tokens),
    )
