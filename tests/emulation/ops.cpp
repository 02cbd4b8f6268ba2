// SPDX-License-Identifier: MIT
// The CUDA kernels behind ops of CPU tensors: `torch.ops.natten_emulated` runs on the emulator what `torch.ops.natten` runs on
// a GPU, front and kernels alike. The tests set the order in which warps run and read the findings.
#include "../../csrc/cuda/fronts.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/tiles/plan.h"

#include <cstring>

namespace natten::cuda {
namespace {

// From the first to the last number of a tensor.
void allow(const Rows& rows, int64_t batch, const int64_t* tokens, int64_t heads, int64_t dims, int64_t bytes) {
  if (!rows.data || batch * tokens[0] * tokens[1] * tokens[2] * heads * dims == 0) return;
  int64_t last = (batch - 1) * rows.batch + (heads - 1) * rows.head + (dims - 1) * rows.dim;
  for (int a = 0; a < kAxes; ++a) last += (tokens[a] - 1) * rows.token[a];
  emu::register_global(rows.data, size_t((last + 1) * bytes));
}

// Registers all that a problem has.
void allow_problem(const Problem& p, Dtype dtype, int64_t partials) {
  emu::buffers().clear();
  const int64_t wide = dtype == Dtype::float64 ? 8 : 4, bytes = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  const int64_t additional[] = {1, 1, p.additional}, table[] = {2 * p.axis[0].kernel - 1, 2 * p.axis[1].kernel - 1, 2 * p.axis[2].kernel - 1};
  const int64_t slots = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel + p.additional;
  for (const Rows* rows : {&p.query, &p.grad_query}) allow(*rows, p.batch, p.q_shape, p.heads, p.head_dim, bytes);
  for (const Rows* rows : {&p.out, &p.grad_out}) allow(*rows, p.batch, p.q_shape, p.heads, p.value_dim, bytes);
  for (const Rows* rows : {&p.slots_in, &p.slots_out}) allow(*rows, p.batch, p.q_shape, p.heads, slots, bytes);
  for (const Rows* rows : {&p.lse, &p.grad_lse, &p.delta, &p.row_lse}) allow(*rows, p.batch, p.q_shape, p.heads, 1, wide);
  for (const Rows* rows : {&p.key, &p.grad_key}) allow(*rows, p.batch, p.kv_shape, p.heads_kv, p.head_dim, bytes);
  for (const Rows* rows : {&p.value, &p.grad_value}) allow(*rows, p.batch, p.kv_shape, p.heads_kv, p.value_dim, bytes);
  for (const Rows* rows : {&p.additional_keys, &p.grad_additional_keys}) allow(*rows, p.batch, additional, p.heads_kv, p.head_dim, bytes);
  for (const Rows* rows : {&p.additional_values, &p.grad_additional_values}) allow(*rows, p.batch, additional, p.heads_kv, p.value_dim, bytes);
  allow(p.key_mask, p.batch, p.kv_shape, 1, 1, 1);
  Rows gradient = p.rpb;
  gradient.data = p.grad_rpb.data;
  for (const Rows* rows : {static_cast<const Rows*>(&p.rpb), static_cast<const Rows*>(&gradient)}) allow(*rows, 1, table, p.heads, 1, p.rpb_wide ? 4 : bytes);
  if (p.partials && partials) emu::register_global(p.partials, size_t(partials * wide));
}

struct Emulator {
  struct Guard { explicit Guard(const Tensor&) {} };
  static Stream stream(const Tensor&) { return nullptr; }
  static void expose(const Problem& p, Dtype dtype, int64_t partials) { allow_problem(p, dtype, partials); }
};

}  // namespace

STABLE_TORCH_LIBRARY(natten_emulated, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
  for (const char* schema : kUnfusedSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(natten_emulated, CPU, m) { register_kernels<Emulator>(m); }

}  // namespace natten::cuda

extern "C" __attribute__((visibility("default"))) void natten_emulation_set(int order, int landing, uint64_t seed) {
  emu::config() = {emu::Order(order), emu::Async(landing), seed, true};
}
// The device that kernels are chosen for, and what every launch reports; an empty error: launches run.
extern "C" __attribute__((visibility("default"))) void natten_emulation_device(int capability, int64_t shared_bytes, const char* error) {
  emu::device() = {capability, shared_bytes, error};
}
// Copies the findings since the last call, a line each.
extern "C" __attribute__((visibility("default"))) void natten_emulation_findings(char* text, size_t size) {
  std::string all;
  for (const auto& [line, count] : emu::findings()) all += line + " (" + std::to_string(count) + " times)\n";
  emu::findings().clear();
  strncpy(text, all.c_str(), size - 1);
  text[size - 1] = 0;
}
// The plan of the tensor-core kernels for three axes of {length, kernel, stride, dilation, causal}: rows, then columns.
extern "C" __attribute__((visibility("default"))) void natten_tile_plan(const int64_t* axes, int key_rows, int rows, int most, int64_t* plan) {
  natten::Problem p{};
  for (int a = 0; a < natten::kAxes; ++a) {
    p.axis[a] = {axes[5 * a], axes[5 * a + 1], axes[5 * a + 2], axes[5 * a + 3], axes[5 * a + 4] != 0};
    p.q_shape[a] = p.kv_shape[a] = axes[5 * a];
  }
  const natten::cuda::tiles::Plan chosen = natten::cuda::tiles::make_plan(p, key_rows != 0, rows, most);
  for (int a = 0; a < natten::kAxes; ++a) plan[a] = chosen.rows[a], plan[natten::kAxes + a] = chosen.columns[a];
}
