"""A `vllm serve` of our own, and what one asks of it: for the demo and the evaluation."""
