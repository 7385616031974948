"""The one exception type that users of vllm-lsa are meant to read."""


class LsaError(ValueError):
    """A setting that cannot work, said in one line: what, its value, and the remedy."""
