"""How close a kernel must be to its naive twin."""

import pytest
import torch

# Absolute and relative tolerance, and how far the cosine may be from 1.
_LIMITS = {
    torch.float32: (1e-5, 1e-5, 1e-6),
    torch.bfloat16: (1e-2, 2e-2, 1e-5),
    torch.float16: (2e-3, 4e-3, 1e-6),
}


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Asserts that `got` is `want` to the precision of `dtype`, by default that of `got`, -inf and 0 included."""
    absolute, relative, angle = _LIMITS[dtype or got.dtype]
    got, want = got.double(), want.double()
    torch.testing.assert_close(got, want, atol=absolute, rtol=relative)
    finite = want.isfinite()
    if finite.any() and want[finite].norm() > 0:
        cosine = torch.cosine_similarity(got[finite], want[finite], dim=0)
        assert cosine > 1 - angle, f"cosine {cosine}"


def test_assert_close_tells_apart():
    x = torch.tensor([0.0, 1.0, -torch.inf])
    assert_close(x + 1e-6, x)
    for other in (x + 1e-3, x.nan_to_num(neginf=0), torch.full_like(x, float("nan"))):
        with pytest.raises(AssertionError):
            assert_close(other, x)
    with pytest.raises(AssertionError, match="cosine"):
        assert_close(torch.tensor([0.009, -0.009]).bfloat16(), torch.tensor([0.001, 0.001]))
