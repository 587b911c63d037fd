// powerflow_fast::la_tb on CUDA: one launch, no floating-point atomics, the same bits from run to run.
#include <cuda_runtime.h>

#include <algorithm>

#include <torch/csrc/stable/accelerator.h>

#include "la_tb_tensors.h"

// A CPU-only libtorch lacks this symbol; a weak reference lets the one library load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define POWERFLOW_CUDA_CHECK(call)                                                                     \
  do {                                                                                                 \
    const cudaError_t error = (call);                                                                  \
    STD_TORCH_CHECK(error == cudaSuccess, "la_tb: CUDA error: ", cudaGetErrorString(error));           \
  } while (0)

namespace powerflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 8192;

// The sum over the block, in a fixed order, known to every thread.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // an earlier call's warp_sums have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  return sum;
}

__device__ int64_t count_with_tokens(const int32_t* cu_seqlens, int64_t batch) {
  double count = 0;
  for (int64_t i = threadIdx.x; i < batch; i += kThreads) count += cu_seqlens[i + 1] > cu_seqlens[i];
  return static_cast<int64_t>(block_sum(count));
}

// A block takes a sequence at a time: sum, residual, gradients. The block that finishes last adds up the loss, each
// thread the same sequences whichever block it is. Offsets can't be checked on the host without waiting for the
// device: where they don't partition the tokens, the loss is NaN and nothing outside of the tensors is touched.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    la_tb_kernel(const LaTbBuffers<Scalar> buffers, const LaTbOptions options, unsigned* finished_blocks) {
  const int64_t n =
      options.num_sequences > 0 ? options.num_sequences : count_with_tokens(buffers.cu_seqlens, buffers.batch);
  const double inv_n = inverse_count(n);
  __shared__ Scalar shared_d_logp;
  for (int64_t i = blockIdx.x; i < buffers.batch; i += gridDim.x) {
    const bool valid = buffers.valid_offsets(i);
    const int64_t begin = buffers.cu_seqlens[i];
    const int64_t length = valid ? buffers.cu_seqlens[i + 1] - begin : 1;
    double partial = 0;
    if (valid) {
#pragma unroll 4
      for (int64_t t = threadIdx.x; t < length; t += kThreads) partial += static_cast<double>(buffers.logps[begin + t]);
    } else {
      partial = nan("");
    }
    const double logp_sum = block_sum(partial);
    if (threadIdx.x == 0) shared_d_logp = la_tb_sequence(buffers, options, i, length, logp_sum, inv_n);
    __syncthreads();
    const Scalar d_logp = shared_d_logp;
    if (valid) {
      for (int64_t t = threadIdx.x; t < length; t += kThreads) buffers.d_logps[begin + t] = d_logp;
    }
  }

  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();  // this block's delta and weight are visible before its tick
    is_last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  double partial = 0;
  for (int64_t i = threadIdx.x; i < buffers.batch; i += kThreads) {
    // other multiprocessors wrote these: read from L2
    partial += la_tb_term(__ldcg(buffers.delta + i), __ldcg(buffers.weight + i));
  }
  const double loss = block_sum(partial);
  if (threadIdx.x == 0) *buffers.loss = static_cast<Scalar>(loss * inv_n);
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "la_tb: this PyTorch was built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

LaTbTensors la_tb_cuda(const Tensor& logps, const Tensor& base_logps, const Tensor& log_z, const Tensor& cu_seqlens,
                       const OptionalTensor& psi, const OptionalTensor& old_logps, double alpha, double clip_low,
                       double clip_high, bool length_normalized, int64_t num_sequences) {
  const int32_t device = logps.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const LaTbOptions options = make_options(alpha, clip_low, clip_high, length_normalized, num_sequences);
  LaTbCall call(logps, base_logps, log_z, cu_seqlens, psi, old_logps);
  const Tensor counter = torch::stable::new_empty(cu_seqlens, {1});
  auto* finished_blocks = reinterpret_cast<unsigned*>(counter.mutable_data_ptr<int32_t>());
  POWERFLOW_CUDA_CHECK(cudaMemsetAsync(finished_blocks, 0, sizeof(unsigned), stream));
  return call.run([&]<typename Scalar>(const LaTbBuffers<Scalar>& buffers) {
    const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(buffers.batch, 1, kMaxBlocks));
    la_tb_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(buffers, options, finished_blocks);
    POWERFLOW_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace
}  // namespace powerflow

STABLE_TORCH_LIBRARY_IMPL(powerflow_fast, CUDA, m) { m.impl("la_tb", TORCH_BOX(&powerflow::la_tb_cuda)); }
