// Plain data between the torch operator (ops.cpp) and the instruction sets (isa_*.cpp). No torch here.
//
// W[n, k] = (table[n or 0, code[n, k]] - zeros[n, group]) * scales[n, group] + sparse[n, k]
//
// Layout of the codes. A *vector* is 32 weights, a *block* the vectors that share one load: 64 bytes seen as 32 words of
// 16 bits, where word i holds weight i of every vector of the block.
//
//   bits  vectors  bytes  where vector j is
//   2     8        64     bits 2j of each word
//   3     16       192    three loads; j < 15: bits 3 (j % 5) of words j / 5; j = 15: the words' top bits, low one first
//   4     4        64     bits 4j
//   8     2        64     bits 8j
//
// One shift brings a vector's codes down to bit 0. What stands above them needs no mask: a table of 32 entries is
// indexed by 5 bits, and shorter tables repeat. There are two ways to fill the vectors:
//
//   rows     Every channel has a table. A vector is 32 consecutive input features of a channel. Four channels form a
//            tile, whose blocks alternate, so that a thread reads one sequential stream: [n / 4, blocks, 4, bytes].
//   columns  All channels share one table. A vector is two consecutive input features of 16 channels, the tile: word
//            2c + p holds feature p of channel c. [n / 16, blocks, bytes]. The lanes of a register are channels, so that
//            their scales are a register too, and one multiplication scales the sums of a group.
//
// Scales and zeros are [n / tile, groups, tile]. A group is padded to whole vectors of rows, or to whole blocks of
// columns: with 4 bits to 32 or 8 features. x is spread the same way, with zeros in the gaps.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantserve {

constexpr int TILE = 4;      // channels of a tile of rows
constexpr int COLUMNS = 16;  // channels of a tile of columns
constexpr int VECTOR = 32;
constexpr int block_vectors(int bits) { return bits == 2 ? 8 : bits == 3 ? 16 : bits == 4 ? 4 : 2; }
constexpr int block_bytes(int bits) { return bits == 3 ? 192 : 64; }

// Tables of columns of 8 bits that are computed, not looked up, where that is faster: `Weight::coding` is one of these
// instead of the bits.
constexpr int INTEGERS = 9;  // table[code] = first + (code ^ flip), integers; flip is 0, or 128 for two's complement
constexpr int E4M3 = 10;     // 8-bit floats; the codes of NaN stand for 480 and -480

enum class Float : int { f32, f16, bf16 };

struct Weight {
  const uint8_t* codes;
  int bits;
  int64_t n, k;      // out_features, in_features
  int64_t k_padded;  // in_features as stored: whole blocks
  int64_t group, group_padded, groups;
  bool columns;        // the layout
  int coding;          // the bits, or INTEGERS or E4M3
  const float* table;  // [n, 2^bits]; of columns [1, 2^bits]
  const void* scales;  // [n / tile, groups, tile] of scale_type, or null
  const void* zeros;   // the same, or null
  Float scale_type;
  const int32_t* rows;  // CSR [n, k_padded], columns rising within a row, or null
  const int32_t* cols;
  const float* vals;
  int64_t nnz;
  bool stored;  // weights are decoded to memory for few rows of x too

  int tile() const { return columns ? COLUMNS : TILE; }
  int64_t block() const { return block_vectors(bits) * (columns ? 2 : VECTOR); }  // input features of a block
};

struct Source {
  const void* x;  // [m, k]
  Float type;
  int64_t m;
};

struct Input {
  const void* x;       // prepared: [m, k_padded] of the kernel's element, in panels
  const float* sums;   // [m, groups] sums of x, where the weight has zeros and `direct`
  const float* plain;  // [m, k_padded] in float32 and natural order, where the weight is sparse and `direct`
  int64_t m;
};

struct Output {
  void* y;  // [m, n]
  Float type;
  const float* bias;  // [n], or null
};

// How the product of m rows is cut into tasks. Task i computes strip i % strips of the output channels for part
// i / strips % parts of the rows, over slice i / strips / parts of the input features. How it is cut changes no result:
// sums over the slices are added up in their order, whoever computes them.
struct Plan {
  int64_t strip;       // output channels of a task
  int64_t strips;      // n / strip, rounded up
  int64_t parts;       // of the panels of x
  int64_t slices = 1;  // where there are more, `run` writes float32 [slices, m, n] without a bias, and `join` follows
  int64_t tasks() const { return strips * parts * slices; }
};

// One instruction set. All functions are safe to call from several threads.
struct Kernel {
  const char* name;
  size_t element;      // bytes of a prepared x
  // Whether m rows take decoded weights from registers; else weights are decoded to memory once for all rows.
  bool (*direct)(const Weight& w, int64_t m);
  int64_t (*panels)(const Weight& w, int64_t m);
  // Spread, convert and order one panel of x; also fills `sums` and `plain` where they are not null.
  void (*prepare)(const Weight& w, const Source& x, int64_t panel, void* out, float* sums, float* plain);
  Plan (*plan)(const Weight& w, int64_t m, int64_t threads);
  // Bytes of scratch a thread needs for `run`.
  size_t (*scratch)(const Weight& w, int64_t m, const Plan& plan);
  // Compute tasks begin to end. False: a sparse index was out of range (nothing outside was read).
  bool (*run)(const Weight& w, const Input& in, const Output& out, const Plan& plan, int64_t begin, int64_t end,
              char* scratch);
  // The sums of the slices, for elements begin to end of [m, n], with bias, converted. Null where plans have one slice.
  void (*join)(const float* sums, const Output& out, const Plan& plan, int64_t m, int64_t n, int64_t begin, int64_t end);
};

extern const Kernel portable;
#if defined(__x86_64__)
extern const Kernel avx2, avx512, avx512bf16, amx;
bool may_use_amx();  // asks the processor, and the system for the permission, which this process then has
#elif defined(__aarch64__)
extern const Kernel neon, neonbf16;
bool has_neonbf16();  // whether this processor does
#endif

}  // namespace quantserve
