// What the kernels need of the standard library, included before any `#pragma GCC target`: its inline functions must not
// be compiled for an instruction set that the machine may lack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.h"
