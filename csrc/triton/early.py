"""Programmatic dependent launch: the kernels of a decode step begin before the ones ahead of them have ended.

Each of them waits in every program, whether that has work or not, before it writes and before it ends: so whoever waits
for a kernel waits for all that came before it. What they read before that must be older than the kernel right ahead of
them: the rows of the step and the pages of sets, which are written before the first layer's `write_rows`, and q, which
is written before this layer's. Since `write_rows` waits first of all, whatever comes after it finds those complete.
"""

import triton
import triton.language as tl


@triton.jit
def await_ahead():
    """Wait for the kernels ahead."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin():
    """Let the next kernel begin to wait for this one, once all programs have said so."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_grid():
    """Both, in this order."""
    await_ahead()
    let_next_begin()
