// Element types, 16-byte vectors of a row, and the value of a logit: shared by the kernels that read rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../elements.h"
#include "../logprob_entropy.h"
#include "../row_math.h"

namespace {

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

__device__ __forceinline__ RowScale scale_of(const ql::LogprobEntropy& args, std::int64_t t) {
  return row_scale(args.temperatures ? args.temperatures[t] : args.temperature, args.softcap, args.logit_scale);
}

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
