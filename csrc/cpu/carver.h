// SPDX-License-Identifier: MIT
// How kernels lay out their scratch.
#pragma once
#include <cstdint>

namespace natten {
namespace {

// A piece of scratch memory, cut up; with no memory it only measures.
struct Carver {
  char* memory;
  int64_t used = 0;
  template <class T> T* take(int64_t count) {
    const int64_t piece = used;
    used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;  // at least one line between pieces
    return memory ? reinterpret_cast<T*>(memory + piece) : nullptr;
  }
};

}  // namespace
}  // namespace natten
