// exp, tanh and the normal distribution of a pack. For float these are polynomials without branches; for elements of 16
// bits there are shorter ones (Approx). For double the C library computes lane by lane. tests/test_activation.py holds
// the activations made of them to errors in ulp. No instruction here gives other bits on another processor: reciprocals
// are divisions, which take place beside the multiplications.
#pragma once

#include <cmath>

#include "load_store.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

using PackF = Pack<float>;
using PackD = Pack<double>;

// c[0] x^(n-1) + ... + c[n-1], by Horner's rule.
template <int n>
FASTNORM_INLINE PackF polynomial(PackF x, const float (&c)[n]) {
  PackF r(c[0]);
  for (int i = 1; i < n; ++i) r = fma(r, x, PackF(c[i]));
  return r;
}

FASTNORM_INLINE PackF absolute(PackF x) {
  Mask<float> bits = bits_of(x);
  for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA { bits.part[k] &= 0x7fffffff; });
  return from_bits<float>(bits);
}

// |magnitude| with the sign of `sign`.
FASTNORM_INLINE PackF copy_sign(PackF magnitude, PackF sign) {
  Mask<float> bits = bits_of(magnitude);
  const Mask<float> sign_bits = bits_of(sign);
  for_each_index<kParts>(
      [&](auto k) FASTNORM_LAMBDA { bits.part[k] = (bits.part[k] & 0x7fffffff) | (sign_bits.part[k] & ~0x7fffffff); });
  return from_bits<float>(bits);
}

// x within [-limit, limit]. NaN passes.
FASTNORM_INLINE PackF clamp(PackF x, double limit) { return max(PackF(-limit), min(PackF(limit), x)); }

// ---- powers: 2^n for an integer n, times a factor of the order of one ----

// The integer next to x, and the sum that rounds to it: adding 1.5 * 2^23 leaves no place for a fraction.
struct Nearest {
  PackF n, shifted;
  // Of x * factor.
  FASTNORM_INLINE Nearest(PackF x, double factor) : shifted(fma(x, PackF(factor), PackF(0x1.8p23))) {
    n = shifted - PackF(0x1.8p23);
  }
};

// v * 2^n. It is right below the normal range and where the result is Inf.
FASTNORM_INLINE PackF times_power_of_two(PackF v, const Nearest& nearest) {
#if defined(__AVX512F__)
  for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA { v.part[k] = _mm512_scalef_ps(v.part[k], nearest.n.part[k]); });
  return v;
#else
  Mask<float> half = bits_of(nearest.shifted), rest;  // two factors; each is a normal number
  for_each_index<kParts>([&](auto k) FASTNORM_LAMBDA {
    const auto exponent = half.part[k] - 0x4b400000;
    half.part[k] = ((exponent >> 1) + 127) << 23;
    rest.part[k] = (exponent - (exponent >> 1) + 127) << 23;
  });
  return v * from_bits<float>(half) * from_bits<float>(rest);
#endif
}

// exp(r) - 1 for |r| <= ln2 / 2. The polynomial is Cephes' expf (Moshier 1989).
FASTNORM_INLINE PackF expm1_reduced(PackF r) {
  const PackF p = polynomial(
      r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  return fma(p, r * r, r);
}
constexpr double kLog2E = 1.44269504088896341, kLn2Upper = 0.693359375, kLn2Lower = -2.12194440e-4;

// exp(x) = 2^n exp(r), |r| <= ln2 / 2.
struct ExpArgument {
  Nearest nearest;
  PackF r;
  FASTNORM_INLINE explicit ExpArgument(PackF x) : nearest(x, kLog2E) {
    r = fma(nearest.n, PackF(-kLn2Lower), fma(nearest.n, PackF(-kLn2Upper), x));
  }
};
FASTNORM_INLINE PackF exp(const ExpArgument& x) { return times_power_of_two(expm1_reduced(x.r) + PackF(1), x.nearest); }
FASTNORM_INLINE PackF exp(PackF x) { return exp(ExpArgument(clamp(x, 110))); }
FASTNORM_INLINE PackF exp_of_minus(PackF x) { return exp(-x); }

FASTNORM_INLINE PackF tanh(PackF x) {
  const PackF a = absolute(x);
  const PackF square = x * x;
  const PackF p = polynomial(
      square, {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f});
  const PackF small = fma(p * square, x, x);
  const PackF large = PackF(1) - PackF(2) / (exp(a + a) + PackF(1));
  return select(a > PackF(0.625), copy_sign(large, x), small);  // NaN takes `small`
}

// ---- the normal distribution: P(Z <= -a) = bell(a) mills(a), with bell(a) = exp(-a^2 / 2) ----
//
// mills, Mills' ratio over sqrt(2 pi), varies little, so that the tail keeps its digits where 1 + erf cancels. It is a
// quotient of polynomials whose coefficients are all positive, a fit of the least largest relative error over a < 14.6.
// Value and slope of GELU share the exponential.

// |z|, where bell is not yet 0. NaN passes.
FASTNORM_INLINE PackF bell_argument(PackF z) { return min(PackF(15), absolute(z)); }

// -a^2 / 2, with what rounding cuts off the square.
FASTNORM_INLINE ExpArgument bell_exponent(PackF a) {
  const PackF half = a * PackF(-0.5), square = half * a;
  ExpArgument x(square);
  x.r = x.r + fma(half, a, -square);
  return x;
}

// mills = (1/2 + a above) / (1 + a below). The relative error is 2^-27.
FASTNORM_INLINE PackF mills_above(PackF a) {
  return polynomial(a, {0.00409362f, 0.04049578f, 0.18285011f, 0.43781069f});
}
FASTNORM_INLINE PackF mills_below(PackF a) {
  return polynomial(a, {0.01026106f, 0.10151437f, 0.46844728f, 1.20096102f, 1.67350623f});
}

FASTNORM_INLINE PackF normal_density(PackF z) {
  return PackF(0.39894228040143267794) * exp(bell_exponent(bell_argument(z)));
}
FASTNORM_INLINE PackF cdf_of_tail(PackF z, PackF tail) { return select(z <= PackF(0), tail, PackF(1) - tail); }
FASTNORM_INLINE PackF normal_cdf(PackF z) {
  const PackF a = bell_argument(z);
  return cdf_of_tail(z,
                     exp(bell_exponent(a)) * (fma(mills_above(a), a, PackF(0.5)) / fma(mills_below(a), a, PackF(1))));
}
// max(z, 0) - |z| P(Z <= -|z|), which is z P(Z <= z). -Inf gives NaN, as it does in torch.
FASTNORM_INLINE PackF gelu_of_tail(PackF z, PackF a_tail) {
  return fma(z, select(z <= PackF(0), PackF(0), PackF(1)), -a_tail);
}
FASTNORM_INLINE PackF gelu(PackF z) {
  // exp(a^2 / 2) = exp(r) / 2^n joins the denominator, which has a single rounding near 0 then, as the numerator has.
  const PackF a = bell_argument(z), half = a * PackF(0.5), square = half * a;
  const Nearest nearest(square, -kLog2E);
  const PackF reduced = fma(nearest.n, PackF(kLn2Lower), fma(nearest.n, PackF(kLn2Upper), square));
  const PackF e = expm1_reduced(reduced + fma(half, a, -square));
  const PackF above = fma(a * a, mills_above(a), half), below = a * mills_below(a);
  const PackF quotient = above / (fma(e, below + PackF(1), below) + PackF(1));
  return gelu_of_tail(z, times_power_of_two(quotient, nearest));
}

// ---- activations of 16-bit elements ----

// A pack whose exponential and normal distribution have a relative error of 2^-21. The element is rounded to 2^-9
// (bfloat16) or 2^-12 (float16) afterwards, but the gradients of float32 weights are not.
struct Approx : PackF {
  using PackF::PackF;
  FASTNORM_INLINE Approx(PackF v) : PackF(v) {}
};

// exp(x * factor) for |x * factor * log2(e)| < 2^22.
FASTNORM_INLINE PackF approx_exp(PackF x, double factor) {
  const double log2e = kLog2E * factor;
  const Nearest nearest(x, log2e);
  const PackF f = fma(x, PackF(log2e), -nearest.n);
  const PackF p = polynomial(
      f, {0.00132764713f, 0.00967554189f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.00000012f});  // 2^-23.7
  return times_power_of_two(p, nearest);
}
FASTNORM_INLINE Approx exp_of_minus(Approx z) { return approx_exp(clamp(z, 110), -1); }

FASTNORM_INLINE PackF approx_bell(PackF a) { return approx_exp(a * a, -0.5); }
FASTNORM_INLINE Approx normal_density(Approx z) {
  return PackF(0.39894228040143267794) * approx_bell(bell_argument(z));
}
// mills with a relative error of 2^-21.2.
FASTNORM_INLINE PackF approx_mills(PackF a) {
  return polynomial(a, {0.0171969787f, 0.120160216f, 0.363063281f, 0.499999799f}) /
         polynomial(a, {0.0431110987f, 0.301003857f, 0.956446136f, 1.52399126f, 1.0f});
}
FASTNORM_INLINE Approx normal_cdf(Approx z) {
  const PackF a = bell_argument(z);
  return cdf_of_tail(z, approx_bell(a) * approx_mills(a));
}
FASTNORM_INLINE Approx gelu(Approx z) {
  const PackF a = bell_argument(z);
  return gelu_of_tail(z, a * approx_bell(a) * approx_mills(a));
}

// The type that an activation of elements of T is computed in.
template <class T>
using ActivationValue = std::conditional_t<sizeof(T) == 2, Approx, Pack<Accum<T>>>;

#define FASTNORM_LANEWISE(name)                     \
  inline PackD name(PackD x) {                      \
    alignas(kPackBytes) double lane[PackD::kLanes]; \
    store(lane, x);                                 \
    for (double& v : lane) v = std::name(v);        \
    return load(lane);                              \
  }
FASTNORM_LANEWISE(exp)
FASTNORM_LANEWISE(erf)
FASTNORM_LANEWISE(tanh)
#undef FASTNORM_LANEWISE

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
