// SPDX-License-Identifier: MIT
// Vector operations that only the tiled path needs: permutations by lane, transposition, rounding to 16 bits, log.
#pragma once
#include "../simd.h"

namespace natten {
namespace {

template <class A> struct IndexOf {
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Integer;
  typedef Integer type __attribute__((vector_size(NATTEN_VECTOR_BYTES)));
};
template <class A> using Index = typename IndexOf<A>::type;  // one integer a lane

NATTEN_INLINE Vector<double> maximum(Vector<double> a, Vector<double> b) { return a > b ? a : b; }

// out[l] = v[index[l]]
template <class A> NATTEN_INLINE Vector<A> permute(Vector<A> v, Index<A> index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
  else return (Vector<A>)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
#else
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#endif
  Vector<A> out;
  for (int l = 0; l < kLanes<A>; ++l) out[l] = v[index[l]];
  return out;
#endif
}
// out[l] = the lanes of v, then those of w, at index[l]
template <class A> NATTEN_INLINE Vector<A> permute(Vector<A> v, Vector<A> w, Index<A> index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_permutex2var_ps((__m512)v, (__m512i)index, (__m512)w);
  else return (Vector<A>)_mm512_permutex2var_pd((__m512d)v, (__m512i)index, (__m512d)w);
#else
  constexpr int W = kLanes<A>;
  const Index<A> wrapped = index & (W - 1);
  return index < W ? permute<A>(v, wrapped) : permute<A>(w, wrapped);
#endif
}

// ---- four elements -------------------------------------------------------------------------------------------------
typedef float Quad __attribute__((vector_size(16)));
NATTEN_INLINE Quad load_four(const float* p) { Quad v; std::memcpy(&v, p, sizeof v); return v; }
NATTEN_INLINE Quad load_four(const bfloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(8)));
  typedef uint32_t Full __attribute__((vector_size(16)));
  Half h; std::memcpy(&h, p, sizeof h);
  return (Quad)(__builtin_convertvector(h, Full) << 16);
}
NATTEN_INLINE Quad load_four(const float16* p) {
#if defined(__F16C__)
  return (Quad)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#else
  return Quad{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
#endif
}
// Four elements of each of kLanes / 4 rows, one row per 128-bit part.
template <class T> NATTEN_INLINE Vector<float> load_parts(const T* const* row, int64_t at) {
#if NATTEN_VECTOR_BYTES == 64  // of shuffled() g++ 12 makes loads into registers, then shuffles of them
  __m512 v = _mm512_castps128_ps512((__m128)load_four(row[0] + at));
  v = _mm512_insertf32x4(v, (__m128)load_four(row[1] + at), 1);
  v = _mm512_insertf32x4(v, (__m128)load_four(row[2] + at), 2);
  return (Vector<float>)_mm512_insertf32x4(v, (__m128)load_four(row[3] + at), 3);
#elif NATTEN_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load_four(row[0] + at)), (__m128)load_four(row[1] + at), 1);
#else
  return load_four(row[0] + at);
#endif
}
// Within every 128-bit part: elements p and q of a, r - 4 and s - 4 of b.
template <int p, int q, int r, int s> NATTEN_INLINE Vector<float> shuffled_parts(Vector<float> a, Vector<float> b) {
#if NATTEN_VECTOR_BYTES == 64
  return shuffled<p, q, r + 12, s + 12, p + 4, q + 4, r + 16, s + 16, p + 8, q + 8, r + 20, s + 20, p + 12, q + 12, r + 24, s + 24>(a, b);
#elif NATTEN_VECTOR_BYTES == 32
  return shuffled<p, q, r + 4, s + 4, p + 4, q + 4, r + 8, s + 8>(a, b);
#else
  return shuffled<p, q, r, s>(a, b);
#endif
}
// Transposes 4x4 within every 128-bit part.
NATTEN_INLINE void transpose_parts(Vector<float> (&v)[4]) {
  const Vector<float> a = shuffled_parts<0, 1, 4, 5>(v[0], v[1]), b = shuffled_parts<2, 3, 6, 7>(v[0], v[1]);
  const Vector<float> c = shuffled_parts<0, 1, 4, 5>(v[2], v[3]), d = shuffled_parts<2, 3, 6, 7>(v[2], v[3]);
  v[0] = shuffled_parts<0, 2, 4, 6>(a, c), v[1] = shuffled_parts<1, 3, 5, 7>(a, c);
  v[2] = shuffled_parts<0, 2, 4, 6>(b, d), v[3] = shuffled_parts<1, 3, 5, 7>(b, d);
}

// ---- results -------------------------------------------------------------------------------------------------------
NATTEN_INLINE void store_narrow(double* p, Vector<double> v) { store(p, v); }
NATTEN_INLINE void store_narrow(float* p, Vector<float> v) { store(p, v); }
NATTEN_INLINE void store_narrow(bfloat16* p, Vector<float> v) {  // round to nearest even; NaN stays NaN
  typedef uint32_t Bits __attribute__((vector_size(NATTEN_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(NATTEN_VECTOR_BYTES / 2)));
  const Bits bits = (Bits)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector(v == v ? rounded : (Bits{} + 0x7fc0), Half);
  std::memcpy(p, &half, sizeof half);
}
NATTEN_INLINE void store_narrow(float16* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(v[i], p + i);
#endif
}
// The first `count` lanes.
template <class T> NATTEN_INLINE void store_narrow_part(T* p, Vector<Accumulate<T>> v, int count) {
  for (int i = 0; i < count; ++i) narrow(v[i], p + i);
}

// ln x of numbers that are at least 1 (absolute error 3e-7 below 100), -inf for 0: the exponent by bits, the mantissa in
// [0.71, 1.41) by the series of atanh.
NATTEN_INLINE Vector<float> log_of_sum(Vector<float> x) {
  typedef int32_t Bits __attribute__((vector_size(NATTEN_VECTOR_BYTES)));
  const Bits exponent = ((Bits)x - 0x3f3504f3) >> 23;
  const Vector<float> m = (Vector<float>)((Bits)x - (exponent << 23)), y = (m - 1.f) / (m + 1.f), z = y * y;
  Vector<float> p = z * 0.22222222f + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  p = p * z + 2.f;
  const Vector<float> ln = p * y + __builtin_convertvector(exponent, Vector<float>) * 0.69314718f;
  return x > 0.f ? ln : (x == 0.f ? splat(-__builtin_inff()) : x);  // NaN stays NaN
}
NATTEN_INLINE Vector<double> log_of_sum(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

}  // namespace
}  // namespace natten
