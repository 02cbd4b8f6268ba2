// SPDX-License-Identifier: MIT
// Fused attention over lines of different lengths: the values of a batch one after the other, [tokens, heads, dim], and the
// offsets at which samples begin. Every sample is a problem of its own for the kernels of neighborhood_attention.cpp; the
// rules of the op are in natten_ops/ops/jagged.py.
#include "cpu_passes.h"

namespace natten {
namespace {

// The tokens of one sample as a batch of one.
Tensor sample_of(const Tensor& values, int64_t begin, int64_t count) {
  Tensor whole = values;
  return torch::stable::unsqueeze(torch::stable::narrow(whole, 0, begin, count), 0);
}
OptionalTensor entry_of(const OptionalTensor& rows, int64_t sample) {
  if (!rows) return rows;
  Tensor whole = *rows;
  return torch::stable::narrow(whole, 0, sample, 1);
}

struct Jagged {
  const Tensor &query, &key, &value, &offsets;
  const Windows windows;
  const std::optional<double>& scale;
  const OptionalTensor &additional_keys, &additional_values, &rpb;

  int64_t samples() const { return offsets.size(0) - 1; }
  int64_t begin(int64_t sample) const { return static_cast<const int64_t*>(offsets.data_ptr())[sample]; }
  int64_t count(int64_t sample) const { return begin(sample + 1) - begin(sample); }
  Tensor tokens(const Tensor& values, int64_t sample) const { return sample_of(values, begin(sample), count(sample)); }
};

void check_values(const char* name, const Tensor& values, const Jagged& j) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == j.query.size(0), "natten: ", name, " has ", values.dim(), " dims and ",
                  values.dim() > 0 ? values.size(0) : 0, " tokens, expected [", j.query.size(0), ", heads, head dim]");
}

void check(const Jagged& j) {
  STD_TORCH_CHECK(j.query.dim() == 3, "natten: query has ", j.query.dim(), " dims, expected 3: [tokens, heads, head dim]");
  check_values("key", j.key, j);
  check_values("value", j.value, j);
  check_windows(j.windows, 1);
  STD_TORCH_CHECK(j.offsets.dim() == 1 && j.offsets.size(0) >= 1 && j.offsets.scalar_type() == ScalarType::Long && j.offsets.is_contiguous(),
                  "natten: offsets must be a contiguous int64 tensor [samples + 1]");
  check_device("offsets", j.offsets, j.query);
  const int64_t span = j.windows.kernel_size[0], tokens = j.query.size(0);
  STD_TORCH_CHECK(j.begin(0) == 0 && j.begin(j.samples()) == tokens, "natten: offsets begin at ", j.begin(0), " and end at ",
                  j.begin(j.samples()), ", expected 0 and ", tokens, ", the number of tokens");
  for (int64_t i = 0; i < j.samples(); ++i) {
    STD_TORCH_CHECK(j.count(i) >= 0 && j.begin(i + 1) <= tokens, "natten: offsets[", i + 1, "]=", j.begin(i + 1), " must lie in [", j.begin(i), ", ", tokens, "]");
    STD_TORCH_CHECK(span <= j.count(i) / j.windows.dilation[0], "natten: kernel_size[0]=", span, " with dilation[0]=", j.windows.dilation[0],
                    " spans more than the ", j.count(i), " tokens of sample ", i);
  }
  for (const OptionalTensor* rows : {&j.additional_keys, &j.additional_values})
    STD_TORCH_CHECK(!*rows || ((*rows)->dim() == 4 && (*rows)->size(0) == j.samples()), "natten: additional tokens have ",
                    *rows ? (*rows)->dim() : 0, " dims, expected [", j.samples(), " samples, tokens, heads, dim]");
  if (j.rpb) check_dtype("rpb", *j.rpb, lse_dtype(j.query));  // its gradient is summed over the samples in that type
}

// Calls visit(problem, sample) for the checked problem of every sample; what it sets is kept.
template <class Visit> std::vector<Problem> make_problems(const Jagged& j, const Visit& visit) {
  static const Integers none;
  static const OptionalTensor no_mask;
  std::vector<Problem> problems;
  problems.reserve(size_t(j.samples()));
  for (int64_t i = 0; i < j.samples(); ++i) {
    const Tensor query = j.tokens(j.query, i), key = j.tokens(j.key, i), value = j.tokens(j.value, i);
    const OptionalTensor keys = entry_of(j.additional_keys, i), values = entry_of(j.additional_values, i);
    const Arguments a{query, key, value, j.windows.kernel_size, j.windows.stride, j.windows.dilation, j.windows.is_causal, j.scale,
                      keys, values, j.rpb, no_mask, none, none, none};
    check(a);
    problems.push_back(make_problem(a));
    visit(problems.back(), i);
  }
  return problems;
}

bool all_tiled(const std::vector<Problem>& problems, Dtype dtype) {
  for (const Problem& p : problems)
    if (!takes_tiled(p, dtype, kChoose)) return false;
  return true;
}

// Many samples share the threads out among them; of a few each uses all threads. The numbers are the same.
template <class Run> void for_samples(const std::vector<Problem>& problems, const Run& run_one) {
  const int64_t count = int64_t(problems.size());
  if (count >= 2 * int64_t(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run_one(problems[size_t(i)]);
    });
  } else {
    for (const Problem& p : problems) run_one(p);
  }
}

Rows batch_rows(const Tensor& sample, bool has_dim) { return rows_of(sample, true, 1, true, has_dim); }

std::tuple<Tensor, Tensor> jagged_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets, Integers kernel_size, Integers stride,
    Integers dilation, Flags is_causal, std::optional<double> scale, OptionalTensor additional_keys, OptionalTensor additional_values,
    OptionalTensor rpb) {
  rpb = dense(rpb);
  const Jagged j{query, key, value, offsets, {kernel_size, stride, dilation, is_causal}, scale, additional_keys, additional_values, rpb};
  check(j);
  const Tensor out = torch::stable::new_empty(query, Integers{query.size(0), query.size(1), value.size(2)});
  const Tensor lse = torch::stable::new_empty(query, Integers{query.size(0), query.size(1)}, lse_dtype(query));
  const std::vector<Problem> problems = make_problems(j, [&](Problem& p, int64_t i) {
    p.out = batch_rows(j.tokens(out, i), true), p.lse = batch_rows(j.tokens(lse, i), false);
  });
  if (lse.numel() == 0) return {out, lse};
  const Dtype dtype = dtype_of(query);
  const cpu::ForwardKernels kernels = all_tiled(problems, dtype) ? cpu::tiled_forward_kernels(dtype) : cpu::forward_kernels(dtype);
  for_samples(problems, [&](const Problem& p) { run(kernels.forward, p, kernels.query_items(p), kernels.scratch_bytes(p), work_of(p)); });
  return {out, lse};
}

// What a backward needs beside the problems themselves; all of it lives as long as they run.
struct Buffers {
  OptionalTensor sum_key, sum_value, delta, row_lse, partials;
  OptionalTensor tables;  // a gradient of the bias table for each sample
};

// Gradients of all samples together; size 0 where one is not wanted.
std::vector<Tensor> make_gradients(const Jagged& j, const Flags& needed, bool empty) {
  const Tensor* inputs[kGradients] = {&j.query, &j.key, &j.value, j.rpb ? &*j.rpb : nullptr,
                                      j.additional_keys ? &*j.additional_keys : nullptr, j.additional_values ? &*j.additional_values : nullptr};
  std::vector<Tensor> gradients;
  for (int i = 0; i < kGradients; ++i) {
    const bool made = needed[i] && inputs[i];
    gradients.push_back(torch::stable::new_empty(made ? *inputs[i] : j.query, made ? sizes_of(*inputs[i]) : Integers{0}));
    if (made && empty) torch::stable::zero_(gradients.back());
  }
  return gradients;
}

// A sample's rows of the gradients that are wanted.
void set_gradients(Problem& p, const Jagged& j, const Flags& needed, const std::vector<Tensor>& g, const OptionalTensor& tables, int64_t sample) {
  Rows* const of_tokens[] = {&p.grad_query, &p.grad_key, &p.grad_value};
  for (int n = 0; n < 3; ++n)
    if (needed[n] && g[n].numel() > 0) *of_tokens[n] = batch_rows(j.tokens(g[n], sample), true);
  if (tables) p.grad_rpb.data = entry_of(tables, sample)->data_ptr();
  if (needed[kAdditionalKeys] && p.additional) p.grad_additional_keys = batch_rows(*entry_of(g[kAdditionalKeys], sample), true);
  if (needed[kAdditionalValues] && p.additional) p.grad_additional_values = batch_rows(*entry_of(g[kAdditionalValues], sample), true);
}

// Makes what the passes of one path need, and gives each problem its share.
void set_buffers(std::vector<Problem>& problems, const Jagged& j, const Tensor& lse, std::vector<Tensor>& g, bool tiled, Buffers& b) {
  const Problem& first = problems[0];
  const int64_t table = first.grad_rpb.data ? j.rpb->numel() : 0;
  const int64_t partial = kParts * (tiled ? cpu::tiled_backward_kernels(dtype_of(j.query)).partial_size(first) : table);
  b.partials = torch::stable::new_zeros(lse, Integers{j.samples(), partial});
  Rows ignored;  // of all samples together
  const auto view = [](const Tensor& tensor) { return rows_of(tensor, false, 1, true, true); };
  if (tiled && first.grad_key.data) b.sum_key = make_sums(g[kKey], first.grad_key, ignored, view);
  if (tiled && first.grad_value.data) b.sum_value = make_sums(g[kValue], first.grad_value, ignored, view);
  if (!tiled) b.delta = torch::stable::new_empty(lse, sizes_of(lse)), b.row_lse = torch::stable::new_empty(lse, sizes_of(lse));
  for (int64_t i = 0; i < j.samples(); ++i) {
    Problem& p = problems[size_t(i)];
    p.partials = entry_of(b.partials, i)->data_ptr();
    if (b.sum_key) p.sum_key = batch_rows(j.tokens(*b.sum_key, i), true);
    if (b.sum_value) p.sum_value = batch_rows(j.tokens(*b.sum_value, i), true);
    if (b.delta) p.delta = batch_rows(j.tokens(*b.delta, i), false), p.row_lse = batch_rows(j.tokens(*b.row_lse, i), false);
  }
}

// The sum of one table a sample, in their order.
template <class A> void sum_tables(const Tensor& tables, Tensor& total) {
  const A* from = static_cast<const A*>(tables.data_ptr());
  A* const to = static_cast<A*>(total.data_ptr());
  const int64_t size = total.numel();
  torch::stable::zero_(total);
  for (int64_t i = 0; i < tables.size(0); ++i)
    for (int64_t at = 0; at < size; ++at) to[at] += from[i * size + at];
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six jagged_backward_cpu(
    OptionalTensor grad_out, OptionalTensor grad_lse, const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& offsets, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
    std::optional<double> scale, OptionalTensor additional_keys, OptionalTensor additional_values, OptionalTensor rpb, Flags needed) {
  rpb = dense(rpb);
  const Jagged j{query, key, value, offsets, {kernel_size, stride, dilation, is_causal}, scale, additional_keys, additional_values, rpb};
  check(j);
  check_saved(query, grad_out, grad_lse, out, lse, {query.size(0), query.size(1), value.size(2)}, {query.size(0), query.size(1)}, needed);
  const bool empty = lse.numel() == 0, of_table = needed[kRpb] && rpb;
  std::vector<Tensor> g = make_gradients(j, needed, empty);
  Six result{g[0], g[1], g[2], g[3], g[4], g[5]};
  Buffers b;
  if (of_table) {
    Integers shape = sizes_of(*rpb);
    shape.insert(shape.begin(), j.samples());
    b.tables = torch::stable::new_empty(*rpb, shape);
  }
  std::vector<Problem> problems = make_problems(j, [&](Problem& p, int64_t i) {
    p.out = batch_rows(j.tokens(out, i), true), p.lse = batch_rows(j.tokens(lse, i), false);
    if (grad_out) p.grad_out = batch_rows(j.tokens(*grad_out, i), true);
    if (grad_lse) p.grad_lse = batch_rows(j.tokens(*grad_lse, i), false);
    set_gradients(p, j, needed, g, b.tables, i);
  });
  if (empty) return result;
  const Dtype dtype = dtype_of(query);
  const bool tiled = all_tiled(problems, dtype);
  set_buffers(problems, j, lse, g, tiled, b);
  for_samples(problems, [&](const Problem& p) {
    if (tiled) run_colours(cpu::tiled_backward_kernels(dtype), p);
    else run_general(cpu::backward_kernels(dtype), p);
  });
  if (of_table && dtype == Dtype::float64) sum_tables<double>(*b.tables, g[kRpb]);
  else if (of_table) sum_tables<float>(*b.tables, g[kRpb]);
  return result;
}

}  // namespace

#define NATTEN_LINES "Tensor query, Tensor key, Tensor value, Tensor offsets, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
  m.def("neighborhood_attention_jagged(" NATTEN_LINES "float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, "
        "Tensor? rpb=None) -> (Tensor out, Tensor lse)");
  m.def("neighborhood_attention_jagged_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " NATTEN_LINES
        "float? scale, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, bool[] needed) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, Tensor grad_additional_keys, "
        "Tensor grad_additional_values)");
}

STABLE_TORCH_LIBRARY_IMPL(natten, CPU, m) {
  m.impl("neighborhood_attention_jagged", TORCH_BOX(&jagged_cpu));
  m.impl("neighborhood_attention_jagged_backward", TORCH_BOX(&jagged_backward_cpu));
}

}  // namespace natten
