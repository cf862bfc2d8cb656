// Rows of logits through a ring of shared memory, for sm_90: see row_ring.cu.
#pragma once

#include <cstdint>

#include "../logprob_entropy.h"

namespace ql::cuda {

// Whether the current device is of sm_90 and the rows of the tensors start on 16 bytes. dlogits may be null.
bool ring_fits(const LogprobEntropy& args, const void* dlogits, std::int64_t dstride_t);

int ring_fwd(const LogprobEntropyForward& args, std::uintptr_t stream);

// Leaves out the rows whose lse needs refinement (needs_refinement).
int ring_bwd(const LogprobEntropyBackward& args, std::uintptr_t stream);

}  // namespace ql::cuda
