// qlkernels._C: the only file that sees pybind11. Pointers and streams are integers, 0 where there is none; shapes,
// dtypes and devices are checked in Python.
#include <pybind11/pybind11.h>

#include <string>

#include "checks.h"
#include "logprob_entropy.h"
#include "moe_routing.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Args>
Args shared_args(std::uintptr_t logits, int dtype, std::int64_t T, std::int64_t V, std::int64_t stride_t,
                 std::uintptr_t target, std::uintptr_t row_mask, std::uintptr_t temperatures, float temperature,
                 float softcap, float logit_scale) {
  if (dtype < ql::kFloat32 || dtype > ql::kBFloat16) throw py::value_error("dtype_code must be 0, 1 or 2");
  if (!(logit_scale > 0.0f)) throw py::value_error("logit_scale must be positive");
  if (V > INT32_MAX) throw py::value_error("V must be below 2**31");
  Args args{};
  args.logits = pointer<const void>(logits);
  args.dtype = dtype;
  args.T = T;
  args.V = V;
  args.stride_t = stride_t;
  args.target = pointer<const std::int64_t>(target);
  args.row_mask = pointer<const std::uint8_t>(row_mask);
  args.temperatures = pointer<const float>(temperatures);
  args.temperature = temperature;
  args.softcap = softcap;
  args.logit_scale = logit_scale;
  return args;
}

// Last is the number of threads on the CPU, the stream on CUDA.
template <auto run, class Last>
void forward(std::uintptr_t logits, int dtype, std::int64_t T, std::int64_t V, std::int64_t stride_t,
             std::uintptr_t target, std::uintptr_t row_mask, std::uintptr_t temperatures, float temperature,
             float softcap, float logit_scale, std::uintptr_t logprobs, std::uintptr_t entropy, std::uintptr_t lse,
             Last last) {
  auto args = shared_args<ql::LogprobEntropyForward>(logits, dtype, T, V, stride_t, target, row_mask, temperatures,
                                                     temperature, softcap, logit_scale);
  args.logprobs = pointer<float>(logprobs);
  args.entropy = pointer<float>(entropy);
  args.lse = pointer<float>(lse);
  run(args, last);
}

template <auto run, class Last>
void backward(std::uintptr_t logits, int dtype, std::int64_t T, std::int64_t V, std::int64_t stride_t,
              std::uintptr_t target, std::uintptr_t row_mask, std::uintptr_t temperatures, float temperature,
              float softcap, float logit_scale, std::uintptr_t entropy, std::uintptr_t lse, std::uintptr_t g_logprobs,
              std::uintptr_t g_entropy, std::uintptr_t g_lse, std::uintptr_t dlogits, std::int64_t dstride_t,
              Last last) {
  auto args = shared_args<ql::LogprobEntropyBackward>(logits, dtype, T, V, stride_t, target, row_mask, temperatures,
                                                      temperature, softcap, logit_scale);
  args.entropy = pointer<const float>(entropy);
  args.lse = pointer<const float>(lse);
  args.g_logprobs = pointer<const float>(g_logprobs);
  args.g_entropy = pointer<const float>(g_entropy);
  args.g_lse = pointer<const float>(g_lse);
  args.dlogits = pointer<void>(dlogits);
  args.dstride_t = dstride_t;
  run(args, last);
}

template <class Args>
Args route_args(std::uintptr_t logits, int dtype, std::int64_t T, int E, std::int64_t stride_t, int top_k,
                bool is_normalised) {
  if (dtype < ql::kFloat32 || dtype > ql::kBFloat16) throw py::value_error("dtype_code must be 0, 1 or 2");
  if (top_k < 1 || top_k > E) throw py::value_error("top_k must be in [1, E]");
  Args args{};
  args.logits = pointer<const void>(logits);
  args.dtype = dtype;
  args.T = T;
  args.stride_t = stride_t;
  args.E = E;
  args.top_k = top_k;
  args.is_normalised = is_normalised;
  return args;
}

template <auto run, class Last>
void route_forward(std::uintptr_t logits, int dtype, std::int64_t T, int E, std::int64_t stride_t, int top_k,
                   bool is_normalised, std::uintptr_t replay, bool replay_is_int64, int rounding,
                   std::uintptr_t weights, std::uintptr_t prob_sums, std::uintptr_t ids,
                   std::uintptr_t tokens_per_expert, int parts, std::uintptr_t part_probs, std::uintptr_t part_counts,
                   Last last) {
  auto args = route_args<ql::MoeRouteForward>(logits, dtype, T, E, stride_t, top_k, is_normalised);
  args.replay = {pointer<const void>(replay), replay_is_int64};
  args.rounding = rounding;
  args.weights = pointer<float>(weights);
  args.prob_sums = pointer<float>(prob_sums);
  args.ids = pointer<std::int32_t>(ids);
  args.tokens_per_expert = pointer<std::int32_t>(tokens_per_expert);
  args.parts = parts;
  args.part_probs = pointer<float>(part_probs);
  args.part_counts = pointer<std::int32_t>(part_counts);
  run(args, last);
}

template <auto run, class Last>
void route_backward(std::uintptr_t logits, int dtype, std::int64_t T, int E, std::int64_t stride_t, int top_k,
                    bool is_normalised, std::uintptr_t ids, std::uintptr_t g_weights, std::uintptr_t g_prob_sums,
                    std::uintptr_t dlogits, Last last) {
  auto args = route_args<ql::MoeRouteBackward>(logits, dtype, T, E, stride_t, top_k, is_normalised);
  args.ids = pointer<const std::int32_t>(ids);
  args.g_weights = pointer<const float>(g_weights);
  args.g_prob_sums = pointer<const float>(g_prob_sums);
  args.dlogits = pointer<void>(dlogits);
  run(args, last);
}

template <auto run, class Last>
void expert_index(std::uintptr_t ids, bool ids_are_int64, std::int64_t rows, int E, std::uintptr_t sort_order,
                  std::uintptr_t inverse_order, std::uintptr_t offsets, std::uintptr_t counts, Last last) {
  ql::ExpertIndex args{};
  args.ids = {pointer<const void>(ids), ids_are_int64};
  args.rows = rows;
  args.E = E;
  args.sort_order = pointer<std::int32_t>(sort_order);
  args.inverse_order = pointer<std::int32_t>(inverse_order);
  args.offsets = pointer<std::int32_t>(offsets);
  args.counts = pointer<std::int32_t>(counts);
  run(args, last);
}

#if defined(QL_CUDA_ARCHS)
void fwd_cuda(const ql::LogprobEntropyForward& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::logprob_entropy_fwd(args, stream));
}

void bwd_cuda(const ql::LogprobEntropyBackward& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::logprob_entropy_bwd(args, stream));
}

// False where these rows do not go through the ring; then nothing ran.
bool grad_cuda(std::uintptr_t logits, int dtype, std::int64_t T, std::int64_t V, std::int64_t stride_t,
               std::uintptr_t target, std::uintptr_t row_mask, std::uintptr_t temperatures, float temperature,
               float softcap, float logit_scale, std::uintptr_t logprobs, std::uintptr_t entropy, std::uintptr_t lse,
               std::uintptr_t g_logprobs, std::uintptr_t g_entropy, std::uintptr_t g_lse, std::uintptr_t dlogits,
               std::int64_t dstride_t, std::uintptr_t stream) {
  auto args = shared_args<ql::LogprobEntropyGrad>(logits, dtype, T, V, stride_t, target, row_mask, temperatures,
                                                  temperature, softcap, logit_scale);
  args.logprobs = pointer<float>(logprobs);
  args.entropy = pointer<float>(entropy);
  args.lse = pointer<float>(lse);
  args.g_logprobs = pointer<const float>(g_logprobs);
  args.g_entropy = pointer<const float>(g_entropy);
  args.g_lse = pointer<const float>(g_lse);
  args.dlogits = pointer<void>(dlogits);
  args.dstride_t = dstride_t;
  if (!ql::cuda::logprob_entropy_grad_fits(args)) return false;
  QL_CUDA_CHECK(ql::cuda::logprob_entropy_grad(args, stream));
  return true;
}

void route_fwd_cuda(const ql::MoeRouteForward& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::moe_route_fwd(args, stream));
}

void route_bwd_cuda(const ql::MoeRouteBackward& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::moe_route_bwd(args, stream));
}

void index_cuda(const ql::ExpertIndex& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::build_expert_index(args, stream));
}
#endif

}  // namespace

#define QL_SHARED_NAMES                                                                                     \
  py::arg("logits_ptr"), py::arg("dtype_code"), py::arg("T"), py::arg("V"), py::arg("stride_t"),            \
      py::arg("target_ptr"), py::arg("row_mask_ptr"), py::arg("temperature_ptr"), py::arg("temperature"),   \
      py::arg("softcap"), py::arg("logit_scale")
#define QL_FORWARD_NAMES QL_SHARED_NAMES, py::arg("logprobs_ptr"), py::arg("entropy_ptr"), py::arg("lse_ptr")
#define QL_GRADIENT_NAMES                                                                                   \
  py::arg("g_logprobs_ptr"), py::arg("g_entropy_ptr"), py::arg("g_lse_ptr"), py::arg("dlogits_ptr"),        \
      py::arg("dstride_t")
#define QL_BACKWARD_NAMES QL_SHARED_NAMES, py::arg("entropy_ptr"), py::arg("lse_ptr"), QL_GRADIENT_NAMES

#define QL_ROUTE_NAMES                                                                                      \
  py::arg("logits_ptr"), py::arg("dtype_code"), py::arg("T"), py::arg("E"), py::arg("stride_t"),            \
      py::arg("top_k"), py::arg("is_normalised")
#define QL_ROUTE_FORWARD_NAMES                                                                              \
  QL_ROUTE_NAMES, py::arg("replay_ptr"), py::arg("replay_is_int64"), py::arg("rounding_code"),              \
      py::arg("weights_ptr"), py::arg("prob_sums_ptr"), py::arg("ids_ptr"),                                 \
      py::arg("tokens_per_expert_ptr"), py::arg("parts"), py::arg("part_probs_ptr"), py::arg("part_counts_ptr")
#define QL_ROUTE_BACKWARD_NAMES                                                                             \
  QL_ROUTE_NAMES, py::arg("ids_ptr"), py::arg("g_weights_ptr"), py::arg("g_prob_sums_ptr"), py::arg("dlogits_ptr")
#define QL_INDEX_NAMES                                                                                      \
  py::arg("ids_ptr"), py::arg("ids_are_int64"), py::arg("rows"), py::arg("E"), py::arg("sort_order_ptr"),   \
      py::arg("inverse_order_ptr"), py::arg("offsets_ptr"), py::arg("counts_ptr")

PYBIND11_MODULE(_C, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("cpu_isa", &ql::cpu::isa, "Instruction set of the CPU kernels, chosen at run time.");
  m.def(
      "set_cpu_isa",
      [](const char* name) {
        if (!ql::cpu::set_isa(name)) throw py::value_error(std::string("this CPU or build has no ") + name);
      },
      py::arg("name"), "Run the CPU kernels on 'avx512', 'avx2' or 'baseline' instead.");
  m.def("logprob_entropy_fwd_cpu", &forward<ql::cpu::logprob_entropy_fwd, int>, QL_FORWARD_NAMES,
        py::arg("num_threads"), NoGil());
  m.def("logprob_entropy_bwd_cpu", &backward<ql::cpu::logprob_entropy_bwd, int>, QL_BACKWARD_NAMES,
        py::arg("num_threads"), NoGil());
  m.def("moe_route_fwd_cpu", &route_forward<ql::cpu::moe_route_fwd, int>, QL_ROUTE_FORWARD_NAMES,
        py::arg("num_threads"), NoGil());
  m.def("moe_route_bwd_cpu", &route_backward<ql::cpu::moe_route_bwd, int>, QL_ROUTE_BACKWARD_NAMES,
        py::arg("num_threads"), NoGil());
  m.def("build_expert_index_cpu", &expert_index<ql::cpu::build_expert_index, int>, QL_INDEX_NAMES,
        py::arg("num_threads"), NoGil());
  m.attr("most_experts") = ql::kMostExperts;
  m.attr("most_top_k") = ql::kMostTopK;
  py::list archs;
#if defined(QL_CUDA_ARCHS)
  for (const char* arch : {QL_CUDA_ARCHS}) archs.append(arch);
  m.def("logprob_entropy_fwd_cuda", &forward<fwd_cuda, std::uintptr_t>, QL_FORWARD_NAMES, py::arg("stream"), NoGil());
  m.def("logprob_entropy_bwd_cuda", &backward<bwd_cuda, std::uintptr_t>, QL_BACKWARD_NAMES, py::arg("stream"),
        NoGil());
  m.def("logprob_entropy_grad_cuda", &grad_cuda, QL_FORWARD_NAMES, QL_GRADIENT_NAMES, py::arg("stream"), NoGil());
  m.def("moe_route_fwd_cuda", &route_forward<route_fwd_cuda, std::uintptr_t>, QL_ROUTE_FORWARD_NAMES,
        py::arg("stream"), NoGil());
  m.def("moe_route_bwd_cuda", &route_backward<route_bwd_cuda, std::uintptr_t>, QL_ROUTE_BACKWARD_NAMES,
        py::arg("stream"), NoGil());
  m.def("build_expert_index_cuda", &expert_index<index_cuda, std::uintptr_t>, QL_INDEX_NAMES, py::arg("stream"),
        NoGil());
  m.def("index_parts", &ql::cuda::index_parts, py::arg("rows"), "Parts of the scratch of build_expert_index_cuda.");
#endif
  m.attr("has_cuda") = py::len(archs) > 0;
  m.attr("cuda_archs") = archs;
}
