// The library's functions: what the processor has, threads, tiles of a weight and back, products.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include "steps.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// -- the processor --
EXPORT int32_t graphq_abi() { return 4; }

// Bits: 1 << Level.
EXPORT int32_t graphq_levels() {
  int32_t found = 1 << PORTABLE;
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks the operating system, too, whether it keeps the registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= 1 << AVX2;
  else return found;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return found;
  found |= 1 << AVX512;
  if (__builtin_cpu_supports("avx512vnni")) found |= 1 << AVX512_VNNI;
  if (__builtin_cpu_supports("avx512bf16")) found |= 1 << AVX512_BF16;
#endif
  return found;
}

// -- threads: OpenMP's, of the very library that torch has loaded --
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
static Parallel gomp_parallel;
static int (*thread_number)();
static int (*thread_count)();

EXPORT void graphq_use_openmp(void *parallel, void *number, void *count) {
  gomp_parallel = (Parallel)parallel;
  thread_number = (int (*)())number;
  thread_count = (int (*)())count;
}

namespace {
struct Region { Body body; void *data; };
void enter(void *data) {
  const Region &region = *(const Region *)data;
  region.body(region.data, thread_number(), thread_count());
}
}

void in_parallel(Body body, void *data, int64_t threads) {
  if (threads <= 1 || !gomp_parallel) return body(data, 0, 1);
  Region region{body, data};
  gomp_parallel(enter, &region, (unsigned)threads, 0);
}

void *scratch_alloc(int64_t bytes) {
  void *memory = nullptr;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) ? nullptr : memory;
}
void scratch_free(void *memory) { free(memory); }

// -- tiles --
namespace {
// Calls ``at(row, k, byte, plane shift, bits of the plane, code's shift)`` for each plane of each code of a tile.
template <class F> void each_code(const Weight &w, const Grid &grid, int64_t tile, F at) {
  const int64_t width = chunk_k(w.bits), beside = (w.scale == SCALE_F32 ? 64 : 16) + (w.has_zero ? 16 : 0);
  int64_t byte = tile * grid.tile_bytes;
  for (int64_t g = 0; g < grid.groups; g++, byte += beside) {
    const int64_t chunks = g + 1 < grid.groups ? grid.chunks : grid.last_chunks;
    const int64_t size = g + 1 < grid.groups ? w.group : grid.last;
    for (int64_t c = 0; c < chunks; c++, byte += chunk_bytes(w.bits))
      for (int64_t i = 0; i < width; i++) {
        const int64_t in_group = c * width + i, j = i / 4, place = i % 4;
        for (int lane = 0; lane < LANES; lane++) {
          const int64_t row = tile * LANES + lane, k = in_group < size && row < w.n ? g * w.group + in_group : -1;
          int64_t plane = byte;
          int shift = 0;
          for (int bits = 8; bits; bits >>= 1) {
            if (!(w.bits & bits)) continue;
            const int each = 8 / bits;  // byte vectors in a vector of the plane
            at(row, k, plane + j / each * 64 + lane * 4 + place, (int)(j % each) * bits, (1 << bits) - 1, shift);
            plane += width / 4 / each * 64;
            shift += bits;
          }
        }
      }
  }
}
}

// Bytes of all tiles; of the weight sizes and kinds alone are read.
EXPORT int64_t graphq_tiles_size(const Weight *w) {
  const Grid grid(*w);
  return grid.tiles * grid.tile_bytes;
}

struct Packing {
  const Weight *weight;
  uint8_t *tiles, *rows;  // rows: [n, row_bytes], code i of a row from bit i * bits on
  int64_t row_bytes;
  const uint8_t *scale;   // [n, groups] of float32 or bytes
  const int8_t *zero;     // [n, groups], or null
};

static void pack_part(void *data, int64_t part, int64_t parts) {
  const Packing &p = *(const Packing *)data;
  const Weight &w = *p.weight;
  const Grid grid(w);
  const int flip = w.is_integer ? 1 << (w.bits - 1) : 0, mask = (1 << w.bits) - 1;
  const int64_t first = grid.tiles * part / parts, end = grid.tiles * (part + 1) / parts;
  const int64_t scale_bytes = w.scale == SCALE_F32 ? 4 : 1;
  for (int64_t tile = first; tile < end; tile++) {
    uint8_t *own = p.tiles + tile * grid.tile_bytes;
    std::memset(own, 0, grid.tile_bytes);
    each_code(w, grid, tile, [&](int64_t row, int64_t k, int64_t byte, int at, int most, int shift) {
      int code = flip;
      if (k >= 0) {
        const int64_t bit = k * w.bits;
        const uint8_t *from = p.rows + row * p.row_bytes + bit / 8;
        int both = from[0];
        if (bit % 8 + w.bits > 8) both |= from[1] << 8;
        code = ((both >> (bit % 8)) & mask) ^ flip;
      }
      p.tiles[byte] |= (uint8_t)(((code >> shift) & most) << at);
    });
    for (int64_t g = 0; g < grid.groups; g++) {
      const int64_t chunks = g + 1 < grid.groups ? grid.chunks : grid.last_chunks;
      uint8_t *beside = own + g * grid.group_bytes + chunks * chunk_bytes(w.bits);
      for (int lane = 0; lane < LANES && tile * LANES + lane < w.n; lane++) {
        const int64_t at = (tile * LANES + lane) * grid.groups + g;
        std::memcpy(beside + lane * scale_bytes, p.scale + at * scale_bytes, scale_bytes);
        if (w.has_zero) beside[LANES * scale_bytes + lane] = (uint8_t)p.zero[at];
      }
    }
  }
}

static void unpack_part(void *data, int64_t part, int64_t parts) {
  const Packing &p = *(const Packing *)data;
  const Weight &w = *p.weight;
  const Grid grid(w);
  const int flip = w.is_integer ? 1 << (w.bits - 1) : 0;
  const int64_t first = grid.tiles * part / parts, end = grid.tiles * (part + 1) / parts;
  for (int64_t tile = first; tile < end; tile++) {
    const int64_t row = tile * LANES, rows = w.n - row < LANES ? w.n - row : LANES;
    std::memset(p.rows + row * p.row_bytes, 0, rows * p.row_bytes);
    each_code(w, grid, tile, [&](int64_t r, int64_t k, int64_t byte, int at, int most, int shift) {
      if (k < 0) return;
      const int code = ((((p.tiles[byte] >> at) & most) << shift) ^ flip) & (most << shift);
      const int64_t bit = k * w.bits;
      uint8_t *to = p.rows + r * p.row_bytes + bit / 8;
      const int both = code << (bit % 8);
      to[0] |= (uint8_t)both;
      if (both >> 8) to[1] |= (uint8_t)(both >> 8);
    });
  }
}

EXPORT void graphq_pack(const Packing *p, int64_t threads) { in_parallel(pack_part, (void *)p, threads); }
EXPORT void graphq_unpack(const Packing *p, int64_t threads) { in_parallel(unpack_part, (void *)p, threads); }

// -- products --
// 0: done; 1: no memory; 2: no such product at this level.
int32_t linear(const Call &call, int32_t product, int32_t level, int64_t threads) {
  const Weight &weight = *call.weight;
  if (call.m <= 0) return 0;
  const int64_t tiles = (weight.n + LANES - 1) / LANES;
  if (threads > tiles) threads = tiles;
  if (call.m * weight.n * weight.k < 1 << 17) threads = 1;  // starting others takes longer
  switch (product) {
    case PRODUCT_FLOAT32:
      return level >= AVX512 ? avx512::float32(call, threads)
             : level == AVX2 ? avx2::float32(call, threads) : portable::float32(call, threads);
    case PRODUCT_BFLOAT16: return level == AVX512_BF16 ? avx512_bf16::bfloat16(call, threads) : 2;
    case PRODUCT_INT8:
      return level == AVX512_VNNI ? avx512_vnni::int8(call, threads)
             : level == AVX2 ? avx2::int8(call, threads) : portable::int8(call, threads);
  }
  return 2;
}

EXPORT int32_t graphq_linear(const Weight *weight, const void *x, const float *x_scale, const int8_t *x_zero, void *y,
                             int64_t m, int32_t x_type, int32_t y_type, int32_t product, int32_t level, int64_t threads) {
  return linear(Call{weight, x, x_scale, x_zero, y, m, x_type, y_type}, product, level, threads);
}

// -- experts --
namespace {
int64_t offset_of(const Grouping &by, int64_t expert) {
  if (expert < 0) return 0;
  return by.type == INT64 ? ((const int64_t *)by.offsets)[expert] : ((const int32_t *)by.offsets)[expert];
}

struct Experts {
  const Call *call;
  const Grouping *by;
  const Grid *grid;
  int32_t product, level;
  std::atomic<int64_t> next{0};  // which expert a thread takes
  std::atomic<int32_t> failed{0};
};

int32_t one_expert(const Experts &of, int64_t expert, int64_t threads) {
  const Weight &all = *of.call->weight;
  const int64_t first = offset_of(*of.by, expert - 1), rows = offset_of(*of.by, expert) - first;
  if (!rows) return 0;
  Weight own = all;
  own.tiles += expert * of.grid->tiles * of.grid->tile_bytes;
  if (own.row_scale) own.row_scale += expert * all.n;
  if (own.sums) own.sums += expert * of.grid->tiles * of.grid->groups * LANES;
  Call call = *of.call;
  call.weight = &own;
  call.m = rows;
  call.x = (const uint8_t *)call.x + first * all.k * (call.x_type == FLOAT32 ? 4 : call.x_type == BFLOAT16 ? 2 : 1);
  call.y = (uint8_t *)call.y + first * all.n * (call.y_type == FLOAT32 ? 4 : 2);
  if (call.x_scale) call.x_scale += first;
  if (call.x_zero) call.x_zero += first;
  return linear(call, of.product, of.level, threads);
}

void experts_part(void *data, int64_t, int64_t) {
  Experts &of = *(Experts *)data;
  for (int64_t expert; (expert = of.next++) < of.by->experts;)
    if (const int32_t failed = one_expert(of, expert, 1)) of.failed = failed;
}
}

// 0: done; 1: no memory; 2: no such product at this level; 4: the offsets do not cut the rows.
int32_t grouped(const Call &call, const Grouping &by, int32_t product, int32_t level, int64_t threads) {
  const Weight &weight = *call.weight;
  int64_t end = 0, active = 0;
  for (int64_t e = 0; e < by.experts; e++) {
    const int64_t next = offset_of(by, e);
    if (next < end || next > call.m) return 4;
    active += next > end;
    end = next;
  }
  const int64_t size = weight.n * (call.y_type == FLOAT32 ? 4 : 2);
  std::memset((uint8_t *)call.y + end * size, 0, (call.m - end) * size);
  const Grid grid(weight);
  Experts of{&call, &by, &grid, product, level};
  if (end * weight.n * weight.k < 1 << 17) threads = 1;  // starting others takes longer
  if (active >= 2 * threads) {  // each is the work of one thread
    in_parallel(experts_part, &of, threads);
    return of.failed;
  }
  for (int64_t e = 0; e < by.experts; e++)
    if (const int32_t failed = one_expert(of, e, threads)) return failed;
  return 0;
}

EXPORT int32_t graphq_grouped(const Weight *weight, const void *offsets, int64_t experts, int32_t offset_type, const void *x,
                              const float *x_scale, const int8_t *x_zero, void *y, int64_t m, int32_t x_type,
                              int32_t y_type, int32_t product, int32_t level, int64_t threads) {
  const Call call{weight, x, x_scale, x_zero, y, m, x_type, y_type};
  return grouped(call, Grouping{offsets, experts, offset_type}, product, level, threads);
}

// -- activations --
namespace {
struct Quantization { const Quantizing *rows; int32_t level; int32_t failed; };
void quantize_part(void *data, int64_t part, int64_t parts) {
  Quantization &q = *(Quantization *)data;
  const int64_t m = q.rows->m;
  for (int64_t row = m * part / parts; row < m * (part + 1) / parts; row++)
    if (q.level >= AVX2 ? avx2::quantize(*q.rows, row) : portable::quantize(*q.rows, row)) q.failed = 1;  // from any thread
}
}

// 0, or 1 where a row holds what is not finite.
int32_t quantize_rows(const Quantizing &rows, int32_t level, int64_t threads) {
  Quantization q{&rows, level, 0};
  if (rows.m <= 0) return 0;
  if (threads > rows.m) threads = rows.m;
  if (rows.m * rows.k < 1 << 15) threads = 1;
  in_parallel(quantize_part, &q, threads);
  return q.failed;
}

EXPORT int32_t graphq_quantize(const void *x, int8_t *codes, float *scale, int8_t *zero, int64_t m, int64_t k,
                               int32_t x_type, int32_t rule, int32_t level, int64_t threads) {
  return quantize_rows(Quantizing{x, codes, scale, zero, m, k, x_type, rule}, level, threads);
}
