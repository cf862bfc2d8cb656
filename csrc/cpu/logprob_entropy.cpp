// Token scores from logits and their gradient, on rows [first, last). Compiled once per instruction set, QL_ISA.
//
// A row is worked off in blocks that stay in L1: convert to fp32 and find the maximum, then exponentials and sums in
// fp32 lanes; blocks merge in double. Rows are independent, so the number of threads cannot change a bit.
#include "../elements.h"
#include "../logprob_entropy.h"
#include "../row_math.h"
#include "simd.h"

namespace {

constexpr int64_t kBlock = 2048;
constexpr int kUnroll = 4;
constexpr float kInfinity = __builtin_inff();

struct alignas(64) Block {
  float v[kBlock];      // logits, or tanh under a soft-cap; -inf after the row's end
  float slope[kBlock];  // d tanh, under a soft-cap
};

int64_t padded(int64_t n) { return (n + kUnroll * kLanes - 1) / (kUnroll * kLanes) * (kUnroll * kLanes); }

// Fills block with n <= kBlock logits and returns the largest v. NaN never becomes the maximum.
template <class E, bool kCap>
float load_block(const typename E::Storage* logits, int64_t n, float gain, Block& block) {
  Floats largest = broadcast(kLowestLogit);
  const auto put = [&](const typename E::Storage* from, int64_t i) {
    Floats v = E::load(from);
    if constexpr (kCap) {
      Floats slope;
      tanh_and_slope(v * gain, v, slope);
      Float32::store(block.slope + i, slope);
    }
    Float32::store(block.v + i, v);
    return v;
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) largest = maximum(put(logits + i, i), largest);
  if (whole < n) {
    typename E::Storage rest[kLanes] = {};
    __builtin_memcpy(rest, logits + whole, (n - whole) * sizeof rest[0]);
    put(rest, whole);
  }
  float m = max_of(largest);
  for (int64_t i = whole; i < n; ++i) m = block.v[i] > m ? block.v[i] : m;
  for (int64_t i = n, end = padded(n); i < end; ++i) block.v[i] = -kInfinity;
  return m;
}

Part<double> sum_block(const float* v, int64_t n, float m, float alpha) {
  Floats s[kUnroll] = {}, q[kUnroll] = {};
  for (int64_t i = 0; i < n; i += kUnroll * kLanes) {
    for (int j = 0; j < kUnroll; ++j) add_element(Float32::load(v + i + j * kLanes), m, alpha, s[j], q[j]);
  }
  return {m, sum_of((s[0] + s[1]) + (s[2] + s[3])), sum_of((q[0] + q[1]) + (q[2] + q[3]))};
}

template <class E, bool kCap>
Part<double> sum_row(const typename E::Storage* logits, int64_t V, const RowScale& scale, Block& block) {
  Part<double> row;
  for (int64_t start = 0; start < V; start += kBlock) {
    const int64_t n = V - start < kBlock ? V - start : kBlock;
    const float m = load_block<E, kCap>(logits + start, n, scale.gain, block);
    row = merge(row, sum_block(block.v, n, m, scale.alpha), static_cast<double>(scale.alpha));
  }
  return row;
}

// One logit as load_block would give it.
template <class E, bool kCap>
float value_at(const typename E::Storage* logit, float gain, float& slope) {
  typename E::Storage lanes[kLanes] = {*logit};
  Floats v = E::load(lanes), slopes = broadcast(1.0f);
  if constexpr (kCap) tanh_and_slope(v * gain, v, slopes);
  slope = slopes[0];
  return v[0];
}

RowScale scale_of(const ql::LogprobEntropy& args, int64_t t) {
  return row_scale(args.temperatures ? args.temperatures[t] : args.temperature, args.softcap, args.logit_scale);
}

template <class E, bool kCap>
void forward(const ql::LogprobEntropyForward& args, int64_t first, int64_t last) {
  Block block;
  for (int64_t t = first; t < last; ++t) {
    if (args.row_mask && !args.row_mask[t]) {
      args.logprobs[t] = args.entropy[t] = args.lse[t] = 0.0f;
      continue;
    }
    const auto* logits = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
    const RowScale scale = scale_of(args, t);
    const int64_t y = args.target[t];
    float unused, v_target = __builtin_nanf("");
    if (0 <= y && y < args.V) v_target = value_at<E, kCap>(logits + y, scale.gain, unused);
    const Scores scores = finish(sum_row<E, kCap>(logits, args.V, scale, block), scale.alpha, v_target);
    args.logprobs[t] = scores.logprob;
    args.entropy[t] = scores.entropy;
    args.lse[t] = scores.lse;
  }
}

// Writes one block's gradient and returns the sum of its probabilities.
template <class E, bool kCap>
double write_block(const Block& block, int64_t n, const RowScale& scale, const RowGradient& g,
                   typename E::Storage* dlogits) {
  Floats rest[2] = {};
  const auto gradient = [&](int64_t i, int chain) {
    const Floats du = element_gradient(Float32::load(block.v + i), scale.alpha, g, rest[chain]);
    if constexpr (kCap) return du * Float32::load(block.slope + i);
    return du;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Floats a = gradient(i, 0), b = gradient(i + kLanes, 1);
    E::store(dlogits + i, a);
    E::store(dlogits + i + kLanes, b);
  }
  for (; i < n; i += kLanes) {  // the last vector may be partial
    typename E::Storage lanes[kLanes];
    E::store(lanes, gradient(i, 0));
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    __builtin_memcpy(dlogits + i, lanes, left * sizeof lanes[0]);
  }
  return sum_of(rest[0] + rest[1]);
}

template <class E, bool kCap>
void backward(const ql::LogprobEntropyBackward& args, int64_t first, int64_t last) {
  Block block;
  for (int64_t t = first; t < last; ++t) {
    auto* dlogits = static_cast<typename E::Storage*>(args.dlogits) + t * args.dstride_t;
    float g_logprob = args.g_logprobs ? args.g_logprobs[t] : 0.0f;
    const float g_entropy = args.g_entropy ? args.g_entropy[t] : 0.0f;
    const float g_lse = args.g_lse ? args.g_lse[t] : 0.0f;
    const bool is_masked = args.row_mask && !args.row_mask[t];
    if (is_masked || (g_logprob == 0.0f && g_entropy == 0.0f && g_lse == 0.0f)) {
      __builtin_memset(dlogits, 0, args.V * sizeof *dlogits);
      continue;
    }
    const auto* logits = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
    const RowScale scale = scale_of(args, t);
    const int64_t y = args.target[t];
    const bool has_target = 0 <= y && y < args.V;
    float v_target = 0.0f, slope_target = 0.0f;
    if (has_target) v_target = value_at<E, kCap>(logits + y, scale.gain, slope_target);
    else g_logprob = __builtin_nanf("");
    const bool refines = __builtin_fabsf(args.lse[t]) >= E::kRefineLse;
    const Offset offset = refines ? offset_of(sum_row<E, kCap>(logits, args.V, scale, block))
                                  : offset_of(args.lse[t], scale.alpha);
    const RowGradient g = row_gradient(scale, offset, args.entropy[t], g_logprob, g_entropy, g_lse);
    double rest = 0;
    for (int64_t start = 0; start < args.V; start += kBlock) {
      const int64_t n = args.V - start < kBlock ? args.V - start : kBlock;
      load_block<E, kCap>(logits + start, n, scale.gain, block);
      // The target leaves the sum of the others and is written last.
      if (start <= y && y < start + n) block.v[y - start] = -kInfinity;
      rest += write_block<E, kCap>(block, n, scale, g, dlogits + start);
    }
    if (!has_target) continue;
    typename E::Storage lanes[kLanes];
    E::store(lanes, broadcast(slope_target * target_gradient(scale, g, v_target, rest, args.entropy[t], g_logprob,
                                                             g_entropy, g_lse)));
    dlogits[y] = lanes[0];
  }
}

template <class E>
void forward(const ql::LogprobEntropyForward& args, int64_t first, int64_t last) {
  args.softcap > 0.0f ? forward<E, true>(args, first, last) : forward<E, false>(args, first, last);
}

template <class E>
void backward(const ql::LogprobEntropyBackward& args, int64_t first, int64_t last) {
  args.softcap > 0.0f ? backward<E, true>(args, first, last) : backward<E, false>(args, first, last);
}

}  // namespace

namespace ql::cpu::QL_ISA {

void forward_rows(const LogprobEntropyForward& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case kFloat32: return forward<Float32>(args, first, last);
    case kFloat16: return forward<Float16>(args, first, last);
    case kBFloat16: return forward<BFloat16>(args, first, last);
  }
}

void backward_rows(const LogprobEntropyBackward& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case kFloat32: return backward<Float32>(args, first, last);
    case kFloat16: return backward<Float16>(args, first, last);
    case kBFloat16: return backward<BFloat16>(args, first, last);
  }
}

}  // namespace ql::cpu::QL_ISA
