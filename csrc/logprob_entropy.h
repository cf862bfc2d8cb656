// Arguments of the op logits -> (logprobs, entropy, lse), forward and backward. Pointers may be null where said.
#pragma once

#include <cstdint>

namespace ql {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct LogprobEntropy {
  const void* logits;  // [T, V], rows stride_t elements apart
  int dtype;
  std::int64_t T, V, stride_t;
  const std::int64_t* target;    // [T]
  const std::uint8_t* row_mask;  // [T], 0 = never read the row; or null
  const float* temperatures;     // [T]; or null: temperature
  float temperature, softcap, logit_scale;  // softcap 0 = none
};

struct LogprobEntropyForward : LogprobEntropy {
  float *logprobs, *entropy, *lse;  // [T]
};

struct LogprobEntropyBackward : LogprobEntropy {
  const float *entropy, *lse;                    // [T], from the forward
  const float *g_logprobs, *g_entropy, *g_lse;  // [T]; null = 0
  void* dlogits;                                 // [T, V], dtype of logits; may be logits itself
  std::int64_t dstride_t;
};

// Scores and gradient in one read, where the upstream gradient is known before the scores are.
struct LogprobEntropyGrad : LogprobEntropy {
  float *logprobs, *entropy, *lse;              // [T]
  const float *g_logprobs, *g_entropy, *g_lse;  // [T]; null = 0
  void* dlogits;                                // [T, V], dtype of logits; may be logits itself
  std::int64_t dstride_t;
};

namespace cpu {
void logprob_entropy_fwd(const LogprobEntropyForward& args, int num_threads);
void logprob_entropy_bwd(const LogprobEntropyBackward& args, int num_threads);
const char* isa();
bool set_isa(const char* name);  // false: unknown here
}  // namespace cpu

namespace cuda {  // return the cudaError_t of the launch
int logprob_entropy_fwd(const LogprobEntropyForward& args, std::uintptr_t stream);
int logprob_entropy_bwd(const LogprobEntropyBackward& args, std::uintptr_t stream);
bool logprob_entropy_grad_fits(const LogprobEntropyGrad& args);  // this device, these shapes and alignments
int logprob_entropy_grad(const LogprobEntropyGrad& args, std::uintptr_t stream);
const char* error_name(int error);
const char* error_text(int error);
}  // namespace cuda

}  // namespace ql
