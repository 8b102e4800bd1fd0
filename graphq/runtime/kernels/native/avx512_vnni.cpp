// Products of int8 inputs for x86 processors with AVX-512 VNNI.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif
#include <immintrin.h>
#include <cstring>
#include "weight.h"
namespace avx512_vnni {
#include "engine.h"
#include "inputs.h"

struct Int8 : Int8Input {
  using Vec = __m512i;
  using Acc = __m512i;
  static constexpr int MAX_M = 16, SUPER = 128, DIRECT = 4;
  template <int B> static constexpr int SPLIT = 1;
  template <int B> static constexpr bool has = true;
  struct Tables { explicit Tables(const Weight &) {} };
  INLINE __m512i zero() { return _mm512_setzero_si512(); }
  INLINE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  INLINE __m512i mac(__m512i acc, __m512i v, const uint32_t *x) {
    return _mm512_dpbusd_epi32(acc, v, _mm512_set1_epi32((int)*x));
  }
  INLINE V16 value(const Weight &w, __m512i acc, int32_t sum, const uint8_t *zero, int8_t x_zero, const int32_t *sums) {
    return integer_value(w.bits, (I16)acc, sum, zero, x_zero, sums);
  }
  template <int B> INLINE void decode(const uint8_t *p, const Tables &, __m512i *out) {
    byte_vectors<B>(p, (U16 *)out);
  }
};

int int8(const Call &call, int64_t threads) { return Engine<Int8>::run(call, threads); }
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "weight.h"
namespace avx512_vnni { int int8(const Call &call, int64_t threads) { return portable::int8(call, threads); } }
#endif
