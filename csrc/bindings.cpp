// qlkernels._C: the only file that sees pybind11. Pointers and streams are integers, 0 where there is none; shapes,
// dtypes and devices are checked in Python.
#include <pybind11/pybind11.h>

#include <string>

#include "checks.h"
#include "logprob_entropy.h"

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

#if defined(QL_CUDA_ARCHS)
void fwd_cuda(const ql::LogprobEntropyForward& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::logprob_entropy_fwd(args, stream));
}

void bwd_cuda(const ql::LogprobEntropyBackward& args, std::uintptr_t stream) {
  QL_CUDA_CHECK(ql::cuda::logprob_entropy_bwd(args, stream));
}
#endif

}  // namespace

#define QL_SHARED_NAMES                                                                                     \
  py::arg("logits_ptr"), py::arg("dtype_code"), py::arg("T"), py::arg("V"), py::arg("stride_t"),            \
      py::arg("target_ptr"), py::arg("row_mask_ptr"), py::arg("temperature_ptr"), py::arg("temperature"),   \
      py::arg("softcap"), py::arg("logit_scale")
#define QL_FORWARD_NAMES QL_SHARED_NAMES, py::arg("logprobs_ptr"), py::arg("entropy_ptr"), py::arg("lse_ptr")
#define QL_BACKWARD_NAMES                                                                                   \
  QL_SHARED_NAMES, py::arg("entropy_ptr"), py::arg("lse_ptr"), py::arg("g_logprobs_ptr"),                   \
      py::arg("g_entropy_ptr"), py::arg("g_lse_ptr"), py::arg("dlogits_ptr"), py::arg("dstride_t")

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
  py::list archs;
#if defined(QL_CUDA_ARCHS)
  for (const char* arch : {QL_CUDA_ARCHS}) archs.append(arch);
  m.def("logprob_entropy_fwd_cuda", &forward<fwd_cuda, std::uintptr_t>, QL_FORWARD_NAMES, py::arg("stream"), NoGil());
  m.def("logprob_entropy_bwd_cuda", &backward<bwd_cuda, std::uintptr_t>, QL_BACKWARD_NAMES, py::arg("stream"),
        NoGil());
#endif
  m.attr("has_cuda") = py::len(archs) > 0;
  m.attr("cuda_archs") = archs;
}
