// Runs straight-line programs of steps (steps.h).
#include <cstring>
#include "steps.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {
struct Plain { const PlainCall *call; int32_t level; };
void plain_part(void *data, int64_t part, int64_t parts) {
  const Plain &p = *(const Plain *)data;
  const PlainCall &c = *p.call;
  const int64_t blocks = (c.n + 3) / 4, first = blocks * part / parts * 4, last = blocks * (part + 1) / parts * 4;
  const int64_t end = last < c.n ? last : c.n;
  if (p.level == AVX512_BF16) avx512_bf16::plain(c, first, end);
  else if (p.level >= AVX512) avx512::plain(c, first, end);
  else if (p.level == AVX2) avx2::plain(c, first, end);
  else portable::plain(c, first, end);
}

int32_t plain_linear(const Step &s, const void *a, const void *w, const void *bias, void *out, int64_t threads) {
  const int64_t count = s.n0 * s.n2;
  const bool is_half = s.level == AVX512_BF16 && s.a_type == BFLOAT16 && s.b_type == BFLOAT16;
  float *wide = nullptr;
  if (s.a_type != FLOAT32 && !is_half) {
    wide = (float *)scratch_alloc(count * 4);
    if (!wide) return 1;
    for (int64_t i = 0; i < count; i++) {
      const uint32_t u = (uint32_t)((const uint16_t *)a)[i] << 16;
      std::memcpy(wide + i, &u, 4);
    }
  }
  const PlainCall call{wide ? wide : (const float *)a, is_half ? (const uint16_t *)a : nullptr, w, bias, out,
                       s.n0, s.n1, s.n2, s.b_type, s.c_type, s.out_type};
  Plain job{&call, is_half ? AVX512_BF16 : s.level >= AVX512 ? AVX512 : s.level};
  if (s.n0 * s.n1 * s.n2 < 1 << 17) threads = 1;  // starting others takes longer
  in_parallel(plain_part, &job, threads);
  if (wide) scratch_free(wide);
  return 0;
}
}

// 0: done; 1: no memory; 2: no such step; 3: a row that is quantized holds what is not finite; 4: no rows of experts.
EXPORT int32_t graphq_steps(const Step *steps, int64_t count, void *const *buffers, int64_t scratch, int64_t threads) {
  uint8_t *memory = (uint8_t *)scratch_alloc(scratch);
  if (!memory) return 1;
  int32_t failed = 0;
  for (int64_t i = 0; i < count && !failed; i++) {
    const Step &s = steps[i];
    const auto at = [&](int64_t p) -> void * { return p >= 0 ? buffers[p] : p == -1 ? nullptr : memory + (-2 - p); };
    void *a = at(s.a), *b = at(s.b), *c = at(s.c), *out = at(s.out);
    switch (s.op) {
      case STEP_QUANTIZE: {
        const Quantizing rows{a, (int8_t *)out, (float *)at(s.out2), (int8_t *)at(s.out3), s.n0, s.n2, s.a_type, s.rule};
        failed = quantize_rows(rows, s.level, threads) ? 3 : 0;
        break;
      }
      case STEP_PACKED: {
        const Call call{s.weight, a, (const float *)b, (const int8_t *)c, out, s.n0, s.a_type, s.out_type};
        failed = linear(call, s.product, s.level, threads);
        break;
      }
      case STEP_GROUPED: {
        const Call call{s.weight, a, (const float *)b, (const int8_t *)c, out, s.n0, s.a_type, s.out_type};
        failed = grouped(call, Grouping{at(s.d), s.n1, s.d_type}, s.product, s.level, threads);
        break;
      }
      case STEP_PLAIN: failed = plain_linear(s, a, b, c, out, threads); break;
      default:
        if (s.level >= AVX512) avx512::elementwise(s, a, b, out);
        else if (s.level == AVX2) avx2::elementwise(s, a, b, out);
        else portable::elementwise(s, a, b, out);
    }
  }
  scratch_free(memory);
  return failed;
}
