"""A logits processor that makes a request's first tokens what the request says: teacher forcing by decode steps.

It only masks what is sampled from. With `logprobs_mode` raw_logprobs, vLLM's default, the log-probabilities that the
server reports are those from before, the model's own. For vLLM's V1 model runner.
"""

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_lsa.serving.client import FORCED


class ForcedTokens(AdapterLogitsProcessor):
    """`vllm serve … --logits-processors vllm_lsa.plugin.forced_tokens:ForcedTokens`; see `stream_completion`."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError, which the server answers a request with, if the tokens are no list of token ids."""
        forced = (sampling_params.extra_args or {}).get(FORCED, [])
        if not isinstance(forced, list) or not all(type(token) is int and token >= 0 for token in forced):
            raise ValueError(f"vllm_xargs.{FORCED} is not a list of token ids: {str(forced)[:60]}")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """For a request that forces tokens, a function of the tokens so far and a row of logits, fp32 [vocabulary]."""
        forced = (params.extra_args or {}).get(FORCED)
        if not forced:
            return None

        def force(so_far: list[int], logits: torch.Tensor) -> torch.Tensor:
            # A token that the vocabulary lacks is not worth the engine: that it does not come back tells the client.
            if len(so_far) < len(forced) and (token := forced[len(so_far)]) < len(logits):
                logits.fill_(-torch.inf)
                logits[token] = 0.0
            return logits

        return force
