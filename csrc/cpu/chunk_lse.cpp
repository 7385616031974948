// Chunk scores from the 4-bit key index; see vllm_lsa/ops/chunk_lse.py for the cell layout.
#include <omp.h>

#include <cmath>
#include <limits>
#include <vector>

#include "export.h"
#include "vec.h"

namespace lsa {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// A token's codes are read as 32-bit words of 8 nibbles, 8 words at a time. Nibble i of all words is one vector that
// meets the queries of dims 8 w + i. Nibbles 0..6 are masked where they stand and so carry a factor 16^i, which the
// prepared query takes back; nibble 7 is shifted down, as it would set the sign.
struct Query {
  int heads, blocks;
  std::vector<float> lanes;  // [Hq, blocks, 8 nibbles, 8 words], 0 for dims past the head
  std::vector<float> sums;   // [Hq]

  Query(const float* q, int heads, int dim, float scale)
      : heads(heads), blocks((dim + 63) / 64), lanes(size_t(heads) * blocks * 64), sums(heads) {
    for (int h = 0; h < heads; h++)
      for (int d = 0; d < dim; d++) {
        const float x = q[h * dim + d] * (scale * kLog2e);
        const int nibble = d % 8;
        lanes[(size_t(h) * blocks + d / 64) * 64 + nibble * 8 + d % 64 / 8] =
            nibble < 7 ? std::ldexp(x, -4 * nibble) : x;
        sums[h] += x;
      }
  }
};

// out[h][t] = q_h . codes_t. Reads up to 28 bytes past a token's codes: the cell's minima and steps are there.
template <int H>
LSA_INLINE void dot_codes(const float* q, int blocks, const uint8_t* codes, int chunk, int token_bytes, int pad,
                          float* out) {
  for (int t = 0; t < chunk; t += 4) {
    f8 s[H][4] = {};
    for (int b = 0; b < blocks; b++)
      LSA_UNROLL
      for (int i = 0; i < 4; i++) {
        const u8 x = load<u8>(codes + (t + i) * token_bytes + 32 * b);
        LSA_UNROLL
        for (int n = 0; n < 8; n++) {
          const i8 bits = n < 7 ? (i8)(x & (15u << (4 * n))) : (i8)(x >> 28);
          const f8 c = __builtin_convertvector(bits, f8);
          LSA_UNROLL
          for (int h = 0; h < H; h++) s[h][i] += c * load<f8>(q + (h * blocks + b) * 64 + 8 * n);
        }
      }
    LSA_UNROLL
    for (int h = 0; h < H; h++) {
      const f4 r = sum_each(s[h][0], s[h][1], s[h][2], s[h][3]);
      std::memcpy(out + h * pad + t, &r, sizeof r);
    }
  }
}

}  // namespace
}  // namespace lsa

// q [Hq, dim] float32, out [Hq, n] float32. chunk: multiple of 8, dim: multiple of 8. Chunk c and a head have the
// dim / 2 * chunk + 4 * chunk bytes at cells + block * block_stride + head * head_stride +
// c % per_block * chunk_stride, with block = blocks[c / per_block], or c / per_block if blocks is null.
// Returns -1, or, having done nothing, the index of the first block that is not one of num_blocks.
LSA_EXPORT int64_t lsa_keys4_chunk_logits(const float* q, const uint8_t* cells, int64_t block_stride,
                                          int64_t head_stride, int64_t chunk_stride, const int64_t* blocks,
                                          int64_t num_blocks, int per_block, float* out, int64_t n, int kv_heads,
                                          int group, int chunk, int dim, float scale, int threads) {
  using namespace lsa;
  for (int64_t i = 0; blocks && i * per_block < n; i++)
    if (blocks[i] < 0 || blocks[i] >= num_blocks) return i;
  const Query query(q, kv_heads * group, dim, scale);
  const int token_bytes = dim / 2, codes_bytes = chunk * token_bytes, steps = query.blocks;
  const int team = n * kv_heads * chunk < 2048 ? 1 : threads;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    std::vector<float> dots(size_t(group) * chunk);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < n; c++) {
      const int64_t b = c / per_block, block = blocks ? blocks[b] : b;
      const uint8_t* of_chunk = cells + block * block_stride + (c - b * per_block) * chunk_stride;
      for (int head = 0; head < kv_heads; head++) {
        const uint8_t* cell = of_chunk + head * head_stride;
        const float* lanes = query.lanes.data() + size_t(head) * group * steps * 64;
        for (int h = 0; h < group;) {
          const float* qh = lanes + size_t(h) * steps * 64;
          float* s = dots.data() + h * chunk;
          switch (group - h) {
            case 1: dot_codes<1>(qh, steps, cell, chunk, token_bytes, chunk, s); h += 1; break;
            case 2: case 4: dot_codes<2>(qh, steps, cell, chunk, token_bytes, chunk, s); h += 2; break;
            default: dot_codes<3>(qh, steps, cell, chunk, token_bytes, chunk, s); h += 3;
          }
        }
        const half* lows = reinterpret_cast<const half*>(cell + codes_bytes);
        for (int h = 0; h < group; h++) {
          float* s = dots.data() + h * chunk;
          const f8 sum_q = splat(query.sums[head * group + h]);
          f8 top = splat(-std::numeric_limits<float>::infinity()), total = {};
          for (int t = 0; t < chunk; t += 8) {
            const f8 x = load_half8(lows + t) * sum_q + load_half8(lows + chunk + t) * load<f8>(s + t);
            store(s + t, x);
            top = max(x, top);
          }
          const float peak = max(top);
          for (int t = 0; t < chunk; t += 8) total += exp2_neg(load<f8>(s + t) - splat(peak));
          out[(int64_t(head) * group + h) * n + c] = peak * kLn2 + std::log(sum(total));
        }
      }
    }
  }
  return -1;
}
