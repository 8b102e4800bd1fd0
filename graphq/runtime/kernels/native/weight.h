// A weight in tiles, and what a product with it takes. Shared by all translation units; plain C layout, filled by ctypes.
//
// A tile holds 16 rows (output channels) of a weight [N, K], a row in each 32-bit lane of a 64-byte vector. Along K it is
// cut into groups of one scale, groups into chunks of CHUNK_K(bits) codes, whose vectors follow one another:
//
//   group = chunks..., 16 scales (float32, or a byte each), 16 zero points (int8) where there are any
//
// "Byte vector" j of a chunk holds codes 4j .. 4j+3 of each row in the bytes of its lane. 8-bit codes are stored so.
// Narrower ones are split into planes of 4, 2 and 1 bits, low bits first: a vector of the 4-bit plane holds two byte
// vectors, one in the low nibbles and one in the high ones; one of the 2-bit plane four; one of the 1-bit plane eight.
// Groups are filled up to whole chunks, rows to whole tiles, with codes that stand for 0. Integer codes are stored plus
// 2^(bits-1), as unsigned numbers.
#pragma once
#include <cstdint>

enum ScaleKind : int32_t { SCALE_F32 = 0, SCALE_E8M0 = 1, SCALE_E4M3 = 2 };
enum Product : int32_t { PRODUCT_FLOAT32 = 0, PRODUCT_BFLOAT16 = 1, PRODUCT_INT8 = 2 };
enum Element : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT32 = 3, INT64 = 4 };
enum Level : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_VNNI = 3, AVX512_BF16 = 4 };

constexpr int LANES = 16;

struct Weight {
  const uint8_t *tiles;
  const float *table;      // float32[256]: what a stored code stands for
  const float *row_scale;  // float32[N], or null: multiplies a row's sums
  const float *bias;       // float32[N], or null
  const int32_t *sums;     // int32[tiles, groups, 16], or null: of a group's codes less their zero points
  int64_t n, k, group;
  int32_t bits, scale, has_zero, is_integer;
};

// codes of a chunk: those of 1, 2, 4 or 8 byte vectors
constexpr int chunk_k(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 || bits == 6 ? 16 : 32; }
constexpr int chunk_bytes(int bits) { return chunk_k(bits) * bits * 2; }

struct Grid {  // how a weight is cut
  int64_t groups, last, chunks, last_chunks, tile_bytes, group_bytes, tiles;
  explicit Grid(const Weight &w) {
    const int64_t width = chunk_k(w.bits);
    groups = (w.k + w.group - 1) / w.group;
    last = w.k - (groups - 1) * w.group;
    chunks = (w.group + width - 1) / width;
    last_chunks = (last + width - 1) / width;
    const int64_t beside = (w.scale == SCALE_F32 ? 64 : 16) + (w.has_zero ? 16 : 0);
    group_bytes = chunks * chunk_bytes(w.bits) + beside;
    tile_bytes = (groups - 1) * group_bytes + last_chunks * chunk_bytes(w.bits) + beside;
    tiles = (w.n + LANES - 1) / LANES;
  }
};

struct Call {  // one product
  const Weight *weight;
  const void *x;         // [m, k], contiguous: float32, bfloat16, or int8 codes
  const float *x_scale;  // float32[m]: of int8 codes
  const int8_t *x_zero;  // int8[m], or null
  void *y;               // [m, n], contiguous: float32 or bfloat16
  int64_t m;
  int32_t x_type, y_type;
};

// Rows of one product by the weights of several experts, whose tiles, row scales and sums follow one another: expert e has
// the rows from where the one before ends to offsets[e]. Those after the last are 0.
struct Grouping {
  const void *offsets;  // [experts] of int32 or int64
  int64_t experts;
  int32_t type;
};

enum Rule : int32_t { RULE_MAX = 0, RULE_HALF = 1, RULE_BY_SIGN = 2, RULE_ASYMMETRIC = 3, RULE_JOINT = 4 };

struct Quantizing {  // rows of activations to int8 codes
  const void *x;     // [m, k], contiguous: float32 or bfloat16
  int8_t *codes;     // [m, k]
  float *scale;      // [m]
  int8_t *zero;      // [m]
  int64_t m, k;
  int32_t x_type, rule;
};

// ``body(data, part, parts)`` for each part at once; ``parts`` as many as there are threads.
using Body = void (*)(void *data, int64_t part, int64_t parts);
void in_parallel(Body body, void *data, int64_t threads);
void *scratch_alloc(int64_t bytes);  // 64-byte aligned, null where there is no memory
void scratch_free(void *memory);

// 0, or 1 where there is no memory
namespace portable {
int float32(const Call &, int64_t threads);
int int8(const Call &, int64_t threads);
int quantize(const Quantizing &, int64_t row);  // 1 where the row holds what is not finite
}
namespace avx2 {
int float32(const Call &, int64_t threads);
int int8(const Call &, int64_t threads);
int quantize(const Quantizing &, int64_t row);
}
namespace avx512 { int float32(const Call &, int64_t threads); }
namespace avx512_vnni { int int8(const Call &, int64_t threads); }
namespace avx512_bf16 { int bfloat16(const Call &, int64_t threads); }
