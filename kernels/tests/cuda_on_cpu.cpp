// codebook.cu on a CPU: every thread of a block is a thread, and a warp's multiplication waits for its 32 lanes.

#define CUDA_ON_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define __syncthreads() whole_block->arrive_and_wait()

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::min;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint64_t u64;
struct Place {
    int x, y, z;
};
struct uint4 {
    u32 x, y, z, w;
};
struct uint2 {
    u32 x, y;
};

static thread_local Place threadIdx;
static Place blockIdx, gridDim, blockDim;
static std::unique_ptr<std::barrier<>> whole_block;
static std::unique_ptr<std::barrier<>> one_warp[32];
static u32 given[32][32][6];

static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
template <class T>
static T read_once(const T* at) {
    return *at;
}
static uint4 read(const u16* at) {
    uint4 value;
    memcpy(&value, at, 16);
    return value;
}

// Copies arrive at once.
static void copy_ahead(uint4* to, const u16* from, bool there) {
    if (there) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
static void close_group() {}
template <int COUNT>
static void wait_for_groups() {}

// Byte i is the one of `high:low` that nibble i names by its low three bits, or eight times its sign where bit 3 is set.
static u32 permute(u32 low, u32 high, u32 selector) {
    const u64 bytes = (u64)high << 32 | low;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> 4 * i & 15;
        u32 byte = bytes >> 8 * (nibble & 7) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * i;
    }
    return out;
}

static u32 mask_or(u32 value, u32 mask, u32 rest) { return value & mask | rest; }
template <class T>
static void keep(T*&) {}

static u16 narrow(float value) {
#if HALF
    const _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
#else
    u32 bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}
static float widen(u16 bits) {
#if HALF
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
#else
    const u32 wide = (u32)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
#endif
}
static u32 round_pair(float first, float second) { return (u32)narrow(second) << 16 | narrow(first); }

static float from_lane(float value, int flipped) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    memcpy(&given[warp][lane][0], &value, 4);
    one_warp[warp]->arrive_and_wait();
    memcpy(&value, &given[warp][lane ^ flipped][0], 4);
    one_warp[warp]->arrive_and_wait();
    return value;
}

// As PTX defines the fragments of m16n8k16.
static void multiply(float (&sums)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 x0, u32 x1) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto& all = given[warp];
    const u32 mine[6] = {w0, w1, w2, w3, x0, x1};
    memcpy(all[lane], mine, sizeof mine);
    one_warp[warp]->arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const u32 w = all[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8] >> k % 2 * 16;
            const u32 x = all[column * 4 + k % 8 / 2][4 + k / 8] >> k % 2 * 16;
            sums[i] += widen((u16)w) * widen((u16)x);
        }
    }
    one_warp[warp]->arrive_and_wait();
}

#include CODEBOOK

template <class Kernel>
static void launch(const int* grid, int threads, Kernel kernel) {
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {threads, 1, 1};
    for (int block = 0; block < grid[0] * grid[1] * grid[2]; block++) {
        blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
        whole_block = std::make_unique<std::barrier<>>(threads);
        for (int i = 0; i < threads / 32; i++) one_warp[i] = std::make_unique<std::barrier<>>(32);
        std::vector<std::thread> all;
        for (int i = 0; i < threads; i++)
            all.emplace_back([&, i] {
                threadIdx = {i, 0, 0};
                kernel();
            });
        for (auto& thread : all) thread.join();
    }
}

#define RUN_FEW(NAME)                                                                                                  \
    extern "C" void run_##NAME(const int* grid, int threads, const u32* codes, const float* table, const u16* x,       \
                               const float* extra, const float* bias, u16* y, int stride, int m, int n, int k) {       \
        launch(grid, threads, [=] { NAME(codes, table, x, extra, bias, y, stride, m, n, k); });                        \
    }
#define RUN_MANY(NAME)                                                                                                 \
    extern "C" void run_##NAME(const int* grid, int threads, const u32* codes, const float* table, const u16* x,       \
                               const float* extra, const float* bias, u16* y, float* parts, int stride, int m, int n,  \
                               int k) {                                                                                \
        launch(grid, threads, [=] { NAME(codes, table, x, extra, bias, y, parts, stride, m, n, k); });                 \
    }
RUN

extern "C" void run_add_parts(const int* grid, int threads, const float* parts, const float* extra, const float* bias,
                              u16* y, int count, int m, int n) {
    launch(grid, threads, [=] { add_parts(parts, extra, bias, y, count, m, n); });
}
extern "C" void run_sparse_product(const int* grid, int threads, const u16* x_t, const int* rows, const int* cols,
                                   const float* vals, float* out, int m, int n, int tokens) {
    launch(grid, threads, [=] { sparse_product(x_t, rows, cols, vals, out, m, n, tokens); });
}
extern "C" void run_add_sparse(const int* grid, int threads, u16* w, const int* rows, const int* cols,
                               const float* vals, int first, int count, int k) {
    launch(grid, threads, [=] { add_sparse(w, rows, cols, vals, first, count, k); });
}
extern "C" void run_add_sparse_float32(const int* grid, int threads, float* w, const int* rows, const int* cols,
                                       const float* vals, int first, int count, int k) {
    launch(grid, threads, [=] { add_sparse_float32(w, rows, cols, vals, first, count, k); });
}
extern "C" void run_dequantize(const int* grid, int threads, const u32* codes, const float* table, u16* w, int stride,
                               int tile, int rows, int n, int k) {
    launch(grid, threads, [=] { dequantize(codes, table, w, stride, tile, rows, n, k); });
}
extern "C" void run_dequantize_float32(const int* grid, int threads, const u32* codes, const float* table, float* w,
                                       int stride, int tile, int rows, int n, int k) {
    launch(grid, threads, [=] { dequantize_float32(codes, table, w, stride, tile, rows, n, k); });
}
