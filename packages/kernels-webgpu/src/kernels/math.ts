/**
 * @file Functions that the contract requires to be more accurate than WGSL guarantees (it allows sin an error of 2^-11), or to preserve NaN and infinities.
 * Polynomials from Moshier's Cephes (expf, logf, sinf, cosf, tanhf), single precision.
 */

/** Bits of special values. WGSL does not allow them as constants, and compilers may remove comparisons with NaN. */
export const special = `
var<private> nan_bits: u32 = 0x7fc00000u;
var<private> inf_bits: u32 = 0x7f800000u;
fn nan() -> f32 { return bitcast<f32>(nan_bits); }
fn inf() -> f32 { return bitcast<f32>(inf_bits); }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_inf(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0x7f800000u; }
fn is_negative(x: f32) -> bool { return (bitcast<u32>(x) >> 31u) == 1u; }
fn max_(a: f32, b: f32) -> f32 {
  if (is_nan(a)) { return a; }
  if (is_nan(b)) { return b; }
  return select(b, a, a > b);
}
fn min_(a: f32, b: f32) -> f32 {
  if (is_nan(a)) { return a; }
  if (is_nan(b)) { return b; }
  return select(b, a, a < b);
}`

export const exponential = `
fn power_of_two(k: i32) -> f32 { return bitcast<f32>(u32(k + 127) << 23u); }
fn exp_(x: f32) -> f32 {
  if (is_nan(x)) { return x; }
  let a = clamp(x, -104.0, 89.0);
  let k = round(a * 1.44269504088896341);
  let r = (a - k * 0.693359375) + k * 2.12194440e-4;
  var y = ((((1.9875691500E-4 * r + 1.3981999507E-3) * r + 8.3334519073E-3) * r + 4.1665795894E-2) * r + 1.6666665459E-1) * r + 5.0000001201E-1;
  y = y * r * r + r + 1.0;
  let half = i32(k) / 2;
  return y * power_of_two(half) * power_of_two(i32(k) - half);
}
fn sigmoid_(x: f32) -> f32 { return 1.0 / (1.0 + exp_(-x)); }`

export const logarithm = `
fn log_(x: f32) -> f32 {
  if (is_nan(x)) { return x; }
  if (abs(x) < 1.17549435e-38) { return -inf(); }
  if (is_negative(x)) { return nan(); }
  if (is_inf(x)) { return x; }
  let bits = bitcast<u32>(x);
  var e = f32(i32(bits >> 23u) - 126);
  var m = bitcast<f32>((bits & 0x007fffffu) | 0x3f000000u);
  if (m < 0.707106781186547524) { e -= 1.0; m = m + m - 1.0; } else { m -= 1.0; }
  let z = m * m;
  var y = ((((((((7.0376836292E-2 * m - 1.1514610310E-1) * m + 1.1676998740E-1) * m - 1.2420140846E-1) * m + 1.4249322787E-1) * m
    - 1.6668057665E-1) * m + 2.0000714765E-1) * m - 2.4999993993E-1) * m + 3.3333331174E-1) * m * z;
  y += -2.12194440e-4 * e - 0.5 * z;
  return m + y + 0.693359375 * e;
}`

export const trigonometry = `
fn turned(x: f32, quarter: i32) -> f32 {
  if (is_nan(x) || is_inf(x)) { return nan(); }
  let q = round(x * 0.636619772367581343);
  var r = x - q * 1.5703125;
  r -= q * 4.8375129699707031250e-4;
  r -= q * 7.54978995489188216e-8;
  let z = r * r;
  let sine = ((-1.9515295891E-4 * z + 8.3321608736E-3) * z - 1.6666654611E-1) * z * r + r;
  let cosine = ((2.443315711809948E-5 * z - 1.388731625493765E-3) * z + 4.166664568298827E-2) * z * z - 0.5 * z + 1.0;
  let n = (i32(q) + quarter) & 3;
  let y = select(sine, cosine, (n & 1) == 1);
  return select(y, -y, n >= 2);
}
fn sin_(x: f32) -> f32 { return turned(x, 0); }
fn cos_(x: f32) -> f32 { return turned(x, 1); }`

export const hyperbolic = `
fn tanh_(x: f32) -> f32 {
  let a = abs(x);
  if (a < 0.625) {
    let z = x * x;
    return ((((-5.70498872745E-3 * z + 2.06390887954E-2) * z - 5.37397155531E-2) * z + 1.33314422036E-1) * z - 3.33332819422E-1) * z * x + x;
  }
  let y = 1.0 - 2.0 / (exp_(a + a) + 1.0);
  return select(y, -y, is_negative(x) && !is_nan(x));
}`

export const powers = `
fn pow_(a: f32, b: f32) -> f32 {
  if (b == 0.0) { return 1.0; }
  if (is_nan(a)) { return a; }
  if (is_nan(b)) { return b; }
  let y = exp_(b * log_(abs(a)));
  if (!(a < 0.0)) { return y; }
  if (floor(b) != b) { return nan(); }
  let odd = floor(b * 0.5) * 2.0 != b;
  return select(y, -y, odd);
}`
