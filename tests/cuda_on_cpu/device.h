// What csrc/cuda/device.cuh and CUDA itself have for kernels, on a CPU: for tests of the arithmetic, not of races.
//
// A block's threads are fibers that run one after the other up to the next barrier, shuffle or reduction, where they
// meet. Asynchronous copies arrive when they are awaited and not before, shared memory begins with rubbish, copies from
// outside of the memory that was named are refused, and a barrier that some thread never reaches ends the program. One
// kernel runs at a time.
#define LSA_CUDA_DEVICE  // in the place of csrc/cuda/device.cuh

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct int2 { int x, y; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

namespace cpu {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "kernel on a CPU: %s\n", what);
  std::abort();
}

// -- the threads of a block -----------------------------------------------------------------------------------------

struct Barrier {
  int waiting = 0;
  unsigned generation = 0;
};

struct Copy {
  uint32_t to;
  const uint8_t* from;
  int bytes;
};

constexpr int kWarp = 32, kMostThreads = 1024, kStack = 64 << 10;
static dim3 thread, block, threads, blocks;
static Barrier whole, warps[kMostThreads / kWarp];
static uint64_t slots[kMostThreads / kWarp][kWarp];  // what lanes show each other
static ucontext_t scheduler, fibers[kMostThreads];
static bool done[kMostThreads];
static std::vector<std::vector<Copy>> groups[kMostThreads];  // of a thread's copies; the last one is open
static int running;
static long idle;  // turns in which nobody got past a barrier
static std::function<void()> body;
alignas(1024) static uint8_t memory[256 << 10];  // shared
static const uint8_t *source_begin, *source_end;
static int multiprocessors = 1;

inline void meet(Barrier& barrier, int count) {
  const unsigned mine = barrier.generation;
  idle = 0;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    barrier.generation++;
  }
  while (barrier.generation == mine) swapcontext(&fibers[running], &scheduler);
}

inline void enter() {
  body();
  done[running] = true;
  swapcontext(&fibers[running], &scheduler);
}

inline void run_block(int count) {
  static std::vector<uint8_t> stacks(size_t(kMostThreads) * kStack);
  std::memset(memory, 0xa5, sizeof memory);
  whole = {};
  for (Barrier& barrier : warps) barrier = {};
  for (int i = 0; i < count; i++) {
    done[i] = false;
    groups[i].assign(1, {});
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = &stacks[size_t(i) * kStack];
    fibers[i].uc_stack.ss_size = kStack;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], enter, 0);
  }
  for (int left = count; left;) {
    if (++idle > 1000) fail("threads wait for each other in vain");
    for (int i = 0; i < count; i++) {
      if (done[i]) continue;
      running = i;
      thread = dim3(i, 0, 0);
      swapcontext(&scheduler, &fibers[i]);
      if (done[i]) left--, idle = 0;
    }
  }
}

template <typename T>
uint64_t shown(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <typename T>
T seen(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// f of what all lanes of the warp show.
template <typename F>
auto together(uint64_t x, F f) {
  const int warp = thread.x / kWarp;
  slots[warp][thread.x % kWarp] = x;
  meet(warps[warp], kWarp);
  const auto result = f(slots[warp]);
  meet(warps[warp], kWarp);
  return result;
}

template <typename F>
int reduced(int x, F f) {
  return together(shown(x), [&](const uint64_t* all) {
    int result = seen<int>(all[0]);
    for (int i = 1; i < kWarp; i++) result = f(result, seen<int>(all[i]));
    return result;
  });
}

}  // namespace cpu

#define threadIdx cpu::thread
#define blockIdx cpu::block
#define blockDim cpu::threads
#define gridDim cpu::blocks

// -- CUDA's functions -----------------------------------------------------------------------------------------------

inline void __syncthreads() { cpu::meet(cpu::whole, cpu::threads.x); }
inline void __syncwarp() { cpu::meet(cpu::warps[cpu::thread.x / cpu::kWarp], cpu::kWarp); }
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return cpu::together(cpu::shown(x), [&](const uint64_t* all) { return cpu::seen<T>(all[lane % cpu::kWarp]); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int by) {
  return __shfl_sync(~0u, x, int(cpu::thread.x % cpu::kWarp) ^ by);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int by) {
  const int lane = cpu::thread.x % cpu::kWarp;
  return __shfl_sync(~0u, x, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return cpu::together(x, [](const uint64_t* all) {
    unsigned result = 0;
    for (int i = 0; i < cpu::kWarp; i++) result |= unsigned(all[i]) << i;
    return result;
  });
}
inline int __reduce_min_sync(unsigned, int x) {
  return cpu::reduced(x, [](int a, int b) { return min(a, b); });
}
inline int __reduce_max_sync(unsigned, int x) {
  return cpu::reduced(x, [](int a, int b) { return max(a, b); });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t both = a | uint64_t(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(both >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16;
}
inline float __int_as_float(int x) { return cpu::seen<float>(uint32_t(x)); }
inline float __uint_as_float(uint32_t x) { return cpu::seen<float>(x); }
inline int __float_as_int(float x) { return int(cpu::shown(x)); }
inline uint32_t __float2uint_rn(float x) { return x < 0 ? 0 : uint32_t(std::nearbyint(double(x))); }
inline uint32_t __float2uint_rz(float x) { return x < 0 ? 0 : uint32_t(x); }
inline float __log2f(float x) { return std::log2(x); }
inline size_t __cvta_generic_to_shared(const void* p) { return static_cast<const uint8_t*>(p) - cpu::memory; }
inline void* __cvta_shared_to_generic(uint32_t at) {
  if (at >= sizeof cpu::memory) cpu::fail("an address outside of shared memory");
  return cpu::memory + at;
}

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum { cudaFuncAttributePreferredSharedMemoryCarveout, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the kernel's launch"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int which, int) {
  *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
           : which == cudaDevAttrMultiProcessorCount        ? cpu::multiprocessors
                                                            : 9;
  return cudaSuccess;
}
template <typename K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, K) {
  return own->sharedSizeBytes = 6 << 10, cudaSuccess;
}
template <typename K>
cudaError_t cudaFuncSetAttribute(K, int, int) {
  return cudaSuccess;
}
template <typename K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K, int, int) {
  return *blocks = 1, cudaSuccess;
}

// -- csrc/cuda/device.cuh -------------------------------------------------------------------------------------------

namespace lsa::device {

inline void await_grid() {}
inline void let_next_begin() {}
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cpu::memory);
}
inline float to_float(float x) { return x; }
inline float to_float(__nv_bfloat16 x) { return cpu::seen<float>(uint32_t(x.bits) << 16); }
inline float to_float(__half x) { return float(cpu::seen<_Float16>(x.bits)); }
inline void prefetch(const void*) {}
inline uint32_t anew(uint32_t x) { return x; }
inline const uint8_t* sixteens(const uint8_t* p, uint32_t x) { return p + 16 * uint64_t(x); }
inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
template <int T>
void copy_async(uint32_t to, const uint8_t* from) {
  if (from < cpu::source_begin || from + T > cpu::source_end) cpu::fail("a copy from outside of the cells");
  cpu::groups[cpu::running].back().push_back({to, from, T});
}
inline void close_group() { cpu::groups[cpu::running].push_back({}); }
template <int Latest>
void await_groups() {
  auto& mine = cpu::groups[cpu::running];
  while (int(mine.size()) - 1 > Latest) {
    for (const cpu::Copy& copy : mine[0]) std::memcpy(__cvta_shared_to_generic(copy.to), copy.from, copy.bytes);
    mine.erase(mine.begin());
  }
}
inline float exp2_fast(float x) { return std::exp2(x); }

template <typename... Arguments>
cudaError_t launch_early(void (*kernel)(Arguments...), dim3 grid, int threads, int, bool, cudaStream_t,
                         Arguments... arguments) {
  cpu::threads = dim3(threads);
  cpu::blocks = grid;
  cpu::body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        cpu::block = dim3(x, y, z);
        cpu::run_block(threads);
      }
  return cudaSuccess;
}

}  // namespace lsa::device

// Where kernels may copy from, and among how many multiprocessors they share their work.
extern "C" __attribute__((visibility("default"))) void cpu_set(const uint8_t* begin, const uint8_t* end, int count) {
  cpu::source_begin = begin;
  cpu::source_end = end;
  cpu::multiprocessors = count;
}
