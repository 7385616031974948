// Small fixed-size vectors on GCC/Clang vector extensions: AVX2 on x86-64-v3, pairs of NEON registers on ARM.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lsa {

#define LSA_INLINE inline __attribute__((always_inline))
// Before a loop of constant length whose body indexes an array of accumulators: keeps those in registers.
#define LSA_UNROLL _Pragma("GCC unroll 16")

using f8 = float __attribute__((vector_size(32)));
using f4 = float __attribute__((vector_size(16)));
using i8 = int32_t __attribute__((vector_size(32)));
using u8 = uint32_t __attribute__((vector_size(32)));

#if defined(__aarch64__)
using half = __fp16;
#else
using half = _Float16;
#endif
struct bfloat {
  uint16_t bits;
};

template <class V>
LSA_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LSA_INLINE void store(float* p, f8 v) { std::memcpy(p, &v, sizeof v); }
LSA_INLINE f8 splat(float x) { return f8{x, x, x, x, x, x, x, x}; }

LSA_INLINE f8 load_half8(const half* p) {
#if defined(__F16C__)
  return (f8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  using h8 = half __attribute__((vector_size(16)));
  return __builtin_convertvector(load<h8>(p), f8);
#endif
}

// Sixteen elements as two vectors. bf16 comes out as even and odd elements, since that takes one shift and one mask;
// lane(d) says where element d of a row lands, so that queries and outputs can be kept in the same order.
struct Pair {
  f8 a, b;
};
LSA_INLINE Pair load16(const float* p) { return {load<f8>(p), load<f8>(p + 8)}; }
LSA_INLINE Pair load16(const half* p) { return {load_half8(p), load_half8(p + 8)}; }
LSA_INLINE Pair load16(const bfloat* p) {
  u8 x = load<u8>(p);
  return {(f8)(x << 16), (f8)(x & 0xffff0000u)};
}
template <class T>
LSA_INLINE int lane(int d) {
  return d;
}
template <>
LSA_INLINE int lane<bfloat>(int d) {
  return (d & ~15) + ((d & 15) >> 1) + (d & 1) * 8;
}

LSA_INLINE float to_float(float x) { return x; }
LSA_INLINE float to_float(half x) { return static_cast<float>(x); }
LSA_INLINE float to_float(bfloat x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  return load<float>(&u);
}
LSA_INLINE void from_float(float x, float* p) { *p = x; }
LSA_INLINE void from_float(float x, half* p) { *p = static_cast<half>(x); }
LSA_INLINE void from_float(float x, bfloat* p) {
  const uint32_t u = load<uint32_t>(&x);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // round to nearest even
}

// Sums of the lanes of four vectors.
LSA_INLINE f4 sum_each(f8 a, f8 b, f8 c, f8 d) {
#if defined(__AVX2__)
  __m256 t = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  return (f4)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#else
  f4 r;
  const f8 v[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++)
    r[i] = ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) + ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
  return r;
#endif
}
template <int... I>
LSA_INLINE f8 shuffled(f8 v) {
  return __builtin_shufflevector(v, v, I...);
}
LSA_INLINE float sum(f8 v) {
  v += shuffled<4, 5, 6, 7, 0, 1, 2, 3>(v);
  v += shuffled<2, 3, 0, 1, 6, 7, 4, 5>(v);
  return v[0] + v[1];
}
LSA_INLINE f8 max(f8 a, f8 b) { return a > b ? a : b; }
LSA_INLINE float max(f8 v) {
  v = max(v, shuffled<4, 5, 6, 7, 0, 1, 2, 3>(v));
  v = max(v, shuffled<2, 3, 0, 1, 6, 7, 4, 5>(v));
  return v[0] > v[1] ? v[0] : v[1];
}

// 2^x for x <= 0 to 2e-7 relative; 0 below 2^-126; NaN stays NaN. 2^x = 2^n * 2^f, |f| <= 1/2, Taylor series in f ln 2.
LSA_INLINE f8 exp2_neg(f8 x) {
  const f8 magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  f8 t = x + magic;
  i8 n = (i8)t - (i8)magic;
  f8 f = x - (t - magic);
  f8 p = splat(1.5252734e-5f);
  p = p * f + splat(1.5403530e-4f);
  p = p * f + splat(1.3333558e-3f);
  p = p * f + splat(9.6181291e-3f);
  p = p * f + splat(5.5504109e-2f);
  p = p * f + splat(2.4022651e-1f);
  p = p * f + splat(6.9314718e-1f);
  p = p * f + splat(1.f);
  f8 r = (f8)((i8)p + (n << 23));
  return x < splat(-126.f) ? splat(0.f) : r;
}

// log2 x for positive normal x to half an ulp of its n and 1e-7 more; NaN stays NaN. x = 2^n * m,
// sqrt(1/2) <= m < sqrt(2), and log2 m is an odd polynomial in (m - 1) / (m + 1).
LSA_INLINE f8 log2_normal(f8 x) {
  const i8 root = (i8)splat(0.70710677f);
  const i8 n = ((i8)x - root) >> 23;
  const f8 m = (f8)((i8)x - (n << 23));
  const f8 r = (m - splat(1.f)) / (m + splat(1.f));
  const f8 s = r * r;
  f8 p = splat(0.32059889f);
  p = p * s + splat(0.41219857f);
  p = p * s + splat(0.57707801f);
  p = p * s + splat(0.96179669f);
  p = p * s + splat(2.8853901f);
  const f8 y = __builtin_convertvector(n, f8) + p * r;
  return x == x ? y : x;
}

}  // namespace lsa
