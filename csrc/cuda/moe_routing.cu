// MoE routing: a warp a token. Index of the experts' rows: a stable counting sort.
//
// Nothing is added in an order that could change: integers are counted in shared memory, probabilities by one warp
// after the other; a block's sums become a row of a table, whose columns a second kernel adds up. Nothing synchronises,
// so all of it can be captured in a CUDA graph. On sm_90 a kernel may start while the one before still runs, and waits
// for its end before it reads what that wrote.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../moe_routing.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

// For a kernel launched by launch_early: before its first access to global memory.
__device__ __forceinline__ void await_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start where it was launched by launch_early.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <class... Params, class... Args>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t on,
                         Args... args) {
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = on;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

__device__ __forceinline__ std::int64_t id_at(const ql::Ids& ids, std::int64_t i) {
  return ids.is_int64 ? static_cast<const std::int64_t*>(ids.data)[i] : static_cast<const std::int32_t*>(ids.data)[i];
}

__device__ __forceinline__ float warp_sum(float x) {  // every lane gets the same bits
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {  // of what is not NaN
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}

// --- routing ---------------------------------------------------------------------------------------------------------

constexpr int kRouteWarps = 8;
constexpr int kRouteThreads = kRouteWarps * kWarp;

// Orders as the logits do: -0 equals 0, every NaN is the same and the largest, -inf is above 0.
__device__ __forceinline__ unsigned sort_key(float x) {
  const unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return x != x ? 0xffffffffu : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

// kCount neighbours of a row, as wide as memory is read.
template <class S, int kCount>
struct alignas(sizeof(S) * kCount < 16 ? sizeof(S) * kCount : 16) Pack {
  S values[kCount];
};

// The row of a token over a warp: lane l holds the logits of experts [l kCount, (l + 1) kCount), -inf beyond E.
template <class S, int kCount>
struct Row {
  float x[kCount];

  __device__ __forceinline__ void load(const S* row, int E, bool is_aligned) {
    const int first = (threadIdx.x % kWarp) * kCount;
    if (is_aligned && first + kCount <= E) {
      const auto pack = *reinterpret_cast<const Pack<S, kCount>*>(row + first);
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = widen(pack.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = first + j < E ? widen(row[first + j]) : -INFINITY;
    }
  }

  __device__ __forceinline__ void store(S* row, int E, bool is_aligned) const {
    const int first = (threadIdx.x % kWarp) * kCount;
    if (is_aligned && first + kCount <= E) {
      Pack<S, kCount> pack;
#pragma unroll
      for (int j = 0; j < kCount; ++j) narrow(x[j], pack.values[j]);
      *reinterpret_cast<Pack<S, kCount>*>(row + first) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (first + j < E) narrow(x[j], row[first + j]);
      }
    }
  }

  // Overwrites the logits with e^(x - m). Returns the sum and, in m, the largest logit.
  __device__ __forceinline__ float exponentials(float& m) {
    m = x[0];
#pragma unroll
    for (int j = 1; j < kCount; ++j) m = fmaxf(m, x[j]);
    m = warp_max(m);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum += x[j] = expf(x[j] - m);
    return warp_sum(sum);
  }

  // Lane k gets the k-th largest's id; ties go to the lower one, which the lower lane or the lower j holds.
  __device__ __forceinline__ int select(int E, int top_k) const {
    const int lane = threadIdx.x % kWarp;
    unsigned taken = 0;  // bit j
#pragma unroll
    for (int j = 0; j < kCount; ++j) taken |= lane * kCount + j < E ? 0u : 1u << j;
    unsigned best = 0;  // below every key
    int best_j = 0, id = 0;
    const auto find_best = [&] {
      best = 0;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const unsigned key = taken >> j & 1 ? 0 : sort_key(x[j]);
        if (key > best) {
          best = key;
          best_j = j;
        }
      }
    };
    find_best();
    for (int k = 0; k < top_k; ++k) {
      const unsigned largest = __reduce_max_sync(kAll, best);
      const int owner = __ffs(__ballot_sync(kAll, best == largest)) - 1;
      const int chosen = owner * kCount + __shfl_sync(kAll, best_j, owner);
      if (lane == k) id = chosen;
      if (lane == owner) {
        taken |= 1u << best_j;
        find_best();
      }
    }
    return id;
  }
};

// Lane k < top_k holds the logit of its expert and gets its weight, the others get 0. m and s are those of the row.
__device__ __forceinline__ float weight_of(float chosen, bool is_mine, bool is_normalised, float m, float s) {
  // relative to the largest chosen: replayed experts may all have p = 0 in fp32
  const float largest = is_normalised ? warp_max(is_mine ? chosen : -INFINITY) : m;
  const float e = is_mine ? expf(chosen - largest) : 0.0f;
  return e / (is_normalised ? warp_sum(e) : s);
}

__device__ __forceinline__ float round_weight(float w, int rounding) {
  if (rounding == ql::kFloat16) return __half2float(__float2half_rn(w));
  if (rounding == ql::kBFloat16) return __bfloat162float(__float2bfloat16_rn(w));
  return w;
}

template <class S, int kCount>
__global__ void __launch_bounds__(kRouteThreads, 4) moe_route_fwd_kernel(const ql::MoeRouteForward args,
                                                                         bool is_aligned) {
  constexpr int kWidth = kWarp * kCount;
  __shared__ float block_probs[kRouteWarps][kWidth];
  __shared__ int block_counts[kWidth];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int E = args.E, top_k = args.top_k;
  const bool is_mine = lane < top_k;
  allow_next_kernel();
  for (int e = threadIdx.x; e < kWidth; e += kRouteThreads) block_counts[e] = 0;
  __syncthreads();

  float probs[kCount] = {};
  const std::int64_t tokens = (args.T + args.parts - 1) / args.parts;  // a block
  const std::int64_t last = min(args.T, (blockIdx.x + 1) * tokens);
  for (std::int64_t t = blockIdx.x * tokens + warp; t < last; t += kRouteWarps) {
    const S* row = static_cast<const S*>(args.logits) + t * args.stride_t;
    Row<S, kCount> part;
    part.load(row, E, is_aligned);
    bool is_known = false, is_bad = false;
    int id = 0;
    if (args.replay.data) {
      const std::int64_t given = is_mine ? id_at(args.replay, t * top_k + lane) : 0;
      is_known = __all_sync(kAll, 0 <= given && given < E);
      is_bad = !is_known && !__all_sync(kAll, given == -1 || !is_mine);
      id = static_cast<int>(given);
    }
    if (!is_known) id = part.select(E, top_k);
    const float chosen = is_mine ? widen(row[id]) : 0.0f;
    float m;
    const float s = part.exponentials(m);
    const float scale = 1.0f / s;
#pragma unroll
    for (int j = 0; j < kCount; ++j) probs[j] += part.x[j] * scale;
    const float w = weight_of(chosen, is_mine, args.is_normalised, m, s);
    if (is_mine) {
      args.weights[t * top_k + lane] = is_bad ? __int_as_float(0x7fffffff) : round_weight(w, args.rounding);
      args.ids[t * top_k + lane] = id;
      atomicAdd(&block_counts[id], 1);
    }
  }

#pragma unroll
  for (int j = 0; j < kCount; ++j) block_probs[warp][lane * kCount + j] = probs[j];
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kRouteThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += block_probs[w][e];
    const std::int64_t place = static_cast<std::int64_t>(blockIdx.x) * E + e;
    args.part_probs[place] = sum;
    args.part_counts[place] = block_counts[e];
  }
}

// Column sums of the parts: 32 columns a block, every 32nd row a thread, then the 32 threads of a column in order.
__global__ void __launch_bounds__(kWarp * kWarp) moe_totals_kernel(const ql::MoeRouteForward args) {
  __shared__ float probs[kWarp][kWarp];
  __shared__ int counts[kWarp][kWarp];
  const int e = blockIdx.x * kWarp + threadIdx.x, E = args.E;
  float prob = 0.0f;
  int count = 0;
  allow_next_kernel();
  await_kernel_before();
  for (int part = threadIdx.y; e < E && part < args.parts; part += kWarp) {
    prob += args.part_probs[part * E + e];  // parts * E < 2^31: at most 1024 * 512
    count += args.part_counts[part * E + e];
  }
  probs[threadIdx.y][threadIdx.x] = prob;
  counts[threadIdx.y][threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.y != 0 || e >= E) return;
  for (int y = 1; y < kWarp; ++y) {
    prob += probs[y][threadIdx.x];
    count += counts[y][threadIdx.x];
  }
  args.prob_sums[e] = prob;
  args.tokens_per_expert[e] = count;
}

template <class S, int kCount>
__global__ void __launch_bounds__(kRouteThreads, 4) moe_route_bwd_kernel(const ql::MoeRouteBackward args,
                                                                         bool is_aligned, bool is_out_aligned) {
  const int lane = threadIdx.x % kWarp, E = args.E, top_k = args.top_k;
  const bool is_mine = lane < top_k;
  const auto h_at = [&](int j) { return lane * kCount + j < E ? args.g_prob_sums[lane * kCount + j] : 0.0f; };
  bool has_h = false;
  for (int j = 0; args.g_prob_sums && j < kCount; ++j) has_h |= h_at(j) != 0.0f;
  has_h = __any_sync(kAll, has_h);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kRouteWarps;
  for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kRouteWarps + threadIdx.x / kWarp; t < args.T;
       t += stride) {
    const float g = is_mine && args.g_weights ? args.g_weights[t * top_k + lane] : 0.0f;
    const bool has_g = __any_sync(kAll, g != 0.0f);
    const S* row = static_cast<const S*>(args.logits) + t * args.stride_t;
    Row<S, kCount> part;
    float m = 0.0f, s = 1.0f;
    const bool needs_row = has_h || (has_g && !args.is_normalised);
    if (needs_row) {
      part.load(row, E, is_aligned);
      s = part.exponentials(m);
    }
    float dx[kCount] = {};
    if (has_g) {
      const int id = is_mine ? args.ids[t * top_k + lane] : 0;
      const float w = weight_of(is_mine ? widen(row[id]) : 0.0f, is_mine, args.is_normalised, m, s);
      const float mean = warp_sum(g * w);
      const float share = args.is_normalised ? w * (g - mean) : g;
      for (int k = 0; k < top_k; ++k) {
        const int j = __shfl_sync(kAll, id, k) - lane * kCount;
        const float value = __shfl_sync(kAll, share, k);
#pragma unroll
        for (int i = 0; i < kCount; ++i) dx[i] += i == j ? value : 0.0f;
      }
      if (!args.is_normalised) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) dx[j] = part.x[j] / s * (dx[j] - mean);
      }
    }
    if (has_h) {  // h is read twice a row: kept, it would cost every row registers
      float mean = 0.0f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) mean += part.x[j] / s * h_at(j);
      mean = warp_sum(mean);
#pragma unroll
      for (int j = 0; j < kCount; ++j) dx[j] += part.x[j] / s * (h_at(j) - mean);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) part.x[j] = dx[j];
    part.store(static_cast<S*>(args.dlogits) + t * E, E, is_out_aligned);
  }
}

template <class S, int kCount>
bool is_aligned_for(const void* rows, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(rows) % alignof(Pack<S, kCount>) == 0 &&
         stride * sizeof(S) % alignof(Pack<S, kCount>) == 0;
}

// Calls launch(a value of the storage type, logits a lane).
template <class Launch>
int dispatch(const ql::MoeRoute& args, const Launch& launch) {
  const auto with_count = [&](auto storage) {
    const int E = args.E;
    if (E <= 32) return launch(storage, std::integral_constant<int, 1>{});
    if (E <= 64) return launch(storage, std::integral_constant<int, 2>{});
    if (E <= 128) return launch(storage, std::integral_constant<int, 4>{});
    if (E <= 256) return launch(storage, std::integral_constant<int, 8>{});
    return launch(storage, std::integral_constant<int, ql::kMostExperts / kWarp>{});
  };
  switch (args.dtype) {
    case ql::kFloat32: with_count(float{}); break;
    case ql::kFloat16: with_count(__half{}); break;
    case ql::kBFloat16: with_count(__nv_bfloat16{}); break;
  }
  return cudaGetLastError();
}

// --- index -----------------------------------------------------------------------------------------------------------

constexpr int kSortWarps = 16;
constexpr int kSortThreads = kSortWarps * kWarp;
constexpr int kItemsAlone = 8, kItemsAPart = 4;  // rows a lane
constexpr int kMostBins = ql::kMostExperts + 1;  // the last: rows of no expert

template <int kItems>
constexpr int kRows = kSortThreads * kItems;  // a block

__device__ __forceinline__ int bin_of(std::int64_t id, int E) { return 0 <= id && id < E ? static_cast<int>(id) : E; }

// counts[part][bin], of the rows that the block of this number will sort.
__global__ void __launch_bounds__(kSortThreads, 2) count_experts_kernel(const ql::ExpertIndex args) {
  __shared__ int counts[kMostBins];
  const int bins = args.E + 1;
  for (int e = threadIdx.x; e < bins; e += kSortThreads) counts[e] = 0;
  __syncthreads();
  allow_next_kernel();
  await_kernel_before();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows<kItemsAPart>;
#pragma unroll
  for (int i = 0; i < kItemsAPart; ++i) {
    const std::int64_t row = first + i * kSortThreads + threadIdx.x;
    const int bin = row < args.rows ? bin_of(id_at(args.ids, row), args.E) : -1;
    const unsigned same = __match_any_sync(kAll, bin);  // one addition for all of them: most may be on one expert
    if (bin >= 0 && __ffs(same) - 1 == static_cast<int>(threadIdx.x % kWarp)) atomicAdd(&counts[bin], __popc(same));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < bins; e += kSortThreads) {
    args.counts[static_cast<std::int64_t>(blockIdx.x) * bins + e] = counts[e];
  }
}

// Down the columns of counts: each becomes the sum of those above it, and the sum of all goes to row `parts`. 32 columns
// a block; each of the 32 threads of a column takes a run of consecutive rows.
__global__ void __launch_bounds__(kWarp * kWarp) scan_counts_kernel(const ql::ExpertIndex args, std::int64_t parts) {
  __shared__ int sums[kWarp][kWarp];
  const int bins = args.E + 1, e = blockIdx.x * kWarp + threadIdx.x;
  const std::int64_t run = (parts + kWarp - 1) / kWarp;
  const std::int64_t first = threadIdx.y * run, last = e < bins ? min(parts, first + run) : 0;
  allow_next_kernel();
  await_kernel_before();
  int sum = 0;
  for (std::int64_t part = first; part < last; ++part) sum += args.counts[part * bins + e];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  int before = 0;
  for (int y = 0; y < static_cast<int>(threadIdx.y); ++y) before += sums[y][threadIdx.x];
  for (std::int64_t part = first; part < last; ++part) {
    const int count = args.counts[part * bins + e];
    args.counts[part * bins + e] = before;
    before += count;
  }
  if (threadIdx.y == kWarp - 1 && e < bins) args.counts[parts * bins + e] = before;
}

// Rows to their places: a warp takes consecutive rows, 32 at a time, and counts them bin by bin. A row's place is behind
// all smaller bins, the bin's rows of earlier blocks, of earlier warps, and of its own warp so far.
template <int kItems>
__global__ void __launch_bounds__(kSortThreads, 2) sort_rows_kernel(const ql::ExpertIndex args, std::int64_t parts) {
  extern __shared__ int shared[];
  const int bins = args.E + 1, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* starts = shared;                      // [bins]
  int* mine = shared + bins * (1 + warp);    // [bins]: this warp's counts, then the next place of each bin
  for (int e = threadIdx.x; e < bins * (1 + kSortWarps); e += kSortThreads) shared[e] = 0;
  __syncthreads();
  await_kernel_before();

  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows<kItems> + warp * kWarp * kItems + lane;
  int bin[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const std::int64_t row = first + i * kWarp;
    bin[i] = row < args.rows ? bin_of(id_at(args.ids, row), args.E) : -1;
  }
  unsigned same[kItems];  // lanes with the same bin
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    same[i] = __match_any_sync(kAll, bin[i]);
    if (bin[i] >= 0 && __ffs(same[i]) - 1 == lane) mine[bin[i]] += __popc(same[i]);
    __syncwarp();
  }
  __syncthreads();

  for (int e = threadIdx.x; e < bins; e += kSortThreads) {  // rows of each bin, of all blocks
    int total = 0;
    if (parts > 1) {
      total = args.counts[parts * bins + e];
    } else {
      for (int w = 0; w < kSortWarps; ++w) total += shared[bins * (1 + w) + e];
    }
    starts[e] = total;
  }
  __syncthreads();
  if (warp == 0) {  // becomes the first row of each bin
    const int run = (bins + kWarp - 1) / kWarp, begin = min(bins, lane * run), end = min(bins, begin + run);
    int sum = 0;
    for (int e = begin; e < end; ++e) sum += starts[e];
    int upto = sum;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAll, upto, distance);
      if (lane >= distance) upto += other;
    }
    int start = upto - sum;
    for (int e = begin; e < end; ++e) {
      const int total = starts[e];
      starts[e] = start;
      start += total;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < bins; e += kSortThreads) {
    if (blockIdx.x == 0) args.offsets[e] = starts[e];
    int place = starts[e];
    if (parts > 1) place += args.counts[static_cast<std::int64_t>(blockIdx.x) * bins + e];
    for (int w = 0; w < kSortWarps; ++w) {
      int& count = shared[bins * (1 + w) + e];
      const int next = place + count;
      count = place;
      place = next;
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int next = bin[i] >= 0 ? mine[bin[i]] : 0;
    __syncwarp();
    if (bin[i] >= 0) {
      const std::int64_t row = first + i * kWarp;
      const int place = next + __popc(same[i] & ((1u << lane) - 1));
      args.sort_order[place] = static_cast<std::int32_t>(row);
      args.inverse_order[row] = place;
      if (__ffs(same[i]) - 1 == lane) mine[bin[i]] = next + __popc(same[i]);
    }
    __syncwarp();
  }
}

unsigned columns_of(int E) { return (E + kWarp - 1) / kWarp; }

}  // namespace

namespace ql::cuda {

int moe_route_fwd(const MoeRouteForward& args, std::uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto launch = [&](auto storage, auto count) {
    using S = decltype(storage);
    constexpr int kCount = decltype(count)::value;
    moe_route_fwd_kernel<S, kCount>
        <<<args.parts, kRouteThreads, 0, on>>>(args, is_aligned_for<S, kCount>(args.logits, args.stride_t));
  };
  if (args.parts > 0) {
    if (const int error = dispatch(args, launch)) return error;
  }
  return launch_early(moe_totals_kernel, columns_of(args.E), dim3(kWarp, kWarp), 0, on, args);
}

int moe_route_bwd(const MoeRouteBackward& args, std::uintptr_t stream) {
  if (args.T == 0) return cudaSuccess;
  const std::int64_t blocks = std::min<std::int64_t>((args.T + kRouteWarps - 1) / kRouteWarps, 4096);
  return dispatch(args, [&](auto storage, auto count) {
    using S = decltype(storage);
    constexpr int kCount = decltype(count)::value;
    moe_route_bwd_kernel<S, kCount>
        <<<static_cast<unsigned>(blocks), kRouteThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
            args, is_aligned_for<S, kCount>(args.logits, args.stride_t),
            is_aligned_for<S, kCount>(args.dlogits, args.E));
  });
}

std::int64_t index_parts(std::int64_t rows) {
  if (rows <= kRows<kItemsAlone>) return 1;
  return (rows + kRows<kItemsAPart> - 1) / kRows<kItemsAPart>;
}

int build_expert_index(const ExpertIndex& args, std::uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const int bins = args.E + 1;
  const int bytes = bins * (1 + kSortWarps) * static_cast<int>(sizeof(int));  // 35 KB for 512 experts
  const std::int64_t parts = index_parts(args.rows);
  if (args.rows == 0) {
    return cudaMemsetAsync(args.offsets, 0, bins * sizeof(int), on);
  }
  if (parts == 1) {
    return launch_early(sort_rows_kernel<kItemsAlone>, 1, kSortThreads, bytes, on, args, 1);
  }
  const auto grid = static_cast<unsigned>(parts);
  if (const int error = launch_early(count_experts_kernel, grid, kSortThreads, 0, on, args)) return error;
  if (const int error = launch_early(scan_counts_kernel, columns_of(bins), dim3(kWarp, kWarp), 0, on, args, parts)) {
    return error;
  }
  return launch_early(sort_rows_kernel<kItemsAPart>, grid, kSortThreads, bytes, on, args, parts);
}

}  // namespace ql::cuda
