// Exponential functions of vectors, after Cephes (netlib.org/cephes: expf.c, tanhf.c). To be included after a Simd.
#pragma once

namespace mpillama {
namespace {

inline F polynomial(F, F value) { return value; }
// Horner's rule, the highest coefficient first.
template <class... Rest>
F polynomial(F x, F value, float next, Rest... rest) {
  return polynomial(x, Simd::fma(value, x, Simd::all(next)), rest...);
}

// e^x, relative error below 2e-7; 0 below -87.3, where floats lose their precision, and at most 2.4e38.
inline F exp(F x) {
  const F y = Simd::min(Simd::all(88.3762f), x), n = Simd::round(Simd::mul(y, Simd::all(1.44269504f)));
  // ln 2 in two parts, of which the first has few bits: n times it is exact.
  const F r = Simd::fma(n, Simd::all(2.12194440e-4f), Simd::fma(n, Simd::all(-0.693359375f), y));
  const F p = polynomial(r, Simd::all(1.9875691500e-4f), 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                         1.6666665459e-1f, 5.0000001201e-1f);
  const F e = Simd::fma(Simd::mul(p, r), r, Simd::add(r, Simd::all(1)));
  // The exponent of a lane below the limit may be anything; its value is thrown away.
  return Simd::if_less(x, Simd::all(-87.3365f), Simd::zero(), Simd::times_power_of_2(e, Simd::max(Simd::all(-126), n)));
}

// e^x for x < 88, relative error below 2e-7 + |x| * 1e-7, and 1 for 0. Below -87.3 it is 0, or, where zeros are not needed, as
// it is there. The coefficients, of 2^x, have the smallest relative error on [-1/2, 1/2] of those with the value 1 at 0.
template <bool zeros> inline F exp_near_0(F x) {
  const F limit = Simd::all(-87.3365f), y = Simd::mul(Simd::max(limit, x), Simd::all(1.44269504f));
  const F n = Simd::round(y), r = Simd::sub(y, n);
  const F p = polynomial(r, Simd::all(1.326472731e-3f), 9.671512991e-3f, 5.550733581e-2f, 2.402224243e-1f, 6.931470037e-1f, 1.0f);
  const F e = Simd::times_power_of_2(p, n);
  return zeros ? Simd::if_less(x, limit, Simd::zero(), e) : e;
}

// 0 where e^x is: x times it does not grow again.
inline F sigmoid(F x) {
  const F one = Simd::all(1), y = Simd::div(one, Simd::add(one, exp(Simd::sub(Simd::zero(), x))));
  return Simd::if_less(x, Simd::all(-87.3365f), Simd::zero(), y);
}

// Relative error below 3e-7.
inline F tanh(F x) {
  const F size = Simd::abs(x), square = Simd::mul(x, x), one = Simd::all(1);
  const F p = polynomial(square, Simd::all(-5.70498872745e-3f), 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                         -3.33332819422e-1f);
  const F small = Simd::fma(Simd::mul(p, square), x, x);
  const F e = exp(Simd::add(size, size));
  const F large = Simd::sub(one, Simd::div(Simd::all(2), Simd::add(e, one)));
  const F signed_large = Simd::if_less(x, Simd::zero(), Simd::sub(Simd::zero(), large), large);
  return Simd::if_less(Simd::all(0.625f), size, signed_large, small);
}

}  // namespace
}  // namespace mpillama
