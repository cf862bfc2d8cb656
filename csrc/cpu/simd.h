// Vectors of floats in GCC and Clang vector extensions, as wide as the instruction set this file is compiled for.
// Standard headers with inline code stay out: a weak symbol compiled for AVX-512 could replace the baseline's at link
// time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../row_math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Floats broadcast(float x) { return x - Floats{}; }
inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Floats reciprocal_of(Floats x) { return 1.0f / x; }
inline Words select(Ints condition, Words yes, Words no) { return condition ? yes : no; }

// The second argument where either is NaN.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Floats clamp_exponent(Floats d) { return maximum(broadcast(kLowestExponent), d); }

// 2^d for -200 <= d < 127: under one ulp, 0 where the result would be subnormal (AVX-512: gradual), NaN stays NaN.
inline Floats pow2(Floats d) {
#if defined(__AVX512F__)
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)d, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats shifted = d + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits are round(d)
  const Floats n = shifted - 12582912.0f;
#endif
  const Floats f = d - n;  // [-1/2, 1/2], exact
  Floats e = f * 0.00015461447765119374f + 0.0013390866806730628f;
  e = e * f + 0.009618056938052177f;
  e = e * f + 0.055503569543361664f;
  e = e * f + 0.24022650718688965f;
  e = e * f + 0.6931471824645996f;
  e = e * f + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)e, (__m512)n);
#else
  e = (Floats)((Words)e + ((Words)shifted << 23));
  return select(d >= -126.0f, e, d - d);
#endif
}

inline double sum_of(Floats x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

inline float max_of(Floats x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

struct Float32 {
  typedef float Storage;
  static constexpr float kRefineLse = kRefineFloat32;
  static Floats load(const Storage* p) {
    Floats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(Storage* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
};

struct BFloat16 {
  typedef uint16_t Storage;
  static constexpr float kRefineLse = kRefineBFloat16;
  static Floats load(const Storage* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
  }
  static void store(Storage* p, Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Words word = select(x == x, rounded, (bits >> 16) | 0x40u);
    const Halves h = __builtin_convertvector(word, Halves);
    __builtin_memcpy(p, &h, sizeof h);
  }
};

struct Float16 {
  typedef uint16_t Storage;
  static constexpr float kRefineLse = kRefineFloat16;
  static Floats load(const Storage* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    const Words bits = __builtin_convertvector(h, Words);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Floats finite = (Floats)magnitude * 0x1p112f;  // moves the exponent's bias; subnormals come out right
    const Words wide = select((Ints)(magnitude >= (0x7c00u << 13)), magnitude | 0x7f800000u, (Words)finite);
    return (Floats)(wide | ((bits & 0x8000u) << 16));
  }
  static void store(Storage* p, Floats x) {
    const Words sign = ((Words)x >> 16) & 0x8000u;
    const Words bits = (Words)x & 0x7fffffffu;
    const Words normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    // Adding 1/2 leaves round(x 2^24), the subnormal's bits, at the bottom of the mantissa.
    const Words subnormal = (Words)((Floats)bits + 0.5f) - (Words)broadcast(0.5f);
    Words word = select((Ints)(bits < (113u << 23)), subnormal, normal);
    word = select((Ints)(bits >= 0x477ff000u), Words{} + 0x7c00u, word);  // 65520 and above
    word = select((Ints)(bits > 0x7f800000u), Words{} + 0x7e00u, word);
    const Halves h = __builtin_convertvector(word | sign, Halves);
    __builtin_memcpy(p, &h, sizeof h);
  }
};

}  // namespace
