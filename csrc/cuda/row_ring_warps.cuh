// What the warps of row_ring.cu do: planning and finishing rows, reading them, summing, writing gradients.
#pragma once

#include "row_ring_rows.cuh"

namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Forward: what is left of a row when its chunks are read.
template <class E, bool kCap>
__device__ __forceinline__ void finish_rows(const ql::LogprobEntropyGrad& args, Shared& shared, int lane,
                                            std::int64_t first_row, std::int64_t row_step) {
  int count = 0;
  for (std::int64_t t = first_row; t < args.T; t += row_step) {
    if (!row_of<E, Mode::kForward>(args, t).is_read) continue;
    const RowScale scale = scale_of(args, t);
    const std::int64_t y = args.target[t];
    const int parity = count & 1;
    barrier_wait(&shared.done[parity], count >> 1 & 1);
    ++count;
    Part<float> all = merge_parts(shared, parity, kReaderWarps, lane, scale.alpha);
    if (lane == 0) {
      float v = nan_value();
      if (0 <= y && y < args.V) {
        v = value_of<kCap>(shared.target[parity], scale.gain);
        all = with_target(all, v, scale.alpha);
      }
      const Scores scores = finish(all, scale.alpha, v);
      args.logprobs[t] = scores.logprob;
      args.entropy[t] = scores.entropy;
      args.lse[t] = scores.lse;
    }
    barrier_arrive_warp(&shared.taken[parity], lane);
  }
}

// Backward: plans a row two rows ahead of the readers, and writes the target's entry when they are done with it. Rows
// come from the last to the first: L2 still holds what the forward read last.
template <class E, bool kCap>
__device__ __forceinline__ void plan_backward(const ql::LogprobEntropyGrad& args, Shared& shared, int lane,
                                              std::int64_t first_row, std::int64_t row_step) {
  const auto finish_row = [&](std::int64_t t, int n) {
    const int parity = n & 1;
    barrier_wait(&shared.done[parity], n >> 1 & 1);
    const Plan& plan = shared.plan[parity];
    if (!plan.is_read || plan.y < 0 || plan.y >= args.V) return;
    const float rest = warp_sum(lane < kReaderWarps ? shared.s[parity][lane] : 0.0f);
    if (lane != 0) return;
    float v = shared.target[parity], slope = 1.0f;
    if constexpr (kCap) tanh_and_slope(v * plan.scale.gain, v, slope);
    const Row row = row_of<E, Mode::kBackward>(args, t);
    const float du = target_gradient(plan.scale, plan.g, v, rest, args.entropy[t], row.g_logprob, row.g_entropy,
                                     row.g_lse);
    (static_cast<typename E::Storage*>(args.dlogits) + t * args.dstride_t)[plan.y] = E::narrow(slope * du);
  };
  int n = 0;
  std::int64_t t = first_row;
  for (; t >= 0; t += row_step, ++n) {
    Plan plan{};
    const Row row = row_of<E, Mode::kBackward>(args, t);
    plan.is_read = row.is_read;
    plan.is_live = row.is_live;
    plan.is_left_out = row.is_left_out;
    if (row.is_read) {
      plan.y = args.target[t];
      plan.scale = scale_of(args, t);
      const bool has_target = 0 <= plan.y && plan.y < args.V;
      plan.g = row_gradient(plan.scale, offset_of(args.lse[t], plan.scale.alpha), args.entropy[t],
                            has_target ? row.g_logprob : nan_value(), row.g_entropy, row.g_lse);
    }
    if (n >= 2) finish_row(t - 2 * row_step, n - 2);
    __syncwarp();
    if (lane == 0) shared.plan[n & 1] = plan;
    barrier_arrive_warp(&shared.ready[n & 1], lane);
  }
  if (n >= 2) finish_row(t - 2 * row_step, n - 2);
  if (n >= 1) finish_row(t - row_step, n - 1);
}

// Both: merges the sums of a row, writes its scores, and plans its gradient.
template <class E, bool kCap>
__device__ __forceinline__ void plan_both(const ql::LogprobEntropyGrad& args, Shared& shared, int rank, int ranks,
                                          int lane, std::int64_t first_row, std::int64_t row_step) {
  int n = 0, count = 0;
  for (std::int64_t t = first_row; t < args.T; t += row_step, ++n) {
    const Row row = row_of<E, Mode::kBoth>(args, t);
    Plan plan{};
    plan.is_read = row.is_read;
    plan.is_live = row.is_live;
    float logprob = 0.0f, entropy = 0.0f, lse = 0.0f;
    if (row.is_read) {
      plan.scale = scale_of(args, t);
      plan.y = args.target[t];
      const bool has_target = 0 <= plan.y && plan.y < args.V;
      const int parity = count & 1;
      barrier_wait_cluster(&shared.done[parity], count >> 1 & 1);
      ++count;
      const Part<float> others = merge_parts(shared, parity, ranks * kSummerWarps, lane, plan.scale.alpha);
      float v = has_target ? shared.target[parity] : nan_value(), slope = 1.0f;
      barrier_arrive_warp_in_all(&shared.taken[parity], lane, ranks);  // what their warps sent is read
      if (lane == 0) {
        if constexpr (kCap) tanh_and_slope(v * plan.scale.gain, v, slope);
        const Part<float> all = has_target ? with_target(others, v, plan.scale.alpha) : others;
        const Scores scores = finish(all, plan.scale.alpha, v);
        logprob = scores.logprob;
        entropy = scores.entropy;
        lse = scores.lse;
        plan.g = row_gradient(plan.scale, offset_of(all), entropy, has_target ? row.g_logprob : nan_value(),
                              row.g_entropy, row.g_lse);
        const float rest = others.s * pow2(clamp_exponent(plan.scale.alpha * (others.m - all.m))) / all.s;
        plan.du_target = slope * target_gradient(plan.scale, plan.g, v, rest, entropy, row.g_logprob, row.g_entropy,
                                                 row.g_lse);
      }
    }
    barrier_wait(&shared.used[n & 1], (n >> 1 & 1) ^ 1);
    if (lane == 0) shared.plan[n & 1] = plan;
    barrier_arrive_warp(&shared.ready[n & 1], lane);
    if (lane == 0 && rank == 0) {
      args.logprobs[t] = logprob;
      args.entropy[t] = entropy;
      args.lse[t] = lse;
    }
    __syncwarp();
  }
}

// Forward: the reader warps. Lane 0 of a warp hands over what the warp found, the target's logit too.
template <class E, bool kCap>
__device__ __forceinline__ void read_forward(const ql::LogprobEntropyGrad& args, Shared& shared, std::int64_t first_row,
                                             std::int64_t row_step) {
  Rows<E, kReaders> rows(args, shared, 0, 1, threadIdx.x);
  int count = 0;
  for (std::int64_t t = first_row; t < args.T; t += row_step) {
    if (!row_of<E, Mode::kForward>(args, t).is_read) {
      if (rows.reader == 0) args.logprobs[t] = args.entropy[t] = args.lse[t] = 0.0f;
      continue;
    }
    const RowScale scale = scale_of(args, t);
    const TargetPlace target = find_target<E, kReaders>(args.target[t], rows.share, rows.V);
    float v_target = 0.0f;
    const Part<float> part = rows.template sum_row<kCap, true>(t, target, scale, v_target);
    const bool holds_target = rows.bring_target(target, v_target);
    const int parity = count & 1;
    barrier_wait(&shared.taken[parity], (count >> 1 & 1) ^ 1);
    ++count;
    if (rows.lane == 0) {
      shared.m[parity][rows.warp] = part.m;
      shared.s[parity][rows.warp] = part.s;
      shared.q[parity][rows.warp] = part.q;
      if (holds_target) shared.target[parity] = v_target;
    }
    barrier_arrive_warp(&shared.done[parity], rows.lane);
  }
}

// Backward: the reader warps.
template <class E, bool kCap>
__device__ __forceinline__ void read_backward(const ql::LogprobEntropyGrad& args, Shared& shared,
                                              std::int64_t first_row, std::int64_t row_step) {
  Rows<E, kReaders> rows(args, shared, 0, 1, threadIdx.x);
  int n = 0;
  for (std::int64_t t = first_row; t >= 0; t += row_step, ++n) {
    const int parity = n & 1;
    barrier_wait(&shared.ready[parity], n >> 1 & 1);
    const Plan plan = shared.plan[parity];
    float sum = 0.0f, v_target = 0.0f;
    bool holds_target = false;
    if (plan.is_read) {
      const TargetPlace target = find_target<E, kReaders>(plan.y, rows.share, rows.V);
      sum = warp_sum(rows.template write_row<kCap>(t, target, plan.scale, plan.g, v_target));
      holds_target = rows.bring_target(target, v_target);
    } else if (!plan.is_left_out) {
      write_zeros<E, kReaders>(rows.out(t), rows.share, rows.V, rows.reader);
    }
    if (rows.lane == 0) {
      shared.s[parity][rows.warp] = sum;
      if (holds_target) shared.target[parity] = v_target;
    }
    barrier_arrive_warp(&shared.done[parity], rows.lane);
  }
}

// Both: the warps that form the sums, and send them to every rank.
template <class E, bool kCap>
__device__ __forceinline__ void sum_rows(const ql::LogprobEntropyGrad& args, Shared& shared, int rank, int ranks,
                                         std::int64_t first_row, std::int64_t row_step) {
  Rows<E, kSummers> rows(args, shared, rank, ranks, threadIdx.x);
  int count = 0;
  for (std::int64_t t = first_row; t < args.T; t += row_step) {
    if (!row_of<E, Mode::kBoth>(args, t).is_read) continue;
    const RowScale scale = scale_of(args, t);
    const TargetPlace target = find_target<E, kSummers>(args.target[t], rows.share, rows.V);
    float v_target = 0.0f;
    Part<float> part = rows.template sum_row<kCap, false>(t, target, scale, v_target);
    part.m = __shfl_sync(kAll, part.m, 0);
    part.s = __shfl_sync(kAll, part.s, 0);
    part.q = __shfl_sync(kAll, part.q, 0);
    const bool holds_target = rows.bring_target(target, v_target);
    const int parity = count & 1;
    barrier_wait_cluster(&shared.taken[parity], (count >> 1 & 1) ^ 1);
    ++count;
    if (rows.lane < ranks) {  // lane r sends to rank r
      const int i = rank * kSummerWarps + rows.warp;
      store_in(&shared.m[parity][i], part.m, rows.lane);
      store_in(&shared.s[parity][i], part.s, rows.lane);
      store_in(&shared.q[parity][i], part.q, rows.lane);
      if (holds_target) store_in(&shared.target[parity], v_target, rows.lane);
      barrier_arrive_in(&shared.done[parity], rows.lane);
    }
    __syncwarp();
  }
}

// Both: the warps that write the gradient.
template <class E, bool kCap>
__device__ __forceinline__ void write_rows(const ql::LogprobEntropyGrad& args, Shared& shared, int rank, int ranks,
                                           std::int64_t first_row, std::int64_t row_step) {
  Rows<E, kWriters> rows(args, shared, rank, ranks, threadIdx.x - kSummers);
  int n = 0;
  for (std::int64_t t = first_row; t < args.T; t += row_step, ++n) {
    const int parity = n & 1;
    barrier_wait(&shared.ready[parity], n >> 1 & 1);
    const Plan plan = shared.plan[parity];
    barrier_arrive_warp(&shared.used[parity], rows.lane);
    if (!plan.is_live) {
      if (plan.is_read) rows.release_row();
      write_zeros<E, kWriters>(rows.out(t), rows.share, rows.V, rows.reader);
      continue;
    }
    const TargetPlace target = find_target<E, kWriters>(plan.y, rows.share, rows.V);
    float ignored;
    rows.template write_row<kCap>(t, target, plan.scale, plan.g, ignored);
    if (target.reader == rows.reader) rows.out(t)[plan.y] = E::narrow(plan.du_target);  // which has just written 0
  }
}

#endif

}  // namespace
