// What matmul.cu needs that only a GPU has. Included after its definitions: BF16, STAGES, GROUP, GROUP_WARPS, OVERLAP, WGMMA, FOLDED, CHUNK.
#define OPAQUE(...) asm volatile("" : __VA_ARGS__)

#include "rounding.cuh"

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

#if WGMMA
// Sums of a warp's sixteen rows of W with 8 CHUNK rows of x: float32 c[8-row tile of x][4], as of mma. They belong to the
// tensor cores from `multiply` to `wait_for_products`.
#define SUMS_OF(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#if CHUNK == 4
#define SHAPE "m64n32k16"
#define ALL_SUMS SUMS_OF(0), SUMS_OF(4), SUMS_OF(8), SUMS_OF(12)
#define SUMS "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20"
#define AGAIN "%21"
#elif CHUNK == 16
#define SHAPE "m64n128k16"
#define ALL_SUMS SUMS_OF(0), SUMS_OF(4), SUMS_OF(8), SUMS_OF(12), SUMS_OF(16), SUMS_OF(20), SUMS_OF(24), SUMS_OF(28), \
  SUMS_OF(32), SUMS_OF(36), SUMS_OF(40), SUMS_OF(44), SUMS_OF(48), SUMS_OF(52), SUMS_OF(56), SUMS_OF(60)
#define SUMS "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68"
#define AGAIN "%69"
#else
#define SHAPE "m64n64k16"
#define ALL_SUMS SUMS_OF(0), SUMS_OF(4), SUMS_OF(8), SUMS_OF(12), SUMS_OF(16), SUMS_OF(20), SUMS_OF(24), SUMS_OF(28)
#define SUMS                                                                                                    \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31}, {%32,%33,%34,%35}, %36"
#define AGAIN "%37"
#endif

// What multiply takes for x in shared memory at this address: rows of 128 bytes, chunks of 16 bytes swizzled by row. An
// address 16 bytes further is one more. ("Matrix descriptor" and "128-Byte swizzle mode" in the PTX ISA.)
__device__ __forceinline__ u64 matrix_at(u32 address) {
  return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | address >> 4;
}

// c = a x^T, or c += a x^T, for sixteen columns of x.
__device__ __forceinline__ void multiply(float* c, const u32* a, u64 x, bool again) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " AGAIN ", 0;\n"
#if BF16
               "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 " SUMS ", p, 1, 1, 0; }"
#else
               "wgmma.mma_async.sync.aligned." SHAPE ".f32.f16.f16 " SUMS ", p, 1, 1, 0; }"
#endif
               : ALL_SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"((int)again));
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last `PENDING` groups of products are made.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

#if !FOLDED
// All but the last `PENDING` groups of products are in c.
template <int PENDING>
__device__ __forceinline__ void wait_for_products(float* c) {
  asm volatile("wgmma.wait_group.sync.aligned %16;" : ALL_SUMS : "n"(PENDING) : "memory");
}
#endif

// A barrier in shared memory for pieces that the copy engine brings: it is through when all who fill the stage have said
// how many bytes come, and these have come. By turns its phase is 0 and 1.
__device__ __forceinline__ void make_barrier(u32 barrier, int fillers) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(fillers) : "memory");
}

__device__ __forceinline__ void show_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bring(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for_barrier(u32 barrier, u32 phase) {
  asm volatile("{ .reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN; }" ::"r"(barrier),
               "r"(phase) : "memory");
}
#endif

__device__ __forceinline__ u32 lds(u32 address) {
  u32 v;
  asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));  // not volatile: the compiler may interleave lookups
  return v;
}

__device__ __forceinline__ uint2 lds_pair(u32 address) {
  uint2 v;
  asm("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));  // likewise
  return v;
}

// Differences of both halves, each rounded.
__device__ __forceinline__ u32 difference(u32 a, u32 b) {
  u32 d;
#if BF16
  asm("{ .reg .b32 m; neg.bf16x2 m, %2; fma.rn.bf16x2 %0, %1, %3, m; }" : "=r"(d) : "r"(a), "r"(b), "r"(0x3f803f80));
#else
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}

// Products of both halves, each rounded.
__device__ __forceinline__ u32 product16(u32 a, u32 b) {
  u32 p;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(p) : "r"(a), "r"(b), "r"(0x80008000));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(p) : "r"(a), "r"(b));
#endif
  return p;
}

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// For what this multiprocessor reads once: past the L1.
__device__ __forceinline__ void copy_once(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ uint4 lds128(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint2 lds64(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// What is no lookup: the stage that it lies in is filled again and again.
__device__ __forceinline__ u32 lds32(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ u32 shared_address(const void* p) {
  u32 address;
  asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"((u64)p));
  return address;
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last STAGES - 2 groups of copies have come.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory"); }

__device__ __forceinline__ void group_barrier(int split) {
#if GROUP_WARPS == 1
  __syncwarp();
#else
  asm volatile("bar.sync %0, %1;" ::"r"(split + 1), "n"(GROUP) : "memory");
#endif
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ void let_next_begin() {
#if OVERLAP
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if OVERLAP
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
