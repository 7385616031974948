"""Where fallbacks for operators of vLLM's AVX512-BF16 library are collected, and how they enter `torch.ops._C`."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_FALLBACKS: dict[str, tuple[str, Callable[..., Any], bool]] = {}
_libraries: list[torch.library.Library] = []


def fallback(schema: str, always: bool = False) -> Callable[[Function], Function]:
    """Mark a function as what the operator of its name does; schema: arguments and result as in torch_bindings.cpp.

    always: also where the library has the operator, because it does not take the sizes of `model.py`.
    """

    def mark(function: Function) -> Function:
        _FALLBACKS[function.__name__] = (schema, function, always)
        return function

    return mark


def define(everywhere: bool = False) -> None:
    """Define those of the collected operators that the loaded library of vLLM lacks or that are `always`, or all.

    everywhere: also in the place of operators that the library has, so that tests compute the same on any CPU.
    """
    # Operators live as long as the library object does.
    library = torch.library.Library("_C", "FRAGMENT")
    _libraries.append(library)
    for name, (schema, function, always) in _FALLBACKS.items():
        present = hasattr(torch.ops._C, name)
        if not present:
            library.define(name + schema)
        if everywhere or always or not present:
            library.impl(name, function, "CPU", allow_override=True)
