// What kbit/kernels/matmul.cu needs of a GPU, on a CPU: a thread for every CUDA thread, one CTA after another. It shows
// whether the kernel computes the right thing, on any machine; not how fast, and not every race. Asynchronous copies come
// at once, or as late as they may, when they are waited for.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
using std::max;
using std::min;

#define __device__ static
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__
#define __align__(x)
#define OPAQUE(...)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
alignas(1024) unsigned char shared[1 << 18];
static unsigned shared_bytes;
static bool late;

class Barrier {
 public:
  void wait(int expected) {
    const unsigned phase = phase_;
    if (++arrived_ == expected) {
      arrived_ = 0, phase_++;
      phase_.notify_all();
    } else {
      phase_.wait(phase);
    }
  }

 private:
  std::atomic<int> arrived_ = 0;
  std::atomic<unsigned> phase_ = 0;
};
static Barrier whole, groups[K_TILES], warps[N_TILES * K_TILES * WARPS_PER_TILE];

static void __syncthreads() { whole.wait(N_TILES * K_TILES * WARPS_PER_TILE * 32); }
static void __syncwarp() { warps[threadIdx.x / 32].wait(32); }
static void group_barrier(int split) { groups[split].wait(N_TILES * WARPS_PER_TILE * 32); }
static void __threadfence() {}
static void prefetch(const void* p) { (void)*(const volatile char*)p; }
static void let_next_begin() {}
static void wait_for_previous() {}
static unsigned atomicAdd(unsigned* p, unsigned value) { return __sync_fetch_and_add(p, value); }
template <class T> static T __ldg(const T* p) { return *p; }
template <class T> static T __ldcg(const T* p) { return *p; }

static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static float half_to_float(unsigned half) {
  const uint16_t bits = (uint16_t)half;
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}
static float widened(unsigned bits) { return BF16 ? __uint_as_float(bits << 16) : half_to_float(bits); }
static uint16_t round16(float value) {
  uint16_t bits;
#if BF16
  unsigned whole_bits;
  memcpy(&whole_bits, &value, 4);
  bits = (whole_bits + 0x7fff + (whole_bits >> 16 & 1)) >> 16;
#else
  const _Float16 half = (_Float16)value;
  memcpy(&bits, &half, 2);
#endif
  return bits;
}
static unsigned round_pair(float low, float high) {
  const float largest = BF16 ? 3.38953139e38f : 65504.f;
  const auto rounded = [&](float value) { return (unsigned)round16(min(max(value, -largest), largest)); };
  return rounded(low) | rounded(high) << 16;
}

static unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static unsigned difference(unsigned a, unsigned b) {
  const unsigned high = round16(widened(a >> 16) - widened(b >> 16));
  return high << 16 | round16(widened(a & 0xffff) - widened(b & 0xffff));
}

static unsigned product16(unsigned a, unsigned b) {
  const unsigned high = round16(widened(a >> 16) * widened(b >> 16));
  return high << 16 | round16(widened(a & 0xffff) * widened(b & 0xffff));
}

static unsigned char* at(unsigned address, unsigned size) {
  if (address + size > shared_bytes || address % size) {
    fprintf(stderr, "shared memory: %u bytes at %u of %u\n", size, address, shared_bytes);
    abort();
  }
  return shared + address;
}
static unsigned shared_address(const void* p) { return (unsigned)((const unsigned char*)p - shared); }
static unsigned lds(unsigned address) {
  unsigned value;
  memcpy(&value, at(address, 4), 4);
  return value;
}
static unsigned lds32(unsigned address) { return lds(address); }
static uint4 lds128(unsigned address) {
  uint4 value;
  memcpy(&value, at(address, 16), 16);
  return value;
}
static uint2 lds64(unsigned address) {
  uint2 value;
  memcpy(&value, at(address, 8), 8);
  return value;
}
static uint2 lds_pair(unsigned address) { return lds64(address); }
static uint4 load_once(const uint4* p) { return *p; }

using Copies = std::vector<std::pair<unsigned, const void*>>;
static thread_local Copies uncommitted;
static thread_local std::deque<Copies> committed;
static void copy_async(unsigned to, const void* from) {
  if (late) uncommitted.emplace_back(to, from);
  else memcpy(at(to, 16), from, 16);
}
static void copy_once(unsigned to, const void* from) { copy_async(to, from); }
static void commit_copies() {
  committed.push_back(std::move(uncommitted));
  uncommitted.clear();
}
static void wait_for_copies() {
  for (; committed.size() > STAGES - 2; committed.pop_front())
    for (const auto& [to, from] : committed.front()) memcpy(at(to, 16), from, 16);
}

// mma.sync m16n8k16, as the PTX manual spreads its operands over the lanes; each sum in float64, rounded once.
struct Operands { unsigned a[32][4], b[32][2]; };
static Operands of_warps[2][N_TILES * K_TILES * WARPS_PER_TILE];  // by turns: while some lanes still read one, others fill the next
static thread_local int turn;
static Operands& next_operands(const unsigned* a, unsigned b0, unsigned b1) {
  const int lane = threadIdx.x % 32;
  Operands& own = of_warps[turn ^= 1][threadIdx.x / 32];
  memcpy(own.a[lane], a, 16);
  own.b[lane][0] = b0, own.b[lane][1] = b1;
  __syncwarp();
  return own;
}
static void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  const int lane = threadIdx.x % 32;
  const Operands& of_warp = next_operands(a, b0, b1);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const unsigned left = of_warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const unsigned right = of_warp.b[column * 4 + k % 8 / 2][k / 8];
      sum += (double)widened(left >> 16 * (k % 2) & 0xffff) * widened(right >> 16 * (k % 2) & 0xffff);
    }
    c[i] = (float)sum;
  }
}

#if WGMMA
static int __shfl_sync(unsigned, int value, int) { return value; }  // of what all lanes have the same

// Barriers that pieces come to: each phase ends when all fillers have said how many bytes come, and these have come.
struct Gate {
  int fillers, said = 0, missing = 0, ended = 0;
  struct Piece { unsigned to; const void* from; unsigned bytes; };
  std::vector<Piece> pieces = {};
};
static std::map<unsigned, Gate> gates;
static std::mutex gates_mutex;
static std::condition_variable gate_opens;
static void make_barrier(unsigned barrier, int fillers) {
  std::lock_guard<std::mutex> lock(gates_mutex);
  at(barrier, 8);
  gates[barrier] = Gate{fillers};
}
static void show_barriers() {}
static void change(unsigned barrier, int said, int bytes) {
  Gate& gate = gates[barrier];
  gate.said += said, gate.missing += bytes;
  if (gate.said == gate.fillers && gate.missing == 0) {
    gate.said = 0, gate.ended++;
    gate_opens.notify_all();
  }
}
static void expect(unsigned barrier, unsigned bytes) {
  std::lock_guard<std::mutex> lock(gates_mutex);
  change(barrier, 1, (int)bytes);
}
static void bring(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  std::lock_guard<std::mutex> lock(gates_mutex);
  at(to, 16), at(to + bytes - 16, 16);
  if (late) gates[barrier].pieces.push_back({to, from, bytes});
  else memcpy(shared + to, from, bytes);
  change(barrier, 0, -(int)bytes);
}
static void wait_for_barrier(unsigned barrier, unsigned phase) {
  std::unique_lock<std::mutex> lock(gates_mutex);
  Gate& gate = gates[barrier];
  gate_opens.wait(lock, [&] { return (gate.ended & 1) != (int)phase; });
  for (const auto& [to, from, size] : gate.pieces) memcpy(shared + to, from, size);
  gate.pieces.clear();
}

// wgmma with the left operand in registers: a warp's sixteen rows of it, and the right one from shared memory, K-major in
// the 128-byte swizzle, whose atoms of 8 rows lie one after another. Products are made when they are waited for.
static uint64_t matrix_at(unsigned address) { return address / 16; }
const int rows_together = FOLDED ? 8 * M_TILES : 32;  // of x: the kernel's 8 CHUNK
struct Product { float* c; unsigned a[4]; unsigned x; bool again; };
using Products = std::vector<Product>;
static thread_local Products begun;
static thread_local std::deque<Products> underway;
static void multiply(float* c, const unsigned* a, uint64_t x, bool again) {
  begun.push_back({c, {a[0], a[1], a[2], a[3]}, (unsigned)x * 16, again});
}
static void begin_products() {}
static void commit_products() {
  underway.push_back(std::move(begun));
  begun.clear();
}
template <int PENDING> static void wait_for_products(const float* = nullptr) {
  const int lane = threadIdx.x % 32;
  for (; underway.size() > PENDING; underway.pop_front())
    for (const auto& [c, a, x, again] : underway.front()) {
      const Operands& of_warp = next_operands(a, 0, 0);
      for (int i = 0; i < rows_together / 2; i++) {
        const int row = lane / 4 + 8 * (i % 4 / 2), m = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        double sum = again ? c[i] : 0.;
        for (int k = 0; k < 16; k++) {
          const unsigned left = of_warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
          const unsigned linear = x + m * 128 + k / 2 * 4, right = lds(linear ^ (linear >> 3 & 0x70));
          sum += (double)widened(left >> 16 * (k % 2) & 0xffff) * widened(right >> 16 * (k % 2) & 0xffff);
        }
        c[i] = (float)sum;
      }
    }
}
extern "C" void kbit_arrange(const unsigned*, uint4*, int, int, int);
#endif

extern "C" void kbit_matmul(const uint4*, const uint4*, const void*, const uint16_t*, const uint16_t*, const float*,
                            uint16_t*, float*, unsigned*, const float*, int, int, int, int);

extern "C" void launch(int ctas, int bytes, const uint4* codes, const uint4* scales, const void* table, const uint16_t* x,
                       const uint16_t* bias, const float* addend, uint16_t* y, float* partial, unsigned* arrived,
                       const float* unscale, int rows, int outputs, int columns, int stride, bool copies_are_late) {
  gridDim.x = ctas, shared_bytes = bytes, late = copies_are_late;
#if WGMMA
  std::vector<uint4> arranged(columns / 8 * M_TILES * 8);
  for (int i = 0; i < (int)arranged.size(); i++) {
    blockIdx.x = i / 256, threadIdx.x = i % 256;
    kbit_arrange((const unsigned*)x, arranged.data(), rows, columns, stride);
  }
  x = (const uint16_t*)arranged.data();
#endif
  for (int cta = 0; cta < ctas; cta++) {
    memset(shared, 0xff, sizeof shared);  // not a number, in any dtype
    std::vector<std::thread> threads;
    for (int i = 0; i < N_TILES * K_TILES * WARPS_PER_TILE * 32; i++)
      threads.emplace_back([=] {
        threadIdx.x = i, blockIdx.x = cta;
        kbit_matmul(codes, scales, table, x, bias, addend, y, partial, arrived, unscale, rows, outputs, columns, stride);
      });
    for (auto& thread : threads) thread.join();
  }
}
