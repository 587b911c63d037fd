// powerflow_fast::la_tb: schema, CPU and Meta implementations, and the Python module that loads them.
#include <Python.h>

#include <algorithm>

#include "la_tb_tensors.h"

namespace powerflow {
namespace {

// Eight independent sums let the compiler use vector registers; their number, and so the rounding, never changes.
template <typename Scalar>
double segment_sum(const Scalar* values, int64_t length) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t t = 0;
  for (; t + kLanes <= length; t += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(values[t + lane]);
  }
  double sum = 0;
  for (; t < length; ++t) sum += static_cast<double>(values[t]);
  for (double lane : lanes) sum += lane;
  return sum;
}

// A sequence is summed by one thread and the loss by the caller's, so the result doesn't depend on the thread count.
template <typename Scalar>
void la_tb_cpu_kernel(const LaTbBuffers<Scalar>& buffers, const LaTbOptions& options) {
  int64_t n = options.num_sequences, with_tokens = 0;
  for (int64_t i = 0; i < buffers.batch; ++i) {
    STD_TORCH_CHECK(buffers.valid_offsets(i), "la_tb: cu_seqlens must rise from 0 to the number of tokens");
    with_tokens += buffers.cu_seqlens[i + 1] > buffers.cu_seqlens[i];
  }
  if (n == 0) n = with_tokens;
  const double inv_n = inverse_count(n);

  constexpr int64_t kTokensPerTask = 16384;
  const int64_t mean_length = buffers.num_tokens / std::max<int64_t>(buffers.batch, 1) + 1;
  const int64_t grain = std::max<int64_t>(kTokensPerTask / mean_length, 1);
  torch::stable::parallel_for(0, buffers.batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = buffers.cu_seqlens[i], length = buffers.cu_seqlens[i + 1] - begin;
      const double logp_sum = segment_sum(buffers.logps + begin, length);
      const Scalar d_logp = la_tb_sequence(buffers, options, i, length, logp_sum, inv_n);
      std::fill_n(buffers.d_logps + begin, length, d_logp);
    }
  });

  double loss = 0;
  for (int64_t i = 0; i < buffers.batch; ++i) loss += la_tb_term(buffers.delta[i], buffers.weight[i]);
  *buffers.loss = static_cast<Scalar>(loss * inv_n);
}

LaTbTensors la_tb_cpu(const Tensor& logps, const Tensor& base_logps, const Tensor& log_z, const Tensor& cu_seqlens,
                      const OptionalTensor& psi, const OptionalTensor& old_logps, double alpha, double clip_low,
                      double clip_high, bool length_normalized, int64_t num_sequences) {
  const LaTbOptions options = make_options(alpha, clip_low, clip_high, length_normalized, num_sequences);
  LaTbCall call(logps, base_logps, log_z, cu_seqlens, psi, old_logps);
  return call.run([&](const auto& buffers) { la_tb_cpu_kernel(buffers, options); });
}

LaTbTensors la_tb_meta(const Tensor& logps, const Tensor&, const Tensor& log_z, const Tensor&, const OptionalTensor&,
                       const OptionalTensor&, double, double, double, bool, int64_t) {
  return empty_outputs(logps, log_z);
}

}  // namespace
}  // namespace powerflow

STABLE_TORCH_LIBRARY(powerflow_fast, m) {
  m.def(
      "la_tb(Tensor logps, Tensor base_logps, Tensor log_z, Tensor cu_seqlens, Tensor? psi, Tensor? old_logps, "
      "float alpha, float clip_low, float clip_high, bool length_normalized, int num_sequences) -> "
      "(Tensor loss, Tensor delta, Tensor weight, Tensor logp_mean, Tensor d_logps, Tensor d_log_z)");
}
STABLE_TORCH_LIBRARY_IMPL(powerflow_fast, CPU, m) { m.impl("la_tb", TORCH_BOX(&powerflow::la_tb_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(powerflow_fast, Meta, m) { m.impl("la_tb", TORCH_BOX(&powerflow::la_tb_meta)); }

// Importing powerflow_fast._C registers the ops; `cuda_archs` tells what the build contains ("" without nvcc).
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1,      nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "cuda_archs", POWERFLOW_FAST_CUDA_ARCHS) < 0) return nullptr;
  return module;
}
