"""Programmatic dependent launch: the kernels of a decode step begin before the ones ahead of them have ended.

Each of them calls `await_grid` first of all, in every program, whether that has work or not: so whoever waits for a
kernel waits for all that came before it, and only launching and the way into the kernel overlap.
"""

import triton
import triton.language as tl


@triton.jit
def await_grid():
    """Wait for the kernels ahead, and let the next one begin to wait for this one."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
