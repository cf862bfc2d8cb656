// Chooses the instruction set at run time and spreads rows over threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../logprob_entropy.h"
#include "threads.h"

namespace ql::cpu {

#define QL_DECLARE(isa)                                                                      \
  namespace isa {                                                                            \
  void forward_rows(const LogprobEntropyForward& args, std::int64_t first, std::int64_t last);  \
  void backward_rows(const LogprobEntropyBackward& args, std::int64_t first, std::int64_t last); \
  }
QL_DECLARE(baseline)
#if defined(__x86_64__)
QL_DECLARE(avx2)
QL_DECLARE(avx512)
#endif
#undef QL_DECLARE

namespace {

struct Isa {
  const char* name;
  bool (*is_supported)();
  void (*forward_rows)(const LogprobEntropyForward&, std::int64_t, std::int64_t);
  void (*backward_rows)(const LogprobEntropyBackward&, std::int64_t, std::int64_t);
};

const Isa kIsas[] = {  // fastest first
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     avx512::forward_rows, avx512::backward_rows},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::forward_rows,
     avx2::backward_rows},
#endif
    {"baseline", [] { return true; }, baseline::forward_rows, baseline::backward_rows},
};

const Isa* best() {
  return std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& isa) { return isa.is_supported(); });
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{best()};
  return isa;
}

template <class Rows>
void for_rows(std::int64_t T, std::int64_t V, int num_threads, const Rows& rows) {
  constexpr std::int64_t kChunkElements = 1 << 17;
  const std::int64_t chunk = std::max<std::int64_t>(1, kChunkElements / std::max<std::int64_t>(1, V));
  for_chunks((T + chunk - 1) / chunk, num_threads,
             [&](std::int64_t i) { rows(i * chunk, std::min(T, (i + 1) * chunk)); });
}

}  // namespace

const char* isa() { return chosen().load()->name; }

bool set_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.is_supported()) {
      chosen().store(&isa);
      return true;
    }
  }
  return false;
}

void logprob_entropy_fwd(const LogprobEntropyForward& args, int num_threads) {
  const Isa* isa = chosen().load();
  for_rows(args.T, args.V, num_threads, [&](auto first, auto last) { isa->forward_rows(args, first, last); });
}

void logprob_entropy_bwd(const LogprobEntropyBackward& args, int num_threads) {
  const Isa* isa = chosen().load();
  for_rows(args.T, args.V, num_threads, [&](auto first, auto last) { isa->backward_rows(args, first, last); });
}

}  // namespace ql::cpu
