"""The two tiers of the KV cache and the copies between them."""
