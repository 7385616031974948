// What kernels need of a device that C++ has no words for: assembly, launches, and the memory a block is given at launch.
//
// tests/cuda_on_cpu has the same for a CPU, and defines the guard.
#ifndef LSA_CUDA_DEVICE
#define LSA_CUDA_DEVICE

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lsa::device {

// With programmatic launches a kernel begins before the ones ahead of it end. `await_grid` waits for those, and every
// block calls it before it ends, so that whoever waits for this kernel waits for them too. What a kernel reads before,
// the one right ahead must not write; and that lets it begin (`let_next_begin`) only after its own wait, if the next
// one is to find what came before both.
inline __device__ void await_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

inline __device__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Shared memory of the size that the launch says.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(256) uint8_t given[];
  return reinterpret_cast<T*>(given);
}

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float to_float(__half x) { return __half2float(x); }

inline __device__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The same number, of which the compiler knows nothing: what follows from it is not computed ahead and kept.
inline __device__ uint32_t anew(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// p + 16 * x in one instruction.
inline __device__ const uint8_t* sixteens(const uint8_t* p, uint32_t x) {
  const uint8_t* sum;
  asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(sum) : "r"(x), "l"(p));
  return sum;
}

inline __device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A chunk's codes are asked for in pieces, but come from memory at one time.
template <int T>
inline __device__ void copy_async(uint32_t to, const uint8_t* from) {
  if constexpr (T == 16)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

inline __device__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of the lane's copies but the latest ones.
template <int Latest>
inline __device__ void await_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Latest) : "memory");
}

inline __device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A launch that may begin before the kernel ahead of it has ended, where the device can do that.
template <typename... Arguments>
cudaError_t launch_early(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, bool can,
                         cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = can;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace lsa::device

#endif
