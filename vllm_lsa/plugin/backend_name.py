"""Tells whether a setting names this backend."""

from typing import Any


def is_lsa(backend: Any) -> bool:
    """True for the string "LSA" in any case and for the registered enum member."""
    return str(getattr(backend, "name", backend) or "").upper() == "LSA"
