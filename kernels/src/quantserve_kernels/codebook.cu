// y = x @ W^T with W[n, k] = table[n, code[n, k]]: a codebook per output channel, no groups, 16-bit floats.
//
// A warp decodes a tile of 16 channels by 64 features straight into the registers of the tensor cores' first operand;
// x^T is the second, 8 tokens at a time. Nothing of W goes through shared memory, so one token costs what eight do.
//
// Layout of the codes, int32 [n / 16, k / 64, 32 * BITS], both rounded up and padded with code 0. Lane l of a warp has
// g = l / 4 and t = l % 4, and of a tile four octets of codes: channel g, features t * 8 and up; channel g, features
// 32 + t * 8 and up; the same two of channel g + 8. An octet is a word with a code in every nibble.
//   4 bits: a word an octet, four consecutive words a lane.
//   3 bits: three words with the first three octets in the low bits of their nibbles, and one bit each of the fourth
//           in the high ones. Word j of all lanes, then word j + 1: there is no load of 12 bytes.
//   2 bits: a word for two octets, the second shifted by two; two consecutive words a lane.
// The tensor core's features may be numbered in any order that both operands share. Here a lane's eight consecutive
// features are its part of two multiplications, so that x is read 16 bytes at a time.
//
// Lookup. A codebook is 16 entries of two bytes: as low and high bytes, four registers each. One byte permutation finds
// four bytes among eight by the low three bits of four nibbles; a second one chooses by the fourth bit.
//
// The host defines BITS (2, 3, 4), HALF (1 for float16, 0 for bfloat16) and KERNELS, a list of FEW(...) and MANY(...).
// tests/cuda_on_cpu.cpp is the other compiler of this file: the same warps as threads of a CPU.

#ifndef CUDA_ON_CPU
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// Not __byte_perm, which masks the selector first.
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// value & mask | rest
__device__ __forceinline__ u32 mask_or(u32 value, u32 mask, u32 rest) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(value), "r"(mask), "r"(rest));
    return out;
}

// Keeps the compiler from computing an address again and again to save a register.
template <class T>
__device__ __forceinline__ void keep(T*& pointer) {
    asm volatile("" : "+l"(pointer));
}

// Codes are read once: they do not push x out of the L1 cache.
__device__ __forceinline__ u32 read_once(const u32* at) {
    u32 word;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(at));
    return word;
}
__device__ __forceinline__ uint2 read_once(const uint2* at) {
    uint2 words;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(at));
    return words;
}
__device__ __forceinline__ uint4 read_once(const uint4* at) {
    uint4 words;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(at));
    return words;
}

// x is read by every block; a generic load, which the compiler takes for a kept pointer, is slower.
__device__ __forceinline__ uint4 read(const u16* at) {
    uint4 value;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(at));
    return value;
}

// 16 bytes of x on their way to shared memory, or zeros; they count to the group that `close_group` ends.
__device__ __forceinline__ void copy_ahead(uint4* to, const u16* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(there ? 16 : 0));
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;"); }
// Wait until at most COUNT groups of this thread are under way.
template <int COUNT>
__device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// Two floats rounded to 16 bits, the first in the low half.
__device__ __forceinline__ u32 round_pair(float first, float second) {
    u32 pair;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
    return pair;
}

__device__ __forceinline__ float widen(u16 value) {
#if HALF
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#else
    return __uint_as_float((u32)value << 16);
#endif
}

__device__ __forceinline__ float from_lane(float value, int flipped) {
    return __shfl_xor_sync(0xffffffff, value, flipped);
}

// sums [16 channels, 8 tokens] += w [16, 16 features] x [16 features, 8]
__device__ __forceinline__ void multiply(float (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1));
}
#endif

#define TILE_N 16
#define TILE_K 64
#define ENTRIES (1 << BITS)
#define DECODERS 8                  // warps of `dequantize`
#define DECODED 4                   // tiles that each of them has under way
#define PLANES (BITS == 4 ? 4 : 2)  // words of low bytes, and of high bytes, that a channel's codebook takes

// A lane's words of one tile.
struct Words {
    u32 word[BITS];
};

__device__ __forceinline__ Words load_words(const u32* tile, int lane) {
    Words out;
#if BITS == 4
    uint4 words = read_once((const uint4*)tile + lane);
    out.word[0] = words.x, out.word[1] = words.y, out.word[2] = words.z, out.word[3] = words.w;
#elif BITS == 3
    for (int j = 0; j < 3; j++) out.word[j] = read_once(tile + j * 32 + lane);
#else
    uint2 words = read_once((const uint2*)tile + lane);
    out.word[0] = words.x, out.word[1] = words.y;
#endif
    return out;
}

// A code in every nibble of four words.
__device__ __forceinline__ void split_octets(const Words& words, u32 (&octet)[4]) {
#if BITS == 4
    for (int i = 0; i < 4; i++) octet[i] = words.word[i];
#elif BITS == 3
    for (int i = 0; i < 3; i++) octet[i] = words.word[i] & 0x77777777;
    octet[3] = words.word[0] >> 3 & 0x11111111 | words.word[1] >> 2 & 0x22222222 | words.word[2] >> 1 & 0x44444444;
#else
    for (int i = 0; i < 2; i++) {
        octet[2 * i] = words.word[i] & 0x33333333;
        octet[2 * i + 1] = words.word[i] >> 2 & 0x33333333;
    }
#endif
}

// A channel's codebook: bytes of entries 0 to 3, 4 to 7 and so on.
struct Codebook {
    u32 low[PLANES], high[PLANES];
};

// The entries of eight codes, two to a word.
__device__ __forceinline__ void look_up(u32 octet, const Codebook& book, u32 (&pair)[4]) {
#if BITS == 4
    const u32 within = octet & 0x77777777, which = mask_or(octet >> 1, 0x44444444, 0x32103210);
#else
    const u32 within = octet;
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 low = permute(book.low[0], book.low[1], within >> 16 * half);
        u32 high = permute(book.high[0], book.high[1], within >> 16 * half);
#if BITS == 4
        low = permute(low, permute(book.low[2], book.low[3], within >> 16 * half), which >> 16 * half);
        high = permute(high, permute(book.high[2], book.high[3], within >> 16 * half), which >> 16 * half);
#endif
        pair[2 * half] = permute(low, high, 0x5140);
        pair[2 * half + 1] = permute(low, high, 0x7362);
    }
}

// Fill `planes` [channels, 2 * PLANES] with the codebooks of `channels` channels from `first` on; the whole block.
__device__ __forceinline__ void split_codebooks(const float* table, int table_stride, int first, int n, int channels,
                                                u32* planes) {
    for (int i = threadIdx.x; i < channels * PLANES; i += blockDim.x) {
        int channel = i / PLANES, plane = i % PLANES;
        const float* row = table + (u64)min(first + channel, n - 1) * table_stride;
        float entry[4];
        for (int j = 0; j < 4; j++) entry[j] = row[(plane * 4 + j) % ENTRIES];
        u32 front = round_pair(entry[0], entry[1]), back = round_pair(entry[2], entry[3]);
        planes[channel * 2 * PLANES + plane] = permute(front, back, 0x6420);
        planes[channel * 2 * PLANES + PLANES + plane] = permute(front, back, 0x7531);
    }
    __syncthreads();
}

__device__ __forceinline__ Codebook load_codebook(const u32* planes, int channel) {
    Codebook book;
    for (int i = 0; i < PLANES; i++) {
        book.low[i] = planes[channel * 2 * PLANES + i];
        book.high[i] = planes[channel * 2 * PLANES + PLANES + i];
    }
    return book;
}

// A lane's pairs of a tile: [half of k, half of the channels, pair].
typedef u32 Pairs[2][2][4];

__device__ __forceinline__ void decode(const Words& words, const Codebook (&book)[2], Pairs& weight) {
    u32 octet[4];
    split_octets(words, octet);
#pragma unroll
    for (int i = 0; i < 4; i++) look_up(octet[i], book[i / 2], weight[i % 2][i / 2]);
}

// Both multiplications of half a tile; `x` holds a lane's eight features of a token.
__device__ __forceinline__ void multiply_half(float (&sums)[4], const u32 (&w)[2][4], uint4 x) {
    multiply(sums, w[0][0], w[1][0], w[0][1], w[1][1], x.x, x.y);
    multiply(sums, w[0][2], w[1][2], w[0][3], w[1][3], x.z, x.w);
}

// Both kernels: x [m, k], table float [n or 1, ENTRIES], extra float [n, m] or null, bias float [n] or null, y [m, n].

// Few tokens: a block computes 16 * TILES channels of 8 * EIGHTS tokens, its warps take turns along k, and x comes from
// the caches.
template <int WARPS, int TILES, int EIGHTS>
__device__ __forceinline__ void few(const u32* codes, const float* table, const u16* x, const float* extra,
                                    const float* bias, u16* y, int table_stride, int m, int n, int k) {
    constexpr int CHANNELS = TILES * TILE_N;
    __shared__ u32 planes[CHANNELS * 2 * PLANES];
    __shared__ float sums_of[WARPS][CHANNELS * 8];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * CHANNELS, token = blockIdx.y * EIGHTS * 8;
    const int tiles_k = (k + TILE_K - 1) / TILE_K, last_tile = (n - 1) / TILE_N, k_left = k - t * 8;
    split_codebooks(table, table_stride, first, n, CHANNELS, planes);

    Codebook book[TILES][2];
    const u32* row[TILES];
    Words ahead[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        for (int half = 0; half < 2; half++) book[tile][half] = load_codebook(planes, tile * TILE_N + half * 8 + g);
        row[tile] = codes + (u64)min(first / TILE_N + tile, last_tile) * tiles_k * (32 * BITS);
        if (warp < tiles_k) ahead[tile] = load_words(row[tile] + (u64)warp * (32 * BITS), lane);
    }
    const u16* x_row[EIGHTS];
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++) {  // tokens past the end repeat the last one
        x_row[eight] = x + (u64)min(token + eight * 8 + g, m - 1) * k + t * 8;
        keep(x_row[eight]);
    }

    float sums[TILES][EIGHTS][4] = {};
    for (int at = warp; at < tiles_k; at += WARPS) {
        auto load_x = [&](int eight, int half) {
            const int feature = at * TILE_K + half * 32;
            return feature < k_left ? read(x_row[eight] + feature) : make_uint4(0, 0, 0, 0);
        };
        uint4 value[2] = {load_x(0, 0), load_x(0, 1)};  // on their way while codes are looked up
        Pairs weight[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const Words words = ahead[tile];
            if (at + WARPS < tiles_k) ahead[tile] = load_words(row[tile] + (u64)(at + WARPS) * (32 * BITS), lane);
            decode(words, book[tile], weight[tile]);
        }
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 now = value[half];
                if (eight + 1 < EIGHTS) value[half] = load_x(eight + 1, half);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) multiply_half(sums[tile][eight], weight[tile][half], now);
            }
    }

#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < 4; i++) sums_of[warp][tile * 128 + i * 32 + lane] = sums[tile][eight][i];
        __syncthreads();
        for (int i = threadIdx.x; i < CHANNELS * 8; i += WARPS * 32) {
            float sum = 0;
            for (int j = 0; j < WARPS; j++) sum += sums_of[j][i];  // in the same order every time
            const int from = i % 32;
            const int channel = first + i / 128 * TILE_N + i / 64 % 2 * 8 + from / 4;
            const int to = token + eight * 8 + from % 4 * 2 + i / 32 % 2;
            if (channel < n && to < m) {
                if (extra) sum += extra[(u64)channel * m + to];
                if (bias) sum += bias[channel];
                y[(u64)to * n + channel] = (u16)round_pair(sum, 0);
            }
        }
        __syncthreads();
    }
}

// Many tokens: each warp of a block has 16 * TILES channels of its own, and all of them read x, 8 * EIGHTS tokens of it,
// from shared memory, STAGES tiles deep. gridDim.z blocks share k and write their sums to parts float
// [gridDim.z, m, n], for `add_parts`; a lone one writes y.
template <int WARPS, int TILES, int EIGHTS, int STAGES>
__device__ __forceinline__ void many(const u32* codes, const float* table, const u16* x, const float* extra,
                                     const float* bias, u16* y, float* parts, int table_stride, int m, int n, int k) {
    constexpr int CHANNELS = WARPS * TILES * TILE_N, PIECES = EIGHTS * 8 * 8;  // of 16 bytes, a tile of x has
    __shared__ u32 planes[CHANNELS * 2 * PLANES];
    __shared__ uint4 staged[STAGES][PIECES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * CHANNELS + warp * TILES * TILE_N, token = blockIdx.y * EIGHTS * 8;
    const int tiles_k = (k + TILE_K - 1) / TILE_K, last_tile = (n - 1) / TILE_N;
    const int share = (tiles_k + gridDim.z - 1) / gridDim.z;
    const int begin = blockIdx.z * share, end = min(begin + share, tiles_k);
    split_codebooks(table, table_stride, blockIdx.x * CHANNELS, n, CHANNELS, planes);

    Codebook book[TILES][2];
    const u32* row[TILES];
    Words ahead[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        for (int half = 0; half < 2; half++)
            book[tile][half] = load_codebook(planes, (warp * TILES + tile) * TILE_N + half * 8 + g);
        row[tile] = codes + (u64)min(first / TILE_N + tile, last_tile) * tiles_k * (32 * BITS);
        if (begin < end) ahead[tile] = load_words(row[tile] + (u64)begin * (32 * BITS), lane);
    }
    // Neighbouring tokens lie in swapped halves of the 128 bytes of a row, so that a warp's reads meet all banks.
    auto stage = [&](int at) {
        for (int i = threadIdx.x; i < PIECES; i += WARPS * 32) {
            const int row_of = i / 8, piece = i % 8, feature = at * TILE_K + piece * 8;
            const bool there = at < end && feature < k;
            const u16* from = x + (u64)min(token + row_of, m - 1) * k + (there ? feature : 0);
            copy_ahead(&staged[at % STAGES][row_of * 8 + (piece ^ (row_of & 1) * 4)], from, there);
        }
        close_group();
    };
    for (int at = begin; at < begin + STAGES - 1; at++) stage(at);

    float sums[TILES][EIGHTS][4] = {};
    for (int at = begin; at < end; at++) {
        wait_for_groups<STAGES - 2>();
        __syncthreads();  // this tile is here for all, and all are done with the one before
        stage(at + STAGES - 1);
        Pairs weight[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const Words words = ahead[tile];
            if (at + 1 < end) ahead[tile] = load_words(row[tile] + (u64)(at + 1) * (32 * BITS), lane);
            decode(words, book[tile], weight[tile]);
        }
        const uint4* here = staged[at % STAGES] + g * 8;
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 now = here[eight * 64 + ((half * 4 + t) ^ (g & 1) * 4)];
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) multiply_half(sums[tile][eight], weight[tile][half], now);
            }
    }

#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int channel = first + tile * TILE_N + i / 2 * 8 + g, to = token + eight * 8 + t * 2 + i % 2;
                if (channel >= n || to >= m) continue;
                const u64 place = (u64)to * n + channel;
                float sum = sums[tile][eight][i];
                if (gridDim.z > 1) {
                    parts[(u64)blockIdx.z * m * n + place] = sum;
                    continue;
                }
                if (extra) sum += extra[(u64)channel * m + to];
                if (bias) sum += bias[channel];
                y[place] = (u16)round_pair(sum, 0);
            }
}

#define FEW(NAME, WARPS, TILES, EIGHTS)                                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                           \
        NAME(const u32* codes, const float* table, const u16* x, const float* extra, const float* bias, u16* y,        \
             int table_stride, int m, int n, int k) {                                                                  \
        few<WARPS, TILES, EIGHTS>(codes, table, x, extra, bias, y, table_stride, m, n, k);                             \
    }
#define MANY(NAME, WARPS, TILES, EIGHTS, STAGES)                                                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                           \
        NAME(const u32* codes, const float* table, const u16* x, const float* extra, const float* bias, u16* y,        \
             float* parts, int table_stride, int m, int n, int k) {                                                    \
        many<WARPS, TILES, EIGHTS, STAGES>(codes, table, x, extra, bias, y, parts, table_stride, m, n, k);             \
    }
KERNELS

// Sum parts [count, m, n] in the same order every time, and what is added to a product, into y [m, n].
extern "C" __global__ void __launch_bounds__(256) add_parts(const float* parts, const float* extra, const float* bias,
                                                            u16* y, int count, int m, int n) {
    const int i = blockIdx.x * 256 + threadIdx.x, size = m * n;
    if (i >= size) return;
    float sum = 0;
    for (int part = 0; part < count; part++) sum += parts[(u64)part * size + i];
    if (extra) sum += extra[(u64)(i % n) * m + i / n];
    if (bias) sum += bias[i % n];
    y[i] = (u16)round_pair(sum, 0);
}

// out float [n, m] = S x^T for a CSR matrix S [n, k] and x^T [k, m], whose rows make an entry's tokens neighbours. A warp
// has a channel; `tokens` lanes, a power of two up to 32, take the tokens, and the rest as many entries at a time.
extern "C" __global__ void __launch_bounds__(256)
    sparse_product(const u16* x_t, const int* rows, const int* cols, const float* vals, float* out, int m, int n,
                   int tokens) {
    const int lane = threadIdx.x % 32, channel = blockIdx.x * 8 + threadIdx.x / 32;
    const int token = blockIdx.y * 32 + lane % tokens;
    if (channel >= n) return;
    const int end = rows[channel + 1];
    float sum = 0;
#pragma unroll 4
    for (int entry = rows[channel] + lane / tokens; entry < end; entry += 32 / tokens)
        if (token < m) sum += vals[entry] * widen(x_t[(u64)cols[entry] * m + token]);
    for (int flipped = tokens; flipped < 32; flipped *= 2) sum += from_lane(sum, flipped);
    if (lane < tokens && token < m) out[(u64)channel * m + token] = sum;
}

// w [rows, k] += the rows of S from `first` on; a position is in S at most once.
template <class T, class Add>
__device__ __forceinline__ void add_rows(T* w, const int* rows, const int* cols, const float* vals, int first,
                                         int count, int k, Add add) {
    const int lane = threadIdx.x % 32, channel = blockIdx.x * 8 + threadIdx.x / 32;
    if (channel >= count) return;
    const int end = rows[first + channel + 1];
    for (int entry = rows[first + channel] + lane; entry < end; entry += 32) {
        T& place = w[(u64)channel * k + cols[entry]];
        place = add(place, vals[entry]);
    }
}
extern "C" __global__ void __launch_bounds__(256) add_sparse(u16* w, const int* rows, const int* cols,
                                                             const float* vals, int first, int count, int k) {
    auto add = [](u16 a, float b) { return (u16)round_pair(widen(a) + b, 0); };
    add_rows(w, rows, cols, vals, first, count, k, add);
}
extern "C" __global__ void __launch_bounds__(256) add_sparse_float32(float* w, const int* rows, const int* cols,
                                                                     const float* vals, int first, int count, int k) {
    add_rows(w, rows, cols, vals, first, count, k, [](float a, float b) { return a + b; });
}

// W's channels from 16 * tile_first on, `rows` of them, into w [rows, k]: for many tokens, before an ordinary product.
extern "C" __global__ void __launch_bounds__(DECODERS * 32)
    dequantize(const u32* codes, const float* table, u16* w, int table_stride, int tile_first, int rows, int n, int k) {
    __shared__ u32 planes[TILE_N * 2 * PLANES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile = tile_first + blockIdx.x, tiles_k = (k + TILE_K - 1) / TILE_K;
    split_codebooks(table, table_stride, tile * TILE_N, n, TILE_N, planes);
    Codebook book[2] = {load_codebook(planes, g), load_codebook(planes, 8 + g)};
    const u32* row = codes + (u64)tile * tiles_k * (32 * BITS);
    for (int start = warp; start < tiles_k; start += DECODERS * DECODED) {
        Words words[DECODED];
#pragma unroll
        for (int turn = 0; turn < DECODED; turn++)
            if (start + turn * DECODERS < tiles_k)
                words[turn] = load_words(row + (u64)(start + turn * DECODERS) * (32 * BITS), lane);
#pragma unroll
        for (int turn = 0; turn < DECODED; turn++) {
            const int at = start + turn * DECODERS;
            if (at >= tiles_k) break;
            u32 octet[4], pair[4];
            split_octets(words[turn], octet);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                look_up(octet[i], book[i / 2], pair);
                const int channel = blockIdx.x * TILE_N + i / 2 * 8 + g, feature = at * TILE_K + i % 2 * 32 + t * 8;
                if (channel < rows && feature < k)
                    *(uint4*)(w + (u64)channel * k + feature) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            }
        }
    }
}

// The same in float32, from the table as it is.
extern "C" __global__ void __launch_bounds__(DECODERS * 32)
    dequantize_float32(const u32* codes, const float* table, float* w, int table_stride, int tile_first, int rows,
                       int n, int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile = tile_first + blockIdx.x, tiles_k = (k + TILE_K - 1) / TILE_K;
    const u32* row = codes + (u64)tile * tiles_k * (32 * BITS);
    for (int at = warp; at < tiles_k; at += DECODERS) {
        u32 octet[4];
        split_octets(load_words(row + (u64)at * (32 * BITS), lane), octet);
        for (int i = 0; i < 4; i++) {
            const int channel = blockIdx.x * TILE_N + i / 2 * 8 + g, feature = at * TILE_K + i % 2 * 32 + t * 8;
            if (channel >= rows || feature >= k) continue;
            const float* entries = table + (u64)(tile_first * TILE_N + channel) * table_stride;
            for (int j = 0; j < 8; j++) w[(u64)channel * k + feature + j] = entries[octet[i] >> 4 * j & (ENTRIES - 1)];
        }
    }
}
