// Decode attention over a slot pool [S, 2, Hkv, C, D]; see vllm_lsa/ops/paged_decode.py for the contract.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "export.h"
#include "vec.h"

namespace lsa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

struct Decode {
  const void* q;          // [n, Hq, D], rows q_stride elements apart
  const void* pool;       // slots slot_stride elements apart
  const int32_t* table;   // rows table_stride elements apart
  const int32_t* counts;
  const int32_t* first_len;
  void* out;              // [n, Hq, D], rows out_stride elements apart
  float* lse;             // [n, Hq]
  int64_t q_stride, slot_stride, table_stride, out_stride;
  int n, kv_heads, group, chunk, dim;
  float scale;
};

// Entries [begin, end) of one row for one kv head; part < 0 if that is all there is, else where the state goes.
struct Span {
  int row, head, begin, end, part;
};
struct Merge {
  int row, head, first_part, parts;
};

int padded(int chunk) { return (chunk + 7) & ~7; }

// Online-softmax state of the `group` query heads of one kv head. Lanes of acc are in lane<T>() order.
struct State {
  float *q, *acc, *weights, *top, *total;
  State(float* p, int group, int dim, int chunk)
      : q(p), acc(q + group * dim), weights(acc + group * dim), top(weights + group * padded(chunk)), total(top + group) {}
  static int floats(int group, int dim, int chunk) { return group * (2 * dim + padded(chunk) + 2) + 16; }
};

// While one tile is worked on, the tile needed after it is fetched: hardware prefetch stops where a page ends. Behind
// the keys of a page come its values, behind those the keys of the next page.
template <class T, int H>
LSA_INLINE void scores(const float* q, const T* k, const T* next, int len, int dim, int pad, float* out) {
  int t = 0;
  for (; t + 4 <= len; t += 4) {
    f8 s[H][4] = {};
    const T* row = k + t * dim;
    for (int d = 0; d < dim; d += 16) {
      LSA_UNROLL
      for (int i = 0; i < 4; i++) {
        Pair x = load16(row + i * dim + d);
        LSA_UNROLL
        for (int h = 0; h < H; h++) s[h][i] += x.a * load<f8>(q + h * dim + d);
        LSA_UNROLL
        for (int h = 0; h < H; h++) s[h][i] += x.b * load<f8>(q + h * dim + d + 8);
      }
    }
    for (size_t b = 0; b < 4 * dim * sizeof(T); b += 64) __builtin_prefetch((const char*)(next + t * dim) + b);
    LSA_UNROLL
    for (int h = 0; h < H; h++) {
      f4 r = sum_each(s[h][0], s[h][1], s[h][2], s[h][3]);
      std::memcpy(out + h * pad + t, &r, sizeof r);
    }
  }
  for (; t < len; t++)
    LSA_UNROLL
    for (int h = 0; h < H; h++) {
      f8 s = {};
      for (int d = 0; d < dim; d += 16) {
        Pair x = load16(k + t * dim + d);
        s += x.a * load<f8>(q + h * dim + d) + x.b * load<f8>(q + h * dim + d + 8);
      }
      out[h * pad + t] = sum(s);
    }
}

template <class T, int H, int P>  // P pairs of vectors (16 P columns) of the output at a time
LSA_INLINE void weighted_columns(const float* w, const T* v, const T* next, int len, int dim, int pad, float* acc) {
  f8 s[H][2 * P];
  LSA_UNROLL
  for (int h = 0; h < H; h++)
    LSA_UNROLL
    for (int j = 0; j < 2 * P; j++) s[h][j] = load<f8>(acc + h * dim + 8 * j);
  for (int t = 0; t < len; t++) {
    LSA_UNROLL
    for (int j = 0; j < P; j++) {
      Pair x = load16(v + t * dim + 16 * j);
      LSA_UNROLL
      for (int h = 0; h < H; h++) {
        f8 p = splat(w[h * pad + t]);
        s[h][2 * j] += p * x.a;
        s[h][2 * j + 1] += p * x.b;
      }
    }
    for (size_t b = 0; b < 16 * P * sizeof(T); b += 64) __builtin_prefetch((const char*)(next + t * dim) + b);
  }
  LSA_UNROLL
  for (int h = 0; h < H; h++)
    LSA_UNROLL
    for (int j = 0; j < 2 * P; j++) store(acc + h * dim + 8 * j, s[h][j]);
}

template <class T, int H>
LSA_INLINE void weighted_sum(const float* w, const T* v, const T* next, int len, int dim, int pad, float* acc) {
  int d = 0;
  for (; d + 32 <= dim; d += 32) weighted_columns<T, H, 2>(w, v + d, next + d, len, dim, pad, acc + d);
  if (d < dim) weighted_columns<T, H, 1>(w, v + d, next + d, len, dim, pad, acc + d);
}

// Scores of one page become weights 2^(score - top); the state is rescaled when the maximum rises.
LSA_INLINE void soften(const State& st, int h, int len, int dim, int pad) {
  float* w = st.weights + h * pad;
  f8 m = splat(-kInf);
  for (int t = len; t < ((len + 7) & ~7); t++) w[t] = -kInf;
  for (int t = 0; t < len; t += 8) m = max(load<f8>(w + t), m);
  float page_top = max(m);
  if (page_top > st.top[h]) {
    float shrink = exp2_neg(splat(st.top[h] - page_top))[0];
    st.top[h] = page_top;
    st.total[h] *= shrink;
    for (int d = 0; d < dim; d += 8) store(st.acc + h * dim + d, load<f8>(st.acc + h * dim + d) * shrink);
  }
  f8 top = splat(st.top[h]), total = {};
  for (int t = 0; t < len; t += 8) {
    f8 p = exp2_neg(load<f8>(w + t) - top);
    total += p;
    store(w + t, p);
  }
  st.total[h] += sum(total);
}

template <class T>
LSA_INLINE void attend_span(const Decode& a, const Span& span, const State& st) {
  const int dim = a.dim, pad = padded(a.chunk), group = a.group;
  const T* q = static_cast<const T*>(a.q) + span.row * a.q_stride + int64_t(span.head) * group * dim;
  for (int h = 0; h < group; h++) {
    for (int d = 0; d < dim; d++) st.q[h * dim + lane<T>(d)] = to_float(q[h * dim + d]) * (a.scale * kLog2e);
    st.top[h] = -kInf;
    st.total[h] = 0;
  }
  std::fill(st.acc, st.acc + group * dim, 0.f);

  const int32_t* slots = a.table + span.row * a.table_stride;
  const int64_t head = int64_t(span.head) * a.chunk * dim, values = int64_t(a.kv_heads) * a.chunk * dim;
  const T* keys = static_cast<const T*>(a.pool) + head;
  for (int e = span.begin; e < span.end; e++) {
    const int len = e ? a.chunk : a.first_len[span.row];
    const T* k = keys + slots[e] * a.slot_stride;
    const T* next = keys + slots[std::min(e + 1, span.end - 1)] * a.slot_stride;
    for (int h = 0; h < group;) {
      const float* qh = st.q + h * dim;
      float* w = st.weights + h * pad;
      switch (group - h) {
        case 1: scores<T, 1>(qh, k, k + values, len, dim, pad, w); h += 1; break;
        case 2: case 4: scores<T, 2>(qh, k, k + values, len, dim, pad, w); h += 2; break;
        default: scores<T, 3>(qh, k, k + values, len, dim, pad, w); h += 3;
      }
    }
    for (int h = 0; h < group; h++) soften(st, h, len, dim, pad);
    for (int h = 0; h < group;) {
      const float* w = st.weights + h * pad;
      float* acc = st.acc + h * dim;
      switch (group - h) {
        case 1: weighted_sum<T, 1>(w, k + values, next, len, dim, pad, acc); h += 1; break;
        case 2: case 4: weighted_sum<T, 2>(w, k + values, next, len, dim, pad, acc); h += 2; break;
        default: weighted_sum<T, 3>(w, k + values, next, len, dim, pad, acc); h += 3;
      }
    }
  }
}

template <class T>
void write_out(const Decode& a, int row, int head, const float* acc, const float* top, const float* total) {
  T* out = static_cast<T*>(a.out) + row * a.out_stride + int64_t(head) * a.group * a.dim;
  float* lse = a.lse + (int64_t(row) * a.kv_heads + head) * a.group;
  for (int h = 0; h < a.group; h++) {
    const bool empty = top[h] == -kInf && total[h] == 0;
    const float inv = empty ? 0.f : 1 / total[h];
    for (int d = 0; d < a.dim; d++) from_float(acc[h * a.dim + lane<T>(d)] * inv, out + h * a.dim + d);
    lse[h] = empty ? -kInf : top[h] * kLn2 + std::log(total[h]);
  }
}

template <class T>
void merge_parts(const Decode& a, const Merge& m, const float* parts, int part_floats, const State& st) {
  std::fill(st.acc, st.acc + a.group * a.dim, 0.f);
  for (int h = 0; h < a.group; h++) {
    float top = -kInf, total = 0;
    for (int i = 0; i < m.parts; i++) top = std::max(top, parts[(m.first_part + i) * part_floats + a.group * a.dim + h]);
    for (int i = 0; i < m.parts; i++) {
      const float* part = parts + (m.first_part + i) * part_floats;
      const float weight = std::exp2(part[a.group * a.dim + h] - top);
      total += weight * part[a.group * (a.dim + 1) + h];
      for (int d = 0; d < a.dim; d++) st.acc[h * a.dim + d] += weight * part[h * a.dim + d];
    }
    st.top[h] = top;
    st.total[h] = total;
  }
  write_out<T>(a, m.row, m.head, st.acc, st.top, st.total);
}

// Cuts the (row, kv head, entry) space into equal pieces, a few per thread, so that one long row keeps all busy.
struct Plan {
  std::vector<Span> spans;
  std::vector<int> piece_begin;  // index into spans
  std::vector<Merge> merges;
  int parts = 0;

  Plan(const Decode& a, int threads) {
    constexpr int kPiecesPerThread = 4, kMinEntries = 16;
    int64_t work = 0;
    for (int r = 0; r < a.n; r++) work += int64_t(a.counts[r]) * a.kv_heads;
    const int64_t pieces = threads == 1 ? 1 : int64_t(threads) * kPiecesPerThread;
    const int64_t size = std::max<int64_t>((work + pieces - 1) / pieces, kMinEntries);
    int64_t room = 0;
    for (int r = 0; r < a.n; r++)
      for (int head = 0; head < a.kv_heads; head++) {
        const size_t first = spans.size();
        int begin = 0;
        do {
          if (room == 0) {
            piece_begin.push_back(int(spans.size()));
            room = size;
          }
          const int end = int(std::min<int64_t>(a.counts[r], begin + room));
          spans.push_back({r, head, begin, end, -1});
          room -= end - begin;
          begin = end;
        } while (begin < a.counts[r]);
        const int count = int(spans.size() - first);
        if (count > 1) {
          merges.push_back({r, head, parts, count});
          for (size_t i = first; i < spans.size(); i++) spans[i].part = parts++;
        }
      }
    piece_begin.push_back(int(spans.size()));
  }
};

template <class T>
void decode(const Decode& a, int threads) {
  const Plan plan(a, threads);
  const int part_floats = a.group * (a.dim + 2);
  std::vector<float> parts(size_t(plan.parts) * part_floats);
  const int pieces = int(plan.piece_begin.size()) - 1;
#pragma omp parallel num_threads(std::max(1, std::min(threads, pieces)))
  {
    std::vector<float> scratch(State::floats(a.group, a.dim, a.chunk));
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t(63));
    const State st(aligned, a.group, a.dim, a.chunk);
#pragma omp for schedule(dynamic, 1)
    for (int p = 0; p < pieces; p++)
      for (int i = plan.piece_begin[p]; i < plan.piece_begin[p + 1]; i++) {
        const Span& span = plan.spans[i];
        attend_span<T>(a, span, st);
        if (span.part < 0)
          write_out<T>(a, span.row, span.head, st.acc, st.top, st.total);
        else {
          float* part = parts.data() + size_t(span.part) * part_floats;
          std::copy(st.acc, st.acc + a.group * a.dim, part);
          std::copy(st.top, st.top + a.group, part + a.group * a.dim);
          std::copy(st.total, st.total + a.group, part + a.group * (a.dim + 1));
        }
      }
#pragma omp for schedule(static)
    for (int i = 0; i < int(plan.merges.size()); i++) merge_parts<T>(a, plan.merges[i], parts.data(), part_floats, st);
  }
}

enum Fault { kCounts = 1, kFirstLen = 2, kSlot = 3 };

}  // namespace
}  // namespace lsa

// dtype: 0 float32, 1 bfloat16, 2 float16. Returns 0, or 4 * row + Fault with nothing written.
LSA_EXPORT int64_t lsa_paged_decode(int dtype, const void* q, const void* pool, const int32_t* table,
                                    const int32_t* counts, const int32_t* first_len, void* out, float* lse,
                                    int64_t q_stride, int64_t slot_stride, int64_t table_stride, int64_t out_stride,
                                    int n, int slots, int width, int kv_heads, int group, int chunk, int dim,
                                    float scale, int threads) {
  using namespace lsa;
  for (int64_t r = 0; r < n; r++) {
    if (counts[r] < 0 || counts[r] > width) return 4 * r + kCounts;
    if (counts[r] && (first_len[r] < 1 || first_len[r] > chunk)) return 4 * r + kFirstLen;
    for (int e = 0; e < counts[r]; e++) {
      const int32_t s = table[r * table_stride + e];
      if (s < 0 || s >= slots) return 4 * r + kSlot;
    }
  }
  const Decode a{q,        pool,        table,        counts,     first_len, out,      lse,   q_stride,
                 slot_stride, table_stride, out_stride, n, kv_heads,  group,    chunk, dim,
                 scale};
  if (dtype == 0) decode<float>(a, threads);
  if (dtype == 1) decode<bfloat>(a, threads);
  if (dtype == 2) decode<half>(a, threads);
  return 0;
}
