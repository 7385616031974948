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

// Blocks of a cluster run at the same time and reach each other's shared memory, once all have met for a first time. What
// a thread wrote before it arrives, others see after they have awaited. Launched on devices of 9.0 and later only.
inline __device__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

inline __device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

inline __device__ void cluster_await() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same variable of shared memory in another block of the cluster.
template <typename T>
inline __device__ T* of_rank(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return p;
#endif
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

// The same in clusters of so many blocks, neighbours in x. For devices of 9.0 and later.
template <typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, int cluster,
                            cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Whether the device runs clusters of more blocks than all devices do. If so, the kernel may be launched as such.
template <typename Kernel>
bool has_clusters(Kernel kernel, int threads, int bytes, int cluster) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return cudaGetLastError(), false;
  cudaLaunchAttribute size;
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return cudaGetLastError(), false;
  return clusters > 0;
}

}  // namespace lsa::device

#endif
