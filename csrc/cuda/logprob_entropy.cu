// Token scores from logits and their gradient. One thread block works off one row at a time.
//
// Forward reads the logits once: T V itemsize bytes. Backward reads and writes once; rows without an upstream gradient
// are only written. A row is split into a head up to the first 16-byte boundary, 16-byte vectors, and a tail.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "reduce.cuh"
#include "row_ring.cuh"
#include "rows.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr unsigned kRefiningBlocks = 256;
// 16-byte loads a thread issues before it uses the first. A soft-cap needs the registers for its arithmetic.
template <bool kCap>
constexpr int kLoads = kCap ? 2 : 4;

template <class E, bool kCap, int kCount>
__device__ __forceinline__ void accumulate_vectors(const uint4* vectors, const RowScale& scale, Part<float>& part) {
  uint4 bits[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) bits[j] = __ldcs(vectors + j * kThreads);
  float v[kCount * E::kVector];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float x[E::kVector];
    E::unpack(bits[j], x);
#pragma unroll
    for (int k = 0; k < E::kVector; ++k) v[j * E::kVector + k] = value_of<kCap>(x[k], scale.gain);
  }
  accumulate(v, scale.alpha, part);
}

// This thread's share of the row, kInFlight vectors at a time.
template <class E, bool kCap, int kInFlight>
__device__ __forceinline__ Part<float> thread_part(const typename E::Storage* row, int V, const RowScale& scale) {
  const Split split = split_row<E>(row, V);
  const uint4* vectors = reinterpret_cast<const uint4*>(row + split.head);
  const int thread = threadIdx.x;
  Part<float> part;
  int i = thread;
  for (; i + (kInFlight - 1) * kThreads < split.vectors; i += kInFlight * kThreads) {
    accumulate_vectors<E, kCap, kInFlight>(vectors + i, scale, part);
  }
  for (; i < split.vectors; i += kThreads) accumulate_vectors<E, kCap, 1>(vectors + i, scale, part);
  float ends[2] = {-INFINITY, -INFINITY};
  if (thread < split.head) ends[0] = value_of<kCap>(E::widen(row[thread]), scale.gain);
  if (thread < V - split.tail) ends[1] = value_of<kCap>(E::widen(row[split.tail + thread]), scale.gain);
  accumulate(ends, scale.alpha, part);
  return part;
}

template <class E, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    logprob_entropy_fwd_kernel(const ql::LogprobEntropyForward args) {
  __shared__ BlockScratch<kThreads> scratch;
  const int V = static_cast<int>(args.V);
  for (std::int64_t t = blockIdx.x; t < args.T; t += gridDim.x) {
    float logprob = 0.0f, entropy = 0.0f, lse = 0.0f;
    if (!args.row_mask || args.row_mask[t]) {
      const auto* row = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
      const RowScale scale = scale_of(args, t);
      const std::int64_t y = args.target[t];
      float v_target = __int_as_float(0x7fffffff);  // NaN for a target outside [0, V)
      if (threadIdx.x == 0 && 0 <= y && y < V) v_target = value_of<kCap>(E::widen(row[y]), scale.gain);
      const Part<float> all = block_merge(thread_part<E, kCap, kLoads<kCap>>(row, V, scale), scale.alpha, scratch);
      const Scores scores = finish(all, scale.alpha, v_target);
      logprob = scores.logprob;
      entropy = scores.entropy;
      lse = scores.lse;
    }
    if (threadIdx.x == 0) {
      args.logprobs[t] = logprob;
      args.entropy[t] = entropy;
      args.lse[t] = lse;
    }
  }
}

template <class E>
__device__ __forceinline__ void zero_row(typename E::Storage* row, int V) {
  const Split split = split_row<E>(row, V);
  uint4* vectors = reinterpret_cast<uint4*>(row + split.head);
  const int thread = threadIdx.x;
  for (int i = thread; i < split.vectors; i += kThreads) __stwb(vectors + i, uint4{0, 0, 0, 0});
  if (thread < split.head) row[thread] = E::narrow(0.0f);
  if (thread < V - split.tail) row[split.tail + thread] = E::narrow(0.0f);
}

// Gradients of one row but the target's, which comes out as 0.
template <class E, bool kCap>
struct GradientWriter {
  using Storage = typename E::Storage;
  const RowScale& scale;
  const RowGradient& g;
  int target;  // -1: none
  float rest;  // sum of the probabilities

  __device__ __forceinline__ float gradient(float logit, bool is_target) {
    float v = logit, slope = 1.0f;
    if constexpr (kCap) tanh_and_slope(logit * scale.gain, v, slope);
    if (is_target) v = -INFINITY;
    return slope * element_gradient(v, scale.alpha, g, rest);
  }

  __device__ __forceinline__ void write_element(const Storage* row, Storage* out, int i) {
    out[i] = E::narrow(gradient(E::widen(row[i]), i == target));
  }

  // kCount vectors, kThreads apart, the first at element i. Loads all before it stores any.
  template <int kCount>
  __device__ __forceinline__ void write_vectors(const Storage* row, Storage* out, int i, bool is_out_aligned) {
    uint4 bits[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      bits[j] = __ldcs(reinterpret_cast<const uint4*>(row + i + j * kThreads * E::kVector));
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int start = i + j * kThreads * E::kVector;
      float x[E::kVector];
      E::unpack(bits[j], x);
#pragma unroll
      for (int k = 0; k < E::kVector; ++k) x[k] = gradient(x[k], start + k == target);
      if (is_out_aligned) {
        __stwb(reinterpret_cast<uint4*>(out + start), E::pack(x));  // a plain store gets split
      } else {
#pragma unroll
        for (int k = 0; k < E::kVector; ++k) out[start + k] = E::narrow(x[k]);
      }
    }
  }

  __device__ __forceinline__ void write_row(const Storage* row, Storage* out, int V) {
    const Split split = split_row<E>(row, V);
    const bool is_out_aligned = reinterpret_cast<std::uintptr_t>(out + split.head) % 16 == 0;
    const int thread = threadIdx.x;
    int i = thread;
    if (is_out_aligned) {  // else a vector at a time: the code for stores off a boundary must not cost registers here
      for (; i + (kLoads<kCap> - 1) * kThreads < split.vectors; i += kLoads<kCap> * kThreads) {
        write_vectors<kLoads<kCap>>(row, out, split.head + i * E::kVector, true);
      }
    }
    for (; i < split.vectors; i += kThreads) {
      write_vectors<1>(row, out, split.head + i * E::kVector, is_out_aligned);
    }
    if (thread < split.head) write_element(row, out, thread);
    if (thread < V - split.tail) write_element(row, out, split.tail + thread);
  }
};

// What the target's entry needs after the rest of the row; in shared memory, because registers are scarce meanwhile.
struct Target {
  float v, slope, entropy, g_logprob, g_entropy, g_lse;
};

template <class E, bool kCap>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    logprob_entropy_bwd_kernel(const ql::LogprobEntropyBackward args, bool only_refined) {
  __shared__ BlockScratch<kThreads> scratch;
  __shared__ Target target;  // of thread 0
  const int V = static_cast<int>(args.V);
  for (std::int64_t t = blockIdx.x; t < args.T; t += gridDim.x) {
    if (only_refined && !(fabsf(args.lse[t]) >= E::kRefineLse)) continue;
    auto* out = static_cast<typename E::Storage*>(args.dlogits) + t * args.dstride_t;
    float g_logprob = args.g_logprobs ? args.g_logprobs[t] : 0.0f;
    const float g_entropy = args.g_entropy ? args.g_entropy[t] : 0.0f;
    const float g_lse = args.g_lse ? args.g_lse[t] : 0.0f;
    const bool is_masked = args.row_mask && !args.row_mask[t];
    if (is_masked || (g_logprob == 0.0f && g_entropy == 0.0f && g_lse == 0.0f)) {
      zero_row<E>(out, V);
      continue;
    }
    const auto* row = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
    const RowScale scale = scale_of(args, t);
    const std::int64_t y = args.target[t];
    const bool has_target = 0 <= y && y < V;
    const float lse = args.lse[t], entropy = args.entropy[t];
    if (!has_target) {
      g_logprob = __int_as_float(0x7fffffff);  // NaN in the whole row
    } else if (threadIdx.x == 0) {
      target = {E::widen(row[y]), 1.0f, entropy, g_logprob, g_entropy, g_lse};
      if constexpr (kCap) tanh_and_slope(target.v * scale.gain, target.v, target.slope);
    }
    Offset offset = offset_of(lse, scale.alpha);
    if (fabsf(lse) >= E::kRefineLse) {  // one load at a time: the rare row must not cost the others registers
      offset = offset_of(block_merge(thread_part<E, kCap, 1>(row, V, scale), scale.alpha, scratch));
    }
    const RowGradient g = row_gradient(scale, offset, entropy, g_logprob, g_entropy, g_lse);
    __syncthreads();  // the target's logit is read before a thread overwrites it in place
    GradientWriter<E, kCap> writer{scale, g, has_target ? static_cast<int>(y) : -1, 0.0f};
    writer.write_row(row, out, V);
    const float rest = block_sum(writer.rest, scratch);  // its barrier orders the row's stores before the next one
    if (has_target && threadIdx.x == 0) {
      const float du = target_gradient(scale, g, target.v, rest, target.entropy, target.g_logprob, target.g_entropy,
                                       target.g_lse);
      out[y] = E::narrow(target.slope * du);
    }
  }
}

unsigned grid_of(std::int64_t T) { return static_cast<unsigned>(std::min<std::int64_t>(T, INT32_MAX)); }

}  // namespace

namespace ql::cuda {

int logprob_entropy_fwd(const LogprobEntropyForward& args, std::uintptr_t stream) {
  if (ring_fits(args, nullptr, 0)) return ring_fwd(args, stream);
  return dispatch(args, [&](auto element, auto cap) {
    logprob_entropy_fwd_kernel<decltype(element), decltype(cap)::value>
        <<<grid_of(args.T), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  });
}

int logprob_entropy_bwd(const LogprobEntropyBackward& args, std::uintptr_t stream) {
  const bool has_ring = ring_fits(args, args.dlogits, args.dstride_t);
  if (has_ring) {
    if (const int error = ring_bwd(args, stream)) return error;
  }
  // after the ring, the rows that it left out: few blocks, because there are usually none
  const unsigned grid = has_ring ? std::min(grid_of(args.T), kRefiningBlocks) : grid_of(args.T);
  return dispatch(args, [&](auto element, auto cap) {
    logprob_entropy_bwd_kernel<decltype(element), decltype(cap)::value>
        <<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args, has_ring);
  });
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ql::cuda
