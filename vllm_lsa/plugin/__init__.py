"""The vLLM-facing shell. vLLM calls `register` in every process it starts (entry point `vllm.general_plugins`)."""


def register() -> None:
    """Make `--attention-backend LSA` known to this process. Safe to call again."""
    from vllm_lsa.plugin.registration import register_lsa

    register_lsa()
