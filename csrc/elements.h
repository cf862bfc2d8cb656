// Arithmetic of one element, on a float or on a vector of them.
#pragma once

#include "row_math.h"
#if !defined(__CUDACC__)
#include "cpu/simd.h"  // pow2 and others on vectors: a template finds only what is declared before it
#endif

namespace {

QL_HOST_DEVICE float select(bool condition, float yes, float no) { return condition ? yes : no; }

// Of 1 <= x <= 2; CUDA's approximation errs by one ulp.
QL_HOST_DEVICE float reciprocal_of(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// tanh(x) and its derivative. One exponential serves both; a polynomial where 1 - 2/(1 + e^2x) would cancel.
template <class F>
QL_HOST_DEVICE void tanh_and_slope(F x, F& value, F& slope) {
  const F a = select(x < 0.0f, -x, x);
  const F z = a * a;
  F poly = z * 0.002295850310474634f - 0.008346989750862122f;
  poly = poly * z + 0.021769965067505836f;
  poly = poly * z - 0.05395940691232681f;
  poly = poly * z + 0.13333304226398468f;
  poly = poly * z - 0.3333333432674408f;
  const F small = x + x * (z * poly);
  const F e = pow2(clamp_exponent(a * static_cast<float>(-2.0 * kLog2E)));  // e^(-2a)
  const F reciprocal = reciprocal_of(e + 1.0f);
  const F large = (1.0f - e) * reciprocal;
  value = select(a < 0.625f, small, select(x < 0.0f, -large, large));
  slope = select(a < 0.625f, 1.0f - small * small, 4.0f * e * reciprocal * reciprocal);
}

// The term d 2^d of Q2 and 2^d of S.
template <class F>
QL_HOST_DEVICE void add_element(F v, float m, float alpha, F& s, F& q) {
  const F d = clamp_exponent(alpha * (v - m));
  const F e = pow2(d);
  s += e;
  q += d * e;
}

// The gradient away from the target, without a soft-cap's factor. Adds the probability to rest.
template <class F>
QL_HOST_DEVICE F element_gradient(F v, float alpha, const RowGradient& g, F& rest) {
  const F d = clamp_exponent(alpha * (v - g.offset) + g.shift);
  const F p = pow2(d);
  rest += p;
  return p * (g.constant - g.slope * d);
}

}  // namespace
