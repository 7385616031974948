"""Chunk scores of a step's decode rows, from index cells found through their block tables."""

import math
import sys
from functools import cache
from importlib import import_module

import torch

from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.ops.cuda_native import Form, built_library, cuda_library, launch
from vllm_lsa.ops.encode_rows import LayerCells
from vllm_lsa.ops.native import DTYPES, gather_cells, require, require_tensor, unsupported
from vllm_lsa.ops.product_lse import CENTROIDS, product_chunk_logits_paged_naive

_KERNELS = "vllm_lsa.kernels.score"
MAX_ROWS = 1024
"""Most rows that the CUDA kernel takes."""


@cache
def product_form() -> Form:
    """How the product index is scored on a GPU: by CUDA C++ if it was built, which the first call looks up and logs."""
    return "cuda" if cuda_library() else "triton"


def score_scratch(
    n: int, q_heads: int, kv_heads: int, subspaces: int, device: torch.device, form: Form | None = None
) -> torch.Tensor:
    """Room for the look-up tables of up to n rows: uint8, about 32 KiB (Triton: 64) per row and KV head for 16
    subspaces and 4 query heads each. One serves all layers, since their kernels run one after the other.
    """
    group = q_heads // kv_heads
    form = form or (product_form() if device.type == "cuda" else "triton")
    if form == "triton":
        size = 4 * n * kv_heads * subspaces * CENTROIDS * (-(-group // 4) * 4)
    else:
        width, passes, padded = _cuda_layout(group, subspaces)
        size = n * kv_heads * passes * padded * width * (2 * CENTROIDS + 8)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _cuda_layout(group: int, subspaces: int) -> tuple[int, int, int]:
    """Heads of an entry, passes over the cells and padded subspaces of a table: as in product_score.cu."""
    width = 4 if group <= 4 else 8
    slab = 4
    while slab < min(subspaces, 16):
        slab *= 2
    return width, -(-group // width), -(-subspaces // slab) * slab


def score_rows(
    q: torch.Tensor,
    cells: torch.Tensor,
    rows: DeviceRows,
    sets: DeviceSets,
    chunk: int,
    scale: float,
    logits: torch.Tensor,
    to_query: torch.Tensor | None = None,
    centroids: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    form: Form | None = None,
    per_sm: int = 0,
) -> None:
    """Estimated log of the attention mass of every full chunk before the row's token, for the rows on a budget.

    q: [T, Hq, D], rows and heads may be strided; fp32, bf16 or fp16; row i is token ``rows.token[i]``. cells: uint8
    [num_blocks, Hkv, per_block, b], all but the last dimension may be strided, by multiples of 16 bytes, from an
    address that is one. chunk: C. scale: factor on q·k. logits: fp32 [num_state_pages, Hq, 64]; chunk c of a row, one
    of ``(length - 1) // C``, goes to ``[sets.pages[state, c // 64], h, c % 64]``; nothing else is written.

    Natural log, as `ChunkIndex.paged_logits` has it. Without `centroids` a cell is the mean key, D values of q's dtype.
    With centroids fp32 [Hkv, M, 256, D / M], M up to 32, and to_query fp32 [Hkv, D, D] it is M·C codes, and `scratch`
    must be of `score_scratch`. The CUDA kernel rounds look-ups to steps: of what four subspaces in a row may differ by,
    the most is 255 steps. So a logit is off by a step and a half or so, which is small beside what the codes lose.
    form: `product_form` if None. per_sm: programs of the CUDA kernel on a multiprocessor, 0 for as many as fit.

    The CUDA kernel may begin before the one ahead of it on the stream has ended: that one must write neither `rows` nor
    the centroids nor `to_query`.

    Nothing is allocated or read back: fit for a CUDA graph. On CPU tensors this is `score_rows_naive`, unless the
    kernels were loaded in Triton's interpreter. Raises ValueError on a bad shape, dtype, stride or address, LsaError if
    CUDA refuses the launch; what only the device knows is not checked.
    """
    if _without_kernels(q.device):
        return score_rows_naive(q, cells, rows, sets, chunk, scale, logits, to_query, centroids)
    if q.device.type == "cpu":
        form = "triton"
    n = rows.length.shape[0]
    if n == 0:
        return
    _check(q, cells, rows, sets, chunk, logits, to_query, centroids)
    if centroids is None:
        import_module(_KERNELS).score_mean_key(q, cells, rows, sets, chunk, scale, logits)
        return
    assert to_query is not None
    form = form or product_form()
    q_heads, kv_heads, subspaces = q.shape[1], cells.shape[1], centroids.shape[1]
    needed = score_scratch(n, q_heads, kv_heads, subspaces, torch.device("meta"), form).numel()
    require(
        scratch is not None and scratch.dtype == torch.uint8 and scratch.device == q.device and scratch.is_contiguous(),
        f"scratch must be from score_scratch on {q.device}",
    )
    assert scratch is not None
    require(scratch.numel() >= needed, f"scratch has {scratch.numel()} bytes, {n} rows need {needed}")
    if form == "triton":
        import_module(_KERNELS).score_product(q, cells, rows, sets, to_query, centroids, chunk, scale, logits, scratch)
        return
    library = built_library()
    require(n <= MAX_ROWS, f"{n} rows are more than {MAX_ROWS}")
    arguments = product_arguments(q, cells, rows, sets, chunk, scale, logits, to_query, centroids, scratch, per_sm)
    launch(library, "lsa_product_score_rows", *arguments)


def score_layers(
    q: torch.Tensor,
    cells: LayerCells,
    rows: DeviceRows,
    sets: DeviceSets,
    chunk: int,
    scale: float,
    logits: torch.Tensor,
) -> None:
    """`score_rows` with mean keys, for all L layers at once. q: [T, L, Hq, D], heads one after the other. logits: fp32
    [L, num_state_pages, Hq, 64]. The rest, and what is raised, as there; on CPU tensors this is `score_layers_naive`,
    unless the kernels were loaded in Triton's interpreter.
    """
    if _without_kernels(q.device):
        return score_layers_naive(q, cells, rows, sets, chunk, scale, logits)
    require(q.dim() == 4 and q.shape[1] == len(cells.parts), f"q must be [T, {len(cells.parts)}, Hq, D]: {q.shape}")
    require_tensor("logits", logits, (len(cells.parts), *logits.shape[1:]), torch.float32, q.device)
    if not len(rows.length):
        return
    first = cells.parts[0]
    _check(q[:, 0], first, rows, sets, chunk, logits[0], None, None)
    import_module(_KERNELS).score_mean_key(q, first, rows, sets, chunk, scale, logits, cells.offsets)


def _without_kernels(device: torch.device) -> bool:
    """Whether a twin does the work: on a CPU, unless the kernels were loaded in Triton's interpreter. Raises LsaError
    on devices other than CPUs and those of CUDA."""
    if device.type not in ("cpu", "cuda"):
        raise unsupported(device)
    kernels = sys.modules.get(_KERNELS)
    return device.type == "cpu" and (kernels is None or not kernels.INTERPRETED)


def score_layers_naive(
    q: torch.Tensor, cells: LayerCells, rows: DeviceRows, sets: DeviceSets, chunk: int, scale: float,
    logits: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of `score_layers`, layer by layer."""
    for layer, part in enumerate(cells.parts):
        score_rows_naive(q[:, layer], part, rows, sets, chunk, scale, logits[layer])


def product_arguments(
    q: torch.Tensor, cells: torch.Tensor, rows: DeviceRows, sets: DeviceSets, chunk: int, scale: float,
    logits: torch.Tensor, to_query: torch.Tensor, centroids: torch.Tensor, scratch: torch.Tensor, per_sm: int = 0,
) -> tuple[int | float, ...]:  # fmt: skip
    """What the C function of the CUDA kernel takes, up to the stream. Tensors: see `score_rows`."""
    kv_heads, per_block, subspaces = cells.shape[1], cells.shape[2], centroids.shape[1]
    return (
        q.data_ptr(), q.stride(0), q.stride(1), DTYPES[q.dtype], to_query.data_ptr(), centroids.data_ptr(),
        cells.data_ptr(), *cells.stride()[:3], per_block, rows.token.data_ptr(), rows.length.data_ptr(),
        rows.state.data_ptr(), rows.block_table.data_ptr(), rows.block_table.stride(0), sets.pages.data_ptr(),
        sets.pages.stride(0), scratch.data_ptr(), logits.data_ptr(), len(rows.length), kv_heads,
        q.shape[1] // kv_heads, subspaces, q.shape[2], chunk, per_sm, scale * math.log2(math.e),
    )  # fmt: skip


def _check(
    q: torch.Tensor,
    cells: torch.Tensor,
    rows: DeviceRows,
    sets: DeviceSets,
    chunk: int,
    logits: torch.Tensor,
    to_query: torch.Tensor | None,
    centroids: torch.Tensor | None,
) -> None:
    device, n = q.device, rows.length.shape[0]
    require(q.dim() == 3 and q.dtype in DTYPES, f"q must be fp32, bf16 or fp16 [T, Hq, D], got {q.dtype} {q.shape}")
    require(cells.dim() == 4, f"cells must be [num_blocks, Hkv, per_block, b], got {list(cells.shape)}")
    (_, q_heads, dim), kv_heads = q.shape, cells.shape[1]
    require(q.stride(2) == 1, f"q: the last dimension must be contiguous, got strides {q.stride()}")
    require(kv_heads > 0 and q_heads % kv_heads == 0, f"{kv_heads} kv heads do not divide {q_heads} query heads")
    if centroids is None:
        size = dim * q.dtype.itemsize
    else:
        require(centroids.dim() == 4, f"centroids must be [Hkv, M, {CENTROIDS}, D / M], got {list(centroids.shape)}")
        subspaces = centroids.shape[1]
        require(1 <= subspaces <= 32 and dim % subspaces == 0, f"M = {subspaces} must divide D = {dim}, at most 32")
        require(chunk % 8 == 0 and 0 < chunk <= 64, f"C = {chunk} must be a multiple of 8 up to 64")
        require(to_query is not None, "centroids without to_query")
        assert to_query is not None
        shape = (kv_heads, subspaces, CENTROIDS, dim // subspaces)
        for name, x, expected in (("centroids", centroids, shape), ("to_query", to_query, (kv_heads, dim, dim))):
            require_tensor(name, x, expected, torch.float32, device)
            require(x.is_contiguous(), f"{name} must be contiguous")
        size = subspaces * chunk
    require(
        cells.dtype == torch.uint8 and cells.shape[3] == size and cells.device == device and cells.stride(3) == 1,
        f"cells must be uint8 [.., {size}] on {device} with contiguous bytes, "
        f"got {cells.dtype} {list(cells.shape)} on {cells.device}, strides {cells.stride()}",
    )
    require(
        cells.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in cells.stride()[:3]),
        f"cells must lie at multiples of 16 bytes, got strides {cells.stride()}",
    )
    span = sum((n - 1) * stride for n, stride in zip(cells.shape, cells.stride(), strict=True))
    require(span < 2**36, f"cells span more than 64 GiB: {list(cells.shape)}, strides {cells.stride()}")
    require_tensor("logits", logits, (logits.shape[0], q_heads, PAGE), torch.float32, device)
    require_tensor("rows.block_table", rows.block_table, (n, rows.block_table.shape[1]), torch.int32, device)
    require_tensor("sets.pages", sets.pages, tuple(sets.pages.shape), torch.int32, device)
    for name, x in (("token", rows.token), ("length", rows.length), ("state", rows.state)):
        require_tensor(f"rows.{name}", x, (n,), torch.int32, device)
        require(x.is_contiguous(), f"rows.{name} must be contiguous")
    require(logits.is_contiguous(), "logits must be contiguous")


def score_rows_naive(
    q: torch.Tensor,
    cells: torch.Tensor,
    rows: DeviceRows,
    sets: DeviceSets,
    chunk: int,
    scale: float,
    logits: torch.Tensor,
    to_query: torch.Tensor | None = None,
    centroids: torch.Tensor | None = None,
) -> None:
    """Twin of `score_rows`, row by row."""
    for i, (token, length, state) in enumerate(
        zip(rows.token.tolist(), rows.length.tolist(), rows.state.tolist(), strict=True)
    ):
        chunks = max(0, length - 1) // chunk
        if state < 0 or not chunks:
            continue
        query, blocks = q[token], rows.block_table[i]
        if centroids is None:
            mean = gather_cells(cells, blocks, chunks).view(q.dtype).float()
            grouped = query.float().unflatten(0, (cells.shape[1], -1))
            result = (scale * grouped @ mean.permute(1, 2, 0)).flatten(0, 1)
        else:
            assert to_query is not None
            result = product_chunk_logits_paged_naive(query, cells, blocks, chunks, to_query, centroids, chunk, scale)
        c = torch.arange(chunks, device=q.device)
        page = sets.pages[state, c // PAGE].long()
        logits[page, :, c % PAGE] = result.T.float()
