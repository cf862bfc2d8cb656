// Rows of logits through a ring of shared memory, filled by bulk copies (sm_90).
//
// A thread block works off rows without a gap: one warp asks for the chunks of this row and of the next ones as slots
// come free, sixteen warps read the chunks, and one more warp plans and finishes rows, so that nobody waits between two.
//
//   forward    a chunk is read once and its slot is free again                                T V elements read
//   backward   the same, and the gradient is written                                          T V read, T V written
//   both       a row stays in the ring until its sums are known and is read again for the     T V read, T V written
//              gradient: eight warps form the sums of a row while the other eight write the
//              gradient of the row before. A cluster of 2, 4 or 8 blocks shares a long row.
//
// The sums leave the target out, which is added at the end: so 1 - p of the target has full relative precision.
#include <algorithm>
#include <cstdint>

#include "row_ring.cuh"
#include "row_ring_warps.cuh"

namespace {

template <class E, bool kCap, Mode kMode>
__global__ void __launch_bounds__(kRingThreads, 1) row_ring_kernel(const ql::LogprobEntropyGrad args, int ranks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int rank = kMode == Mode::kBoth ? static_cast<int>(cluster_rank()) : 0;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(&shared.full[slot], 1);
      barrier_init(&shared.empty[slot], kArrivalsOfWarp * (kMode == Mode::kBoth ? kWriterWarps : kReaderWarps));
    }
    for (int parity = 0; parity < 2; ++parity) {
      // in the mode that does both, every lane that sends to a rank arrives there itself
      barrier_init(&shared.done[parity], kMode == Mode::kBoth ? ranks * kSummerWarps : kArrivalsOfWarp * kReaderWarps);
      barrier_init(&shared.taken[parity], kArrivalsOfWarp * (kMode == Mode::kBoth ? ranks : 1));
      barrier_init(&shared.ready[parity], kArrivalsOfWarp);
      barrier_init(&shared.used[parity], kArrivalsOfWarp * kWriterWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (kMode == Mode::kBoth) cluster_sync();
  std::int64_t first_row = blockIdx.x / ranks, row_step = gridDim.x / ranks;
  if constexpr (kMode == Mode::kBackward) {
    first_row = args.T - 1 - first_row;
    row_step = -row_step;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == kCopyWarp) {
    if (lane == 0) copy_rows<E, kMode>(args, shared, rank, ranks, first_row, row_step);
  } else if constexpr (kMode == Mode::kForward) {
    if (warp < kReaderWarps) {
      read_forward<E, kCap>(args, shared, first_row, row_step);
    } else {
      finish_rows<E, kCap>(args, shared, lane, first_row, row_step);
    }
  } else if constexpr (kMode == Mode::kBackward) {
    if (warp < kReaderWarps) {
      read_backward<E, kCap>(args, shared, first_row, row_step);
    } else {
      plan_backward<E, kCap>(args, shared, lane, first_row, row_step);
    }
  } else {
    if (warp < kSummerWarps) {
      sum_rows<E, kCap>(args, shared, rank, ranks, first_row, row_step);
    } else if (warp < kReaderWarps) {
      write_rows<E, kCap>(args, shared, rank, ranks, first_row, row_step);
    } else {
      plan_both<E, kCap>(args, shared, rank, ranks, lane, first_row, row_step);
    }
  }
  if constexpr (kMode == Mode::kBoth) {
    __syncwarp();
    cluster_sync();  // nobody leaves while another block may still write to its shared memory
  }
#endif
}

struct Device {
  int capability = 0, multiprocessors = 0;
};

Device current_device() {
  Device device;
  int index = 0, major = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return device;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  device.capability = major;
  return device;
}

// Blocks that share a row: as few as hold their shares and two chunks of the next row; 0 where no cluster is large
// enough. On an H100 clusters of 3 and 4 were slower at V = 151,936, though their rings hold more of the next row.
int ranks_for(std::int64_t V, int itemsize) {
  for (int ranks = 1; ranks <= kMostRanks; ranks *= 2) {
    const std::int64_t share = (V * itemsize / 16 + ranks - 1) / ranks;
    if ((share + kVectors - 1) / kVectors + 2 <= kSlots) return ranks;
  }
  return 0;
}

template <Mode kMode>
int launch(const ql::LogprobEntropyGrad& args, int ranks, std::uintptr_t stream) {
  int error = cudaSuccess;
  const int status = dispatch(args, [&](auto element, auto cap) {
    auto* kernel = row_ring_kernel<decltype(element), decltype(cap)::value, kMode>;
    const int bytes = sizeof(Shared);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kRingThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = current_device().multiprocessors;
    if (ranks > 1) {  // processor groups need not hold a whole number of clusters
      config.gridDim = dim3(ranks);
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
      if (error != cudaSuccess) return;
    }
    config.gridDim = dim3(static_cast<unsigned>(std::min<std::int64_t>(args.T, std::max(clusters, 1)) * ranks));
    error = cudaLaunchKernelEx(&config, kernel, args, ranks);
  });
  return error != cudaSuccess ? error : status;
}

template <class Args>
ql::LogprobEntropyGrad shared_of(const Args& args) {
  ql::LogprobEntropyGrad all{};
  static_cast<ql::LogprobEntropy&>(all) = args;
  return all;
}

int itemsize_of(int dtype) { return dtype == ql::kFloat32 ? 4 : 2; }

bool is_aligned(const void* rows, std::int64_t stride, int itemsize) {
  return reinterpret_cast<std::uintptr_t>(rows) % 16 == 0 && stride * itemsize % 16 == 0;
}

}  // namespace

namespace ql::cuda {

bool ring_fits(const LogprobEntropy& args, const void* dlogits, std::int64_t dstride_t) {
  const int itemsize = itemsize_of(args.dtype);
  if (!is_aligned(args.logits, args.stride_t, itemsize)) return false;
  if (dlogits && !is_aligned(dlogits, dstride_t, itemsize)) return false;
  return current_device().capability == 9;
}

int ring_fwd(const LogprobEntropyForward& args, std::uintptr_t stream) {
  LogprobEntropyGrad all = shared_of(args);
  all.logprobs = args.logprobs;
  all.entropy = args.entropy;
  all.lse = args.lse;
  return launch<Mode::kForward>(all, 1, stream);
}

int ring_bwd(const LogprobEntropyBackward& args, std::uintptr_t stream) {
  LogprobEntropyGrad all = shared_of(args);
  all.entropy = const_cast<float*>(args.entropy);  // this mode only reads them
  all.lse = const_cast<float*>(args.lse);
  all.g_logprobs = args.g_logprobs;
  all.g_entropy = args.g_entropy;
  all.g_lse = args.g_lse;
  all.dlogits = args.dlogits;
  all.dstride_t = args.dstride_t;
  return launch<Mode::kBackward>(all, 1, stream);
}

bool logprob_entropy_grad_fits(const LogprobEntropyGrad& args) {
  return ring_fits(args, args.dlogits, args.dstride_t) && ranks_for(args.V, itemsize_of(args.dtype)) > 0;
}

int logprob_entropy_grad(const LogprobEntropyGrad& args, std::uintptr_t stream) {
  return launch<Mode::kBoth>(args, ranks_for(args.V, itemsize_of(args.dtype)), stream);
}

}  // namespace ql::cuda
