// SPDX-License-Identifier: MIT
// The CPU kernels without torch and Python, for platforms that only an emulator runs: the tiled against the general
// kernels in every dtype, and the general ones against the definition in double. Prints one line a problem; tests/
// test_portable.py builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/simd.h"

namespace natten {
namespace {

using Buffer = std::vector<char>;

// [batch, axes, heads, dim] or, with dim 0, [batch, axes, heads].
Rows dense(Buffer& memory, const Problem& p, int64_t heads, int64_t dim, size_t element) {
  Rows r;
  int64_t step = dim ? dim : 1;
  r.dim = dim ? 1 : 0, r.head = step, step *= heads;
  for (int a = kAxes - 1; a >= 0; --a) r.token[a] = step, step *= p.q_shape[a];
  r.batch = step;
  memory.assign(size_t(p.batch * step) * element, 0);
  r.data = memory.data();
  return r;
}

template <class T> void fill(Buffer& memory, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  T* const at = reinterpret_cast<T*>(memory.data());
  for (size_t i = 0; i < memory.size() / sizeof(T); ++i) narrow(Accumulate<T>(normal(generator)), at + i);
}
template <class T> double distance(const Buffer& one, const Buffer& other) {
  double most = 0;
  for (size_t i = 0; i < one.size() / sizeof(T); ++i) {
    const double gap = std::fabs(double(widen(reinterpret_cast<const T*>(one.data())[i])) - double(widen(reinterpret_cast<const T*>(other.data())[i])));
    most = gap <= most ? most : gap;  // a NaN counts
  }
  return most;
}

struct Results {
  Buffer out, lse, query, key, value;
};

// Forward and backward by one family of kernels, all items in one share.
template <class T> Results run(Problem p, cpu::Dtype dtype, bool tiled) {
  using A = Accumulate<T>;
  Results r;
  Buffer delta, row_lse, sum_key, sum_value;
  p.out = dense(r.out, p, p.heads, p.value_dim, sizeof(T)), p.lse = dense(r.lse, p, p.heads, 0, sizeof(A));
  p.grad_query = dense(r.query, p, p.heads, p.head_dim, sizeof(T));
  p.grad_key = dense(r.key, p, p.heads_kv, p.head_dim, sizeof(T)), p.grad_value = dense(r.value, p, p.heads_kv, p.value_dim, sizeof(T));
  p.delta = dense(delta, p, p.heads, 0, sizeof(A)), p.row_lse = dense(row_lse, p, p.heads, 0, sizeof(A));
  p.sum_key = dense(sum_key, p, p.heads_kv, (p.head_dim + 15) / 16 * 16, sizeof(A));
  p.sum_value = dense(sum_value, p, p.heads_kv, (p.value_dim + 15) / 16 * 16, sizeof(A));
  auto pass = [&](cpu::Pass run, int64_t items, int64_t bytes) {
    void* const scratch = std::aligned_alloc(64, size_t((bytes + 127) / 64 * 64));
    run(p, scratch, 0, 0, items);
    std::free(scratch);
  };
  const cpu::ForwardKernels forward = tiled ? cpu::tiled_forward_kernels(dtype) : cpu::forward_kernels(dtype);
  pass(forward.forward, forward.query_items(p), forward.scratch_bytes(p));
  if (tiled) {
    const cpu::TiledBackwardKernels backward = cpu::tiled_backward_kernels(dtype);
    for (int colour = 0; colour < 4; ++colour) pass(backward.backward[colour], backward.owners(p, colour), backward.scratch_bytes(p));
    pass(backward.narrow, p.batch * p.kv_shape[0] * p.kv_shape[1] * p.kv_shape[2], 0);
  } else {
    const cpu::BackwardKernels backward = cpu::backward_kernels(dtype);
    pass(backward.query, backward.query_items(p), backward.scratch_bytes(p));
    pass(backward.key, backward.key_items(p), backward.scratch_bytes(p));
  }
  return r;
}

// One output row by the definition, in double.
void attend(const Problem& p, int64_t b, int64_t h, const int64_t* token, std::vector<double>& out) {
  auto row = [&](const Rows& r, int64_t head, const int64_t* at) {
    return static_cast<const double*>(r.data) + b * r.batch + head * r.head + at[0] * r.token[0] + at[1] * r.token[1] + at[2] * r.token[2];
  };
  Span span[kAxes];
  for (int a = 0; a < kAxes; ++a) span[a] = window(p.axis[a], token[a]);
  const int64_t head_kv = h / (p.heads / p.heads_kv);
  const double* const query = row(p.query, h, token);
  double total = 0;
  out.assign(size_t(p.value_dim), 0);
  for (int64_t z = span[0].first; z < span[0].end; ++z)
    for (int64_t y = span[1].first; y < span[1].end; ++y)
      for (int64_t x = span[2].first; x < span[2].end; ++x) {
        const int64_t at[kAxes] = {span[0].group + p.axis[0].dilation * z, span[1].group + p.axis[1].dilation * y, span[2].group + p.axis[2].dilation * x};
        double score = 0;
        for (int64_t d = 0; d < p.head_dim; ++d) score += query[d] * row(p.key, head_kv, at)[d];
        const double weight = std::exp(score * p.scale);  // small logits: no shift needed
        total += weight;
        for (int64_t d = 0; d < p.value_dim; ++d) out[size_t(d)] += weight * row(p.value, head_kv, at)[d];
      }
  for (double& number : out) number /= total;
}

double distance_to_definition(const Problem& p, const Buffer& have) {
  double most = 0;
  std::vector<double> want;
  const double* at = reinterpret_cast<const double*>(have.data());
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < p.q_shape[0] * p.q_shape[1] * p.q_shape[2]; ++i)
      for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t token[kAxes] = {i / (p.q_shape[1] * p.q_shape[2]), i / p.q_shape[2] % p.q_shape[1], i % p.q_shape[2]};
        attend(p, b, h, token, want);
        for (double number : want) most = std::fmax(most, std::fabs(number - *at++));
      }
  return most;
}

template <class T> bool check(Problem p, cpu::Dtype dtype, const char* name, double tolerance) {
  Buffer query, key, value, gradient;
  p.query = dense(query, p, p.heads, p.head_dim, sizeof(T)), p.key = dense(key, p, p.heads_kv, p.head_dim, sizeof(T));
  p.value = dense(value, p, p.heads_kv, p.value_dim, sizeof(T)), p.grad_out = dense(gradient, p, p.heads, p.value_dim, sizeof(T));
  fill<T>(query, 1), fill<T>(key, 2), fill<T>(value, 3), fill<T>(gradient, 4);
  const Results tiled = run<T>(p, dtype, true), general = run<T>(p, dtype, false);
  double gap = std::fmax(distance<T>(tiled.out, general.out), distance<Accumulate<T>>(tiled.lse, general.lse));
  gap = std::fmax(gap, std::fmax(distance<T>(tiled.query, general.query), std::fmax(distance<T>(tiled.key, general.key), distance<T>(tiled.value, general.value))));
  if (dtype == cpu::Dtype::float64) gap = std::fmax(gap, distance_to_definition(p, general.out));
  std::printf("%s %lldx%lldx%lld %s: %.1e\n", gap <= tolerance ? "ok" : "WRONG", (long long)p.q_shape[0], (long long)p.q_shape[1], (long long)p.q_shape[2], name, gap);
  return gap <= tolerance;
}

bool check_all(const Axis (&axis)[kAxes], int64_t heads_kv, int64_t head_dim, int64_t value_dim) {
  Problem p{};
  p.batch = 2, p.heads = 4, p.heads_kv = heads_kv, p.head_dim = head_dim, p.value_dim = value_dim, p.scale = 0.3;
  for (int a = 0; a < kAxes; ++a) p.axis[a] = axis[a], p.q_shape[a] = p.kv_shape[a] = axis[a].length;
  bool right = check<double>(p, cpu::Dtype::float64, "float64", 1e-13);
  right &= check<float>(p, cpu::Dtype::float32, "float32", 1e-5);
  right &= check<float16>(p, cpu::Dtype::float16, "float16", 2e-2);
  return check<bfloat16>(p, cpu::Dtype::bfloat16, "bfloat16", 1e-1) && right;
}

}  // namespace
}  // namespace natten

int main() {
  using natten::check_all;
  const natten::Axis none{1, 1, 1, 1, false};
  bool right = check_all({none, none, {37, 9, 1, 1, false}}, 4, 8, 8);
  right &= check_all({none, {13, 5, 1, 2, false}, {21, 6, 2, 1, false}}, 2, 12, 5);
  right &= check_all({none, {9, 3, 1, 1, true}, {18, 7, 1, 2, true}}, 4, 16, 16);
  right &= check_all({{5, 3, 1, 1, false}, {6, 2, 2, 3, false}, {9, 4, 1, 1, true}}, 1, 20, 24);
  std::printf("vectors of %d bytes\n", natten::cpu::vector_bytes());
  return right ? 0 : 1;
}
