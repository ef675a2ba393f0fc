// Between float32 and 16 bits: of absmax, which are float16, of weights and of results. Included after the definition of BF16.
__device__ __forceinline__ float half_to_float(u32 h) {
  float f;
  asm("{ .reg .f16 t; mov.b16 t, %1; cvt.f32.f16 %0, t; }" : "=f"(f) : "h"((u16)h));
  return f;
}

__device__ __forceinline__ u16 round16(float f) {
  u16 h;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
#endif
  return h;
}

// Two floats, rounded to 16 bits; what is beyond the largest number becomes that.
__device__ __forceinline__ u32 round_pair(float low, float high) {
  u32 v;
#if BF16
  asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}
