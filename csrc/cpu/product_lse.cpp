// The product-quantised key index: its codes, and chunk scores from them; cells as in vllm_lsa/ops/product_lse.py.
#include <omp.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "export.h"
#include "vec.h"

namespace lsa {
namespace {

constexpr float kLn2 = 0.69314718055994530942f;
constexpr int kCodes = 256;
constexpr int kHeads = 4;  // query heads that share the codes loaded, one lane each

// The table of 256 centroids [256, width] for the part of the queries [width, kHeads] that meets them.
LSA_INLINE void fill(const float* centroids, const float* q, int width, int q_stride, float* table) {
  for (int c = 0; c < kCodes; c += 8) {
    f4 s[8] = {};
    for (int d = 0; d < width; d++) {
      const f4 x = load<f4>(q + d * q_stride);
      LSA_UNROLL
      for (int i = 0; i < 8; i++) s[i] += centroids[(c + i) * width + d] * x;
    }
    std::memcpy(table + c * kHeads, s, sizeof s);
  }
}

LSA_INLINE f8 join(f4 a, f4 b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }

// The nearest of 256 centroids [256, width] of 8 tokens, y [8, stride]; of equally near ones the first.
LSA_INLINE void nearest(const float* centroids, const float* y, int width, int64_t stride, f8* turned, uint8_t* out) {
  for (int d = 0; d < width; d++)
    for (int t = 0; t < 8; t++) turned[d][t] = y[t * stride + d];
  f8 least = splat(std::numeric_limits<float>::infinity());
  i8 code = {};
  for (int c = 0; c < kCodes; c++) {
    f8 distance = {};
    for (int d = 0; d < width; d++) {
      const f8 x = turned[d] - splat(centroids[c * width + d]);
      distance += x * x;
    }
    const i8 nearer = distance < least;
    least = nearer ? distance : least;
    code = nearer ? i8{} + c : code;
  }
  for (int t = 0; t < 8; t++) out[t] = uint8_t(code[t]);
}

// Logits of 8 tokens for kHeads heads, two tokens a vector. A token's entry of the table is one load for all heads,
// which takes half the time of a gather per head of 8 tokens.
LSA_INLINE void look_up(const float* table, const uint8_t* codes, int chunk, int subspaces, f8* out) {
  f4 s[8] = {};
  for (int m = 0; m < subspaces; m++, codes += chunk, table += kCodes * kHeads)
    LSA_UNROLL
    for (int t = 0; t < 8; t++) s[t] += load<f4>(table + size_t(codes[t]) * kHeads);
  LSA_UNROLL
  for (int i = 0; i < 4; i++) out[i] = join(s[2 * i], s[2 * i + 1]);
}

// Log of the sum of 2^logit over a chunk's tokens, twice for each head.
LSA_INLINE void score(const float* table, const uint8_t* cell, int chunk, int subspaces, float* out) {
  f8 peak = splat(-std::numeric_limits<float>::infinity()), total = {};
  for (int t = 0; t < chunk; t += 8) {
    f8 x[4];
    look_up(table, cell + t, chunk, subspaces, x);
    f8 top = max(max(x[0], x[1]), max(x[2], x[3]));
    top = max(top, shuffled<4, 5, 6, 7, 0, 1, 2, 3>(top));
    if (t) {
      top = max(top, peak);
      total *= exp2_neg(peak - top);
    }
    LSA_UNROLL
    for (int i = 0; i < 4; i++) total += exp2_neg(x[i] - top);
    peak = top;
  }
  total += shuffled<4, 5, 6, 7, 0, 1, 2, 3>(total);
  store(out, (peak + log2_normal(total)) * splat(kLn2));
}

}  // namespace
}  // namespace lsa

// y [kv_heads, n * chunk, subspaces * width] float32, centroids [kv_heads, subspaces, 256, width] float32,
// out [n, kv_heads, subspaces, chunk]. chunk: multiple of 8.
LSA_EXPORT void lsa_encode_product(const float* y, const float* centroids, uint8_t* out, int64_t n, int kv_heads,
                                   int chunk, int subspaces, int width, int threads) {
  using namespace lsa;
  const int64_t dim = int64_t(subspaces) * width, groups = n * chunk / 8;
  const int team = groups * kv_heads * subspaces < 32 ? 1 : threads;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    std::vector<f8> turned(width);
    f8 few[8];
    // A subspace's centroids stay in the nearest cache while all tokens meet them.
    for (int part = 0; part < kv_heads * subspaces; part++) {
      const int head = part / subspaces, m = part % subspaces;
      const float* to = centroids + size_t(part) * kCodes * width;
#pragma omp for schedule(static) nowait
      for (int64_t g = 0; g < groups; g++) {
        const float* from = y + (head * n * chunk + 8 * g) * dim + m * width;
        const int64_t c = 8 * g / chunk;
        uint8_t* codes = out + ((c * kv_heads + head) * subspaces + m) * chunk + 8 * g % chunk;
        switch (width) {
          case 4: nearest(to, from, 4, dim, few, codes); break;
          case 8: nearest(to, from, 8, dim, few, codes); break;
          default: nearest(to, from, width, dim, turned.data(), codes);
        }
      }
    }
  }
}

// q [kv_heads, subspaces * width, passes * 4] float32, passes = ceil(group / 4): the lifted queries of a head's group,
// times scale and log2 e, whatever in lanes past the group. centroids [kv_heads, subspaces, 256, width] float32.
// Chunk c is cells + block * block_stride + head * head_stride + c % per_block * chunk_stride, with
// block = blocks[c / per_block], or c / per_block if blocks is null; it has subspaces rows of chunk bytes.
// table: room for [kv_heads, passes, subspaces, 256, 4] float32. out [Hq, n] float32. chunk: multiple of 8.
// Returns -1, or, having done nothing, the index of the first block that is not one of num_blocks.
LSA_EXPORT int64_t lsa_product_chunk_logits(const float* q, const float* centroids, const uint8_t* cells,
                                            int64_t block_stride, int64_t head_stride, int64_t chunk_stride,
                                            const int64_t* blocks, int64_t num_blocks, int per_block, float* table,
                                            float* out, int64_t n, int kv_heads, int group, int subspaces, int width,
                                            int chunk, int threads) {
  using namespace lsa;
  for (int64_t i = 0; blocks && i * per_block < n; i++)
    if (blocks[i] < 0 || blocks[i] >= num_blocks) return i;
  const int passes = (group + kHeads - 1) / kHeads, rows = kv_heads * passes;
  const int team = n * rows < 128 ? 1 : threads;
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int part = 0; part < rows * subspaces; part++) {
      const int row = part / subspaces, m = part % subspaces, head = row / passes, pass = row % passes;
      fill(centroids + size_t(head * subspaces + m) * kCodes * width,
           q + (size_t(head * subspaces + m) * width * passes + pass) * kHeads, width, passes * kHeads,
           table + size_t(part) * kCodes * kHeads);
    }
    // Row by row, so that a row's part of the table stays in the nearest cache.
    for (int row = 0; row < rows; row++) {
      const int head = row / passes, first = row % passes * kHeads, heads = std::min(group - first, kHeads);
      const float* t = table + size_t(row) * subspaces * kCodes * kHeads;
      float* to = out + (int64_t(head) * group + first) * n;
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < n; c++) {
        const int64_t b = c / per_block, block = blocks ? blocks[b] : b;
        const uint8_t* cell = cells + block * block_stride + head * head_stride + (c - b * per_block) * chunk_stride;
        float s[8];
        score(t, cell, chunk, subspaces, s);
        for (int h = 0; h < heads; h++) to[h * n + c] = s[h];
      }
    }
  }
  return -1;
}
