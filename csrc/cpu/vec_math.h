// exp, erf and tanh of a pack. For float these are polynomials without branches; tests/test_activation.py checks their
// largest errors over all floats (exp 1, tanh 2, erf 1.5 ulp). For double the C library computes lane by lane.
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
  for (int k = 0; k < kParts; ++k) bits.part[k] &= 0x7fffffff;
  return from_bits<float>(bits);
}

// |magnitude| with the sign of `sign`.
FASTNORM_INLINE PackF copy_sign(PackF magnitude, PackF sign) {
  Mask<float> bits = bits_of(magnitude);
  const Mask<float> sign_bits = bits_of(sign);
  for (int k = 0; k < kParts; ++k) bits.part[k] = (bits.part[k] & 0x7fffffff) | (sign_bits.part[k] & ~0x7fffffff);
  return from_bits<float>(bits);
}

// v * 2^n for an integer n = biased - 1.5 * 2^23. It is right below the normal range and where the result is Inf.
FASTNORM_INLINE PackF times_power_of_two(PackF v, PackF n, PackF biased) {
#if defined(__AVX512F__)
  (void)biased;
  v.part[0] = _mm512_scalef_ps(v.part[0], n.part[0]);
  return v;
#else
  (void)n;
  Mask<float> half = bits_of(biased), rest;  // two factors; each is a normal number
  for (int k = 0; k < kParts; ++k) {
    const auto exponent = half.part[k] - 0x4b400000;
    half.part[k] = ((exponent >> 1) + 127) << 23;
    rest.part[k] = (exponent - (exponent >> 1) + 127) << 23;
  }
  return v * from_bits<float>(half) * from_bits<float>(rest);
#endif
}

// exp(x) = 2^n exp(r), |r| <= ln2 / 2; the polynomial is Cephes' expf (Moshier 1989).
FASTNORM_INLINE PackF exp(PackF x) {
  x = select(x > PackF(89), PackF(89), select(x <= PackF(-105), PackF(-105), x));  // NaN passes
  const PackF kRound(12582912.0);  // 1.5 * 2^23: adding it rounds to an integer
  const PackF shifted = fma(x, PackF(1.44269504088896341), kRound);
  const PackF n = shifted - kRound;
  PackF r = fma(n, PackF(-0.693359375), x);
  r = fma(n, PackF(2.12194440e-4), r);
  const PackF p = polynomial(
      r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  const PackF e = fma(p, r * r, r) + PackF(1);
  return times_power_of_two(e, n, shifted);
}

FASTNORM_INLINE PackF tanh(PackF x) {
  const PackF a = absolute(x);
  const PackF square = x * x;
  const PackF p = polynomial(
      square, {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f});
  const PackF small = fma(p * square, x, x);
  const PackF large = PackF(1) - PackF(2) / (exp(a + a) + PackF(1));
  return select(a > PackF(0.625), copy_sign(large, x), small);  // NaN takes `small`
}

// Two polynomials after N. Juffa's erff: an odd one like Taylor's near zero, 1 - exp(polynomial) further out.
FASTNORM_INLINE PackF erf(PackF x) {
  const PackF a = absolute(x);
  const PackF square = x * x;
  const PackF near = polynomial(
      square, {-5.96761703e-4f, 4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f, 1.28379166e-1f});
  const PackF small = fma(near, x, x);
  const PackF far = polynomial(a, {-1.72853470e-5f, 3.83197126e-4f, -3.88396438e-3f, 2.42546219e-2f, -1.06777877e-1f,
                                   -6.34846687e-1f, -1.28717512e-1f});
  const PackF large = PackF(1) - exp(fma(far, a, PackF(0) - a));
  return select(a > PackF(0.927734375), copy_sign(large, x), small);
}

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
