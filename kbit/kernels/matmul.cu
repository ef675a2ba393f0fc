// y = x · dequantize(W)^T for k-bit weights. Compiled by NVRTC with
//   BITS 2-8, PAIR 0|1 (codebook looked up by pairs of codes), BLOCK 32|64|128|256, TILES (8 rows of x each) 1|2|4|8,
//   BF16 0|1, WR x WK warps (row groups x splits of the columns), DEPTH (tiles in flight per warp) 1|2, MIN_CTAS,
//   SPLIT (CTAs that share a unit of rows, each with a part of the columns).
// No headers: half pairs are 32-bit words.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define LANES 32
#define ROWS 64                       // rows of W in a tile
#define COLS 64                       // columns of W in a tile
#define WORDS (4 * BITS)              // 32-bit words of codes a lane holds of a tile
#define WIDTH (PAIR ? 2 * BITS : BITS)
#define ENTRIES (1 << WIDTH)
#define MASK ((u32)(ENTRIES - 1) << 7)
#define WARPS (WR * WK)
#define UNIT (ROWS * WR)              // rows of W that a CTA works on at a time
#define STAGES (DEPTH + 1)            // of x in shared memory: one more than are fetched, so that none is overwritten early
#define STRIDE 68                     // of the reduction buffer: avoids bank conflicts
#define SCALES (BLOCK == 32 ? 2 : 1)  // absmax values of a row in a tile

__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 lds(u32 address) {
  u32 v;
  asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));  // not volatile: the compiler may interleave lookups
  return v;
}

__device__ __forceinline__ float half_to_float(u32 h) {
  float f;
  asm("{ .reg .f16 t; mov.b16 t, %1; cvt.f32.f16 %0, t; }" : "=f"(f) : "h"((u16)h));
  return f;
}

__device__ __forceinline__ u16 round_out(float f) {
  u16 h;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
#endif
  return h;
}

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ uint4 lds128(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

struct Tile {
  uint4 codes[BITS];
  uint4 scales[SCALES];
};

// Byte offset in the table of the index that begins at bit `bit` of a lane's codes; all shifts are known to the compiler.
__device__ __forceinline__ u32 entry(const u32* w, int bit, u32 lane4) {
  const int word = bit >> 5, off = bit & 31;
  u32 v;
  if (off + WIDTH <= 32) {
    v = off >= 7 ? w[word] >> (off - 7) : w[word] << (7 - off);
  } else {
    // The index straddles two words: bits off-7 .. of the 64.
    v = __funnelshift_r(w[word], w[word + 1], off - 7);
  }
  return (v & MASK) | lane4;
}

__device__ __forceinline__ u32 decode(const u32* w, int pair, u32 lane4, u32 table) {
#if PAIR
  return lds(table + entry(w, pair * 2 * BITS, lane4));
#else
  u32 low = lds(table + entry(w, (2 * pair) * BITS, lane4));
  u32 high = lds(table + entry(w, (2 * pair + 1) * BITS, lane4));
  return __byte_perm(low, high, 0x5410);
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * LANES, MIN_CTAS)
kbit_matmul(const uint4* __restrict__ codes, const uint4* __restrict__ scales, const u16* __restrict__ codebook,
            const u16* __restrict__ x, u16* __restrict__ y, float* __restrict__ partial, u32* __restrict__ arrived,
            int M, int N, int K, int x_stride, float unscale) {
  extern __shared__ __align__(128) unsigned char shared[];
  u32* table = (u32*)shared;
  float* sums = (float*)(shared + ENTRIES * LANES * 4 + WARPS * STAGES * TILES * 1024);
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int wr = warp % WR, wk = warp / WR;
  const int g = lane >> 2, t = lane & 3;
  const u32 lane4 = lane * 4;
  u32 table_address;
  asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(table_address) : "l"((u64)table));

  // SPLIT CTAs work on one unit of rows after another; each has a part of the columns, and each of its warps some of
  // the part's tiles: those from its number on, every WK.
  const int per_unit = K / COLS, row_blocks = (N + ROWS - 1) / ROWS, units = (row_blocks + WR - 1) / WR;
  const int groups = gridDim.x / SPLIT, rank = blockIdx.x % SPLIT, kblocks = K / BLOCK;
  const int part_begin = per_unit * rank / SPLIT, part_end = per_unit * (rank + 1) / SPLIT;
  const int count = max(0, (part_end - part_begin - wk + WK - 1) / WK);

  // Rows beyond the last repeat it: their sums are not stored, and no lane may leave the others.
  const u16* xp[TILES];
#pragma unroll
  for (int n = 0; n < TILES; n++) xp[n] = x + (long long)min(n * 8 + g, M - 1) * x_stride + t * 8;
  // A warp stages its tiles of x by itself: [stage][row 0..8 TILES][8 chunks of 16 bytes], chunks swizzled by row.
  const u32 stage_address = table_address + ENTRIES * LANES * 4 + warp * (STAGES * TILES * 1024);
  const u32 chunk0 = g * 128 + ((t ^ ((g & 1) * 4)) * 16), chunk1 = chunk0 ^ 64;

  Tile tiles[DEPTH];
  auto fetch = [&](Tile& tile, int unit, int column) {
    const int row_block = unit * WR + wr;
    if (row_block >= row_blocks) return;
    const uint4* p = codes + (long long)(row_block * per_unit + column) * (BITS * LANES) + lane;
#pragma unroll
    for (int i = 0; i < BITS; i++) tile.codes[i] = load_once(p + i * LANES);
    const uint4* s = scales + (long long)(row_block * kblocks + (BLOCK <= COLS ? column * (COLS / BLOCK) : column / (BLOCK / COLS))) * 8 + g;
#pragma unroll
    for (int i = 0; i < SCALES; i++) tile.scales[i] = __ldg(s + i * 8);
  };
  // What is fetched next: this warp's tile `ahead` of unit `ahead_unit`.
  int ahead_unit = blockIdx.x / SPLIT, ahead = 0, stage_in = 0;
  auto fetch_next = [&](Tile& tile) {
    if (ahead_unit < units && count > 0) fetch(tile, ahead_unit, part_begin + wk + ahead * WK);
  };
  auto stage_next = [&]() {
    if (ahead_unit < units && count > 0) {
      const int column = (part_begin + wk + ahead * WK) * COLS;
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const u32 to = stage_address + stage_in * (TILES * 1024) + n * 1024;
        copy_async(to + chunk0, xp[n] + column);
        copy_async(to + chunk1, xp[n] + column + 32);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    stage_in = stage_in + 1 == STAGES ? 0 : stage_in + 1;
  };
  auto advance = [&]() {
    if (++ahead >= count) ahead = 0, ahead_unit += groups;
  };

  // The weights are nobody's result: they are fetched before the kernel that makes x has ended.
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    fetch_next(tiles[d]);
    advance();
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  for (int i = threadIdx.x; i < ENTRIES * LANES; i += WARPS * LANES) {
    const u32 index = i / LANES;
#if PAIR
    table[i] = (u32)codebook[index & ((1 << BITS) - 1)] | ((u32)codebook[index >> BITS] << 16);
#else
    table[i] = (u32)codebook[index] * 0x10001u;
#endif
  }
  __syncthreads();
  // Lookups are not volatile: none may be moved before the table is whole.
  asm volatile("" : "+r"(table_address)::"memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  ahead = 0, ahead_unit = blockIdx.x / SPLIT;
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    stage_next();
    advance();
  }

  int stage_out = 0, turn = 0;
  for (int unit = blockIdx.x / SPLIT; unit < units; unit += groups) {
    const bool mine = unit * WR + wr < row_blocks;
    float acc[4][TILES][4];
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;

    for (int base = 0; base < count; base += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        if (base + d < count) {
          if (mine) {
            asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
            __syncwarp();
            uint4 xs[TILES][2];
            const u32 from = stage_address + stage_out * (TILES * 1024);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
              xs[n][0] = lds128(from + n * 1024 + chunk0);
              xs[n][1] = lds128(from + n * 1024 + chunk1);
            }
            const u32* w = (const u32*)tiles[d].codes;
            const u32* s = (const u32*)tiles[d].scales;
#pragma unroll
            for (int r = 0; r < 4; r++) {
              u32 a[4][4];
#pragma unroll
              for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < 4; j++) a[k][j] = decode(w, (r * 4 + k) * 4 + j, lane4, table_address);
#pragma unroll
              for (int h = 0; h < SCALES; h++) {
                const u32 both = s[h * 4 + r];
                const float s0 = half_to_float(both & 0xffff), s1 = half_to_float(both >> 16);
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                  float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                  for (int k = h * (4 / SCALES); k < (h + 1) * (4 / SCALES); k++) {
                    const u32* b = (const u32*)&xs[n][k >> 1] + 2 * (k & 1);
                    mma(c, a[k], b[0], b[1]);
                  }
                  acc[r][n][0] += s0 * c[0];
                  acc[r][n][1] += s0 * c[1];
                  acc[r][n][2] += s1 * c[2];
                  acc[r][n][3] += s1 * c[3];
                }
              }
            }
          }
          stage_out = stage_out + 1 == STAGES ? 0 : stage_out + 1;
          fetch_next(tiles[d]);
          stage_next();
          advance();
        }
      }
    }
    // Slot 0 must hold this warp's next tile.
    if (DEPTH == 2 && (count & 1)) { Tile swap = tiles[0]; tiles[0] = tiles[DEPTH - 1]; tiles[DEPTH - 1] = swap; }

    // Sums over the warps, then over the cluster's CTAs, always in the same order; eight rows of x at a time.
#pragma unroll
    for (int n8 = 0; n8 < TILES; n8++) {
      const int rows = min(8, M - n8 * 8);
      if (rows <= 0) break;
      __syncthreads();
      float* mine_sums = sums + warp * (8 * STRIDE);
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          mine_sums[(2 * t + (i & 1)) * STRIDE + r * 16 + g + 8 * (i >> 1)] = acc[r][n8][i];
      __syncthreads();
      for (int i = threadIdx.x; i < rows * UNIT; i += WARPS * LANES) {
        const int m8 = i / UNIT, row = i % UNIT, n = unit * UNIT + row;
        float sum = 0.f;
#pragma unroll
        for (int v = 0; v < WK; v++) sum += sums[(v * WR + row / ROWS) * (8 * STRIDE) + m8 * STRIDE + row % ROWS];
#if SPLIT == 1
        if (n < N) y[(long long)(n8 * 8 + m8) * N + n] = round_out(sum * unscale);
#else
        partial[((long long)(unit * SPLIT + rank) * (TILES * 8) + n8 * 8 + m8) * UNIT + row] = sum;
#endif
      }
    }
#if SPLIT > 1
    // The last of the CTAs that share the unit sums what all of them have, always in the same order.
    __shared__ u32 last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(&arrived[unit], 1u) == SPLIT - 1;
      if (last) arrived[unit] = 0;
      __threadfence();
    }
    __syncthreads();
    if (last) {
      for (int i = threadIdx.x; i < M * UNIT; i += WARPS * LANES) {
        const int m = i / UNIT, row = i % UNIT, n = unit * UNIT + row;
        float parts[SPLIT], sum = 0.f;
#pragma unroll
        for (int v = 0; v < SPLIT; v++) parts[v] = __ldcg(&partial[((long long)(unit * SPLIT + v) * (TILES * 8) + m) * UNIT + row]);
#pragma unroll
        for (int v = 0; v < SPLIT; v++) sum += parts[v];
        if (n < N) y[(long long)m * N + n] = round_out(sum * unscale);
      }
    }
#endif
  }
}
