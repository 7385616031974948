// Chunk scores of decode rows from the product-quantised key index; contract in vllm_lsa/ops/score_rows.py.
//
// A look-up costs shared memory's bandwidth, and random codes of a warp would meet in its banks three times over. So
// the table of a subspace lies in one *column* of banks, and lanes that are served at a time read different subspaces:
// lane i scores its own chunk and at step s takes subspace i ^ s. No two lanes ever meet, whatever the codes are. The
// same order keeps the codes, staged as they lie in the cells, free of conflicts, and a chunk's tokens stay in a lane.
//
// An entry has a byte a head, four heads a word, and the entries of four subspaces are added in bytes before they are
// widened: what they may reach together is 255 steps, which is what a step follows from.
#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "launch.cuh"

#define LSA_EXPORT extern "C" __attribute__((visibility("default")))

namespace lsa {
namespace {

using namespace device;
using namespace launching;

constexpr int kCodes = 256;
constexpr int kLine = 128;  // bytes of shared memory that all banks deliver at a time
constexpr int kMostThreads = 256;  // of a block that scores: two of them share a multiprocessor, and its latencies
constexpr int kLeanThreads = 640;  // as which it is compiled where it is to leave registers for `build_tables`
constexpr int kFewItems = 16;  // rows times KV heads up to which it is
constexpr int kTogether = 4;  // subspaces whose entries are added in bytes, and whose look-ups are under way together
constexpr int kMaxRows = 1024;
constexpr int kTableRows = 4;  // whose tables are made side by side: programs with nothing to do take time as well
constexpr int kMaxSlab = 16;  // subspaces; with more, the codes of 32 chunks would take half of a multiprocessor
constexpr int kMaxPadded = 32;
constexpr int kStatePage = 64;
constexpr float kFraction = 65535;  // of a range
constexpr float kMost = 255;        // steps of the ranges of subspaces that are added in bytes
constexpr float kLn2 = 0.69314718055994530942f;

struct Params {
  const void* q;  // [tokens, Hq, D] of q_dtype: 0 fp32, 1 bf16, 2 fp16
  int64_t q_token_stride, q_head_stride;
  int q_dtype;
  const float* to_query;   // [Hkv, D, D]
  const float* centroids;  // [Hkv, M, 256, D / M]
  const uint8_t* cells;    // [num_blocks, Hkv, per_block, M * C], strides in bytes
  int64_t block_stride, head_stride, chunk_stride;
  int per_block;
  const int *token, *length, *state;  // [n]
  const int* block_table;             // [n, ..]
  int64_t table_stride;
  const int* pages;  // [rows, ..]
  int64_t pages_stride;
  uint16_t* tables;  // [n, Hkv, passes, slabs, 256, rows, W]: fractions of a head's range in a subspace
  float2* bounds;    // [n, Hkv, passes, padded, W]: the least value of a head in a subspace, and the range from there
  float* logits;    // [state pages, Hq, 64]
  int n, kv_heads, group, subspaces, dim, chunk;
  int most_blocks;  // on a multiprocessor; 0 for as many as fit
  float factor;     // scale * log2 e
  // rows: subspaces of a slab, a power of two. padded: subspaces with those that fill up slabs, whose tables are 0.
  int passes, slabs, padded, rows, log_rows, width;
};

// Full chunks before the row's token; 0 for rows that are not on a budget.
__device__ int num_chunks(const Params& p, int row) {
  const int length = p.length[row], state = p.state[row];
  return (state >= 0) & (length > 0) ? (length - 1) / p.chunk : 0;
}

// An integer in the order of the floats, and back.
__device__ int order(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Tested together, so loaded together.
__device__ bool scored(const Params& p, int length, int state, int token) {
  return (length > p.chunk) & (state >= 0) & (token >= 0);
}

// Whether a block of `build_tables` has anything to do: where all is resident, none has.
__device__ bool any_row(const Params& p) {
  bool any = false;
  for (int row = blockIdx.z; row < p.n; row += gridDim.z) any |= scored(p, p.length[row], p.state[row], p.token[row]);
  return any;
}

// One subspace of a KV head, for every so many rows: grid (padded, Hkv, programs), a thread per centroid. Entries are
// 16-bit fractions of their head's range in the subspace. Only latency counts here, so all that memory holds is asked
// for at once.
template <int W, typename Q>
__global__ void __launch_bounds__(kCodes, 4) build_tables(Params p) {
  constexpr int kHeld = 2, kAlign = 16;
  float* const lifted = dynamic_shared<float>();  // [width, passes * W]
  __shared__ __align__(16) int least[W][kCodes / 32], most[W][kCodes / 32];
  const int m = blockIdx.x, h = blockIdx.y;
  const int width = p.width, heads = p.passes * W, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!any_row(p)) {
    // Weights are left alone too; what comes next counts on this wait.
    await_grid();
    let_next_begin();
    return;
  }
  const bool real = m < p.subspaces;
  const float* centroid = p.centroids + ((int64_t(h) * p.subspaces + m) * kCodes + threadIdx.x) * width;
  const bool wide = width % 4 == 0 && reinterpret_cast<uintptr_t>(p.centroids) % 16 == 0;
  float4 held[kHeld] = {};
  if (real && wide) {
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if (4 * i < width) held[i] = reinterpret_cast<const float4*>(centroid)[i];
  }
  const float* const matrix = p.to_query + (int64_t(h) * p.dim + int64_t(m) * width) * p.dim;
  if (real)
    for (int i = threadIdx.x * kLine / 4; i < width * p.dim; i += kCodes * kLine / 4) prefetch(matrix + i);
  // The kernel ahead writes neither weights nor rows, so all but q is on its way by now.
  int length = p.length[blockIdx.z], state = p.state[blockIdx.z], token = p.token[blockIdx.z];
  await_grid();
  let_next_begin();
  for (int row = blockIdx.z; row < p.n; row += gridDim.z) {
    if (row != blockIdx.z) length = p.length[row], state = p.state[row], token = p.token[row];
    if (!scored(p, length, state, token)) continue;
    if (real) {
      const Q* q = static_cast<const Q*>(p.q) + token * p.q_token_stride + int64_t(h) * p.group * p.q_head_stride;
      for (int d = warp; d < width; d += kCodes / 32)
        for (int g = 0; g < heads; g += W) {
          float sum[W] = {};
          for (int begin = lane; begin < p.dim; begin += 128) {
            float x[4];
            Q y[4][W];
#pragma unroll
            for (int k = 0; k < 4; k++) {
              // Without conditions: past the end are the last element, times 0, and the last head once more.
              const int e = min(begin + 32 * k, p.dim - 1);
              x[k] = matrix[int64_t(d) * p.dim + e];
#pragma unroll
              for (int w = 0; w < W; w++) y[k][w] = q[min(g + w, p.group - 1) * p.q_head_stride + e];
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
              if (begin + 32 * k >= p.dim) x[k] = 0;
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
              for (int w = 0; w < W; w++) sum[w] += x[k] * to_float(y[k][w]);
          }
#pragma unroll
          for (int w = 0; w < W; w++) {
            for (int i = 16; i; i /= 2) sum[w] += __shfl_xor_sync(~0u, sum[w], i);
            if (!lane) lifted[d * heads + g + w] = sum[w] * p.factor;
          }
        }
    }
    __syncthreads();
    for (int pass = 0; pass < p.passes; pass++) {
      float x[W] = {};
      const auto take = [&](float c, int d) {
        float by[W];
        __builtin_memcpy(by, __builtin_assume_aligned(lifted + d * heads + pass * W, kAlign), sizeof by);
#pragma unroll
        for (int w = 0; w < W; w++) x[w] += c * by[w];
      };
      const auto take_four = [&](float4 c, int d) {
        take(c.x, d), take(c.y, d + 1), take(c.z, d + 2), take(c.w, d + 3);
      };
      if (real && wide) {
#pragma unroll
        for (int i = 0; i < kHeld; i++)
          if (4 * i < width) take_four(held[i], 4 * i);
        for (int d = 4 * kHeld; d < width; d += 4) take_four(*reinterpret_cast<const float4*>(centroid + d), d);
      } else if (real) {
        for (int d = 0; d < width; d++) take(centroid[d], d);
      }
#pragma unroll
      for (int w = 0; w < W; w++) {
        const int key = order(__float_as_int(x[w]));
        const int low = __reduce_min_sync(~0u, key), high = __reduce_max_sync(~0u, key);
        if (!lane) least[w][warp] = low, most[w][warp] = high;
      }
      __syncthreads();
      const int64_t item = (int64_t(row) * p.kv_heads + h) * p.passes + pass;
      alignas(16) uint16_t entry[W];
#pragma unroll
      for (int w = 0; w < W; w++) {
        int first = least[w][0], last = most[w][0];
#pragma unroll
        for (int i = 1; i < kCodes / 32; i++) first = min(first, least[w][i]), last = max(last, most[w][i]);
        const float low = __int_as_float(order(first)), range = __int_as_float(order(last)) - low;
        const float scale = range > 0 ? kFraction / range : 0;
        entry[w] = uint16_t(min(__float2uint_rn((x[w] - low) * scale), uint32_t(kFraction)));
        if (!threadIdx.x) p.bounds[(item * p.padded + m) * W + w] = make_float2(low, range);
      }
      const int64_t line = (item * p.slabs + (m >> p.log_rows)) * kCodes + threadIdx.x;
      uint8_t* const to = reinterpret_cast<uint8_t*>(p.tables + (line * p.rows + (m & (p.rows - 1))) * W);
      __builtin_memcpy(__builtin_assume_aligned(to, 2 * W), entry, 2 * W);
      __syncthreads();
    }
  }
}

template <int W>
using Entry = std::conditional_t<W == 4, uint32_t, uint2>;

template <int T>
using Codes = std::conditional_t<T == 8, uint2, uint4>;

// Adds the entries of four subspaces. Of a word's two heads in even bytes, `sums` has the sums beside 256 times those
// of the odd ones, until `part` takes those off: the carries between them are undone by the same arithmetic.
template <int W, int T>
__device__ void look_up(const uint32_t (&words)[kTogether][T / 4], const uint32_t (&columns)[kTogether],
                        uint32_t (&sums)[T][W / 2]) {
#pragma unroll
  for (int t = 0; t < T; t++) {
    uint32_t x[kTogether][W / 4];
#pragma unroll
    for (int k = 0; k < kTogether; k++) {
      // One instruction: a byte of the codes times the length of a line, and where the column begins.
      const uint32_t at = __dp4a(words[k][t / 4], uint32_t(kLine) << t % 4 * 8, columns[k]);
      const Entry<W> entry = *static_cast<const Entry<W>*>(__cvta_shared_to_generic(at));
      __builtin_memcpy(x[k], &entry, sizeof entry);
    }
#pragma unroll
    for (int i = 0; i < W / 4; i++) {
      const uint32_t sum = x[0][i] + x[1][i] + x[2][i] + x[3][i];
      sums[t][2 * i] += sum;
      sums[t][2 * i + 1] += __byte_perm(sum, 0, 0x4341);
    }
  }
}

// Leaves two heads' sums in each word, of 16 bits each.
template <int W, int T>
__device__ void part(uint32_t (&sums)[T][W / 2]) {
#pragma unroll
  for (int t = 0; t < T; t++)
#pragma unroll
    for (int i = 0; i < W / 2; i += 2) sums[t][i] -= sums[t][i + 1] << 8;
}

constexpr float kMagic = 8388608;  // 2^23: the float of its bits with a 16-bit number in the lowest ones is their sum

// kMagic plus one of the two numbers in a word.
__device__ float plus_magic(uint32_t word, int which) {
  return __uint_as_float(__byte_perm(word, 0x4b000000, which ? 0x7632 : 0x7610));
}

// Takes tokens into a softmax of a lane's chunk: a head's highest sum, and its total beside that.
template <int W, int T>
__device__ void take_in(const uint32_t (&x)[T][W / 2], const float (&steps)[W], bool first, uint32_t (&peak)[W / 2],
                        float (&total)[W]) {
#pragma unroll
  for (int i = 0; i < W / 2; i++) {
    uint32_t top = peak[i];
#pragma unroll
    for (int j = 0; j < T; j++) top = __vmaxu2(top, x[j][i]);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float by = -steps[2 * i + k], to = -kMagic * by;
      float sum = first ? 0 : total[2 * i + k] * exp2_fast(fmaf(plus_magic(top - peak[i], k), by, to));
#pragma unroll
      for (int j = 0; j < T; j++) sum += exp2_fast(fmaf(plus_magic(top - x[j][i], k), by, to));
      total[2 * i + k] = sum;
    }
    peak[i] = top;
  }
}

// A table of an item to shared memory: [slabs, 256, 128 bytes], entries as multiples of the item's `steps`, with heads
// 0, 2, 1, 3 in the bytes of a word. A line has the columns of a slab, and copies of them where it has room, for lanes
// that would meet otherwise. The logits are offsets + steps * sum.
template <int W, int R>
__device__ void load_tables(const Params& p, int64_t which, uint8_t* tables, uint32_t (&factors)[kMaxPadded][W],
                            float (&steps)[W], float (&offsets)[W]) {
  constexpr int kHeld = 4;  // vectors on their way; one of 8 fractions becomes two words
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int width = R * W / 8, vectors = kCodes * width, bytes = R * W;  // of a line
  constexpr int copies = kLine / bytes;
  const int column = threadIdx.x % width;  // the same for all vectors of a thread
  for (int slab = 0; slab < p.slabs; slab++) {
    const uint4* source = reinterpret_cast<const uint4*>(p.tables) + (which * p.slabs + slab) * vectors;
    uint32_t factor[8];
    for (int begin = threadIdx.x; begin - int(threadIdx.x) < vectors; begin += kHeld * blockDim.x) {
      uint4 held[kHeld];
#pragma unroll
      for (int k = 0; k < kHeld; k++) {
        const int i = begin + k * blockDim.x;
        held[k] = i < vectors ? source[i] : uint4{};
      }
      if (begin == threadIdx.x) {
        if (!slab) {
          if (warp < W) {
            const float2 bound = lane < p.padded ? p.bounds[(which * p.padded + lane) * W + warp] : make_float2(0, 0);
            float low = bound.x, most = bound.y;
            for (int i = 16; i; i /= 2) low += __shfl_xor_sync(~0u, low, i);
            for (int i = 1; i < kTogether; i *= 2) most += __shfl_xor_sync(~0u, most, i);
            for (int i = kTogether; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
            // Entries are rounded down, and by half a step each on average.
            const float step = most * (1 / kMost);
            factors[lane][warp] = most > 0 ? __float2uint_rz(bound.y / most * (kMost / kFraction * 4294967296.f)) : 0;
            if (!lane) steps[warp] = step, offsets[warp] = low + 0.5f * step * p.subspaces;
          }
          __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 8; j++) factor[j] = factors[slab * R + (8 * column + j) / W][j % W];
      }
#pragma unroll
      for (int k = 0; k < kHeld; k++) {
        const int i = begin + k * blockDim.x;
        uint32_t words[4], packed[2];
        __builtin_memcpy(words, &held[k], sizeof words);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint32_t first = words[2 * j], last = words[2 * j + 1];
          packed[j] = __umulhi(first & 0xffff, factor[4 * j]) | __umulhi(first >> 16, factor[4 * j + 1]) << 16 |
                      __umulhi(last & 0xffff, factor[4 * j + 2]) << 8 | __umulhi(last >> 16, factor[4 * j + 3]) << 24;
        }
        if (i >= vectors) continue;
        uint8_t* const line = tables + (slab * kCodes + i / width) * kLine + 8 * column;
        // Lines that are written at a time begin with different copies, or they would meet in the banks.
#pragma unroll
        for (int copy = 0; copy < copies; copy++)
          *reinterpret_cast<uint2*>(line + (copy + i / width) % copies * bytes) = make_uint2(packed[0], packed[1]);
      }
    }
  }
}

// By one warp: where the units of each row end, and the units that this block scores, from share.x up to share.y.
// Tables take a block about as long as its units, so it has one item's alone where there are blocks enough.
__device__ void share_out(const Params& p, int items, int* ends, int2& share) {
  const int lane = threadIdx.x % 32, grid = gridDim.x, block = blockIdx.x;
  const auto up_to = [&](int x) {
    for (int i = 1; i < 32; i *= 2) {
      const int before = __shfl_up_sync(~0u, x, i);
      if (lane >= i) x += before;
    }
    return x;
  };
  int units = 0, spare = grid;  // blocks beyond one for each item
  for (int begin = 0; begin < p.n; begin += 32) {
    const int row = begin + lane, own = row < p.n ? (num_chunks(p, row) + 31) / 32 * items : 0, sum = up_to(own);
    if (row < p.n) ends[row] = units + sum;
    units += __shfl_sync(~0u, sum, 31);
    spare -= __popc(__ballot_sync(~0u, own > 0)) * items;
  }
  const bool apart = spare >= 0;
  if (!lane)
    share = apart ? make_int2(0, 0)
                  : make_int2(int(int64_t(units) * block / grid), int(int64_t(units) * (block + 1) / grid));
  __syncwarp();
  int blocks = 0;
  for (int begin = 0; apart && begin < p.n; begin += 32) {
    const int row = begin + lane, from = (row < p.n) & (row > 0) ? ends[row - 1] : 0;
    const int own = row < p.n ? ends[row] - from : 0, tiles = own / items;
    const int parts = own ? 1 + int(uint32_t(tiles) * spare / uint32_t(units)) : 0, sum = up_to(parts * items);
    const int place = block - blocks - (sum - parts * items);
    if ((place >= 0) & (place < parts * items)) {
      const int item = place / parts, which = place - item * parts, first = from + item * tiles;
      share = make_int2(first + tiles * which / parts, first + tiles * (which + 1) / parts);
    }
    blocks += __shfl_sync(~0u, sum, 31);
  }
}

// The chunk of 32 of whose codes a lane makes its k-th copy of a piece. Of lanes that are served at a time, chunks
// differ by 4 and 8, so that their pieces lie in different banks.
__device__ constexpr int copied_chunk(int lane, int k) {
  const int i = lane / 4 + 8 * k;
  return (i & 16) | (i & 3) << 2 | (i >> 2 & 3);
}

// As many blocks as fit on the device at a time share the work. Its unit is 32 chunks of a row, KV head and pass, for
// one warp. A warp's codes lie in pieces of four subspaces, in the order in which its look-ups need them, which another
// one follows at once wherever one has been read: so the codes are a tile ahead, and entries of the block table two.
// Once: a chunk has T tokens and one slab. Lean: with registers to spare beside it, so that both kernels begin early.
template <int W, int T, int R, bool Once, bool Lean>
__global__ void __launch_bounds__(Lean ? kLeanThreads : kMostThreads) score(Params p) {
  constexpr int kColumns = kLine / W, kPieces = R / kTogether;
  uint8_t* const shared = dynamic_shared<uint8_t>();
  __shared__ int ends[kMaxRows];  // units of the rows up to each
  __shared__ int2 share;
  __shared__ uint32_t factors[kMaxPadded][W];
  __shared__ float steps[W], offsets[W];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int items = p.kv_heads * p.passes, chunk = Once ? T : p.chunk, slabs = Once ? 1 : p.slabs;
  let_next_begin();
  if (!warp) share_out(p, items, ends, share);
  __syncthreads();
  int unit = share.x;
  const int last = share.y;
  // Of the lane: its codes of subspace lane % R, the column of that subspace, and where its copies begin.
  const uint32_t mine = shared_address(shared) + slabs * kCodes * kLine + warp * 32 * R * T;
  const uint32_t codes = (mine + lane * R * T) ^ (lane % R * T);
  const uint32_t column = shared_address(shared) ^ (lane % kColumns * W);
  const uint32_t copies = mine + copied_chunk(lane, 0) * R * T;
  const uint32_t block_stride = uint32_t(p.block_stride >> 4), chunk_stride = uint32_t(p.chunk_stride >> 4);
  int row = 0;
  while (unit < last) {
    while (ends[row] <= unit) row++;
    const int chunks = num_chunks(p, row), tiles = (chunks + 31) / 32;
    const int from = unit - (row ? ends[row - 1] : 0), item = from / tiles;
    const int begin = from - item * tiles, end = min(tiles, begin + last - unit);
    const int h = item / p.passes, pass = item - h * p.passes;
    const int* const blocks = p.block_table + row * p.table_stride;
    const int* const pages = p.pages + p.state[row] * p.pages_stride;
    const uint32_t head = h * uint32_t(p.head_stride >> 4);
    uint32_t cell[4];  // those that the lane copies from, in 16 bytes

    const auto find = [&](int tile) {
      const int c = 32 * tile + lane;
      return tile < end && c < chunks ? blocks[c / p.per_block] : 0;
    };
    const auto turn_to = [&](int tile, int block) {
      const int place = p.per_block == 1 ? 0 : (32 * tile + lane) % p.per_block;
      const uint32_t own = block * block_stride + head + place * chunk_stride;
#pragma unroll
      for (int k = 0; k < 4; k++) cell[k] = __shfl_sync(~0u, own, copied_chunk(lane, k));
    };
    // Without conditions: lanes past the end read what is there, a cell of block 0 or the last subspace once more.
    const auto stage = [&](int piece, int t, int slab) {
      const int r = (anew(lane) / 4 ^ piece) % kPieces * kTogether + lane % 4;
      const uint8_t* const of = p.cells + min(slab * R + r, p.subspaces - 1) * chunk + t;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        static_assert(copied_chunk(0, 1) == 2 && copied_chunk(0, 2) == 16 && copied_chunk(0, 3) == 18);
        copy_async<T>(copies + r * T + copied_chunk(0, k) * R * T, sixteens(of, cell[k]));
      }
    };

    int tile = begin + warp, next = find(tile + warps);
    turn_to(tile, find(tile));
    if (tile < end) {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++) stage(piece, 0, 0), close_group();
    }
    __syncthreads();
    await_grid();
    load_tables<W, R>(p, int64_t(row) * items + item, shared, factors, steps, offsets);
    __syncthreads();

    while (tile < end) {
      const int after = tile + warps, later = find(after + warps);
      uint32_t peak[W / 2] = {};
      float total[W] = {};
      int page = 0;
      for (int t = 0; t < chunk; t += T) {
        uint32_t x[T][W / 2] = {};
        for (int slab = 0; slab < slabs; slab++) {
          const bool ends_slabs = slab + 1 == slabs, ends_tile = ends_slabs && t + T >= chunk;
          // Unrolled, sums of several pieces are kept: quicker where there are registers for that.
#pragma unroll (Once && !Lean ? kPieces : 1)
          for (int piece = 0; piece < kPieces; piece++) {
            await_groups<kPieces - 1>();
            __syncwarp();
            const uint32_t first = anew(codes), line = anew(column) + slab * kCodes * kLine;
            uint32_t words[kTogether][T / 4], columns[kTogether];
#pragma unroll
            for (int k = 0; k < kTogether; k++) {
              const int s = piece * kTogether + k;
              columns[k] = anew(line ^ s * W);
              const Codes<T> own = *static_cast<const Codes<T>*>(__cvta_shared_to_generic(first ^ s * T));
              __builtin_memcpy(words[k], &own, T);
            }
            look_up<W, T>(words, columns, x);
            __syncwarp();
            if (!piece && ends_tile) turn_to(after, next);
            if (!ends_tile || after < end)
              stage(piece, ends_tile ? 0 : ends_slabs ? t + T : t, ends_slabs ? 0 : slab + 1);
            close_group();
          }
        }
        if (t + T >= chunk && 32 * tile + lane < chunks) page = pages[(32 * tile + lane) / kStatePage];
        part<W, T>(x);
        take_in<W, T>(x, steps, !t, peak, total);
      }
      const int c = 32 * tile + lane;
      if (c < chunks) {
        float* out = p.logits + (int64_t(page) * p.kv_heads + h) * p.group * kStatePage + c % kStatePage;
#pragma unroll
        for (int w = 0; w < W; w++)
          if (pass * W + w < p.group) {
            const float high = (plus_magic(peak[w / 2], w % 2) - kMagic) * steps[w] + offsets[w];
            out[(pass * W + w) * kStatePage] = (high + __log2f(total[w])) * kLn2;
          }
      }
      tile = after;
      next = later;
    }
    unit += end - begin;
  }
  await_grid();
}

template <int W>
cudaError_t launch_tables(const Params& p, bool early, cudaStream_t stream) {
  const dim3 grid(p.padded, p.kv_heads, min(p.n, kTableRows));
  const int lifted = p.width * p.passes * W * int(sizeof(float));
  const auto kernel = p.q_dtype == 0   ? build_tables<W, float>
                      : p.q_dtype == 1 ? build_tables<W, __nv_bfloat16>
                                       : build_tables<W, __half>;
  return launch_early(kernel, grid, kCodes, lifted, early, stream, p);
}

// How the kernel is launched on a device: found out by the first launch, for a number of tables.
struct Shape {
  int slabs, threads, bytes, multiprocessors, blocks;
  bool early;
};

template <int W, int T, int R, bool Once, bool Lean>
cudaError_t find_shape(int device, int slabs, Shape& shape) {
  int most, multiprocessors, major, blocks;
  cudaFuncAttributes own;
  const auto kernel = score<W, T, R, Once, Lean>;
  cudaError_t error = cudaFuncGetAttributes(&own, kernel);
  if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = divide_memory_alike(build_tables<W, float>);
  if (!error) error = divide_memory_alike(build_tables<W, __nv_bfloat16>);
  if (!error) error = divide_memory_alike(build_tables<W, __half>);
  if (error) return error;
  // As many warps as have room for their codes beside the tables.
  const int tables = slabs * kCodes * kLine, codes = 32 * R * T;
  const int threads = min(kMostThreads, (most - int(own.sharedSizeBytes) - tables) / codes * 32);
  if (threads < 32 * W) return cudaErrorInvalidConfiguration;  // a warp a head finds the steps
  const int bytes = tables + threads / 32 * codes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
  if (error) return error;
  if (!blocks) return cudaErrorInvalidConfiguration;
  shape = {slabs, threads, bytes, multiprocessors, blocks, major >= 9};
  return cudaSuccess;
}

template <int W, int T, int R, bool Once = false, bool Lean = false>
cudaError_t launch_both(const Params& p, cudaStream_t stream) {
  if constexpr (T == 16 && !Once)
    if (p.chunk == T && p.slabs == 1) {
      // With little to score, an early start is worth more than unrolled look-ups.
      if (p.n * p.kv_heads <= kFewItems) return launch_both<W, T, R, true, true>(p, stream);
      return launch_both<W, T, R, true>(p, stream);
    }
  static Shape known[kMaxDevices];
  int device;
  cudaError_t error = find_device(device);
  if (error) return error;
  Shape& shape = known[device];
  if (shape.slabs != p.slabs) error = find_shape<W, T, R, Once, Lean>(device, p.slabs, shape);
  if (error) return error;
  error = launch_tables<W>(p, shape.early, stream);
  if (error) return error;
  const auto kernel = score<W, T, R, Once, Lean>;
  const int blocks = shape.multiprocessors * (p.most_blocks ? min(p.most_blocks, shape.blocks) : shape.blocks);
  return launch_early(kernel, dim3(blocks), shape.threads, shape.bytes, shape.early, stream, p);
}

template <int W, int T>
cudaError_t launch(Params p, cudaStream_t stream) {
  static_assert(kLine / W >= kMaxSlab && kMaxSlab == 16 && kTogether == 4);
  p.passes = (p.group + W - 1) / W;
  p.width = p.dim / p.subspaces;
  p.rows = kTogether, p.log_rows = 2;
  while (p.rows < p.subspaces && p.rows < kMaxSlab) p.rows *= 2, p.log_rows++;
  p.slabs = (p.subspaces + p.rows - 1) / p.rows;
  p.padded = p.slabs * p.rows;
  p.bounds = reinterpret_cast<float2*>(p.tables + int64_t(p.n) * p.kv_heads * p.passes * p.padded * kCodes * W);
  if (p.rows == 4) return launch_both<W, T, 4>(p, stream);
  return p.rows == 8 ? launch_both<W, T, 8>(p, stream) : launch_both<W, T, 16>(p, stream);
}

}  // namespace
}  // namespace lsa

// Every pointer but of this list is to device memory. scratch: as `score_scratch` sizes it. Strides of q in elements,
// of cells in bytes, of block_table and pages in entries. n is at most 1024. most_blocks: on a multiprocessor, 0 for as
// many as fit. Returns a cudaError_t, 0 on success.
LSA_EXPORT int lsa_product_score_rows(
    const void* q, int64_t q_token_stride, int64_t q_head_stride, int q_dtype, const float* to_query,
    const float* centroids, const uint8_t* cells, int64_t block_stride, int64_t head_stride, int64_t chunk_stride,
    int per_block, const int* token, const int* length, const int* state, const int* block_table, int64_t table_stride,
    const int* pages, int64_t pages_stride, uint8_t* scratch, float* logits, int n, int kv_heads, int group,
    int subspaces, int dim, int chunk, int most_blocks, float factor, void* stream) {
  using namespace lsa;
  if (!n) return 0;
  if (n > kMaxRows) return cudaErrorInvalidValue;
  const Params p = {q, q_token_stride, q_head_stride, q_dtype, to_query, centroids, cells, block_stride, head_stride,
                    chunk_stride, per_block, token, length, state, block_table, table_stride, pages, pages_stride,
                    reinterpret_cast<uint16_t*>(scratch), nullptr, logits, n, kv_heads, group, subspaces, dim, chunk,
                    most_blocks, factor, 0, 0, 0, 0, 0, 0};
  const auto on = static_cast<cudaStream_t>(stream);
  const bool wide = chunk % 16 == 0;
  if (group > 4) return launch<8, 8>(p, on);  // 16 tokens of 8 heads would not fit into the registers
  return wide ? launch<4, 16>(p, on) : launch<4, 8>(p, on);
}

LSA_EXPORT const char* lsa_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
