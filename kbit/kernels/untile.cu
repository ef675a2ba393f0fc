// Tiles of k-bit codes to 16-bit rows of W [N, K]: codebook value times absmax, rounded once, and saturated. Compiled by NVRTC with
//   BITS       2-8: of a code
//   BLOCKSIZE  16|32|64|128|256: values of W that share an absmax, or scale
//   SCALE      0|1|2: what they share, as in matmul.cu: a float16 absmax, an E8M0 scale, or an E4M3 scale under the tensor's
//   ZEROS      0|1|2: bytes of a block's zero point, as in matmul.cu; it is subtracted from the codebook value first
//   BF16       0|1: bfloat16 is written, else float16
typedef unsigned int u32;
typedef unsigned short u16;

#define LANES 32
#define ROWS 64
#define COLS 64
#define ENTRIES (1 << BITS)
#define BLOCKS (BLOCKSIZE < COLS ? COLS / BLOCKSIZE : 1)  // of a row in a tile
#define SCALES (BLOCKS == 1 ? 1 : 2)      // of a row that a lane needs: of 16 columns it has eight
#define PIECES (SCALE ? 4 : 8 + 4 * ZEROS)  // of 16 bytes: the absmax of 64 rows, and behind them their zero points
#define SCALE_WORDS (SCALE ? 2 : 4)         // a lane's: of 8 rows

#include "rounding.cuh"

// What the values of a block are multiplied by, from the stored bits that begin at bit 0.
__device__ __forceinline__ float scale_of(u32 bits, const float* tensor_scale) {
#if SCALE == 1
  return __uint_as_float(max((bits & 0xff) << 23, 0x400000u));  // the smallest one is 2^-127
#elif SCALE == 2
  return half_to_float((bits & 0x7f) << 7) * 256.f * *tensor_scale;  // E4M3's bits are those of a smaller float16
#else
  return half_to_float(bits);
#endif
}

// Row blocks from `first` on, [rows, K] at out; a warp takes one tile after another.
extern "C" __global__ void __launch_bounds__(256)
kbit_untile(const uint4* __restrict__ codes, const uint4* __restrict__ scales, const float* __restrict__ tensor_scale,
            const float* __restrict__ codebook, u16* __restrict__ out, int first, int tiles, int N, int K) {
  __shared__ float table[ENTRIES * LANES];  // one copy a lane: no bank conflicts
  for (int i = threadIdx.x; i < ENTRIES * LANES; i += blockDim.x) table[i] = codebook[i / LANES];
  __syncthreads();
  const int lane = threadIdx.x % LANES, g = lane >> 2, t = lane & 3, warps = gridDim.x * (blockDim.x / LANES);
  const int per_row = K / COLS, kblocks = K / BLOCKSIZE;
  for (int tile = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; tile < tiles; tile += warps) {
    const int block = tile / per_row, column = tile % per_row;
    const uint4* p = codes + ((long long)(first + block) * per_row + column) * (BITS * LANES) + lane;
    uint4 held[BITS];
    u32 absmax[SCALES][SCALE_WORDS];
#if ZEROS
    u32 zeros[SCALES][2 * ZEROS];
#endif
#pragma unroll
    for (int i = 0; i < BITS; i++) held[i] = p[i * LANES];
    const int kblock = BLOCKSIZE <= COLS ? column * BLOCKS : column / (BLOCKSIZE / COLS);
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
      const int own = BLOCKS == 4 ? 2 * i + (t >> 1) : i;
      const uint4* of_block = scales + ((long long)(first + block) * kblocks + kblock + own) * PIECES;
#pragma unroll
      for (int v = 0; v < SCALE_WORDS; v++) absmax[i][v] = ((const u32*)of_block)[g * SCALE_WORDS + v];
#if ZEROS
#pragma unroll
      for (int v = 0; v < 2 * ZEROS; v++) zeros[i][v] = ((const u32*)(of_block + 8))[g * 2 * ZEROS + v];
#endif
    }
    const u32* w = (const u32*)held;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int half = 0; half < 2; half++)  // of the columns: 32
#pragma unroll
        for (int j = 0; j < 2; j++) {  // rows g and g + 8
          const u32 stored = absmax[SCALES == 2 ? half : 0][r * SCALE_WORDS / 4];
          const float scale = scale_of(SCALE ? stored >> (16 * (r % 2) + 8 * j) : stored >> (16 * j), tensor_scale);
#if ZEROS == 1
          const float zero = zeros[SCALES == 2 ? half : 0][r / 2] >> (16 * (r % 2) + 8 * j) & 0xff;
#elif ZEROS == 2
          const float zero = half_to_float(zeros[SCALES == 2 ? half : 0][r] >> (16 * j));
#endif
          u32 pairs[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float v[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int bit = ((((r * 4 + half * 2 + i / 2) * 2 + i % 2) * 2 + j) * 2 + e) * BITS, word = bit >> 5, off = bit & 31;
              const u32 shifted = off + BITS <= 32 ? w[word] >> off : __funnelshift_r(w[word], w[word + 1], off);
              v[e] = table[(shifted & (ENTRIES - 1)) * LANES + lane];
#if ZEROS
              v[e] -= zero;
#endif
              v[e] *= scale;
            }
            pairs[i] = round_pair(v[0], v[1]);
          }
          const int row = block * ROWS + r * 16 + j * 8 + g;
          if (first * ROWS + row < N)
            *(uint4*)(out + (long long)row * K + column * COLS + half * 32 + t * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
  }
}
