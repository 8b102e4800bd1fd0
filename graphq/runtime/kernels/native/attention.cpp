// Runs attention over the key/value heads of a batch (attention.h).
#include <atomic>
#include "attention.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {
struct Heads {
  const Attention *call;
  int32_t level;
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> failed{0};
};

void heads_part(void *data, int64_t, int64_t) {
  Heads &of = *(Heads *)data;
  const Attention &a = *of.call;
  for (int64_t head; (head = of.next++) < a.batch * a.kv_heads;) {
    const int failed = of.level >= AVX512 ? avx512::attention(a, head)
                       : of.level == AVX2 ? avx2::attention(a, head) : portable::attention(a, head);
    if (failed) of.failed = failed;
  }
}
}

// 0: done; 1: no memory.
EXPORT int32_t graphq_attention(const Attention *call, int32_t level, int64_t threads) {
  Heads of{call, level};
  const Attention &a = *call;
  if (threads > a.batch * a.kv_heads) threads = a.batch * a.kv_heads;
  if (a.batch * a.heads * a.queries * a.tokens * a.width < 1 << 16) threads = 1;  // starting others takes longer
  in_parallel(heads_part, &of, threads);
  return of.failed;
}
