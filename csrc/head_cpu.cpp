// The arithmetic under the torch backend on CPUs: products of fp32 or bf16 operands with fp32 results, and the
// exponentials between them.
//
// torch.mm rounds a bf16 product to bf16, too coarse for logits, and its fp32 product (MKL) leaves AVX-512 unused on
// CPUs of other makers. libtorch also holds oneDNN's block product, which its attention runs on: `brgemm` multiplies
// whatever the CPU has instructions for and sums in fp32. What is left to do here is to pack operands in its layout
// and to cut the result into blocks. Each block is one task with a fixed order of sums: the number of threads doesn't
// show in the bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// Not part of the stable ABI: looked up weakly, so that a libtorch without them leaves this file's ops unsupported.
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                                  const float* a, const float* b, float* c, bool pairs);
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                                  const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool pairs);
__attribute__((weak)) void brgemm_release(bool pairs);
}  // namespace at::native::cpublas

#if defined(__x86_64__)
#define POWERFLOW_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define POWERFLOW_AVX2 __attribute__((target("avx2,fma")))
#endif
#define POWERFLOW_INLINE inline __attribute__((always_inline))

namespace powerflow {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
namespace blas = at::native::cpublas;

constexpr int64_t kRows = 64, kColumns = 64;  // of a block of the result: its operands stay in L2
constexpr int64_t kDepth = 512;               // of one block product; a longer sum adds to the block
constexpr int64_t kPanels = 4;                // column blocks per task, which share a packed row block

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;
};

template <typename T>
Matrix<const T> read(const Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// brgemm takes bf16 rows of B in pairs: element (k, n) at [k / 2][n][k % 2]. A column block of B becomes one panel,
// padded with zeros to kColumns and to whole pairs.
template <typename T>
POWERFLOW_INLINE void pack_panel(const Matrix<const T>& b, int64_t first, int64_t depth, T* out) {
  constexpr int64_t pair = sizeof(float) / sizeof(T);
  const int64_t width = std::min(kColumns, b.columns - first);
  const T* in = b.data + first * b.column_stride;
  if (width < kColumns || depth > b.rows) std::memset(out, 0, depth * kColumns * sizeof(T));
  if (b.column_stride == 1) {
    for (int64_t k = 0; k < b.rows; ++k) {
      const T* row = in + k * b.row_stride;
      T* to = out + (k / pair) * kColumns * pair + k % pair;
      for (int64_t n = 0; n < width; ++n) to[n * pair] = row[n];
    }
    return;
  }
  // Columns are contiguous: a transposition of elements of four bytes, in tiles that a cache line serves once.
  constexpr int64_t kTile = 16;
  const int64_t words = b.rows / pair;
  for (int64_t word = 0; word < words; word += kTile) {
    const int64_t end = std::min(word + kTile, words);
    for (int64_t n = 0; n < width; ++n) {
      const T* column = in + n * b.column_stride;
      for (int64_t w = word; w < end; ++w) std::memcpy(out + (w * kColumns + n) * pair, column + w * pair, sizeof(float));
    }
  }
  if (b.rows % pair) {
    for (int64_t n = 0; n < width; ++n) out[(words * kColumns + n) * pair] = in[n * b.column_stride + words * pair];
  }
}

// Rows of A with contiguous depth, padded with zeros.
template <typename T>
POWERFLOW_INLINE void pack_rows(const Matrix<const T>& a, int64_t first, int64_t count, int64_t depth, int64_t stride,
                                T* out) {
  constexpr int64_t kTile = 16;
  for (int64_t m = 0; m < count; ++m) std::fill(out + m * stride + a.columns, out + m * stride + depth, T(0));
  for (int64_t k = 0; k < a.columns; k += kTile) {
    const int64_t end = std::min(k + kTile, a.columns);
    for (int64_t tile = 0; tile < count; tile += kTile) {
      const int64_t last = std::min(tile + kTile, count);
      const T* in = a.data + first * a.row_stride;
      for (int64_t i = k; i < end; ++i) {
        const T* column = in + i * a.column_stride;
        for (int64_t m = tile; m < last; ++m) out[m * stride + i] = column[m * a.row_stride];
      }
    }
  }
}

// A thread's own memory, kept: to touch new pages costs as much as a product.
template <typename T>
T* own_memory(int64_t elements) {
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < elements) memory.resize(elements);
  return memory.data();
}

// out (M, N) = a (M, K) b (K, N), or out += ...; `panels` holds the packed b.
template <typename T>
void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<float>& out, bool add, T* panels) {
  constexpr bool in_pairs = sizeof(T) < sizeof(float);
  const bool packed = a.column_stride != 1 || (in_pairs && a.columns % 2);
  // Packed operands end at a multiple of 32, so that brgemm makes code for few shapes whatever the number of tokens.
  const int64_t depth = packed ? ceil_div(a.columns, 32) * 32 : a.columns;
  const int64_t column_blocks = ceil_div(b.columns, kColumns);
  torch::stable::parallel_for(0, column_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) pack_panel(b, i * kColumns, depth, panels + i * kColumns * depth);
  });

  const int64_t per_task = packed ? column_blocks : kPanels;
  const int64_t groups = ceil_div(column_blocks, per_task);
  const int64_t row_stride = packed ? std::min(depth, kDepth) + 16 : a.row_stride;  // + 16: off a power of two
  torch::stable::parallel_for(0, ceil_div(a.rows, kRows) * groups, 1, [&](int64_t first, int64_t last) {
    T* own = packed ? own_memory<T>(kRows * row_stride) : nullptr;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / groups * kRows, rows = std::min(kRows, a.rows - row);
      const int64_t begin = task % groups * per_task, end = std::min(begin + per_task, column_blocks);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t terms = std::min(kDepth, depth - k);
        const T* block = a.data + row * a.row_stride + k * a.column_stride;
        if (packed) {
          const Matrix<const T> part = {a.data + k * a.column_stride, a.rows, std::min(terms, a.columns - k),
                                        a.row_stride, a.column_stride};
          pack_rows(part, row, rows, terms, row_stride, own);
          block = own;
        }
        for (int64_t i = begin; i < end; ++i) {
          const int64_t column = i * kColumns;
          blas::brgemm(rows, std::min(kColumns, b.columns - column), terms, row_stride, kColumns, out.row_stride,
                       add || k > 0, block, panels + (i * depth + k) * kColumns,
                       out.data + row * out.row_stride + column, in_pairs);
        }
      }
    }
    blas::brgemm_release(in_pairs);  // of the tile registers that some CPUs lend
  });
}

// e^x within 2 ulp; 0 below the smallest normal number, +inf from 88.4 on, NaN stays. Branchless, to be vectorised.
POWERFLOW_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x > 88.8f ? 88.8f : (x < -87.3f ? -87.3f : x);
  const float n = (clamped * 1.44269504f + kRound) - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.3f ? 0.0f : p * power;
}

POWERFLOW_INLINE void store(float value, float* out) { *out = value; }

POWERFLOW_INLINE void store(float value, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to even
  const uint16_t half = value != value ? 0x7fc0 : static_cast<uint16_t>(rounded);
  std::memcpy(out, &half, sizeof half);
}

struct RowSums {
  float exps, energy, logits;
};

POWERFLOW_INLINE float add_up(float* lanes, int64_t count) {
  for (int64_t half = count / 2; half; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

constexpr int64_t kLanes = 64;  // whatever is summed: statistics leave Σ e as it is

// Σ z of one row.
POWERFLOW_INLINE float row_sum(const float* z, int64_t width) {
  float sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += z[j + lane];
  }
  for (; j < width; ++j) sums[j % kLanes] += z[j];
  return add_up(sums, kLanes);
}

// One row: out = e = exp(z − anchor) and Σ e, without the label's column if there is one, which gets 0; and, if asked
// for, Σ e (z − anchor) over the same columns, where 0 · −inf is 0, and Σ z over all.
template <bool kStats, typename T>
POWERFLOW_INLINE RowSums exponential_row(float* z, int64_t width, float anchor, int64_t label, T* out) {
  const float logits = kStats ? row_sum(z, width) : 0.0f;  // and so the row is in the nearest cache
  if (label >= 0 && label < width) z[label] = -INFINITY;
  float exps[kLanes] = {}, energy[kLanes] = {};
  auto element = [&](int64_t j, int64_t lane) {
    const float x = z[j] - anchor, e = exponential(x);
    exps[lane] += e;
    if (kStats) energy[lane] += e * (x < -1e30f ? -1e30f : x);
    store(e, out + j);
  };
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) element(j + lane, lane);
  }
  for (; j < width; ++j) element(j, j % kLanes);
  return {add_up(exps, kLanes), kStats ? add_up(energy, kLanes) : 0.0f, logits};
}

template <bool kStats, typename T>
RowSums row_plain(float* z, int64_t width, float anchor, int64_t label, void* out) {
  return exponential_row<kStats>(z, width, anchor, label, static_cast<T*>(out));
}
#if defined(__x86_64__)
template <bool kStats, typename T>
POWERFLOW_AVX2 RowSums row_avx2(float* z, int64_t width, float anchor, int64_t label, void* out) {
  return exponential_row<kStats>(z, width, anchor, label, static_cast<T*>(out));
}
template <bool kStats, typename T>
POWERFLOW_AVX512 RowSums row_avx512(float* z, int64_t width, float anchor, int64_t label, void* out) {
  return exponential_row<kStats>(z, width, anchor, label, static_cast<T*>(out));
}
#endif

using RowFunction = RowSums (*)(float*, int64_t, float, int64_t, void*);

template <bool kStats, typename T>
RowFunction row_function() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return row_avx512<kStats, T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return row_avx2<kStats, T>;
#endif
  return row_plain<kStats, T>;
}

void check(bool condition, const char* message) { STD_TORCH_CHECK(condition, "powerflow_fast: ", message); }

// Bytes of the packed b.
int64_t product_memory(int64_t depth, int64_t columns, int64_t element) {
  return ceil_div(columns, kColumns) * kColumns * ceil_div(depth, 32) * 32 * element;
}

void product_cpu(const Tensor& a, const Tensor& b, Tensor out, bool add, Tensor memory) {
  check(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) && a.size(0) == out.size(0) &&
            b.size(1) == out.size(1),
        "head_product takes (M, K), (K, N) and (M, N)");
  check(a.scalar_type() == b.scalar_type() && out.scalar_type() == ScalarType::Float && out.stride(1) == 1,
        "head_product takes a and b of one dtype and a float32 result with contiguous rows");
  check((b.stride(0) == 1 || b.stride(1) == 1 || b.numel() == 1) && memory.is_contiguous() &&
            memory.numel() * static_cast<int64_t>(memory.element_size()) >=
                product_memory(b.size(0), b.size(1), static_cast<int64_t>(b.element_size())),
        "head_product: b must have contiguous rows or columns, and memory hold b");
  check(blas::brgemm_release != nullptr, "this libtorch has no block product");
  if (out.numel() == 0) return;
  if (a.size(1) == 0) {
    if (!add) torch::stable::zero_(out);
    return;
  }
  const Matrix<float> result = {static_cast<float*>(out.mutable_data_ptr()), out.size(0), out.size(1), out.stride(0), 1};
  if (a.scalar_type() == ScalarType::Float) {
    product(read<float>(a), read<float>(b), result, add, static_cast<float*>(memory.mutable_data_ptr()));
  } else {
    check(a.scalar_type() == ScalarType::BFloat16, "head_product takes float32 or bfloat16");
    product(read<BFloat16>(a), read<BFloat16>(b), result, add, static_cast<BFloat16*>(memory.mutable_data_ptr()));
  }
}

// out = exp(z − anchor), except for the label's column, which gets `at_label` or 0. Over the other columns, the sum is
// added to `sums` and that of exp(z − anchor) (z − anchor) to `energy`; that of z over all columns to `logits`. Both of
// these or none. `out` may be z.
void exponentials_cpu(Tensor z, const Tensor& anchor, const Tensor& label, const OptionalTensor& at_label,
                      OptionalTensor sums, OptionalTensor energy, OptionalTensor logits, Tensor out) {
  check(z.dim() == 2 && out.dim() == 2 && z.size(0) == out.size(0) && z.size(1) == out.size(1) && z.stride(1) == 1 &&
            out.stride(1) == 1 && z.scalar_type() == ScalarType::Float,
        "head_exponentials: z and out must have one shape and contiguous rows, and z be float32");
  const int64_t rows = z.size(0), width = z.size(1);
  auto per_row = [&](const Tensor& t, ScalarType dtype) {
    check(t.dim() == 1 && t.numel() == rows && t.is_contiguous() && t.scalar_type() == dtype,
          "head_exponentials: label must be int64 and other numbers per row float32, all (rows,) and contiguous");
    return t.data_ptr();
  };
  const auto* anchors = static_cast<const float*>(per_row(anchor, ScalarType::Float));
  const auto* labels = static_cast<const int64_t*>(per_row(label, ScalarType::Long));
  const auto* values = at_label ? static_cast<const float*>(per_row(*at_label, ScalarType::Float)) : nullptr;
  auto* totals = sums ? static_cast<float*>(per_row(*sums, ScalarType::Float)) : nullptr;
  check(energy.has_value() == logits.has_value(), "head_exponentials: energy and logits must both be given, or none");
  auto* energies = energy ? static_cast<float*>(per_row(*energy, ScalarType::Float)) : nullptr;
  auto* logit_sums = logits ? static_cast<float*>(per_row(*logits, ScalarType::Float)) : nullptr;
  const bool half = out.scalar_type() == ScalarType::BFloat16;
  check(half || out.scalar_type() == ScalarType::Float, "head_exponentials: out must be float32 or bfloat16");

  const RowFunction row_of = energies ? (half ? row_function<true, BFloat16>() : row_function<true, float>())
                                      : (half ? row_function<false, BFloat16>() : row_function<false, float>());
  auto* elements = static_cast<float*>(z.mutable_data_ptr());
  auto* results = static_cast<char*>(out.mutable_data_ptr());
  const int64_t z_stride = z.stride(0), out_stride = out.stride(0) * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      char* result = results + i * out_stride;
      const int64_t column = labels[i];
      const bool here = column >= 0 && column < width;
      const RowSums row_sums = row_of(elements + i * z_stride, width, anchors[i], column, result);
      if (totals) totals[i] += row_sums.exps;
      if (energies) energies[i] += row_sums.energy, logit_sums[i] += row_sums.logits;
      if (here && values && half) store(values[i], reinterpret_cast<BFloat16*>(result) + column);
      if (here && values && !half) store(values[i], reinterpret_cast<float*>(result) + column);
    }
  });
}

}  // namespace
}  // namespace powerflow

STABLE_TORCH_LIBRARY_FRAGMENT(powerflow_fast, m) {
  m.def("head_product(Tensor a, Tensor b, Tensor(a!) out, bool add, Tensor(b!) memory) -> ()");
  m.def(
      "head_exponentials(Tensor(a!) z, Tensor anchor, Tensor label, Tensor? at_label, Tensor(b!)? sums, "
      "Tensor(c!)? energy, Tensor(d!)? logits, Tensor(e!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(powerflow_fast, CPU, m) {
  m.impl("head_product", TORCH_BOX(&powerflow::product_cpu));
  m.impl("head_exponentials", TORCH_BOX(&powerflow::exponentials_cpu));
}
