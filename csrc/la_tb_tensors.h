// Tensors <-> raw pointers of the LA-TB op, through PyTorch's stable ABI: shared by the CPU and the CUDA entry points.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "la_tb.h"

namespace powerflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using LaTbTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline LaTbOptions make_options(double alpha, double clip_low, double clip_high, bool length_normalized,
                                int64_t num_sequences) {
  return {alpha, clip_low, clip_high, std::log(clip_low), std::log(clip_high), length_normalized, num_sequences};
}

// Loss, delta, weight, logp_mean, d_logps, d_log_z; contiguous whatever the inputs' strides are.
inline LaTbTensors empty_outputs(const Tensor& logps, const Tensor& log_z) {
  const Tensor tokens = torch::stable::contiguous(logps), sequences = torch::stable::contiguous(log_z);
  auto like = [](const Tensor& t) { return torch::stable::empty_like(t); };
  return {torch::stable::new_empty(sequences, {}), like(sequences), like(sequences), like(sequences), like(tokens),
          like(sequences)};
}

// The inputs of one call, held contiguous; `run` picks the scalar type. The Python wrapper reports bad input in the
// user's terms: these checks keep a direct call of the op from reading outside of its tensors.
class LaTbCall {
 public:
  LaTbCall(const Tensor& logps, const Tensor& base_logps, const Tensor& log_z, const Tensor& cu_seqlens,
           const OptionalTensor& psi, const OptionalTensor& old_logps)
      : logps_(torch::stable::contiguous(logps)),
        base_logps_(torch::stable::contiguous(base_logps)),
        log_z_(torch::stable::contiguous(log_z)),
        cu_seqlens_(torch::stable::contiguous(cu_seqlens)),
        outputs_(empty_outputs(logps, log_z)) {
    if (psi) psi_ = torch::stable::contiguous(*psi);
    if (old_logps) old_logps_ = torch::stable::contiguous(*old_logps);
    const auto dtype = logps.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "la_tb: logps must be float32 or float64");
    STD_TORCH_CHECK(logps.dim() == 1 && log_z.dim() == 1, "la_tb: logps and log_z must have one dimension");
    STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, "la_tb: cu_seqlens must be int32");
    STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() == log_z.numel() + 1 &&
                        cu_seqlens.get_device_index() == logps.get_device_index(),
                    "la_tb: cu_seqlens must have shape (B+1,) and the device of logps");
    STD_TORCH_CHECK(log_z.numel() > 0 || logps.numel() == 0, "la_tb: tokens without a sequence");
    check_like_log_z(log_z);
    check_like_log_z(base_logps);
    if (psi) check_like_log_z(*psi);
    if (old_logps) check_like_log_z(*old_logps);
  }

  template <typename Kernel>
  LaTbTensors run(const Kernel& kernel) {
    if (logps_.scalar_type() == ScalarType::Double) {
      kernel(buffers<double>());
    } else {
      kernel(buffers<float>());
    }
    return outputs_;
  }

 private:
  void check_like_log_z(const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.numel() == log_z_.numel() && t.scalar_type() == logps_.scalar_type() &&
                        t.get_device_index() == logps_.get_device_index(),
                    "la_tb: base_logps, log_z, psi and old_logps must have shape (B,), the dtype and device of logps");
  }

  template <typename Scalar>
  LaTbBuffers<Scalar> buffers() {
    auto in = [](const OptionalTensor& t) -> const Scalar* { return t ? t->const_data_ptr<Scalar>() : nullptr; };
    auto& [loss, delta, weight, logp_mean, d_logps, d_log_z] = outputs_;
    return {in(logps_),
            in(base_logps_),
            in(log_z_),
            in(psi_),
            in(old_logps_),
            cu_seqlens_.const_data_ptr<int32_t>(),
            loss.template mutable_data_ptr<Scalar>(),
            delta.template mutable_data_ptr<Scalar>(),
            weight.template mutable_data_ptr<Scalar>(),
            logp_mean.template mutable_data_ptr<Scalar>(),
            d_logps.template mutable_data_ptr<Scalar>(),
            d_log_z.template mutable_data_ptr<Scalar>(),
            logps_.numel(),
            log_z_.numel()};
  }

  Tensor logps_, base_logps_, log_z_, cu_seqlens_;
  OptionalTensor psi_, old_logps_;
  LaTbTensors outputs_;
};

}  // namespace powerflow
