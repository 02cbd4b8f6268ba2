// SPDX-License-Identifier: MIT
// Rows of interleaved pairs, taken apart and joined again: for generated code (lowerings/pairs.py).
#pragma once
#include <utility>

#include "simd.h"

namespace natten {
namespace {

template <int bytes> struct BitsOf;
template <> struct BitsOf<1> { typedef uint8_t type; };
template <> struct BitsOf<2> { typedef uint16_t type; };
template <> struct BitsOf<4> { typedef uint32_t type; };
template <> struct BitsOf<8> { typedef uint64_t type; };
// Numbers are moved as bits, so that any type of torch's goes; the rest of a row by 16 bytes, which most head dims divide by.
template <class T> using Bits = typename BitsOf<sizeof(T)>::type;
template <class T> using WideBits = Vector<Bits<T>>;
template <class T> struct Narrow { typedef Bits<T> type __attribute__((vector_size(16))); };
template <class T> using NarrowBits = typename Narrow<T>::type;

// The even elements of a, then the odd ones of b.
template <class V, int... I> NATTEN_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int count = sizeof...(I);
  return shuffled<2 * I + (2 * I >= count)...>(a, b);
}
template <class V, int... I> NATTEN_INLINE void join_vectors(V first, V second, V* a, V* b, std::integer_sequence<int, I...>) {
  constexpr int count = sizeof...(I);
  *a = shuffled<I / 2 + I % 2 * count...>(first, second), *b = shuffled<count / 2 + I / 2 + I % 2 * count...>(first, second);
}

// in[0], in[2], .., in[2 * count - 2], and not a number more is read: the second vector overlaps the first by one. From i on,
// as far as whole vectors go; where that is, is returned.
template <class V, class T> NATTEN_INLINE int take_vectors(const T* in, int i, int count, T* out) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  for (; i + lanes <= count; i += lanes) {
    V a, b;
    std::memcpy(&a, in + 2 * i, sizeof a), std::memcpy(&b, in + 2 * i + lanes - 1, sizeof b);
    const V taken = every_second(a, b, std::make_integer_sequence<int, lanes>{});
    std::memcpy(out + i, &taken, sizeof taken);
  }
  return i;
}
template <class T> NATTEN_INLINE void take_every_second(const T* in, int count, T* out) {
  int i = take_vectors<WideBits<T>>(in, 0, count, out);
  for (i = take_vectors<NarrowBits<T>>(in, i, count, out); i < count; ++i) out[i] = in[2 * i];
}

template <class V, class T> NATTEN_INLINE int join_to_vectors(const T* first, const T* second, int i, int count, T* pairs) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  for (; i + lanes <= count; i += lanes) {
    V in[2], out[2];
    std::memcpy(&in[0], first + i, sizeof(V)), std::memcpy(&in[1], second + i, sizeof(V));
    join_vectors(in[0], in[1], &out[0], &out[1], std::make_integer_sequence<int, lanes>{});
    std::memcpy(pairs + 2 * i, out, sizeof out);
  }
  return i;
}
template <class T> NATTEN_INLINE void join_pairs(const T* first, const T* second, int count, T* pairs) {
  int i = join_to_vectors<WideBits<T>>(first, second, 0, count, pairs);
  i = join_to_vectors<NarrowBits<T>>(first, second, i, count, pairs);
  for (; i < count; ++i) pairs[2 * i] = first[i], pairs[2 * i + 1] = second[i];
}

}  // namespace
}  // namespace natten
