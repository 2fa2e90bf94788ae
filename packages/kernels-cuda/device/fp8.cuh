// Tiles of 128 numbers in f8e4m3 with a power of two as scale (core's Precision).
#pragma once
#include "moe.cuh"

constexpr int fp8Tile = 128;

/// Of a tile: its numbers are codes * up, codes are numbers * down.
struct Fp8Scale {
  float up, down;
};
/// From the largest magnitude as bits, which are in the order of the numbers, NaN and infinity above all others: 2^e with the least e >= -100 for which it is at most
/// 448 = 1.75 * 2^8 times as much.
MOE_DEVICE Fp8Scale fp8Scale(uint32_t largest) {
  const int e = max((int)((largest + 0x1fffffu) >> 23) - 135, -100);
  return {asFloat(largest >= 0x7f800000u ? 0x7fc00000u : (uint32_t)(e + 127) << 23), asFloat((uint32_t)(127 - e) << 23)};
}
MOE_DEVICE uint32_t magnitude(float x) { return asBits(x) & 0x7fffffffu; }
