// SPDX-License-Identifier: MIT
// Vectors of one instruction set by GCC/Clang vector extensions; the width follows the flags of the including file.
// No std containers and everything in an unnamed namespace: an inline symbol of a wide object would be weak, and the
// linker might let older CPUs execute it (tests/test_packaging.py counts weak symbols).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define NATTEN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NATTEN_VECTOR_BYTES 32
#else
#define NATTEN_VECTOR_BYTES 16
#endif
#define NATTEN_INLINE inline __attribute__((always_inline))

namespace natten {
namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class A> struct VectorOf { typedef A type __attribute__((vector_size(NATTEN_VECTOR_BYTES))); };
template <class A> using Vector = typename VectorOf<A>::type;
template <class A> constexpr int kLanes = NATTEN_VECTOR_BYTES / int(sizeof(A));
// The type in which an element type is accumulated.
template <class T> using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of a and b, numbered through both; g++ 11, which compiles generated code, lacks the builtin.
template <int... Picked, class V> NATTEN_INLINE auto shuffled(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Picked...);
#else
  typedef std::remove_reference_t<decltype(a[0])> Element;
  typedef Element Out __attribute__((vector_size(sizeof...(Picked) * sizeof(Element))));
  constexpr int count = sizeof(V) / sizeof(Element);
  return Out{(Picked < count ? a[Picked % count] : b[Picked % count])...};
#endif
}

// ---- one element ---------------------------------------------------------------------------------------------------
NATTEN_INLINE double widen(double x) { return x; }
NATTEN_INLINE float widen(float x) { return x; }
#if defined(__F16C__)  // g++ 11 and clang 14, which compile generated code, have no _Float16
NATTEN_INLINE float widen(float16 x) { return _cvtsh_ss(x.bits); }
NATTEN_INLINE void narrow(float x, float16* p) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
#if defined(__aarch64__)
typedef __fp16 Binary16;  // g++ 12 has no _Float16 there
#else
typedef _Float16 Binary16;
#endif
NATTEN_INLINE float widen(float16 x) { Binary16 h; std::memcpy(&h, &x, 2); return float(h); }
NATTEN_INLINE void narrow(float x, float16* p) { const Binary16 h = Binary16(x); std::memcpy(p, &h, 2); }
#endif
NATTEN_INLINE float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f; std::memcpy(&f, &bits, 4); return f;
}
NATTEN_INLINE void narrow(double x, double* p) { *p = x; }
NATTEN_INLINE void narrow(float x, float* p) { *p = x; }
NATTEN_INLINE void narrow(float x, bfloat16* p) {  // round to nearest even; NaN stays NaN
  uint32_t bits; std::memcpy(&bits, &x, 4);
  p->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- loads ---------------------------------------------------------------------------------------------------------
NATTEN_INLINE Vector<float> load(const float* p) { Vector<float> v; std::memcpy(&v, p, sizeof v); return v; }
NATTEN_INLINE Vector<double> load(const double* p) { Vector<double> v; std::memcpy(&v, p, sizeof v); return v; }
NATTEN_INLINE Vector<float> load(const bfloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(NATTEN_VECTOR_BYTES / 2)));
  typedef uint32_t Full __attribute__((vector_size(NATTEN_VECTOR_BYTES)));
  Half h; std::memcpy(&h, p, sizeof h);
  return (Vector<float>)(__builtin_convertvector(h, Full) << 16);
}
NATTEN_INLINE Vector<float> load(const float16* p) {
#if defined(__AVX512F__)  // GCC 12 converts _Float16 vectors one by one
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
// The first `count` lanes (fewer than all), zeros behind them; reads nothing past them. Masked loads where the CPU has
// them: with a copy through memory a head dim of 8 took 5 times as long as 16 in 512-bit vectors, with them 1.1 times.
template <class T> NATTEN_INLINE Vector<Accumulate<T>> load_part(const T* p, int count) {
#if defined(__AVX512F__)
  const unsigned lanes = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>) return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16(lanes), p);
  if constexpr (std::is_same_v<T, double>) return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8(lanes), p);
  if constexpr (std::is_same_v<T, float16>)
    return (Vector<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(lanes), p));
  if constexpr (std::is_same_v<T, bfloat16>)
    return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(lanes), p)), 16);
#else
#if defined(__AVX2__)
  static const int64_t on[8] = {-1, -1, -1, -1, 0, 0, 0, 0};  // as int32: eight ones, then eight zeros
  const int32_t* const words = reinterpret_cast<const int32_t*>(on);
  if constexpr (std::is_same_v<T, float>)
    return (Vector<float>)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(words + 8 - count)));
  if constexpr (std::is_same_v<T, double>)
    return (Vector<double>)_mm256_maskload_pd(p, _mm256_loadu_si256((const __m256i*)(on + 4 - count)));
#endif
  T padded[kLanes<Accumulate<T>>] = {};
  std::memcpy(padded, p, size_t(count) * sizeof(T));
  return load(padded);
#endif
}
template <class A> NATTEN_INLINE void store(A* p, Vector<A> v) { std::memcpy(p, &v, sizeof v); }
template <class A> NATTEN_INLINE Vector<A> splat(A x) { return x - Vector<A>{}; }

// ---- arithmetic ----------------------------------------------------------------------------------------------------
// max(a, b) is b where either is NaN, as the instruction has it.
NATTEN_INLINE Vector<float> maximum(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)  // GCC turns the ?: form into compare and blend
  return (Vector<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^y for y <= 0: exactly 1 for 0, exactly 0 for -inf, NaN for NaN, relative error 1.6e-7. Below -126 the result is 0
// instead of a subnormal number. The magic constant leaves round(y) + 127 in the low mantissa bits, so that the exponent
// is one shift away.
NATTEN_INLINE Vector<float> exp2_negative(Vector<float> y) {
  typedef int32_t Bits __attribute__((vector_size(NATTEN_VECTOR_BYTES)));
  y = maximum(splat(-127.f), y);  // this order keeps a NaN
  const Vector<float> magic = splat(12582912.f + 127.f);
  const Vector<float> u = y + magic, f = y - (u - magic);
  Vector<float> p = f * 1.326952130e-3f + 9.671291336e-3f;
  p = p * f + 5.550710857e-2f;
  p = p * f + 2.402224690e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.f;
  return p * (Vector<float>)((Bits)u << 23);
}
// The same in float64, relative error 2e-16: the series of 2^f to the 13th power. Below -1022 the result is 0.
NATTEN_INLINE Vector<double> exp2_negative(Vector<double> y) {
  typedef int64_t Bits __attribute__((vector_size(NATTEN_VECTOR_BYTES)));
  static const double series[] = {
      1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708116e-10, 7.0549116208011234e-09,
      1.01780860092397e-07, 1.321548679014431e-06, 1.5252733804059841e-05, 0.00015403530393381609,
      0.0013333558146428443, 0.0096181291076284769, 0.055504108664821583, 0.24022650695910072, 0.69314718055994529};
  const Vector<double> low = splat(-1023.);
  y = y < low ? low : y;  // keeps a NaN
  const Vector<double> magic = splat(6755399441055744. + 1023.);
  const Vector<double> u = y + magic, f = y - (u - magic);
  Vector<double> p = splat(series[0]);
#pragma GCC unroll 13
  for (int i = 1; i < 13; ++i) p = p * f + series[i];
  p = p * f + 1.;
  return p * (Vector<double>)((Bits)u << 52);
}
// e^x for x <= 0, as above. In float64 by the C library: the product with log2 e would cost digits.
NATTEN_INLINE Vector<float> exp_negative(Vector<float> x) { return exp2_negative(x * 1.44269504f); }
NATTEN_INLINE Vector<double> exp_negative(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class A> NATTEN_INLINE A sum(Vector<A> v) {
  A total = v[0];
  for (int i = 1; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// The four sums of four vectors, to out[0..3].
NATTEN_INLINE void sums_of_four(const Vector<double>* v, double* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum<double>(v[i]);
}
NATTEN_INLINE void sums_of_four(const Vector<float>* v, float* out) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad q[4];
  for (int i = 0; i < 4; ++i) {
#if NATTEN_VECTOR_BYTES == 64
    const auto half = shuffled<0, 1, 2, 3, 4, 5, 6, 7>(v[i], v[i]) +
        shuffled<8, 9, 10, 11, 12, 13, 14, 15>(v[i], v[i]);
#elif NATTEN_VECTOR_BYTES == 32
    const auto half = v[i];
#endif
#if NATTEN_VECTOR_BYTES == 16
    q[i] = v[i];
#else
    q[i] = shuffled<0, 1, 2, 3>(half, half) + shuffled<4, 5, 6, 7>(half, half);
#endif
  }
  const Quad a = shuffled<0, 4, 1, 5>(q[0], q[1]) + shuffled<2, 6, 3, 7>(q[0], q[1]);
  const Quad b = shuffled<0, 4, 1, 5>(q[2], q[3]) + shuffled<2, 6, 3, 7>(q[2], q[3]);
  const Quad total = shuffled<0, 1, 4, 5>(a, b) + shuffled<2, 3, 6, 7>(a, b);
  std::memcpy(out, &total, sizeof total);
}

}  // namespace
}  // namespace natten
