// Everything a kernel source needs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "abi.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"
#include "simd-math.h"
