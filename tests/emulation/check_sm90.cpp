// SPDX-License-Identifier: MIT
// The emulator's proof on the Hopper half of ptx.h: runs tile_sm90.cu over shapes, orders of warps and landing times, and
// compares with attention in float64.
//   check_sm90 [quick]     quick: two problems instead of four
// Exit status: 0, or the sum of 1 (wrong numbers), 2 (a finding of the emulator: race, deadlock, ..) and 4 (bits that
// depend on the order).
#include "tile_sm90.cu"

#include <type_traits>

namespace {

constexpr float kScale = 0.3f, kLog2e = 1.4426950408889634f;

// One head attends to all tokens of its grid.
struct Case {
  int batch, height, width, heads;

  size_t tokens() const { return size_t(batch) * height * width * heads; }
  size_t token(int b, int y, int x, int head) const { return ((size_t(b) * height + y) * width + x) * heads + head; }
};

struct Data {
  std::vector<uint16_t> query, key, value, out;
  std::vector<float> lse;
};

struct Error {
  double out = 0, lse = 0;
};

template <class T> std::vector<uint16_t> numbers(size_t count, uint64_t& state) {
  std::vector<uint16_t> result(count);
  for (uint16_t& number : result) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    number = ptx::from_float<T>(float(int(state >> 40) % 2001 - 1000) / 500.f);
  }
  return result;
}

template <class T> Data make_data(const Case& c, int dims) {
  uint64_t state = 88172645463325252ull + c.tokens();
  const size_t count = c.tokens() * dims;
  Data data;
  data.query = numbers<T>(count, state);
  data.key = numbers<T>(count, state);
  data.value = numbers<T>(count, state);
  data.out.resize(count);
  data.lse.resize(c.tokens());
  return data;
}

// Infinite for NaN.
double difference(double a, double b) { return std::isnan(a - b) ? INFINITY : std::abs(a - b); }

// Largest error of a head's outputs, over the largest output, and of its log-sum-exps.
template <class T> Error compare_head(const Case& c, int dims, const Data& data, int b, int head) {
  auto row = [&](const std::vector<uint16_t>& tensor, int index) { return &tensor[c.token(b, index / c.width, index % c.width, head) * dims]; };
  const int tokens = c.height * c.width;
  Error error;
  double largest_out = 0;
  for (int i = 0; i < tokens; i++) {
    std::vector<double> score(tokens, 0.);
    for (int j = 0; j < tokens; j++)
      for (int d = 0; d < dims; d++) score[j] += double(kScale) * ptx::to_float<T>(row(data.query, i)[d]) * ptx::to_float<T>(row(data.key, j)[d]);
    const double top = *std::max_element(score.begin(), score.end());
    double sum = 0;
    std::vector<double> out(dims, 0.);
    for (int j = 0; j < tokens; j++) {
      const double weight = std::exp(score[j] - top);
      sum += weight;
      for (int d = 0; d < dims; d++) out[d] += weight * ptx::to_float<T>(row(data.value, j)[d]);
    }
    for (int d = 0; d < dims; d++) {
      error.out = std::max(error.out, difference(out[d] / sum, ptx::to_float<T>(row(data.out, i)[d])));
      largest_out = std::max(largest_out, std::abs(out[d] / sum));
    }
    error.lse = std::max(error.lse, difference(top + std::log(sum), data.lse[c.token(b, i / c.width, i % c.width, head)]));
  }
  error.out /= largest_out;
  return error;
}

template <class T> Error compare(const Case& c, int dims, const Data& data) {
  Error worst;
  for (int b = 0; b < c.batch; b++) {
    for (int head = 0; head < c.heads; head++) {
      const Error error = compare_head<T>(c, dims, data, b, head);
      worst = {std::max(worst.out, error.out), std::max(worst.lse, error.lse)};
    }
  }
  return worst;
}

// Boxes of 64 numbers x box_x x 8 tokens.
ptx::TensorMap map_of(std::vector<uint16_t>& tensor, const Case& c, int dims, int box_x) {
  const int64_t row = int64_t(c.heads) * dims;
  const int64_t sizes[] = {row, c.width, c.height, c.batch};
  const int64_t strides[] = {row * 2, row * c.width * 2, row * c.width * c.height * 2};
  const int box[] = {64, box_x, 8, 1}, step[] = {1, 1, 1, 1};
  ptx::TensorMap map;
  ptx::make_tensor_map(&map, nullptr, tensor.data(), 4, sizes, strides, box, step, false);
  return map;
}

template <class T, int kDims, int kKeys> void run(const Case& c, Data& data, emu::Config config) {
  const ptx::TensorMap query = map_of(data.query, c, kDims, 8), out = map_of(data.out, c, kDims, 8);
  const ptx::TensorMap key = map_of(data.key, c, kDims, kKeys / 8), value = map_of(data.value, c, kDims, kKeys / 8);
  const sm90::TileParams params{data.lse.data(), c.height, c.width, c.heads, kScale * kLog2e};
  const emu::Dim grid{(c.height + 7) / 8 * ((c.width + 7) / 8), c.heads, c.batch};
  emu::launch(grid, sm90::kThreads, sm90::Layout<kDims, kKeys>::kBytes, config,
              [&] { sm90::tile<T, kDims, kKeys>(query, key, value, out, params); });
}

void allow_only(Data& data) {
  emu::buffers().clear();
  for (auto* tensor : {&data.query, &data.key, &data.value, &data.out}) emu::register_global(tensor->data(), tensor->size() * 2);
  emu::register_global(data.lse.data(), data.lse.size() * 4);
}

std::vector<emu::Config> configs(int random) {
  std::vector<emu::Config> all;
  for (emu::Order order : {emu::Order::kFixed, emu::Order::kReversed})
    for (emu::Async landing : {emu::Async::kLate, emu::Async::kEarly}) all.push_back({order, landing, 1, true});
  for (int seed = 1; seed <= random; seed++) all.push_back({emu::Order::kRandom, emu::Async::kRandom, uint64_t(seed), true});
  return all;
}

// The exit status of one problem in all orders.
template <class T, int kDims, int kKeys> int check(const Case& c, int random) {
  Data data = make_data<T>(c, kDims), first;
  allow_only(data);
  emu::findings().clear();
  Error worst;
  bool same = true;
  for (const emu::Config& config : configs(random)) {
    std::fill(data.out.begin(), data.out.end(), 0xFFFF);
    std::fill(data.lse.begin(), data.lse.end(), NAN);
    run<T, kDims, kKeys>(c, data, config);
    const Error error = compare<T>(c, kDims, data);
    worst = {std::max(worst.out, error.out), std::max(worst.lse, error.lse)};
    if (first.out.empty()) first = data;
    same = same && first.out == data.out && memcmp(first.lse.data(), data.lse.data(), data.lse.size() * 4) == 0;
  }
  const bool half = std::is_same_v<T, ptx::f16>;
  const bool wrong = worst.out > (half ? 2e-3 : 1.6e-2) || worst.lse > 1e-4;
  printf("%s %d dims, %d keys a box: batch %d, %d x %d, %d heads: out %.1e lse %.1e %s %s\n", half ? "f16" : "bf16", kDims, kKeys,
         c.batch, c.height, c.width, c.heads, worst.out, worst.lse, wrong ? "WRONG" : "right", same ? "same bits" : "BITS DIFFER");
  for (const auto& [text, count] : emu::findings()) printf("    %s (%d times)\n", text.c_str(), count);
  return int(wrong) | int(!emu::findings().empty()) << 1 | int(!same) << 2;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "quick";
  const int random = quick ? 2 : 4;
  int status = check<ptx::f16, 64, 128>({1, 21, 19, 1}, random) | check<ptx::f16, 128, 64>({1, 20, 28, 1}, random);
  if (!quick) status |= check<ptx::f16, 64, 128>({2, 16, 16, 2}, random) | check<ptx::bf16, 128, 128>({1, 13, 40, 2}, random);
  return status;
}
