// Reductions over a thread block, in a fixed order: the same bits on every run.
#pragma once

#include "../row_math.h"

namespace {

constexpr int kWarpSize = 32;

template <int kThreads>
struct BlockScratch {  // in shared memory
  static constexpr int kWarps = kThreads / kWarpSize;
  float m[kWarps], s[kWarps], q[kWarps];
};

// Every thread gets the merged part. Ends with a barrier, so that scratch can be used again at once.
template <int kThreads>
__device__ __forceinline__ Part<float> block_merge(Part<float> part, float alpha, BlockScratch<kThreads>& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    Part<float> other;
    other.m = __shfl_down_sync(0xffffffffu, part.m, distance);
    other.s = __shfl_down_sync(0xffffffffu, part.s, distance);
    other.q = __shfl_down_sync(0xffffffffu, part.q, distance);
    part = merge(part, other, alpha);  // only lane 0 holds a result in the end
  }
  if (lane == 0) {
    scratch.m[warp] = part.m;
    scratch.s[warp] = part.s;
    scratch.q[warp] = part.q;
  }
  __syncthreads();
  Part<float> all;
  for (int w = 0; w < BlockScratch<kThreads>::kWarps; ++w) {
    Part<float> next;
    next.m = scratch.m[w];
    next.s = scratch.s[w];
    next.q = scratch.q[w];
    all = merge(all, next, alpha);
  }
  __syncthreads();
  return all;
}

// Every thread gets the sum. Ends with a barrier, so that scratch can be used again at once.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, BlockScratch<kThreads>& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (lane == 0) scratch.s[warp] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < BlockScratch<kThreads>::kWarps; ++w) sum += scratch.s[w];
  __syncthreads();
  return sum;
}

}  // namespace
