// Chunk scores of decode rows from the product-quantised key index; contract in vllm_lsa/ops/score_rows.py.
//
// A look-up costs shared memory's bandwidth, and random codes of a warp would meet in its banks three times over. So
// the table of a subspace lies in one *column* of banks, and lanes that are served at a time read different subspaces:
// lane i scores its own chunk and at step s takes subspace i ^ s. No two lanes ever meet, whatever the codes are. The
// same order keeps the codes, staged as they lie in the cells, free of conflicts, and a chunk's tokens stay in a lane.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define LSA_EXPORT extern "C" __attribute__((visibility("default")))

namespace lsa {
namespace {

constexpr int kCodes = 256;
constexpr int kLine = 128;  // bytes of shared memory that all banks deliver at a time
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxRows = 1024;
constexpr int kMaxSlab = 16;  // subspaces; with more, the codes of 32 chunks would take half of a multiprocessor
constexpr int kStatePage = 64;
constexpr int kMaxDevices = 64;
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
  // The tables as they lie in shared memory: [n, Hkv, passes, slabs, 256, 128 bytes]. A line has all columns of a slab.
  uint8_t* tables;
  float* centres;   // [n, Hkv, passes, padded, W]
  float* logits;    // [state pages, Hq, 64]
  int n, kv_heads, group, subspaces, dim, chunk;
  float factor;  // scale * log2 e
  // rows: subspaces of a slab, a power of two. padded: subspaces with those that fill up slabs, whose tables are 0.
  int passes, slabs, padded, rows, log_rows;
};

// Full chunks before the row's token; 0 for rows that are not on a budget.
__device__ int num_chunks(const Params& p, int row) {
  const int length = p.length[row];
  return p.state[row] >= 0 && length > 0 ? (length - 1) / p.chunk : 0;
}

__device__ float load_q(const Params& p, int64_t at) {
  if (p.q_dtype == 0) return static_cast<const float*>(p.q)[at];
  if (p.q_dtype == 1) return __bfloat162float(static_cast<const __nv_bfloat16*>(p.q)[at]);
  return __half2float(static_cast<const __half*>(p.q)[at]);
}

// One subspace of a row and KV head: grid (padded, Hkv, n), a thread per centroid. Entries are relative to the middle
// of their head's range in the subspace, so that half precision suffices.
template <int W>
__global__ void __launch_bounds__(kCodes) build_tables(Params p) {
  constexpr int kColumns = kLine / (2 * W);
  extern __shared__ float lifted[];  // [width, passes * W]
  __shared__ float least[W][kCodes / 32], most[W][kCodes / 32];
  const int m = blockIdx.x, h = blockIdx.y, row = blockIdx.z;
  if (!num_chunks(p, row)) return;
  const int width = p.dim / p.subspaces, heads = p.passes * W, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool real = m < p.subspaces;
  if (real) {
    const int64_t q = p.token[row] * p.q_token_stride + int64_t(h) * p.group * p.q_head_stride;
    const float* matrix = p.to_query + (int64_t(h) * p.dim + int64_t(m) * width) * p.dim;
    for (int d = warp; d < width; d += kCodes / 32)
      for (int g = 0; g < heads; g += W) {
        float sum[W] = {};
        for (int e = lane; e < p.dim; e += 32) {
          const float x = matrix[int64_t(d) * p.dim + e];
#pragma unroll
          for (int w = 0; w < W; w++)
            if (g + w < p.group) sum[w] += x * load_q(p, q + (g + w) * p.q_head_stride + e);
        }
#pragma unroll
        for (int w = 0; w < W; w++) {
          for (int i = 16; i; i /= 2) sum[w] += __shfl_xor_sync(~0u, sum[w], i);
          if (!lane) lifted[d * heads + g + w] = sum[w] * p.factor;
        }
      }
  }
  __syncthreads();
  const float* centroid = p.centroids + ((int64_t(h) * p.subspaces + m) * kCodes + threadIdx.x) * width;
  for (int pass = 0; pass < p.passes; pass++) {
    float x[W] = {};
    if (real)
      for (int d = 0; d < width; d++) {
        const float c = centroid[d];
#pragma unroll
        for (int w = 0; w < W; w++) x[w] += c * lifted[d * heads + pass * W + w];
      }
#pragma unroll
    for (int w = 0; w < W; w++) {
      float low = x[w], high = x[w];
      for (int i = 16; i; i /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, i));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, i));
      }
      if (!lane) least[w][warp] = low, most[w][warp] = high;
    }
    __syncthreads();
    const int64_t item = (int64_t(row) * p.kv_heads + h) * p.passes + pass;
    alignas(16) __half entry[W];
#pragma unroll
    for (int w = 0; w < W; w++) {
      float low = least[w][0], high = most[w][0];
      for (int i = 1; i < kCodes / 32; i++) low = fminf(low, least[w][i]), high = fmaxf(high, most[w][i]);
      const float centre = 0.5f * (low + high);
      entry[w] = __float2half(x[w] - centre);
      if (!threadIdx.x) p.centres[(item * p.padded + m) * W + w] = centre;
    }
    uint8_t* line = p.tables + ((item * p.slabs + m / p.rows) * kCodes + threadIdx.x) * kLine;
    // Fewer subspaces than columns: copies, for lanes that would meet otherwise.
    for (int column = m % p.rows; column < kColumns; column += p.rows)
      __builtin_memcpy(__builtin_assume_aligned(line + column * 2 * W, 2 * W), entry, 2 * W);
    __syncthreads();
  }
}

template <int W>
using Entry = std::conditional_t<W == 2, uint32_t, std::conditional_t<W == 4, uint2, uint4>>;

template <int T>
using Codes = std::conditional_t<T == 8, uint2, uint4>;

template <int T>
__device__ void copy_async(void* to, const void* from) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
  if constexpr (T == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
}

__device__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <int W>
__device__ void add(Entry<W>& to, const Entry<W>& x) {
  __half2 a[W / 2], b[W / 2];
  __builtin_memcpy(a, &to, sizeof a);
  __builtin_memcpy(b, &x, sizeof b);
#pragma unroll
  for (int i = 0; i < W / 2; i++) a[i] = __hadd2(a[i], b[i]);
  __builtin_memcpy(&to, a, sizeof a);
}

// Sums of the tables over a slab's subspaces, for T tokens and W heads. codes: the lane's own, [rows, T] bytes.
template <int W, int T>
__device__ void look_up(const uint8_t* table, const uint8_t* codes, int rows, int lane, float (&sums)[T][W]) {
  constexpr int kColumns = kLine / (2 * W);
  for (int s = 0; s < rows; s += 4) {
    const uint8_t* column[4];
    uint32_t words[4][T / 4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int c = (lane ^ (s + k)) % kColumns;
      column[k] = table + c * 2 * W;
      const Codes<T> x = *reinterpret_cast<const Codes<T>*>(codes + (c & (rows - 1)) * T);
      __builtin_memcpy(words[k], &x, T);
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
      Entry<W> x[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint32_t word = words[k][t / 4];
        const int byte = t % 4;  // the code times a line
        const uint32_t line = (byte ? word >> (8 * byte - 7) : word << 7) & 0x7f80;
        x[k] = *reinterpret_cast<const Entry<W>*>(column[k] + line);
      }
      add<W>(x[0], x[1]);
      add<W>(x[2], x[3]);
      add<W>(x[0], x[2]);
      __half2 sum[W / 2];
      __builtin_memcpy(sum, &x[0], sizeof sum);
#pragma unroll
      for (int i = 0; i < W / 2; i++) {
        const float2 two = __half22float2(sum[i]);
        sums[t][2 * i] += two.x;
        sums[t][2 * i + 1] += two.y;
      }
    }
  }
}

// As many blocks as fit on the device at a time share the work evenly. Its unit is 32 chunks of a row, KV head and
// pass, for one warp; a block's units are consecutive, so that it rarely changes its table.
template <int W, int T>
__global__ void __launch_bounds__(kThreads, 2) score(Params p) {
  extern __shared__ __align__(128) uint8_t shared[];
  uint8_t* const table = shared;
  uint8_t* const staged = shared + p.slabs * kCodes * kLine;
  __shared__ int ends[kMaxRows];  // units of the rows up to each
  __shared__ float offset[W];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, items = p.kv_heads * p.passes;
  if (!warp) {
    int sum = 0;
    for (int begin = 0; begin < p.n; begin += 32) {
      const int row = begin + lane;
      int x = row < p.n ? (num_chunks(p, row) + 31) / 32 * items : 0;
      for (int i = 1; i < 32; i *= 2) {
        const int before = __shfl_up_sync(~0u, x, i);
        if (lane >= i) x += before;
      }
      if (row < p.n) ends[row] = sum + x;
      sum += __shfl_sync(~0u, x, 31);
    }
  }
  __syncthreads();
  const int64_t units = ends[p.n - 1];
  int unit = int(units * blockIdx.x / gridDim.x);
  const int last = int(units * (blockIdx.x + 1) / gridDim.x);
  uint8_t* const mine = staged + warp * 32 * p.rows * T;
  int row = 0;
  while (unit < last) {
    while (ends[row] <= unit) row++;
    const int chunks = num_chunks(p, row), tiles = (chunks + 31) / 32;
    const int from = unit - (row ? ends[row - 1] : 0), item = from / tiles;
    const int begin = from - item * tiles, end = min(tiles, begin + last - unit);
    const int64_t which = int64_t(row) * items + item;

    __syncthreads();
    const uint4* source = reinterpret_cast<const uint4*>(p.tables + which * p.slabs * kCodes * kLine);
    for (int i = threadIdx.x; i < p.slabs * kCodes * kLine / 16; i += kThreads)
      copy_async<16>(table + 16 * i, source + i);
    if (threadIdx.x < W) {
      float sum = 0;
      for (int m = 0; m < p.padded; m++) sum += p.centres[(which * p.padded + m) * W + threadIdx.x];
      offset[threadIdx.x] = sum;
    }
    await_copies();
    __syncthreads();

    const int h = item / p.passes, pass = item - h * p.passes;
    for (int tile = begin + warp; tile < end; tile += kWarps) {
      const int c = 32 * tile + lane, count = min(32, chunks - 32 * tile);
      const uint8_t* cell = p.cells;
      if (lane < count) {
        const int b = c / p.per_block;
        cell += p.block_table[row * p.table_stride + b] * p.block_stride + h * p.head_stride +
                (c - b * p.per_block) * p.chunk_stride;
      }
      float peak[W], total[W];
      for (int t = 0; t < p.chunk; t += T) {
        float x[T][W] = {};
        for (int slab = 0; slab < p.slabs; slab++) {
          __syncwarp();
          for (int i = lane; i < 32 * p.rows; i += 32) {
            const int j = i >> p.log_rows, r = i & (p.rows - 1), m = slab * p.rows + r;
            const uint64_t of = __shfl_sync(~0u, reinterpret_cast<uint64_t>(cell), j);
            if (j < count && m < p.subspaces)
              copy_async<T>(mine + i * T, reinterpret_cast<const uint8_t*>(of) + m * p.chunk + t);
          }
          await_copies();
          __syncwarp();
          look_up<W, T>(table + slab * kCodes * kLine, mine + lane * p.rows * T, p.rows, lane, x);
        }
#pragma unroll
        for (int w = 0; w < W; w++) {
          float top = x[0][w];
#pragma unroll
          for (int i = 1; i < T; i++) top = fmaxf(top, x[i][w]);
          float sum = 0;
          if (t) {
            top = fmaxf(top, peak[w]);
            sum = total[w] * exp2_fast(peak[w] - top);
          }
#pragma unroll
          for (int i = 0; i < T; i++) sum += exp2_fast(x[i][w] - top);
          peak[w] = top;
          total[w] = sum;
        }
      }
      if (lane < count) {
        const int page = p.pages[p.state[row] * p.pages_stride + c / kStatePage];
        float* out = p.logits + (int64_t(page) * p.kv_heads + h) * p.group * kStatePage + c % kStatePage;
#pragma unroll
        for (int w = 0; w < W; w++)
          if (pass * W + w < p.group)
            out[(pass * W + w) * kStatePage] = (peak[w] + __log2f(total[w]) + offset[w]) * kLn2;
      }
    }
    unit += end - begin;
  }
}

template <int W, int T>
cudaError_t launch(Params p, cudaStream_t stream) {
  constexpr int kColumns = kLine / (2 * W);
  p.passes = (p.group + W - 1) / W;
  p.rows = 4, p.log_rows = 2;
  while (p.rows < p.subspaces && p.rows < min(kColumns, kMaxSlab)) p.rows *= 2, p.log_rows++;
  p.slabs = (p.subspaces + p.rows - 1) / p.rows;
  p.padded = p.slabs * p.rows;
  p.centres = reinterpret_cast<float*>(p.tables + int64_t(p.n) * p.kv_heads * p.passes * p.slabs * kCodes * kLine);
  const int lifted = p.dim / p.subspaces * p.passes * W * int(sizeof(float));
  const int bytes = p.slabs * kCodes * kLine + kWarps * 32 * p.rows * T;

  // Blocks that fit on the device at a time, by number of bytes: the first launch finds out.
  static int known_bytes[kMaxDevices], known_grid[kMaxDevices];
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (known_bytes[device] != bytes) {
    int multiprocessors, blocks;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaFuncSetAttribute(score<W, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, score<W, T>, kThreads, bytes);
    if (error) return error;
    if (!blocks) return cudaErrorInvalidConfiguration;
    known_grid[device] = multiprocessors * blocks;
    known_bytes[device] = bytes;
  }
  build_tables<W><<<dim3(p.padded, p.kv_heads, p.n), kCodes, lifted, stream>>>(p);
  error = cudaGetLastError();
  if (error) return error;
  score<W, T><<<known_grid[device], kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace lsa

// Every pointer but of this list is to device memory. scratch: as `score_scratch` sizes it. Strides of q in elements,
// of cells in bytes, of block_table and pages in entries. n is at most 1024. Returns a cudaError_t, 0 on success.
LSA_EXPORT int lsa_product_score_rows(
    const void* q, int64_t q_token_stride, int64_t q_head_stride, int q_dtype, const float* to_query,
    const float* centroids, const uint8_t* cells, int64_t block_stride, int64_t head_stride, int64_t chunk_stride,
    int per_block, const int* token, const int* length, const int* state, const int* block_table, int64_t table_stride,
    const int* pages, int64_t pages_stride, uint8_t* scratch, float* logits, int n, int kv_heads, int group,
    int subspaces, int dim, int chunk, float factor, void* stream) {
  using namespace lsa;
  if (!n) return 0;
  if (n > kMaxRows) return cudaErrorInvalidValue;
  const Params p = {q,           q_token_stride, q_head_stride, q_dtype,   to_query, centroids, cells,
                    block_stride, head_stride,    chunk_stride,  per_block, token,    length,    state,
                    block_table, table_stride,   pages,         pages_stride, scratch, nullptr,  logits,
                    n,           kv_heads,       group,         subspaces, dim,      chunk,     factor,
                    0,           0,              0,             0,         0};
  const auto on = static_cast<cudaStream_t>(stream);
  const bool wide = chunk % 16 == 0;
  if (group > 4) return launch<8, 8>(p, on);  // 16 tokens of 8 heads would not fit into the registers
  if (group > 2) return wide ? launch<4, 16>(p, on) : launch<4, 8>(p, on);
  return wide ? launch<2, 16>(p, on) : launch<2, 8>(p, on);
}

LSA_EXPORT const char* lsa_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
