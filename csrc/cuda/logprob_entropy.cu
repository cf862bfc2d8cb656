// Token scores from logits and their gradient. One thread block works off one row at a time.
//
// Forward reads the logits once: T V itemsize bytes. Backward reads and writes once; rows without an upstream gradient
// are only written. A row is split into a head up to the first 16-byte boundary, 16-byte vectors, and a tail.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../elements.h"
#include "../logprob_entropy.h"
#include "../row_math.h"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
// 16-byte loads a thread issues before it uses the first. A soft-cap needs the registers for its arithmetic.
template <bool kCap>
constexpr int kLoads = kCap ? 2 : 4;

struct Float32 {
  using Storage = float;
  static constexpr int kVector = 4;
  static constexpr float kRefineLse = kRefineFloat32;
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&x)[kVector]) {
    x[0] = __uint_as_float(bits.x);
    x[1] = __uint_as_float(bits.y);
    x[2] = __uint_as_float(bits.z);
    x[3] = __uint_as_float(bits.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  static __device__ __forceinline__ float widen(Storage x) { return x; }
  static __device__ __forceinline__ Storage narrow(float x) { return x; }
};

struct Float16 {
  using Storage = __half;
  static constexpr int kVector = 8;
  static constexpr float kRefineLse = kRefineFloat16;
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&x)[kVector]) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[k]));
      x[2 * k] = pair.x;
      x[2 * k + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
    return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
  }
  static __device__ __forceinline__ float widen(Storage x) { return __half2float(x); }
  static __device__ __forceinline__ Storage narrow(float x) { return __float2half_rn(x); }
};

struct BFloat16 {
  using Storage = __nv_bfloat16;
  static constexpr int kVector = 8;
  static constexpr float kRefineLse = kRefineBFloat16;
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&x)[kVector]) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = __uint_as_float(words[k] << 16);
      x[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
    return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
  }
  static __device__ __forceinline__ float widen(Storage x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Storage narrow(float x) { return __float2bfloat16_rn(x); }
};

// Elements [0, head) and [tail, V) are fewer than a vector each and go to one thread an element.
struct Split {
  int head, vectors, tail;
};

template <class E>
__device__ __forceinline__ Split split_row(const typename E::Storage* row, int V) {
  constexpr int kItem = sizeof(typename E::Storage);
  const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16);
  Split split;
  split.head = min(V, (16 - past) % 16 / kItem);
  split.vectors = (V - split.head) / E::kVector;
  split.tail = split.head + split.vectors * E::kVector;
  return split;
}

template <bool kCap>
__device__ __forceinline__ float value_of(float logit, float gain) {
  if constexpr (!kCap) return logit;
  float value, slope;
  tanh_and_slope(logit * gain, value, slope);
  return value;
}

// Adds the elements to the part, relative to their own maximum first: short sums, and one rescaling for all of them.
template <int kCount>
__device__ __forceinline__ void accumulate(const float (&v)[kCount], float alpha, Part<float>& part) {
  Part<float> group;
#pragma unroll
  for (int k = 0; k < kCount; ++k) group.m = fmaxf(group.m, v[k]);  // never NaN
  float s[2] = {}, q[2] = {};
#pragma unroll
  for (int k = 0; k < kCount; ++k) add_element(v[k], group.m, alpha, s[k % 2], q[k % 2]);
  group.s = s[0] + s[1];
  group.q = q[0] + q[1];
  part = merge(part, group, alpha);
}

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

__device__ __forceinline__ RowScale scale_of(const ql::LogprobEntropy& args, std::int64_t t) {
  return row_scale(args.temperatures ? args.temperatures[t] : args.temperature, args.softcap, args.logit_scale);
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
    logprob_entropy_bwd_kernel(const ql::LogprobEntropyBackward args) {
  __shared__ BlockScratch<kThreads> scratch;
  __shared__ Target target;  // of thread 0
  const int V = static_cast<int>(args.V);
  for (std::int64_t t = blockIdx.x; t < args.T; t += gridDim.x) {
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

// Calls launch(element type, whether there is a soft-cap).
template <class Launch>
int dispatch(const ql::LogprobEntropy& args, const Launch& launch) {
  if (args.T == 0) return cudaSuccess;
  const auto with_cap = [&](auto element) {
    args.softcap > 0.0f ? launch(element, std::true_type{}) : launch(element, std::false_type{});
  };
  switch (args.dtype) {
    case ql::kFloat32: with_cap(Float32{}); break;
    case ql::kFloat16: with_cap(Float16{}); break;
    case ql::kBFloat16: with_cap(BFloat16{}); break;
  }
  return cudaGetLastError();
}

}  // namespace

namespace ql::cuda {

int logprob_entropy_fwd(const LogprobEntropyForward& args, std::uintptr_t stream) {
  return dispatch(args, [&](auto element, auto cap) {
    logprob_entropy_fwd_kernel<decltype(element), decltype(cap)::value>
        <<<grid_of(args.T), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  });
}

int logprob_entropy_bwd(const LogprobEntropyBackward& args, std::uintptr_t stream) {
  return dispatch(args, [&](auto element, auto cap) {
    logprob_entropy_bwd_kernel<decltype(element), decltype(cap)::value>
        <<<grid_of(args.T), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  });
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ql::cuda
