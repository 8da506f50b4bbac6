// AVX-512-BF16: products of vectors of bfloat16; see avx512bf16.h.
#include "avx512bf16.h"

namespace quantserve {

const Kernel avx512bf16 = Gemm<Avx512Bf16>::kernel("avx512bf16");

}  // namespace quantserve
