"""`python -m tests.v4_ranks SPEC OUT`: run a small DeepSeek-V4 on several ranks and ask each for its resident sets.

SPEC: {"llm": arguments of LLM, "batches": [scenarios of `tests.generate` without names, …]}. OUT: {"tokens": [[…], …],
"ranks": [{"sets": checksum of all tables that the indexer was shown, "sparse": rows that were shown less than all,
"pinned", "cycles"}, …]}, no ranks without LSA.
"""

import json
import sys

from vllm import LLM

from tests import v4_rank_state
from tests.generate import run_batch


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    llm = LLM(**spec["llm"])
    lsa = spec["llm"].get("attention_backend") == "LSA"
    if lsa:
        llm.collective_rpc(v4_rank_state.watch)
    tokens = [run_batch(llm, {"name": f"batch-{n}", **batch}) for n, batch in enumerate(spec["batches"])]
    json.dump(
        {"tokens": tokens, "ranks": llm.collective_rpc(v4_rank_state.report) if lsa else []}, open(sys.argv[2], "w")
    )


if __name__ == "__main__":
    main()
