// Length-aware trajectory balance (LA-TB): the maths of one sequence, shared by the CPU and the CUDA kernel.
//
//   s = sum(logps) / |y|      r = base_logp / |y|      delta = log_z + s - alpha * (r + psi)
//   w = clip(exp(sum(logps) - old_logp), clip_low, clip_high)       the exponent divided by |y| if length-normalised
//   loss = sum_i w_i delta_i^2 / n      d loss / d log_z = 2 w delta / n      d loss / d logps_t = 2 w delta / (|y| n)
//
// Everything here is in double: it runs once per sequence, and a sum over thousands of tokens loses digits in float.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define POWERFLOW_HOST_DEVICE __host__ __device__
#else
#define POWERFLOW_HOST_DEVICE
#endif

namespace powerflow {

struct LaTbOptions {
  double alpha;
  double clip_low, clip_high;
  double log_clip_low, log_clip_high;
  bool length_normalized;
  int64_t num_sequences;  // divisor of the mean; 0: the number of sequences with tokens
};

// Inputs and outputs of one call; `psi` and `old_logps` may be null (no penalty, on-policy).
template <typename Scalar>
struct LaTbBuffers {
  const Scalar *logps, *base_logps, *log_z, *psi, *old_logps;
  const int32_t* cu_seqlens;
  Scalar *loss, *delta, *weight, *logp_mean, *d_logps, *d_log_z;
  int64_t num_tokens, batch;

  POWERFLOW_HOST_DEVICE bool valid_offsets(int64_t i) const {
    const int64_t begin = cu_seqlens[i], end = cu_seqlens[i + 1];
    return 0 <= begin && begin <= end && end <= num_tokens && (i > 0 || begin == 0) &&
           (i + 1 < batch || end == num_tokens);
  }
};

// Compares in log space, so that a ratio of e^200 never becomes an infinity; NaN passes through both comparisons.
POWERFLOW_HOST_DEVICE inline double clipped_ratio(double log_ratio, const LaTbOptions& options) {
  if (log_ratio <= options.log_clip_low) return options.clip_low;
  if (log_ratio >= options.log_clip_high) return options.clip_high;
  return exp(log_ratio);
}

// Writes the outputs of sequence i and returns d loss / d logps_t, the same for each of its tokens.
template <typename Scalar>
POWERFLOW_HOST_DEVICE inline Scalar la_tb_sequence(const LaTbBuffers<Scalar>& buffers, const LaTbOptions& options,
                                                   int64_t i, int64_t length, double logp_sum, double inv_n) {
  double logp_mean = 0, delta = 0, weight = 0, d_log_z = 0, d_logp = 0;
  if (length > 0) {
    const double inv_length = 1.0 / static_cast<double>(length);
    const double psi = buffers.psi ? static_cast<double>(buffers.psi[i]) : 0.0;
    const double base_mean = static_cast<double>(buffers.base_logps[i]) * inv_length;
    logp_mean = logp_sum * inv_length;
    delta = static_cast<double>(buffers.log_z[i]) + logp_mean - options.alpha * (base_mean + psi);
    weight = 1.0;
    if (buffers.old_logps) {
      double log_ratio = logp_sum - static_cast<double>(buffers.old_logps[i]);
      if (options.length_normalized) log_ratio *= inv_length;
      weight = clipped_ratio(log_ratio, options);
    }
    d_log_z = 2.0 * weight * delta * inv_n;
    d_logp = d_log_z * inv_length;
  }
  buffers.logp_mean[i] = static_cast<Scalar>(logp_mean);
  buffers.delta[i] = static_cast<Scalar>(delta);
  buffers.weight[i] = static_cast<Scalar>(weight);
  buffers.d_log_z[i] = static_cast<Scalar>(d_log_z);
  return static_cast<Scalar>(d_logp);
}

// One sequence's term of the loss, before the division by n.
POWERFLOW_HOST_DEVICE inline double la_tb_term(double delta, double weight) { return weight * delta * delta; }

// 1/n; without any sequence every term is zero, and so must be the mean.
POWERFLOW_HOST_DEVICE inline double inverse_count(int64_t n) { return n > 0 ? 1.0 / static_cast<double>(n) : 0.0; }

}  // namespace powerflow
