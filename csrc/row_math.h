// Arithmetic of one row of logits, shared by the CPU and the CUDA kernels.
//
//   r = logits, z = s r or c tanh(s r / c), u = z / tau
//   m = max u, S = sum e^(u-m), Q = sum (u-m) e^(u-m)
//   lse = m + log S, H = log S - Q / S, logprob = u_y - lse
//   du_i = p_i (g_lse - g_l - g_H (log p_i + H)) + g_l [i = y]
//
// Kernels work on v = r (or tanh) with u log2(e) = alpha v, alpha > 0, so that a maximum over v is one over u, and
// exponents are powers of two: d = alpha (v - m) is log2 of a probability up to a constant, Q2 = sum d 2^d = Q log2(e).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define QL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QL_HOST_DEVICE inline
#endif

// Internal linkage: the CPU kernels are compiled once per instruction set, and the linker must not mix their copies.
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Exponents of two stop here. 2^-200 is 0 in fp32, and 0 * -200 is 0 where 0 * -inf would be NaN.
constexpr float kLowestExponent = -200.0f;

// A maximum starts here and not at -inf: (-inf) - (-inf) is NaN, and finfo.min is a common mask value.
constexpr float kLowestLogit = -FLT_MAX;

// A saved fp32 lse is off by up to |lse| 2^-24, and every log p with it. From these on that shows in a gradient of the
// given precision, and backward reads the row once more to form S again.
constexpr float kRefineFloat32 = 64.0f;
constexpr float kRefineFloat16 = 1024.0f;
constexpr float kRefineBFloat16 = 4096.0f;

// A part of a row: its largest v, S and Q2 relative to that.
template <class Real>
struct Part {
  Real m = static_cast<Real>(kLowestLogit);
  Real s = 0;
  Real q = 0;
};

struct RowScale {
  float gain;   // v = r, or tanh(gain r) with a soft-cap
  float alpha;  // u log2(e) = alpha v
  float slope;  // du/dr, without the soft-cap's own factor
};

struct RowGradient {
  float offset, shift;    // log2 p = alpha (v - offset) + shift
  float constant, slope;  // slope_of_u * du = p (constant - slope log2 p), away from the target
};

struct Scores {
  float logprob, entropy, lse;
};

QL_HOST_DEVICE float pow2(float d) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(d));
  return e;
#else
  return exp2f(d);
#endif
}

QL_HOST_DEVICE double pow2(double d) { return exp2(d); }
QL_HOST_DEVICE float log_of(float x) { return logf(x); }
QL_HOST_DEVICE double log_of(double x) { return log(x); }

// Exponents of two are never below kLowestExponent; NaN stays NaN.
QL_HOST_DEVICE float clamp_exponent(float d) {
#if defined(__CUDA_ARCH__)
  float clamped;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(d), "f"(kLowestExponent));
  return clamped;
#else
  return d < kLowestExponent ? kLowestExponent : d;
#endif
}

QL_HOST_DEVICE double clamp_exponent(double d) {
  return d < kLowestExponent ? static_cast<double>(kLowestExponent) : d;
}

// 1 / x to double precision or nearly so. CUDA's double division is a call that costs the caller registers.
QL_HOST_DEVICE double inverse_of(float x) {
#if defined(__CUDA_ARCH__)
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  const double r = estimate;
  return r * (2.0 - x * r);  // one Newton step squares the error of 2^-23
#else
  return 1.0 / x;
#endif
}

// softcap 0 means none.
QL_HOST_DEVICE RowScale row_scale(float temperature, float softcap, float logit_scale) {
  const double inverse = inverse_of(temperature);
  RowScale scale;
  scale.gain = softcap > 0.0f ? static_cast<float>(logit_scale * inverse_of(softcap)) : 0.0f;
  scale.alpha = static_cast<float>(kLog2E * inverse * (softcap > 0.0f ? softcap : logit_scale));
  scale.slope = static_cast<float>(logit_scale * inverse);
  return scale;
}

// Parts without mass are left out by selection: their maximum means nothing. A NaN sum stays in.
template <class Real>
QL_HOST_DEVICE Part<Real> merge(const Part<Real>& a, const Part<Real>& b, Real alpha) {
  const Real m = a.m > b.m ? a.m : b.m;
  const Real da = clamp_exponent(alpha * (a.m - m));
  const Real db = clamp_exponent(alpha * (b.m - m));
  const Real ea = pow2(da), eb = pow2(db);
  Part<Real> sum;
  sum.m = m;
  sum.s = a.s * ea + b.s * eb;
  sum.q = ea * (a.q + da * a.s) + eb * (b.q + db * b.s);
  return b.s == 0 ? a : (a.s == 0 ? b : sum);
}

template <class Real>
QL_HOST_DEVICE Scores finish(const Part<Real>& row, float alpha, float v_target) {
  const double log_s = log_of(row.s);
  const double per_v = kLn2 * alpha;
  Scores scores;
  scores.lse = static_cast<float>(per_v * row.m + log_s);
  scores.entropy = static_cast<float>(log_s - kLn2 * row.q / row.s);
  scores.logprob = static_cast<float>(per_v * (v_target - static_cast<double>(row.m)) - log_s);
  return scores;
}

struct Offset {
  float value, shift;  // log2 p = alpha (v - value) + shift; two terms, so that a large lse costs no bits
};

QL_HOST_DEVICE Offset offset_of(float lse, float alpha) {
  Offset offset;
  offset.value = static_cast<float>(lse * kLog2E * inverse_of(alpha));
  offset.shift = static_cast<float>(static_cast<double>(alpha) * offset.value - lse * kLog2E);
  return offset;
}

template <class Real>
QL_HOST_DEVICE Offset offset_of(const Part<Real>& row) {
  Offset offset;
  offset.value = static_cast<float>(row.m);
  offset.shift = static_cast<float>(-kLog2E * log_of(row.s));
  return offset;
}

QL_HOST_DEVICE RowGradient row_gradient(const RowScale& scale, const Offset& offset, float entropy, float g_logprob,
                                        float g_entropy, float g_lse) {
  RowGradient g;
  g.offset = offset.value;
  g.shift = offset.shift;
  g.constant = scale.slope * (g_lse - g_logprob - g_entropy * entropy);
  g.slope = scale.slope * g_entropy * static_cast<float>(kLn2);
  return g;
}

// slope_of_u * du at the target. rest is the sum of all other probabilities: near p_y = 1 it holds 1 - p_y and
// log p_y to full relative precision, which a rounded lse cannot.
template <class Real>
QL_HOST_DEVICE float target_gradient(const RowScale& scale, const RowGradient& g, float v_target, Real rest,
                                     float entropy, float g_logprob, float g_entropy, float g_lse) {
  Real log_p = static_cast<Real>(kLn2) *
               clamp_exponent(static_cast<Real>(scale.alpha) * (static_cast<Real>(v_target) - g.offset) + g.shift);
  Real p = exp(log_p), q = -expm1(log_p);
  if (p > static_cast<Real>(0.5)) {
    p = 1 - rest;
    q = rest;
    log_p = log1p(-rest);
  }
  const Real du = g_logprob * q + p * (g_lse - g_entropy * (log_p + entropy));
  return scale.slope * static_cast<float>(du);
}

}  // namespace
