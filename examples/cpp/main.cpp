// SPDX-License-Identifier: MIT
// Runs an AOTInductor package on one float32 tensor, without Python: run_model model.pt2 2,3,32,48 input output
// Input and output are files of raw float32 in row-major order; the shape of the output is printed.
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<int64_t> parse_shape(const std::string& text) {
  std::vector<int64_t> shape;
  std::istringstream stream(text);
  for (std::string size; std::getline(stream, size, ',');) shape.push_back(std::stoll(size));
  return shape;
}

at::Tensor read_tensor(const std::string& path, const std::vector<int64_t>& shape) {
  at::Tensor tensor = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot read " + path);
  if (file.tellg() != std::streamoff(tensor.nbytes()))
    throw std::runtime_error(path + " holds " + std::to_string(file.tellg()) + " bytes; the shape needs " +
                             std::to_string(tensor.nbytes()));
  file.seekg(0).read(static_cast<char*>(tensor.mutable_data_ptr()), std::streamsize(tensor.nbytes()));
  return tensor;
}

void write_tensor(const std::string& path, const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(dense.const_data_ptr()), std::streamsize(dense.nbytes()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_model model.pt2 2,3,32,48 input output\n";
    return 2;
  }
  try {
    const c10::InferenceMode no_gradients;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const std::vector<at::Tensor> outputs = model.run({read_tensor(argv[3], parse_shape(argv[2]))});
    write_tensor(argv[4], outputs.at(0));
    std::cout << outputs.at(0).sizes() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "run_model: " << error.what() << '\n';
    return 1;
  }
}
