// Tiles of k-bit codes to 16-bit rows of W [N, K]: codebook value times absmax, rounded once (saturated with zero points). Compiled by NVRTC with
//   BITS       2-8: of a code
//   BLOCKSIZE  32|64|128|256: values of W that share an absmax
//   ZEROS      0|1|2: bytes of a block's zero point, as in matmul.cu; it is subtracted from the codebook value first
//   BF16       0|1: bfloat16 is written, else float16
typedef unsigned int u32;
typedef unsigned short u16;

#define LANES 32
#define ROWS 64
#define COLS 64
#define ENTRIES (1 << BITS)
#define LARGEST (BF16 ? 3.38953139e38f : 65504.f)
#define SCALES (BLOCKSIZE == 32 ? 2 : 1)  // absmax values of a row in a tile
#define PIECES (8 + 4 * ZEROS)            // of 16 bytes: the absmax of 64 rows, and behind them their zero points

#include "rounding.cuh"

// Row blocks from `first` on, [rows, K] at out; a warp takes one tile after another.
extern "C" __global__ void __launch_bounds__(256)
kbit_untile(const uint4* __restrict__ codes, const uint4* __restrict__ scales, const float* __restrict__ codebook,
            u16* __restrict__ out, int first, int tiles, int N, int K) {
  __shared__ float table[ENTRIES * LANES];  // one copy a lane: no bank conflicts
  for (int i = threadIdx.x; i < ENTRIES * LANES; i += blockDim.x) table[i] = codebook[i / LANES];
  __syncthreads();
  const int lane = threadIdx.x % LANES, g = lane >> 2, t = lane & 3, warps = gridDim.x * (blockDim.x / LANES);
  const int per_row = K / COLS, kblocks = K / BLOCKSIZE;
  for (int tile = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; tile < tiles; tile += warps) {
    const int block = tile / per_row, column = tile % per_row;
    const uint4* p = codes + ((long long)(first + block) * per_row + column) * (BITS * LANES) + lane;
    uint4 held[BITS], absmax[SCALES];
#if ZEROS
    u32 zeros[SCALES][2 * ZEROS];
#endif
#pragma unroll
    for (int i = 0; i < BITS; i++) held[i] = p[i * LANES];
    const int kblock = BLOCKSIZE <= COLS ? column * SCALES : column / (BLOCKSIZE / COLS);
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
      const uint4* of_block = scales + ((long long)(first + block) * kblocks + kblock + i) * PIECES;
      absmax[i] = of_block[g];
#if ZEROS
#pragma unroll
      for (int v = 0; v < 2 * ZEROS; v++) zeros[i][v] = ((const u32*)(of_block + 8))[g * 2 * ZEROS + v];
#endif
    }
    const u32 *w = (const u32*)held, *s = (const u32*)absmax;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int half = 0; half < 2; half++)  // of the columns: 32
#pragma unroll
        for (int j = 0; j < 2; j++) {  // rows g and g + 8
          const float scale = half_to_float(s[(SCALES == 2 ? half * 4 : 0) + r] >> (16 * j));
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
              v[e] = fminf(fmaxf((v[e] - zero) * scale, -LARGEST), LARGEST);
#else
              v[e] *= scale;
#endif
            }
            pairs[i] = round_pair(v[0], v[1]);
          }
          const int row = block * ROWS + r * 16 + j * 8 + g;
          if (first * ROWS + row < N)
            *(uint4*)(out + (long long)row * K + column * COLS + half * 32 + t * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
  }
}
