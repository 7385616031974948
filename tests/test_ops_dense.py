import pytest
import torch

from tests.test_ops_closeness import assert_close
from vllm_lsa.ops.dense import attend_with_lse, attend_with_lse_naive
from vllm_lsa.ops.merge_states import merge_states, merge_states_naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads,group,dim", [(3, 3, 64), (2, 1, 80), (1, 8, 128), (2, 4, 64)])
@pytest.mark.parametrize("s,t,causal", [
    (1, 1, True), (63, 63, True), (7, 111, True), (1, 517, True), (300, 301, True),
    (1, 33, False), (63, 200, False), (200, 3, False),
])  # fmt: skip
def test_attend_with_lse_matches_naive(dtype, kv_heads, group, dim, s, t, causal):
    torch.manual_seed(s + t)
    q = torch.randn(s, 2 * kv_heads * group, dim).to(dtype)[:, : kv_heads * group]
    k, v = torch.randn(2, kv_heads, t, dim).to(dtype).transpose(1, 2)
    out, lse = attend_with_lse(q, k, v, dim**-0.5, causal)
    want, want_lse = attend_with_lse_naive(q.double(), k.double(), v.double(), dim**-0.5, causal)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, want)
    assert_close(lse, want_lse, torch.float32 if dtype == torch.float32 else dtype)


def test_attend_without_keys_or_queries():
    none, some = torch.zeros(0, 2, 64), torch.randn(3, 2, 64)
    out, lse = attend_with_lse(some, none, none, 1.0, False)
    assert not out.any() and lse.isneginf().all()
    out, lse = attend_with_lse(none, some, some, 1.0, True)
    assert out.shape == (0, 2, 64) and lse.shape == (0, 2)


@pytest.mark.parametrize("match,q,k,v,causal", [
    ("s <= t", (4, 2, 64), (3, 2, 64), (3, 2, 64), True),
    ("do not divide", (4, 3, 64), (4, 2, 64), (4, 2, 64), False),
    ("k and v", (4, 2, 64), (4, 2, 64), (5, 2, 64), False),
    ("head dimensions", (4, 2, 64), (4, 2, 80), (4, 2, 80), False),
    ("3-d", (4, 64), (4, 2, 64), (4, 2, 64), False),
])  # fmt: skip
def test_attend_refuses_bad_shapes(match, q, k, v, causal):
    with pytest.raises(ValueError, match=match):
        attend_with_lse(torch.zeros(q), torch.zeros(k), torch.zeros(v), 1.0, causal)


def test_attend_refuses_other_dtypes_and_strides():
    x = torch.zeros(4, 2, 64)
    with pytest.raises(ValueError, match="dtypes differ"):
        attend_with_lse(x, x.half(), x, 1.0, False)
    with pytest.raises(ValueError, match="stride 1"):
        attend_with_lse(x, torch.zeros(4, 64, 2).transpose(1, 2), x, 1.0, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,heads,dim", [(1, 1, 16), (7, 9, 80), (63, 3, 64)])
def test_merge_states_matches_naive(dtype, n, heads, dim):
    torch.manual_seed(n)
    a, b = torch.randn(2, n, heads, dim).to(dtype)
    lse_a, lse_b = torch.randn(2, n, heads) * 20
    a_empty, b_empty = torch.rand(2, n, heads) < 0.3
    lse_a[a_empty], lse_b[b_empty] = -torch.inf, -torch.inf
    a[a_empty], b[b_empty] = float("nan"), float("nan")
    out, lse = merge_states(a, lse_a, b, lse_b)
    want, want_lse = merge_states_naive(a, lse_a, b, lse_b)
    assert_close(out, want)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("a,b", [(-torch.inf, -torch.inf), (-torch.inf, 2.0), (2.0, -torch.inf)])
def test_merge_states_with_empty_sides(a, b):
    out, lse = merge_states(torch.ones(1, 1, 4), torch.tensor([[a]]), torch.full((1, 1, 4), 3.0), torch.tensor([[b]]))
    empty = a == b
    assert lse.item() == (-torch.inf if empty else 2.0)
    assert out.unique().item() == (0 if empty else 1 if a == 2 else 3)


def test_merge_states_of_halves_is_the_whole():
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 6, 64), torch.randn(41, 2, 64), torch.randn(41, 2, 64)
    parts = [attend_with_lse(q, k[cut], v[cut], 0.125, False) for cut in (slice(17), slice(17, None))]
    for got, want in zip(merge_states(*parts[0], *parts[1]), attend_with_lse(q, k, v, 0.125, False), strict=True):
        assert_close(got, want)


def test_merge_states_refuses_bad_shapes():
    x, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="shapes of out"):
        merge_states(x, lse, x[:1], lse)
    with pytest.raises(ValueError, match="lse_a, lse_b"):
        merge_states(x, lse, x, lse[:1])
