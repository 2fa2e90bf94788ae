// Tensor maps: implements cuTensorMapEncodeTiled with the constraints of its documentation. The opaque result is a
// BoxMap.
#include "entry.h"

using namespace emu;

namespace {
int bytesOf(int dataType) {
  constexpr int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return dataType >= 0 && dataType < 13 ? bytes[dataType] : 0;  // sub-byte types are not emulated
}
}  // namespace

EMU_EXPORT int cuTensorMapEncodeTiled(void* map, int dataType, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                                      const uint32_t* box, const uint32_t* elementStrides, int interleave, int swizzle, int l2Promotion,
                                      int fill) {
  const auto refuse = [](const char* what, size_t value) {
    recordRefusal("cuTensorMapEncodeTiled: %s is %zu", what, value);
    return invalidValue;
  };
  if (capability() < 90) return refuse("the compute capability, to be 9.0 or more,", (size_t)capability());
  if ((uintptr_t)map % 64 != 0) return refuse("the address of the map, to be a multiple of 64,", (uintptr_t)map);
  const int elementBytes = bytesOf(dataType);
  if (elementBytes == 0) return refuse("the data type", (size_t)dataType);
  if (rank < 1 || rank > 5) return refuse("the rank", rank);
  if (interleave != 0) return refuse("the interleaving, which is not emulated,", (size_t)interleave);
  if (swizzle < 0 || swizzle > swizzle128) return refuse("the swizzle, of which those above 3 are not emulated,", (size_t)swizzle);
  if (l2Promotion < 0 || l2Promotion > 3) return refuse("the promotion", (size_t)l2Promotion);
  if (fill != 0) return refuse("the fill, of which only zeros are emulated,", (size_t)fill);
  if ((uintptr_t)address % 16 != 0) return refuse("the address of the matrix, to be a multiple of 16,", (uintptr_t)address);
  BoxMap encoded{};
  encoded.magic = boxMapMagic;
  encoded.rank = rank;
  encoded.address = (uintptr_t)address;
  encoded.elementBytes = (uint8_t)elementBytes;
  encoded.swizzle = (uint8_t)swizzle;
  for (uint32_t i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > uint64_t(1) << 32) return refuse("a size", sizes[i]);
    if (box[i] < 1 || box[i] > 256) return refuse("a side of the box", box[i]);
    if (elementStrides[i] != 1) return refuse("an element stride, of which only 1 is emulated,", elementStrides[i]);
    encoded.sizes[i] = sizes[i];
    encoded.box[i] = (uint16_t)box[i];
    if (i + 1 == rank) continue;
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t(1) << 40) return refuse("a stride, to be a multiple of 16 below 2^40,", strides[i]);
    const uint64_t covered = i == 0 ? sizes[0] * elementBytes : strides[i - 1] * sizes[i];
    if (strides[i] < covered || (i > 0 && strides[i] % strides[i - 1] != 0)) return refuse("a stride, to cover a whole number of what lies within,", strides[i]);
    encoded.strides[i] = strides[i];
  }
  const size_t inner = box[0] * (size_t)elementBytes;
  if (inner % 16 != 0) return refuse("the inner side of the box in bytes, to be a multiple of 16,", inner);
  if (swizzle != 0 && inner > size_t(16) << swizzle) return refuse("the inner side of the box in bytes, at most the swizzle's,", inner);
  static_assert(sizeof encoded <= 128, "the size of a CUtensorMap");
  memset(map, 0, 128);
  memcpy(map, &encoded, sizeof encoded);
  return ok;
}
