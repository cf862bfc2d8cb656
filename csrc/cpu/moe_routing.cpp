// MoE routing on the CPU: a row at a time, and the sums over rows chunk by chunk in a fixed order, so that results do
// not depend on the number of threads.
#include "../moe_routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../elements.h"
#include "threads.h"

namespace {

using std::int32_t;
using std::int64_t;

constexpr int64_t kChunk = 256;  // tokens

// Orders as the logits do: -0 equals 0, every NaN is the same and the largest, -inf is above 0.
inline uint32_t sort_key(float x) {
  if (x != x) return 0xffffffffu;
  const float y = x == 0.0f ? 0.0f : x;
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline int64_t id_at(const ql::Ids& ids, int64_t i) {
  return ids.is_int64 ? static_cast<const int64_t*>(ids.data)[i] : static_cast<const int32_t*>(ids.data)[i];
}

int64_t padded(int64_t E) { return (E + kLanes - 1) / kLanes * kLanes; }

// A row in fp32, padded with -inf to whole vectors.
template <class E>
void widen_row(const typename E::Storage* row, int n, float* x) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) Float32::store(x + i, E::load(row + i));
  if (i == n) return;
  typename E::Storage rest[kLanes] = {};
  std::memcpy(rest, row + i, (n - i) * sizeof rest[0]);
  Float32::store(x + i, E::load(rest));
  std::fill(x + n, x + i + kLanes, -INFINITY);
}

template <class E>
void narrow_row(const float* x, int n, typename E::Storage* row) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) E::store(row + i, Float32::load(x + i));
  if (i == n) return;
  typename E::Storage rest[kLanes];
  E::store(rest, Float32::load(x + i));
  std::memcpy(row + i, rest, (n - i) * sizeof rest[0]);
}

template <class E>
float round_through(float w) {
  typename E::Storage lanes[kLanes];
  E::store(lanes, broadcast(w));
  return E::load(lanes)[0];
}

float round_weight(float w, int rounding) {
  switch (rounding) {
    case ql::kFloat16: return round_through<Float16>(w);
    case ql::kBFloat16: return round_through<BFloat16>(w);
  }
  return w;
}

// Overwrites the logits with e^(x - m). Returns the sum and, in m, the largest logit.
float exponentials(float* x, int64_t n, float& m) {
  Floats largest = broadcast(-INFINITY);
  for (int64_t i = 0; i < n; i += kLanes) largest = maximum(Float32::load(x + i), largest);
  m = max_of(largest);
  Floats sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats e = pow2(clamp_exponent((Float32::load(x + i) - m) * static_cast<float>(kLog2E)));
    Float32::store(x + i, e);
    sum += e;
  }
  return static_cast<float>(sum_of(sum));
}

// The top_k largest, ties to the lower id: a sorted list that takes what is strictly larger than its last.
void select_live(const float* x, int E, int top_k, uint32_t* keys, int32_t* ids) {
  int count = 0;
  for (int e = 0; e < E; ++e) {
    const uint32_t key = sort_key(x[e]);
    if (count == top_k && key <= keys[top_k - 1]) continue;
    int at = count < top_k ? count++ : top_k - 1;
    for (; at > 0 && keys[at - 1] < key; --at) {
      keys[at] = keys[at - 1];
      ids[at] = ids[at - 1];
    }
    keys[at] = key;
    ids[at] = e;
  }
}

// Weights of the experts of one token, out of their logits. m and s are those of the whole row.
void weights_of(const float* chosen, int top_k, bool is_normalised, float m, float s, float* w) {
  if (!is_normalised) {
    for (int k = 0; k < top_k; ++k) w[k] = std::exp(chosen[k] - m) / s;
    return;
  }
  // relative to the largest chosen: replayed experts may all have p = 0 in fp32
  float largest = chosen[0], sum = 0.0f;
  for (int k = 1; k < top_k; ++k) largest = std::max(largest, chosen[k]);
  for (int k = 0; k < top_k; ++k) sum += w[k] = std::exp(chosen[k] - largest);
  for (int k = 0; k < top_k; ++k) w[k] /= sum;
}

template <class E>
void forward_rows(const ql::MoeRouteForward& args, int64_t first, int64_t last, double* probs, int64_t* counts) {
  const int n = args.E, top_k = args.top_k;
  const int64_t width = padded(n);
  std::vector<float> x(width), chosen(top_k);
  std::vector<uint32_t> keys(top_k);
  for (int64_t t = first; t < last; ++t) {
    const auto* row = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
    int32_t* ids = args.ids + t * top_k;
    float* weights = args.weights + t * top_k;
    widen_row<E>(row, n, x.data());
    bool is_known = args.replay.data, is_live = true;
    for (int k = 0; args.replay.data && k < top_k; ++k) {
      const int64_t id = id_at(args.replay, t * top_k + k);
      is_known &= 0 <= id && id < n;
      is_live &= id == -1;
    }
    if (is_known) {
      for (int k = 0; k < top_k; ++k) ids[k] = static_cast<int32_t>(id_at(args.replay, t * top_k + k));
    } else {
      select_live(x.data(), n, top_k, keys.data(), ids);
    }
    for (int k = 0; k < top_k; ++k) chosen[k] = x[ids[k]];
    float m;
    const float s = exponentials(x.data(), width, m);
    weights_of(chosen.data(), top_k, args.is_normalised, m, s, weights);
    const bool is_bad = args.replay.data && !is_known && !is_live;
    for (int k = 0; k < top_k; ++k) {
      weights[k] = is_bad ? __builtin_nanf("") : round_weight(weights[k], args.rounding);
      ++counts[ids[k]];
    }
    const float scale = 1.0f / s;
    for (int e = 0; e < n; ++e) probs[e] += x[e] * scale;
  }
}

template <class E>
void backward_rows(const ql::MoeRouteBackward& args, int64_t first, int64_t last) {
  const int n = args.E, top_k = args.top_k;
  const int64_t width = padded(n);
  std::vector<float> x(width), dx(width), chosen(top_k), w(top_k);
  const float* h = args.g_prob_sums;
  const auto is_zero = [](float g) { return g == 0.0f; };
  const bool has_h = h && !std::all_of(h, h + n, is_zero);
  for (int64_t t = first; t < last; ++t) {
    auto* out = static_cast<typename E::Storage*>(args.dlogits) + t * n;
    const float* g = args.g_weights ? args.g_weights + t * top_k : nullptr;
    const bool has_g = g && !std::all_of(g, g + top_k, is_zero);
    if (!has_g && !has_h) {
      std::memset(out, 0, n * sizeof *out);
      continue;
    }
    const auto* row = static_cast<const typename E::Storage*>(args.logits) + t * args.stride_t;
    const int32_t* ids = args.ids + t * top_k;
    widen_row<E>(row, n, x.data());
    for (int k = 0; k < top_k; ++k) chosen[k] = x[ids[k]];
    float m;
    const float s = exponentials(x.data(), width, m), scale = 1.0f / s;
    std::fill(dx.begin(), dx.end(), 0.0f);
    if (has_g) {
      weights_of(chosen.data(), top_k, args.is_normalised, m, s, w.data());
      float mean = 0.0f;
      for (int k = 0; k < top_k; ++k) mean += g[k] * w[k];
      for (int k = 0; k < top_k; ++k) dx[ids[k]] += args.is_normalised ? w[k] * (g[k] - mean) : g[k];
      if (!args.is_normalised) {
        for (int e = 0; e < n; ++e) dx[e] = x[e] * scale * (dx[e] - mean);
      }
    }
    if (has_h) {
      double mean = 0.0;
      for (int e = 0; e < n; ++e) mean += x[e] * scale * h[e];
      for (int e = 0; e < n; ++e) dx[e] += x[e] * scale * (h[e] - static_cast<float>(mean));
    }
    narrow_row<E>(dx.data(), n, out);
  }
}

// Calls run(element type).
template <class Run>
void dispatch(int dtype, const Run& run) {
  switch (dtype) {
    case ql::kFloat32: return run(Float32{});
    case ql::kFloat16: return run(Float16{});
    case ql::kBFloat16: return run(BFloat16{});
  }
}

int64_t chunks_of(int64_t T) { return (T + kChunk - 1) / kChunk; }

}  // namespace

namespace ql::cpu {

void moe_route_fwd(const MoeRouteForward& args, int num_threads) {
  const int64_t chunks = chunks_of(args.T), E = args.E;
  std::vector<double> probs(chunks * E);
  std::vector<int64_t> counts(chunks * E);
  for_chunks(chunks, num_threads, [&](int64_t i) {
    dispatch(args.dtype, [&](auto element) {
      forward_rows<decltype(element)>(args, i * kChunk, std::min(args.T, (i + 1) * kChunk), &probs[i * E],
                                      &counts[i * E]);
    });
  });
  for (int64_t e = 0; e < E; ++e) {
    double prob = 0.0;
    int64_t count = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      prob += probs[i * E + e];
      count += counts[i * E + e];
    }
    args.prob_sums[e] = static_cast<float>(prob);
    args.tokens_per_expert[e] = static_cast<int32_t>(count);
  }
}

void moe_route_bwd(const MoeRouteBackward& args, int num_threads) {
  for_chunks(chunks_of(args.T), num_threads, [&](int64_t i) {
    dispatch(args.dtype, [&](auto element) {
      backward_rows<decltype(element)>(args, i * kChunk, std::min(args.T, (i + 1) * kChunk));
    });
  });
}

// One thread: it reads the ids twice, and that takes less time than the tensors around it.
void build_expert_index(const ExpertIndex& args, int) {
  const int64_t E = args.E;
  const auto bin_of = [&](int64_t row) {
    const int64_t id = id_at(args.ids, row);
    return 0 <= id && id < E ? id : E;
  };
  std::vector<int64_t> next(E + 2);
  for (int64_t row = 0; row < args.rows; ++row) ++next[bin_of(row) + 1];
  for (int64_t e = 0; e <= E; ++e) {
    next[e + 1] += next[e];
    args.offsets[e] = static_cast<int32_t>(next[e]);
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t place = next[bin_of(row)]++;
    args.sort_order[place] = static_cast<int32_t>(row);
    args.inverse_order[row] = static_cast<int32_t>(place);
  }
}

}  // namespace ql::cpu
