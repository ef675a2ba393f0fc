// y = x · dequantize(W)^T for k-bit weights: x [M, K], W [N, K], y [M, N]. Compiled by NVRTC with
//   BITS            2-8: of a code
//   BLOCKSIZE       16|32|64|128|256: values of W that share an absmax, or scale
//   SCALE           0|1|2: what they share: a float16 absmax, or a scale of a byte: E8M0, or E4M3 that is not negative (4 bits)
//   ZEROS           0|1|2: bytes of a block's zero point, which its codes' values are less: none, a whole number, float16
//   APART           0|1: from products, zero points times the sums of x; else from the values that are multiplied
//   BF16            0|1: x and y are bfloat16, else float16
//   PAIR            0|1: the codebook is looked up by pairs of codes
//   WGMMA           0|1: four warps multiply together, each its own rows of W by the same x (Hopper)
//   FOLDED          0|1: what is multiplied are values times their absmax, in 16 bits; else products are scaled
//   M_TILES         1|2|4|8|16: tiles of 8 rows of x that a launch takes
//   N_TILES         tiles of W above each other that a CTA works on at a time: 64 rows of W each
//   K_TILES         tiles of W next to each other that it works on at a time: each with its own part of the columns
//   WARPS_PER_TILE  1|2: warps that share a tile of W; two have half of its rows each
//   STAGES          steps of x, and of codes, in shared memory
//   STAGED          0|1: codes go through shared memory, STAGES - 1 tiles ahead; else through registers, one ahead
//   SUM_TILES       tiles of 8 rows of x whose sums the warps exchange at a time
//   BLOCKS_PER_SM   CTAs that a multiprocessor holds at least
//   SPLIT_K         CTAs that share a unit of rows of W, each with a part of the columns
// A tile of W has 64 rows and 64 columns, laid out as kbit/kernels/tiles.py says. For the operands of a tensor-core
// instruction, and which lane has what of them: "Matrix Fragments for mma.m16n8k16" in NVIDIA's PTX ISA.
// No headers: half pairs are 32-bit words.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define EXACT (FOLDED && SCALE && BITS == 4)  // products of values with scales have few enough bits for 16
#define FLOATS (FOLDED && !EXACT)        // float32 values are looked up
#define CHUNK (FOLDED ? M_TILES : 4)      // tiles of 8 rows of x that four warps multiply together

#if !STAGED && STAGES != 2
#error "codes through registers are one tile ahead, and so must x be"
#endif
#if WARPS_PER_TILE == 2 && !STAGED
#error "warps that share a tile share its codes through shared memory"
#endif
#if !WGMMA && M_TILES * 2 % (N_TILES * WARPS_PER_TILE)
#error "each thread copies a whole number of pieces of x, at least one"
#endif
#if M_TILES % SUM_TILES
#error "sums are exchanged for equal parts of the rows of x"
#endif
#if WGMMA && (!STAGED || N_TILES * WARPS_PER_TILE % 4 || M_TILES % CHUNK)
#error "warps multiply together in fours, what comes through shared memory, with 8 CHUNK rows of x"
#endif
#if FOLDED && !EXACT && (!WGMMA || PAIR && BITS > 4)
#error "but for exact products, four warps that multiply together fold, and a table of larger float32 pairs has no room"
#endif
#if BLOCKSIZE == 16 ? !EXACT : SCALE == 2
#error "blocks of 16 have E4M3 scales, which are multiplied into values: what a tensor core sums is of several blocks"
#endif
#if APART && (!ZEROS || WGMMA || M_TILES > 4)
#error "zero points are subtracted from products of few rows of x, which stay in registers"
#endif
#if SCALE && ZEROS
#error "scales of a byte have no zero points"
#endif

#define OVERLAP (__CUDA_ARCH__ >= 900)   // with the kernels before and after in the stream
#define LANES 32
#define ROWS 64                          // rows of W in a tile
#define COLS 64                          // columns of W in a tile
#define WIDTH (PAIR ? 2 * BITS : BITS)
#define VALUES (1 << BITS)
#define ENTRIES (1 << WIDTH)
#define ENTRY_SHIFT (FLOATS && PAIR ? 8 : 7)
#define MASK ((u32)(ENTRIES - 1) << ENTRY_SHIFT)
#define BYTES (WIDTH == 8)               // an index is a byte: one permutation makes its address, with entries 256 bytes apart
#define ENTRY_BYTES (BYTES ? 256 : 1 << ENTRY_SHIFT)
#define SIXTEENS (4 / WARPS_PER_TILE)    // of rows of W that a warp has of a tile
#define WARP_ROWS (16 * SIXTEENS)
#define GROUP_WARPS (N_TILES * WARPS_PER_TILE)  // warps with the same split of the columns
#define GROUP (GROUP_WARPS * LANES)      // their threads, which share a stage of x
#define THREADS (K_TILES * GROUP)
#define UNIT (ROWS * N_TILES)            // rows of W that a CTA works on at a time
#define X_BYTES (M_TILES * 1024)         // of x in a stage: 8 M_TILES rows, 64 columns, shared by the row groups
#define CODE_BYTES (BITS * LANES * 16)
#define RAISED (ZEROS != 1 || FOLDED || APART ? 0 : BF16 ? (BITS < 8 ? 0x4300 : 0) : 0x6400)  // 128 or 1,024, to which whole numbers are added as bits
#define SCALE_WIDTH (SCALE ? 1 : 2)      // bytes
#define SCALE_BYTES (64 * (SCALE_WIDTH + ZEROS))  // absmax of 64 rows, and behind them their zero points
#define ROW_OF_BANKS (WGMMA ? 64 : 128)  // in which the pieces that each lane copies keep their place
#define TILE_BYTES (STAGED ? (CODE_BYTES + BLOCKS * SCALE_BYTES + ROW_OF_BANKS - 1) / ROW_OF_BANKS * ROW_OF_BANKS : 0)
#define HOLD (M_TILES <= 4)              // x of a tile stays in registers; else it is read again for each AT_ONCE sixteens of rows
#define AT_ONCE (HOLD ? 1 : 2)
#define X_COPIES (M_TILES * 64 / GROUP)  // chunks of x that each thread of a group copies
#define CHUNKS (M_TILES / CHUNK)
#define PRODUCTS (SIXTEENS * SCALES * CHUNKS)  // of a step, each waited for by itself
#define BLOCKS (BLOCKSIZE < COLS ? COLS / BLOCKSIZE : 1)  // of a row in a tile
#define SCALES (BLOCKS == 1 ? 1 : 2)     // of a row that a lane needs: of 16 columns it has eight
#define OWN_BLOCK(i) (BLOCKS == 4 ? 2 * (i) + (t >> 1) : (i))  // which they are
#define STRIDE (WARP_ROWS + 4)           // of the reduction buffer: avoids bank conflicts

#ifndef EMULATED  // tests bring a CPU's
#include "instructions.cuh"
#endif

// Sums of products with the scaled codebook to what is stored of y[m][n .. n + 3]: one rounding.
__device__ __forceinline__ void store(u16* y, const float* sums, float unscale, const u16* bias, const float* addend, int m, int n, int N) {
  const long long at = (long long)m * N + n;
  u32 out[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    if (n + e >= N) break;
    const u32 b = bias ? (u32)__ldg(bias + n + e) : 0;
    const float sum = sums[e] * unscale + (addend ? __ldcg(addend + at + e) : 0.f);
#if BF16
    out[e] = round16(sum + __uint_as_float(b << 16));
#else
    out[e] = round16(sum + half_to_float(b));
#endif
  }
  if (N % 4 == 0) {
    if (n < N) *(uint2*)(y + at) = {out[0] | out[1] << 16, out[2] | out[3] << 16};
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (n + e < N) y[at + e] = out[e];
  }
}

// Byte offset in the table of the index that begins at bit `bit` of a lane's codes; all shifts are known to the compiler.
__device__ __forceinline__ u32 entry(const u32* w, int bit, u32 lane_offset) {
  const int word = bit >> 5, off = bit & 31;
#if BYTES
  return __byte_perm(w[word], lane_offset, 0x5504 | (off / 8 << 4));
#else
  u32 v;
  if (off + WIDTH <= 32) {
    v = off >= ENTRY_SHIFT ? w[word] >> (off - ENTRY_SHIFT) : w[word] << (ENTRY_SHIFT - off);
  } else {
    // The index straddles two words: bits off - ENTRY_SHIFT .. of the 64.
    v = __funnelshift_r(w[word], w[word + 1], off - ENTRY_SHIFT);
  }
  return (v & MASK) | lane_offset;
#endif
}

// A value as it stands in the table.
__device__ __forceinline__ u32 value_at(const void* codebook, int i) {
#if FLOATS
  return __ldg((const u32*)codebook + i);  // float32
#else
  return __ldg((const u16*)codebook + i);
#endif
}

// What lanes have of each block: numbers of 2 SIXTEENS rows.
template <int BYTES_OF_ROWS> struct Rows;
template <> struct Rows<4> { typedef u32 Type; };
template <> struct Rows<8> { typedef uint2 Type; };
template <> struct Rows<16> { typedef uint4 Type; };
typedef Rows<2 * SIXTEENS * SCALE_WIDTH>::Type Scales;
typedef Rows<2 * SIXTEENS * (ZEROS ? ZEROS : 1)>::Type Zeros;
__device__ __forceinline__ void load_rows(uint4& to, u32 address) { to = lds128(address); }
__device__ __forceinline__ void load_rows(uint2& to, u32 address) { to = lds64(address); }
__device__ __forceinline__ void load_rows(u32& to, u32 address) { to = lds32(address); }

// The absmax of rows g and g + 8 of sixteen number `i`, as they are stored.
__device__ __forceinline__ u32 both_of(const u32* s, int i) {
#if SCALE
  return i % 2 ? s[i / 2] >> 16 : s[i / 2] & 0xffff;
#else
  return s[i];
#endif
}

// One of these, which tensor cores' sums or single values are multiplied by.
__device__ __forceinline__ float scale_of(u32 both, int j) {
#if SCALE == 1
  return __uint_as_float(max((both >> 8 * j & 0xff) << 23, 0x400000u));  // the smallest one is 2^-127
#else
  return half_to_float(j ? both >> 16 : both & 0xffff);
#endif
}

// The same twice in 16 bits, for a pair of values, whose products with it are exact. E8M0 is brought into float16's range,
// with what values were divided by; E4M3's bits are those of a smaller float16 or bfloat16, which values make up for.
__device__ __forceinline__ u32 scale_pair_of(u32 both, int j, float unscale) {
#if SCALE == 2
  return (both >> 8 * j & 0xff) * (BF16 ? 0x100010 : 0x800080);
#else
  return round_pair(scale_of(both, j) * unscale, scale_of(both, j) * unscale);
#endif
}

// Two values next to each other; folded, times the absmax of their row, and less its zero point times that.
__device__ __forceinline__ u32 decode(const u32* w, int pair, u32 lane_offset, u32 table, float absmax, float offset) {
#if PAIR && !FLOATS
  return lds(table + entry(w, pair * 2 * BITS, lane_offset));
#else
#if PAIR
  const uint2 both = lds_pair(table + entry(w, pair * 2 * BITS, lane_offset));
  const u32 low = both.x, high = both.y;
#else
  const u32 low = lds(table + entry(w, (2 * pair) * BITS, lane_offset));
  const u32 high = lds(table + entry(w, (2 * pair + 1) * BITS, lane_offset));
#endif
#if FLOATS && ZEROS
  return round_pair(__uint_as_float(low) * absmax + offset, __uint_as_float(high) * absmax + offset);
#elif FLOATS
  return round_pair(__uint_as_float(low) * absmax, __uint_as_float(high) * absmax);
#else
  return __byte_perm(low, high, 0x5410);
#endif
#endif
}

#if ZEROS
// Zero point number `i` of z.
__device__ __forceinline__ float zero_of(const u32* z, int i) {
#if ZEROS == 1  // 2^23 + zero, less 2^23
  return __uint_as_float(__byte_perm(z[i / 4], 0x4B000000, 0x7440 | i % 4)) - 8388608.f;
#else
  return half_to_float(z[i / 2] >> (16 * (i % 2)) & 0xffff);
#endif
}

// A pair of codes' values less zero point `i`. Where that is a whole number the difference is exact: there is none beyond
// 255. Else it is rounded to 16 bits, as any weight of a 16-bit product is.
__device__ __forceinline__ u32 without_zero(u32 values, const u32* z, int i) {
#if RAISED
  return difference(values, __byte_perm(z[i / 4], RAISED >> 8, 0x4040 | i % 4 * 0x101));
#elif ZEROS == 2 && !BF16
  return difference(values, __byte_perm(z[i / 2], 0, i % 2 ? 0x3232 : 0x1010));
#elif ZEROS == 2  // which has three bits more than bfloat16
  return round_pair(__uint_as_float(values << 16) - zero_of(z, i), __uint_as_float(values & 0xffff0000) - zero_of(z, i));
#else
  return difference(values, round_pair(zero_of(z, i), zero_of(z, i)));
#endif
}
#endif

#if WGMMA
// x [M, K] as the tensor cores read it from shared memory: by tiles of 64 columns, all rows of one after those of another,
// in chunks of 16 bytes swizzled by row. Columns lie as those of W are multiplied: of 16 words, word 4 t + v, which is lane
// t's, becomes word 4 v + t. Rows beyond the last repeat it. A thread has a chunk.
extern "C" __global__ void kbit_arrange(const u32* __restrict__ x, uint4* __restrict__ arranged, int M, int K, int x_stride) {
  let_next_begin();
  const int chunk = blockIdx.x * 256 + threadIdx.x;
  if (chunk >= K / 8 * M_TILES * 8) return;
  const int row = chunk / 8 % (M_TILES * 8), c = (chunk ^ row) % 8;
  const u32* from = x + ((long long)min(row, M - 1) * x_stride + chunk / (M_TILES * 64) * COLS) / 2 + c / 4 * 16 + c % 4;
  wait_for_previous();
  arranged[chunk] = {from[0], from[4], from[8], from[12]};
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
kbit_matmul(const uint4* __restrict__ codes, const uint4* __restrict__ scales, const void* __restrict__ codebook,
            const u16* __restrict__ x, const u16* __restrict__ bias, const float* __restrict__ addend,
            u16* __restrict__ y, float* __restrict__ partial, u32* __restrict__ arrived,
            const float* __restrict__ unscale_at, int M, int N, int K, int x_stride) {
  extern __shared__ __align__(1024) unsigned char shared[];
  u32* table = (u32*)shared;
#if WGMMA
  const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0);  // so the compiler knows that all lanes have the same
#else
  const int warp = threadIdx.x / LANES;
#endif
  const int lane = threadIdx.x % LANES;
  const int k_tile = warp / GROUP_WARPS, n_tile = warp % GROUP_WARPS / WARPS_PER_TILE, half = warp % WARPS_PER_TILE;
  const int g = lane >> 2, t = lane & 3;
  u32 lane_offset = lane * (FLOATS && PAIR ? 8 : 4);
  const float unscale = __ldg(unscale_at);
  const float unscale_sums = FOLDED && SCALE != 2 ? 1.f : unscale;  // E8M0 scales are multiplied by it
  // The codebook's values, used once the first codes are on their way.
  u32 value[(VALUES + THREADS - 1) / THREADS];
#pragma unroll
  for (int i = 0; i < VALUES; i += THREADS)
    if (i + threadIdx.x < VALUES) value[i / THREADS] = value_at(codebook, i + threadIdx.x);
  u32 table_address = shared_address(table);
  const u32 x_address = table_address + ENTRIES * ENTRY_BYTES + k_tile * (STAGES * X_BYTES);
  const u32 tile_address = table_address + ENTRIES * ENTRY_BYTES + K_TILES * STAGES * X_BYTES + (k_tile * N_TILES + n_tile) * (STAGES * TILE_BYTES);
  float* sums = (float*)(shared + ENTRIES * ENTRY_BYTES + K_TILES * STAGES * X_BYTES + K_TILES * N_TILES * STAGES * TILE_BYTES);

  // SPLIT_K CTAs work on one unit of rows after another; each has a part of the columns, and each of its splits some of
  // the part's tiles: those from its number on, every K_TILES.
  const int per_unit = K / COLS, row_blocks = (N + ROWS - 1) / ROWS, units = (row_blocks + N_TILES - 1) / N_TILES;
  const int groups = gridDim.x / SPLIT_K, rank = blockIdx.x % SPLIT_K, kblocks = K / BLOCKSIZE;
  const int part_begin = per_unit * rank / SPLIT_K, part_end = per_unit * (rank + 1) / SPLIT_K;
  const int steps = (part_end - part_begin + K_TILES - 1) / K_TILES, first = part_begin + k_tile;
  const int count = (part_end - first + K_TILES - 1) / K_TILES;  // of this split's tiles: steps, or one less; there may be none

  // A group stages its tiles of x: [row 0..8 M_TILES][8 chunks of 16 bytes], chunks swizzled by row. Rows beyond the last
  // repeat it: their sums are not stored. Offsets have 32 bits, here and in the codes; the caller sees to it that they do.
#if !WGMMA
  const int x_row = threadIdx.x % GROUP >> 3, x_chunk = lane & 7;
  u32 x_from[X_COPIES];
#pragma unroll
  for (int i = 0; i < X_COPIES; i++) x_from[i] = min(x_row + i * (GROUP / 8), M - 1) * x_stride + x_chunk * 8;
  u32 x_to = x_address + x_row * 128 + ((x_chunk ^ ((x_row & 1) * 4)) * 16);
  // Where a lane reads: x of row g, the chunk t and that 64 bytes away; its own codes; the absmax of its rows.
  u32 x_at = x_address + g * 128 + ((t ^ ((g & 1) * 4)) * 16);
#endif
  u32 code_to = tile_address + lane * 16;
#if WARPS_PER_TILE == 1
  u32 &code_at = code_to, scale_at = tile_address + CODE_BYTES + g * (8 * SCALE_WIDTH);
#else
  // The second half of a tile's rows begins 2 BITS words into a lane's codes: where that is half a piece, pairs of words
  // lie in the first half of a piece and in the second by turns, and the other way round than in the first half.
  u32 code_at = code_to + half * (BITS / 2 * 512 + BITS % 2 * 8), scale_at = tile_address + CODE_BYTES + (g * 8 + half * 4) * SCALE_WIDTH;
  u32 code_beside = code_to + half * ((BITS + 1) / 2 * 512 - BITS % 2 * 8);
#endif

#if WGMMA
  // x is arranged so already. The barriers of a group's stages lie behind the sums.
  const u32 barrier = shared_address(sums) + K_TILES * GROUP_WARPS * (SUM_TILES * 8 * STRIDE * 4) + k_tile * (STAGES * 8);
  if (threadIdx.x % GROUP == 0)
    for (int i = 0; i < STAGES; i++) make_barrier(barrier + i * 8, N_TILES + 1);
  show_barriers();
  __syncthreads();
  u32 phase = 0;
#endif

  // What is fetched next: tile `ahead` of `ahead_unit`, into stage `stage_in`.
  int ahead_unit = blockIdx.x / SPLIT_K, ahead = 0, stage_in = 0;
  u32 code_from, scale_from;  // a lane's first of the unit; 16 bytes each
  auto enter = [&]() {  // a unit of rows
    // Beyond the last row block that one again: its sums are not stored.
    const int row_block = min(ahead_unit * N_TILES + n_tile, row_blocks - 1);
    code_from = (row_block * per_unit + first) * (BITS * LANES) + (WGMMA ? 0 : lane);
    scale_from = row_block * kblocks * (SCALE_BYTES / 16) + (WGMMA ? 0 : STAGED ? lane : SCALE ? 0 : g);
#if !WGMMA  // whose copies take what all lanes have the same
    OPAQUE("+r"(code_from), "+r"(scale_from));
#endif
  };
  auto advance = [&]() {
    stage_in = stage_in + 1 == STAGES ? 0 : stage_in + 1;
    if (++ahead >= count) {
      ahead = 0, ahead_unit += groups;
      enter();
    }
  };
#if !STAGED
  uint4 codes_now[BITS];
  Scales scales_now[SCALES];
  Zeros zeros_now[SCALES];
  u32 zero_behind = ZEROS == 1 ? 128 - 8 * g : 128;  // a lane's zero points are behind its absmax
#if ZEROS == 1
  OPAQUE("+r"(zero_behind));
#endif
#endif
  auto fetch_codes = [&]() {
    if (ahead_unit >= units || count == 0) return;
    const int column = first + ahead * K_TILES;
    const uint4* p = codes + (code_from + ahead * (K_TILES * BITS * LANES));
    const uint4* s = scales + (scale_from + (BLOCKSIZE <= COLS ? column * BLOCKS : column / (BLOCKSIZE / COLS)) * (SCALE_BYTES / 16));
#if WGMMA
    if (half == 0 && lane == 0) {
      expect(barrier + stage_in * 8, CODE_BYTES + BLOCKS * SCALE_BYTES);
      bring(tile_address + stage_in * TILE_BYTES, p, CODE_BYTES, barrier + stage_in * 8);
      bring(tile_address + stage_in * TILE_BYTES + CODE_BYTES, s, BLOCKS * SCALE_BYTES, barrier + stage_in * 8);
    }
#elif STAGED
#pragma unroll
    for (int i = 0; i < BITS; i++)
      if (i % WARPS_PER_TILE == half) copy_once(code_to + stage_in * TILE_BYTES + i * 512, p + i * LANES);
    if (half == 0 && lane < BLOCKS * SCALE_BYTES / 16) copy_async(code_to + CODE_BYTES + stage_in * TILE_BYTES, s);
#else
#pragma unroll
    for (int i = 0; i < BITS; i++) codes_now[i] = load_once(p + i * LANES);
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
      scales_now[i] = __ldg((const Scales*)(s + OWN_BLOCK(i) * (SCALE_BYTES / 16)) + (SCALE ? g : 0));
#if ZEROS
      zeros_now[i] = __ldg((const Zeros*)((const char*)s + zero_behind + i * SCALE_BYTES));
#endif
    }
#endif
  };
  auto fetch_x = [&]() {
    if (ahead_unit < units && count > 0) {
      const int column = (first + ahead * K_TILES) * COLS;
#if WGMMA
      if (warp % GROUP_WARPS == 0 && lane == 0) {
        expect(barrier + stage_in * 8, X_BYTES);
        bring(x_address + stage_in * X_BYTES, x + (long long)column * (M_TILES * 8), X_BYTES, barrier + stage_in * 8);
      }
#else
#pragma unroll
      for (int i = 0; i < X_COPIES; i++) copy_once(x_to + stage_in * X_BYTES + i * (GROUP * 16), x + (x_from[i] + column));
#endif
    }
#if !WGMMA
    commit_copies();
#endif
  };

  // The weights are fetched before the kernel that makes x has ended: they must not be that kernel's result.
  enter();
#pragma unroll
  for (int d = 0; d < (STAGED ? STAGES - 1 : 1); d++) {
    fetch_codes();
    advance();
  }
  let_next_begin();
  // The table is filled from the codebook, which all threads find where the sums will be.
  u32* values = (u32*)sums;
#pragma unroll
  for (int i = 0; i < VALUES; i += THREADS)
    if (i + threadIdx.x < VALUES) values[i + threadIdx.x] = value[i / THREADS];
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < ENTRIES * LANES; i += THREADS) {
    const u32 index = i / LANES;
    const u32 low = index % VALUES, high = PAIR ? index / VALUES : index;
    const u32 first = RAISED ? RAISED + low : values[low], second = RAISED ? RAISED + high : values[high];
#if FLOATS && PAIR
    *(uint2*)(table + index * (ENTRY_BYTES / 4) + i % LANES * 2) = {first, second};
#else
    table[index * (ENTRY_BYTES / 4) + i % LANES] = FLOATS ? first : first | second << 16;
#endif
  }
  __syncthreads();
  // Lookups are not volatile: none may be moved before the table is whole.
  OPAQUE("+r"(table_address)::"memory");
  wait_for_previous();
  ahead = 0, ahead_unit = blockIdx.x / SPLIT_K, stage_in = 0;
  enter();
  // Kept in registers: the compiler would rather compute them again for every tile.
  OPAQUE("+r"(code_to), "+r"(scale_at), "+r"(lane_offset));
#if ZEROS == 1
  u32 zero_at = tile_address + CODE_BYTES + 128 + g * 8 + half * 4;
  OPAQUE("+r"(zero_at));
#else
  const u32 zero_at = scale_at + 128;
#endif
#if WARPS_PER_TILE > 1
  OPAQUE("+r"(code_at), "+r"(code_beside));
#endif
#if !WGMMA
  OPAQUE("+r"(x_to), "+r"(x_at));
#pragma unroll
  for (int i = 0; i < X_COPIES; i++) OPAQUE("+r"(x_from[i]));
#endif
#pragma unroll
  for (int d = 0; d < STAGES - 1; d++) {
    fetch_x();
    advance();
  }
  int stage_out = 0;
  for (int unit = blockIdx.x / SPLIT_K; unit < units; unit += groups) {
    if (bias && threadIdx.x < UNIT / 32) prefetch(bias + min(unit * UNIT + (int)threadIdx.x * 32, N - 1));
    float acc[SIXTEENS][M_TILES][4];
#pragma unroll
    for (int r = 0; r < SIXTEENS; r++)
#pragma unroll
      for (int n = 0; n < M_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;

#if WARPS_PER_TILE > 1
    uint2 codes_now[BITS];
#elif STAGED
    uint4 codes_now[BITS];
#endif
#if STAGED
    Scales scales_now[SCALES];
    Zeros zeros_now[SCALES];
#endif
    const u32* w = (const u32*)codes_now;
    const u32* s = (const u32*)scales_now;
    const u32* z = (const u32*)zeros_now;
    auto load_scales = [&](int stage) {
#if STAGED
#pragma unroll
      for (int i = 0; i < SCALES; i++) load_rows(scales_now[i], scale_at + stage * TILE_BYTES + OWN_BLOCK(i) * SCALE_BYTES);
#endif
    };
    // Sixteen rows are BITS words of a lane: the pieces that begin within them. Zero points come with the first.
    auto load_sixteen = [&](int stage, int r) {
#if ZEROS && STAGED
      if (r == 0) {
#pragma unroll
        for (int i = 0; i < SCALES; i++) load_rows(zeros_now[i], zero_at + stage * TILE_BYTES + i * SCALE_BYTES);
      }
#endif
#if WARPS_PER_TILE > 1 && BITS % 2 == 0
#pragma unroll
      for (int i = 0; i < BITS / 2; i++)
        if (4 * i >= r * BITS && 4 * i < (r + 1) * BITS) {
          const uint4 piece = lds128(code_at + stage * TILE_BYTES + i * 512);
          codes_now[2 * i].x = piece.x, codes_now[2 * i].y = piece.y;
          codes_now[2 * i + 1].x = piece.z, codes_now[2 * i + 1].y = piece.w;
        }
#elif WARPS_PER_TILE > 1
#pragma unroll
      for (int i = 0; i < BITS; i++)
        if (2 * i >= r * BITS && 2 * i < (r + 1) * BITS)
          codes_now[i] = lds64((i % 2 ? code_beside + 8 : code_at) + stage * TILE_BYTES + i / 2 * 512);
#elif STAGED
#pragma unroll
      for (int i = 0; i < BITS; i++)
        if (4 * i >= r * BITS && 4 * i < (r + 1) * BITS) codes_now[i] = lds128(code_at + stage * TILE_BYTES + i * 512);
#endif
    };
    auto decode_sixteen = [&](int r, u32 (*a)[4]) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const u32 both = both_of(s, k / (4 / SCALES) * SIXTEENS + r);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float absmax = FLOATS ? scale_of(both, j % 2) : 1.f;
#if EXACT
          a[k][j] = product16(decode(w, (r * 4 + k) * 4 + j, lane_offset, table_address, 1.f, 0.f), scale_pair_of(both, j % 2, unscale));
#elif !ZEROS
          a[k][j] = decode(w, (r * 4 + k) * 4 + j, lane_offset, table_address, absmax, 0.f);
#else
          const u32* zeros = z + k / (4 / SCALES) * (SIXTEENS * ZEROS / 2);
          const float offset = FOLDED ? zero_of(zeros, 2 * r + j % 2) * -absmax : 0.f;
          a[k][j] = decode(w, (r * 4 + k) * 4 + j, lane_offset, table_address, absmax, offset);
          if (!FOLDED && !APART) a[k][j] = without_zero(a[k][j], zeros, 2 * r + j % 2);
#endif
        }
      }
    };
#if !FOLDED
    // Products of sixteen rows with 8 rows of x, times the absmax of rows g and g + 8, are summed in float32.
    auto add = [&](float* sum, const float* c, u32 both) {
      const float s0 = scale_of(both, 0), s1 = scale_of(both, 1);
      sum[0] += s0 * c[0];
      sum[1] += s0 * c[1];
      sum[2] += s1 * c[2];
      sum[3] += s1 * c[3];
    };
#endif
#if APART
    // Of products with codes: less the zero points of rows g and g + 8 times the sums of x, which are the same for all rows.
    auto subtract = [&](float* c, const float* x_sums, const u32* zeros, int r) {
#pragma unroll
      for (int i = 0; i < 4; i++) c[i] -= zero_of(zeros, 2 * r + i / 2) * x_sums[i % 2];
    };
#endif

#if WGMMA
    // While the tensor cores have some products, the next sixteen rows are looked up: at the end of a step, the first ones
    // of the next. Folded, the sums stay with them; else the products before are scaled and summed meanwhile.
    u32 a[2][4][4];
    auto look_up = [&](int stage, int r) {
#if FOLDED
      load_sixteen(stage, r);
      decode_sixteen(r, a[r % 2]);
#else
      decode_sixteen(r, a[r % 2]);
      if (r + 1 < SIXTEENS) load_sixteen(stage, r + 1);
#endif
    };
    auto enter_stage = [&](int stage, u32 its_phase) {
      wait_for_barrier(barrier + stage * 8, its_phase);
#if FOLDED
      load_scales(stage);
#else
      load_sixteen(stage, 0);
#endif
      look_up(stage, 0);
    };
#if !FOLDED
    float c[2][CHUNK * 4];
    auto add_products = [&](int i) {
      const int r = i / (SCALES * CHUNKS), h = i / CHUNKS % SCALES, chunk = i % CHUNKS;
#pragma unroll
      for (int n = 0; n < CHUNK; n++) add(acc[r][chunk * CHUNK + n], c[i % 2] + n * 4, both_of(s, h * SIXTEENS + r));
    };
#endif
    if (count > 0) enter_stage(stage_out, phase);
    for (int step = 0; step < count; step++) {
      const u64 x_here = matrix_at(x_address + stage_out * X_BYTES);
      const int stage_next = stage_out + 1 == STAGES ? 0 : stage_out + 1;
      phase ^= stage_next == 0;
      // The compiler wants no branches while products are under way: the last step looks its own first rows up again.
      const bool more = step + 1 < count;
      const int stage_then = more ? stage_next : stage_out;
      const u32 phase_then = more ? phase : phase ^ (stage_next == 0);
#if FOLDED
#pragma unroll
      for (int r = 0; r < SIXTEENS; r++) {
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int chunk = 0; chunk < CHUNKS; chunk++)
            multiply(acc[r][chunk * CHUNK], a[r % 2][k], x_here + (chunk * (CHUNK * 1024) + k * 32) / 16, true);
        commit_products();
        if (r == 0) {
          group_barrier(k_tile);  // the stage before is free: all of the group have read it
          fetch_codes();
          fetch_x();
          advance();
        } else {
          wait_for_products<1>();  // those that read what is filled now
        }
        if (r + 1 < SIXTEENS) {
          look_up(stage_out, r + 1);
        } else {
          enter_stage(stage_then, phase_then);
        }
      }
      wait_for_products<0>();
#else
      load_scales(stage_out);
#pragma unroll
      for (int i = 0; i < PRODUCTS; i++) {
        const int r = i / (SCALES * CHUNKS), h = i / CHUNKS % SCALES, chunk = i % CHUNKS;
        begin_products();
#pragma unroll
        for (int k = h * (4 / SCALES); k < (h + 1) * (4 / SCALES); k++)
          multiply(c[i % 2], a[r % 2][k], x_here + (chunk * (CHUNK * 1024) + k * 32) / 16, k > h * (4 / SCALES));
        commit_products();
        auto look_ahead = [&]() {
          if ((i + 1) % (SCALES * CHUNKS)) return;
          if (r + 1 < SIXTEENS) {
            look_up(stage_out, r + 1);
          } else {
            enter_stage(stage_then, phase_then);
          }
        };
        // Where sixteen rows are multiplied once, the products before are the last that read what is filled now.
        if (SCALES * CHUNKS > 1) look_ahead();
        if (i > 0) {
          wait_for_products<1>(c[(i + 1) % 2]);
          add_products(i - 1);
        } else {
          group_barrier(k_tile);  // the stage before is free: all of the group have read it
          fetch_codes();
          fetch_x();
          advance();
        }
        if (SCALES * CHUNKS == 1) look_ahead();
      }
      wait_for_products<0>(c[1]);
      add_products(PRODUCTS - 1);
#endif
      stage_out = stage_next;
    }
#if FOLDED
#pragma unroll
    for (int r = 0; r < SIXTEENS; r++)
#pragma unroll
      for (int n = 0; n < M_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) OPAQUE("+f"(acc[r][n][i]));
#endif
#else
    for (int step = 0; step < count; step++) {
      wait_for_copies();
      group_barrier(k_tile);  // the stage before is free: all of the group have read it
#if STAGED
      fetch_codes();
#endif
      fetch_x();
      const u32 x_here = x_at + stage_out * X_BYTES, x_beside = x_here ^ 64;
#if HOLD
      uint4 xs[M_TILES][2];
#pragma unroll
      for (int n = 0; n < M_TILES; n++) xs[n][0] = lds128(x_here + n * 1024), xs[n][1] = lds128(x_beside + n * 1024);
#endif
      load_scales(stage_out);
#if APART
      float x_sums[M_TILES][SCALES][4] = {};
      const u32 one = BF16 ? 0x3f803f80 : 0x3c003c00, ones[4] = {one, one, one, one};
#pragma unroll
      for (int n = 0; n < M_TILES; n++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          mma(x_sums[n][k / (4 / SCALES)], ones, ((const u32*)xs[n])[2 * k], ((const u32*)xs[n])[2 * k + 1]);
#endif
#pragma unroll
      for (int r0 = 0; r0 < SIXTEENS; r0 += AT_ONCE) {
        u32 a[AT_ONCE][4][4];
#pragma unroll
        for (int q = 0; q < AT_ONCE; q++) {
          load_sixteen(stage_out, r0 + q);
          decode_sixteen(r0 + q, a[q]);
        }
#pragma unroll
        for (int n = 0; n < M_TILES; n++) {
#if HOLD
          const u32* b = (const u32*)xs[n];
#else
          const uint4 x_now[2] = {lds128(x_here + n * 1024), lds128(x_beside + n * 1024)};
          const u32* b = (const u32*)x_now;
#endif
#pragma unroll
          for (int q = 0; q < AT_ONCE; q++)
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
#if FOLDED
              float* c = acc[r0 + q][n];
#else
              float c[4] = {0.f, 0.f, 0.f, 0.f};
#endif
#pragma unroll
              for (int k = h * (4 / SCALES); k < (h + 1) * (4 / SCALES); k++) mma(c, a[q][k], b[2 * k], b[2 * k + 1]);
#if APART
              subtract(c, x_sums[n][h], z + h * (SIXTEENS * ZEROS / 2), r0 + q);
#endif
#if !FOLDED
              add(acc[r0 + q][n], c, both_of(s, h * SIXTEENS + r0 + q));
#endif
            }
        }
      }
#if !STAGED
      fetch_codes();
#endif
      advance();
      stage_out = stage_out + 1 == STAGES ? 0 : stage_out + 1;
    }
#endif

#if GROUP_WARPS > 1
    // All groups come to as many barriers: racecheck of compute-sanitizer can't follow them otherwise.
    if (count < steps) group_barrier(k_tile);
#endif
    // Sums over the warps, then over the CTAs of a unit, always in the same order; 8 SUM_TILES rows of x at a time.
#pragma unroll
    for (int n0 = 0; n0 < M_TILES; n0 += SUM_TILES) {
      const int rows = min(8 * SUM_TILES, M - n0 * 8);
      if (rows <= 0) break;
      __syncthreads();
#pragma unroll
      for (int n = 0; n < SUM_TILES; n++) {
        float* to = sums + ((warp * SUM_TILES + n) * 8 + 2 * t) * STRIDE + g;
#pragma unroll
        for (int r = 0; r < SIXTEENS; r++)
#pragma unroll
          for (int i = 0; i < 4; i++) to[(i & 1) * STRIDE + r * 16 + 8 * (i >> 1)] = acc[r][n0 + n][i];
      }
      __syncthreads();
      // Four rows of W at a time.
      for (int i = threadIdx.x; i < rows * (UNIT / 4); i += THREADS) {
        const int m = i / (UNIT / 4), row = i % (UNIT / 4) * 4;
        const float* from = sums + (row / WARP_ROWS * SUM_TILES * 8 + m) * STRIDE + row % WARP_ROWS;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int v = 0; v < K_TILES; v++) {
          const float4 part = *(const float4*)(from + v * (GROUP_WARPS * SUM_TILES * 8 * STRIDE));
          sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
#if SPLIT_K == 1
        store(y, sum, unscale_sums, bias, addend, n0 * 8 + m, unit * UNIT + row, N);
#else
        float* to = partial + ((long long)(unit * SPLIT_K + rank) * (M_TILES * 8) + n0 * 8 + m) * UNIT + row;
        *(float4*)to = {sum[0], sum[1], sum[2], sum[3]};
#endif
      }
    }
#if SPLIT_K > 1
    // The last of the CTAs that share the unit sums what all of them have, always in the same order.
    u32* last = (u32*)sums;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      *last = atomicAdd(&arrived[unit], 1u) == SPLIT_K - 1;
      if (*last) arrived[unit] = 0;
      __threadfence();
    }
    __syncthreads();
    if (*last) {
      const float4* parts = (const float4*)partial + (long long)unit * SPLIT_K * (M_TILES * 8) * (UNIT / 4);
      for (int i = threadIdx.x; i < M * (UNIT / 4); i += THREADS) {
        float4 part[SPLIT_K];
#pragma unroll
        for (int v = 0; v < SPLIT_K; v++) part[v] = __ldcg(parts + v * (M_TILES * 8) * (UNIT / 4) + i);
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int v = 0; v < SPLIT_K; v++) sum[0] += part[v].x, sum[1] += part[v].y, sum[2] += part[v].z, sum[3] += part[v].w;
        store(y, sum, unscale_sums, bias, addend, i / (UNIT / 4), unit * UNIT + i % (UNIT / 4) * 4, N);
      }
    }
#endif
  }
}
