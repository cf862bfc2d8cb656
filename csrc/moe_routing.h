// Arguments of MoE routing (router logits -> experts and weights, and back) and of the index of experts' rows. Pointers
// may be null where said; scratch is for CUDA alone.
#pragma once

#include <cstdint>

#include "logprob_entropy.h"

namespace ql {

// What one warp or one block can hold; Python refuses more before a kernel is launched.
constexpr int kMostExperts = 512;
constexpr int kMostTopK = 32;

struct Ids {
  const void* data;
  bool is_int64;
};

struct MoeRoute {
  const void* logits;  // [T, E], rows stride_t elements apart
  int dtype;
  std::int64_t T, stride_t;
  int E, top_k;
  bool is_normalised;  // the weights of a token sum to 1
};

struct MoeRouteForward : MoeRoute {
  Ids replay;    // [T, top_k], a row of -1 routes live; or null
  int rounding;  // the dtype that weights are rounded to; kFloat32 = none
  float* weights;                                         // [T, top_k]
  float* prob_sums;                                       // [E]
  std::int32_t* ids;                                      // [T, top_k]
  std::int32_t* tokens_per_expert;                        // [E]
  int parts;                                              // scratch: one part a block
  float* part_probs;                                      // [parts, E]
  std::int32_t* part_counts;                              // [parts, E]
};

struct MoeRouteBackward : MoeRoute {
  const std::int32_t* ids;  // [T, top_k], in [0, E)
  const float* g_weights;   // [T, top_k]; null = 0
  const float* g_prob_sums;  // [E]; null = 0
  void* dlogits;            // [T, E], dtype of logits, contiguous
};

struct ExpertIndex {
  Ids ids;  // [rows]; outside [0, E): no expert, sorted to the end
  std::int64_t rows;
  int E;
  std::int32_t *sort_order, *inverse_order;  // [rows]
  std::int32_t* offsets;                     // [E + 1]
  std::int32_t* counts;  // scratch: [parts + 1, E + 1] for more than one part, as index_parts(rows) says
};

namespace cpu {
void moe_route_fwd(const MoeRouteForward& args, int num_threads);
void moe_route_bwd(const MoeRouteBackward& args, int num_threads);
void build_expert_index(const ExpertIndex& args, int num_threads);
}  // namespace cpu

namespace cuda {  // return the cudaError_t of the launch
int moe_route_fwd(const MoeRouteForward& args, std::uintptr_t stream);
int moe_route_bwd(const MoeRouteBackward& args, std::uintptr_t stream);
int build_expert_index(const ExpertIndex& args, std::uintptr_t stream);
std::int64_t index_parts(std::int64_t rows);
}  // namespace cuda

}  // namespace ql
