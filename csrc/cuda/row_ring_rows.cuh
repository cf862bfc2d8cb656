// What the kernels of row_ring.cu share: the ring, what is planned of a row, and reading, summing and writing chunks.
#pragma once

#include <cmath>
#include <cstdint>

#include "mbarrier.cuh"
#include "rows.cuh"

namespace {

constexpr int kReaders = 512;
constexpr int kReaderWarps = kReaders / 32;
constexpr int kRingThreads = kReaders + 64;
constexpr int kVectors = 1024;  // 16-byte vectors a chunk
constexpr int kChunkBytes = 16 * kVectors;
constexpr int kSlots = 13;
constexpr int kMostRanks = 8;

enum class Mode { kForward, kBackward, kBoth };

// What the warps that write a gradient have to know of a row. One warp forms it ahead of them.
struct Plan {
  bool is_read, is_live, is_left_out;
  std::int64_t y;
  RowScale scale;
  RowGradient g;
  float du_target;  // of the mode that knows it beforehand
};

struct Shared {
  alignas(128) unsigned char ring[kSlots][kChunkBytes];
  std::uint64_t full[kSlots], empty[kSlots];
  // Two rows under way: parts of the summing warps of every rank, and the target's logit.
  std::uint64_t done[2], taken[2], ready[2], used[2];
  Plan plan[2];
  float m[2][kMostRanks * kReaderWarps], s[2][kMostRanks * kReaderWarps], q[2][kMostRanks * kReaderWarps];
  float target[2];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr int kCopyWarp = kReaderWarps;  // the warp after it plans and finishes rows
constexpr unsigned kAll = 0xffffffffu;

// In the mode that does both, the warps that sum and the warps that write.
constexpr int kSummers = kReaders / 2, kSummerWarps = kSummers / 32;
constexpr int kWriters = kReaders - kSummers, kWriterWarps = kWriters / 32;

// Place in the ring, and the parity of its barriers.
struct Place {
  int slot = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The part of a row that one rank reads: vectors [first, end), and elements [tail, V) for the last rank.
struct Share {
  int first, end, tail;
  __device__ __forceinline__ int chunks() const { return (end - first + kVectors - 1) / kVectors; }
};

template <class E>
__device__ __forceinline__ Share share_of(int V, int rank, int ranks) {
  const int vectors = V / E::kVector, each = (vectors + ranks - 1) / ranks;
  Share share;
  share.first = min(vectors, rank * each);
  share.end = min(vectors, share.first + each);
  share.tail = rank == ranks - 1 ? vectors * E::kVector : V;
  return share;
}

// The target's place in the share: its chunk and vector, or the tail, and the reader of kGroup that comes upon it.
struct TargetPlace {
  int chunk = -1, vector = -1, element = 0, reader = -1;
};

template <class E, int kGroup>
__device__ __forceinline__ TargetPlace find_target(std::int64_t y, const Share& share, int V) {
  TargetPlace found;
  if (y < 0 || y >= V) return found;
  const int vector = static_cast<int>(y) / E::kVector;
  if (vector >= share.first && vector < share.end) {
    found.chunk = (vector - share.first) / kVectors;
    found.vector = (vector - share.first) % kVectors;
    found.element = static_cast<int>(y) % E::kVector;
    found.reader = found.vector % kGroup;
  } else if (y >= share.tail) {
    found.chunk = share.chunks();
    found.reader = static_cast<int>(y) - share.tail;
  }
  return found;
}

struct Row {
  bool is_masked;
  float g_logprob = 0.0f, g_entropy = 0.0f, g_lse = 0.0f;
  bool is_live;      // has an upstream gradient
  bool is_read;      // goes through the ring
  bool is_left_out;  // to the other kernel
};

template <class E, Mode kMode>
__device__ __forceinline__ Row row_of(const ql::LogprobEntropyGrad& args, std::int64_t t) {
  Row row;
  row.is_masked = args.row_mask && !args.row_mask[t];
  row.is_left_out = false;
  if constexpr (kMode == Mode::kForward) {
    row.is_live = false;
    row.is_read = !row.is_masked;
  } else {
    row.g_logprob = args.g_logprobs ? args.g_logprobs[t] : 0.0f;
    row.g_entropy = args.g_entropy ? args.g_entropy[t] : 0.0f;
    row.g_lse = args.g_lse ? args.g_lse[t] : 0.0f;
    row.is_live = !row.is_masked && !(row.g_logprob == 0.0f && row.g_entropy == 0.0f && row.g_lse == 0.0f);
    row.is_read = !row.is_masked;
    if constexpr (kMode == Mode::kBackward) {
      row.is_left_out = row.is_live && fabsf(args.lse[t]) >= E::kRefineLse;
      row.is_read = row.is_live && !row.is_left_out;
    }
  }
  return row;
}

__device__ __forceinline__ float nan_value() { return __int_as_float(0x7fffffff); }

// Merges what the lanes hold; lane 0 has the result.
__device__ __forceinline__ Part<float> warp_merge(Part<float> part, float alpha) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Part<float> other;
    other.m = __shfl_down_sync(kAll, part.m, distance);
    other.s = __shfl_down_sync(kAll, part.s, distance);
    other.q = __shfl_down_sync(kAll, part.q, distance);
    part = merge(part, other, alpha);
  }
  return part;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(kAll, x, distance);
  return x;
}

// The parts of all ranks, in a fixed order; lane 0 has the result.
__device__ __forceinline__ Part<float> merge_parts(const Shared& shared, int parity, int count, int lane, float alpha) {
  Part<float> part;
  for (int i = lane; i < count; i += 32) {
    Part<float> next;
    next.m = shared.m[parity][i];
    next.s = shared.s[parity][i];
    next.q = shared.q[parity][i];
    part = merge(part, next, alpha);
  }
  return warp_merge(part, alpha);
}

__device__ __forceinline__ Part<float> with_target(const Part<float>& rest, float v, float alpha) {
  Part<float> target;
  target.m = v > kLowestLogit ? v : kLowestLogit;
  add_element(v, target.m, alpha, target.s, target.q);
  return merge(rest, target, alpha);
}

// A logit as it was read. -inf marks the target's place, but under a soft-cap a logit of -inf has the mass of -c.
template <bool kCap>
__device__ __forceinline__ float unmarked(float logit) {
  if constexpr (!kCap) return logit;
  return logit == -INFINITY ? kLowestLogit : logit;
}

// One vector of a chunk. The target is taken out: its place holds -inf, whose probability is 0.
template <class E, bool kCap>
__device__ __forceinline__ void unpack_vector(const uint4& bits, int vector, bool has_target,
                                              const TargetPlace& target, float& v_target, float (&x)[E::kVector]) {
  E::unpack(bits, x);
#pragma unroll
  for (int k = 0; k < E::kVector; ++k) x[k] = unmarked<kCap>(x[k]);
  if (has_target && vector == target.vector) {
#pragma unroll
    for (int k = 0; k < E::kVector; ++k) {
      if (k == target.element) {
        v_target = x[k];
        x[k] = -INFINITY;
      }
    }
  }
}

// The value of a logit; the mark of the target's place stays what it is under a soft-cap too.
template <bool kCap>
__device__ __forceinline__ float marked_value(float logit, float gain) {
  if constexpr (!kCap) return logit;
  return logit == -INFINITY ? -INFINITY : value_of<kCap>(logit, gain);
}

template <class E, Mode kMode>
__device__ __forceinline__ void copy_rows(const ql::LogprobEntropyGrad& args, Shared& shared, int rank, int ranks,
                                          std::int64_t first_row, std::int64_t row_step) {
  Place place;
  const Share share = share_of<E>(static_cast<int>(args.V), rank, ranks);
  for (std::int64_t t = first_row; 0 <= t && t < args.T; t += row_step) {
    if (!row_of<E, kMode>(args, t).is_read) continue;
    const auto* row = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
    const uint4* vectors = reinterpret_cast<const uint4*>(row);
    for (int at = share.first; at < share.end; at += kVectors, place.advance()) {
      barrier_wait(&shared.empty[place.slot], place.parity ^ 1);
      const std::uint32_t bytes = 16u * min(kVectors, share.end - at);
      barrier_expect(&shared.full[place.slot], bytes);
      bulk_copy(shared.ring[place.slot], vectors + at, bytes, &shared.full[place.slot]);
    }
  }
}

template <class E, int kGroup>
__device__ __forceinline__ void write_zeros(typename E::Storage* out, const Share& share, int V, int reader) {
  uint4* vectors = reinterpret_cast<uint4*>(out);
  for (int i = share.first + reader; i < share.end; i += kGroup) __stcs(vectors + i, uint4{0, 0, 0, 0});
  if (share.tail + reader < V) out[share.tail + reader] = E::narrow(0.0f);
}

// Adds the reader's vectors of a chunk to its part.
template <class E, bool kCap, int kGroup>
__device__ __forceinline__ void sum_chunk(const unsigned char* chunk, int count, int reader, bool has_target,
                                          const TargetPlace& target, const RowScale& scale, float& v_target,
                                          Part<float>& part) {
  constexpr int kEach = kVectors / kGroup;
  uint4 bits[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (reader + j * kGroup < count) bits[j] = reinterpret_cast<const uint4*>(chunk)[reader + j * kGroup];
  }
#pragma unroll
  for (int pair = 0; pair < kEach; pair += 2) {
    float v[2 * E::kVector];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int vector = reader + (pair + j) * kGroup;
      float x[E::kVector];
      if (vector < count) {
        unpack_vector<E, kCap>(bits[pair + j], vector, has_target, target, v_target, x);
      } else {
#pragma unroll
        for (int k = 0; k < E::kVector; ++k) x[k] = -INFINITY;
      }
#pragma unroll
      for (int k = 0; k < E::kVector; ++k) v[j * E::kVector + k] = marked_value<kCap>(x[k], scale.gain);
    }
    accumulate(v, scale.alpha, part);
  }
}

// The gradient of one logit; 0 where the target was.
template <bool kCap>
__device__ __forceinline__ float gradient_of(float logit, const RowScale& scale, const RowGradient& g, float& rest) {
  float v = logit, slope = 1.0f;
  if constexpr (kCap) {
    tanh_and_slope(logit * scale.gain, v, slope);
    if (logit == -INFINITY) v = -INFINITY;
  }
  return slope * element_gradient(v, scale.alpha, g, rest);
}

// The gradient of the reader's vectors of a chunk; out is that of the chunk's first element.
template <class E, bool kCap, int kGroup>
__device__ __forceinline__ void write_chunk(const unsigned char* chunk, int count, typename E::Storage* out, int reader,
                                            bool has_target, const TargetPlace& target, const RowScale& scale,
                                            const RowGradient& g, float& v_target, float& rest) {
  constexpr int kEach = kVectors / kGroup;
  uint4 bits[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (reader + j * kGroup < count) bits[j] = reinterpret_cast<const uint4*>(chunk)[reader + j * kGroup];
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int vector = reader + j * kGroup;
    if (vector >= count) break;
    float x[E::kVector];
    unpack_vector<E, kCap>(bits[j], vector, has_target, target, v_target, x);
#pragma unroll
    for (int k = 0; k < E::kVector; ++k) x[k] = gradient_of<kCap>(x[k], scale, g, rest);
    __stcs(reinterpret_cast<uint4*>(out) + vector, E::pack(x));
  }
}

// Rows as one group of warps sees them: the common part of reading, summing and writing.
template <class E, int kGroup>
struct Rows {
  using Storage = typename E::Storage;
  const ql::LogprobEntropyGrad& args;
  Shared& shared;
  const int reader, lane, warp, V;
  const Share share;
  const int chunks;
  Place place;

  __device__ __forceinline__ Rows(const ql::LogprobEntropyGrad& args, Shared& shared, int rank, int ranks, int reader)
      : args(args), shared(shared), reader(reader), lane(reader % 32), warp(reader / 32),
        V(static_cast<int>(args.V)), share(share_of<E>(V, rank, ranks)), chunks(share.chunks()) {}

  __device__ __forceinline__ const Storage* source(std::int64_t t) const {
    return static_cast<const Storage*>(args.logits) + t * args.stride_t;
  }
  __device__ __forceinline__ Storage* out(std::int64_t t) const {
    return static_cast<Storage*>(args.dlogits) + t * args.dstride_t;
  }
  __device__ __forceinline__ bool has_tail() const { return share.tail + reader < V; }
  __device__ __forceinline__ int size_of(int chunk) const {
    return min(kVectors, share.end - share.first - chunk * kVectors);
  }
  __device__ __forceinline__ int first_of(int chunk) const { return (share.first + chunk * kVectors) * E::kVector; }

  __device__ __forceinline__ void wait(const Place& at) { barrier_wait(&shared.full[at.slot], at.parity); }
  __device__ __forceinline__ void release(const Place& at) { barrier_arrive_warp(&shared.empty[at.slot], lane); }

  __device__ __forceinline__ void release_row() {
    for (int c = 0; c < chunks; ++c, place.advance()) {
      wait(place);
      release(place);
    }
  }

  // In the warp that came upon the target, which gets true, every lane gets the logit.
  __device__ __forceinline__ bool bring_target(const TargetPlace& target, float& v_target) {
    const bool holds_target = target.reader >= 0 && target.reader / 32 == warp;
    if (holds_target) v_target = __shfl_sync(kAll, v_target, target.reader % 32);
    return holds_target;
  }

  // The sums of a row; lane 0 of each warp gets those of its warp.
  template <bool kCap, bool kRelease>
  __device__ __forceinline__ Part<float> sum_row(std::int64_t t, const TargetPlace& target, const RowScale& scale,
                                                 float& v_target) {
    Part<float> part;
    float tail = has_tail() ? unmarked<kCap>(E::widen(source(t)[share.tail + reader])) : -INFINITY;
    for (int c = 0; c < chunks; ++c, place.advance()) {
      wait(place);
      const bool here = c == target.chunk && reader == target.reader;
      sum_chunk<E, kCap, kGroup>(shared.ring[place.slot], size_of(c), reader, here, target, scale, v_target, part);
      if constexpr (kRelease) release(place);
    }
    if (share.tail < V) {
      if (chunks == target.chunk && reader == target.reader) {
        v_target = tail;
        tail = -INFINITY;
      }
      const float end[1] = {marked_value<kCap>(tail, scale.gain)};
      accumulate(end, scale.alpha, part);
    }
    return warp_merge(part, scale.alpha);
  }

  // The gradient of a row; the target's place gets 0, and its reader the logit. Returns the reader's probabilities.
  template <bool kCap>
  __device__ __forceinline__ float write_row(std::int64_t t, const TargetPlace& target, const RowScale& scale,
                                             const RowGradient& g, float& v_target) {
    float rest = 0.0f;
    Storage* to = out(t);
    float tail = has_tail() ? unmarked<kCap>(E::widen(source(t)[share.tail + reader])) : -INFINITY;
    for (int c = 0; c < chunks; ++c, place.advance()) {
      wait(place);
      const bool here = c == target.chunk && reader == target.reader;
      write_chunk<E, kCap, kGroup>(shared.ring[place.slot], size_of(c), to + first_of(c), reader, here, target, scale,
                                   g, v_target, rest);
      release(place);
    }
    if (has_tail()) {
      if (chunks == target.chunk && reader == target.reader) {
        v_target = tail;
        tail = -INFINITY;
      }
      to[share.tail + reader] = E::narrow(gradient_of<kCap>(tail, scale, g, rest));
    }
    return rest;
  }
};

#endif

}  // namespace
