// What csrc/cuda/device.cuh and CUDA itself have for kernels, on a CPU: for tests of the arithmetic, not of races.
//
// A block's threads are fibers, and so are those of a cluster's blocks. A warp's run, in an order that can be set, as
// far as they get without the others, then come the next warp's. Asynchronous copies arrive when they are awaited and
// not before, shared memory begins with rubbish, what lies past its end and what is left of a block that has ended must
// not be written, copies from outside of the memory that was named are refused, and a barrier that some thread never
// reaches ends the program. One kernel runs at a time.
#define LSA_CUDA_DEVICE  // in the place of csrc/cuda/device.cuh
#undef _FORTIFY_SOURCE   // it takes jumps to another stack for errors

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __forceinline__ inline

using std::max;
using std::min;

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
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

// -- the threads of a cluster ---------------------------------------------------------------------------------------

constexpr int kWarp = 32, kMostThreads = 1024, kMostBlocks = 16, kStack = 64 << 10, kMemory = 256 << 10;
constexpr uint8_t kRubbish = 0xa5, kEnded = 0x5a;  // what shared memory begins with, and what a block leaves there

struct Barrier {
  int waiting = 0;
  unsigned generation = 0;

  void arrive(int count) {
    if (++waiting < count) return;
    waiting = 0;
    generation++;
  }
};

struct Block {
  dim3 index;
  Barrier whole, warps[kMostThreads / kWarp];
  uint64_t slots[kMostThreads / kWarp][kWarp];  // what lanes show each other
  bool votes[2];                                // of this generation of `whole` and of the next one
  int left;                                     // threads that have not ended
  bool begun;
};

struct Copy {
  uint32_t to;
  const uint8_t* from;
  int bytes;
};

struct Fiber {
  std::unique_ptr<uint8_t[]> stack;  // kept for the next blocks
  jmp_buf at;
  const Barrier* waits;  // for the end of this generation
  unsigned generation;
  bool done, arrived;                     // arrived: at the cluster's barrier, which it has not awaited yet
  unsigned arrival;                       // the generation of that
  std::vector<std::vector<Copy>> groups;  // of its copies; the last one is open
};

inline dim3 thread, threads, blocks;
inline int cluster_blocks = 1, shared_bytes = kMemory;
inline Block cluster[kMostBlocks];
inline Barrier cluster_barrier;
inline std::deque<Fiber> fibers;  // block by block
inline jmp_buf scheduler;
inline int running, rank;
inline std::function<void()> body;
alignas(1024) inline uint8_t memories[kMostBlocks][kMemory];  // shared
inline uint8_t* memory = memories[0];                         // of the block that runs
inline const uint8_t *source_begin, *source_end;
inline int multiprocessors = 1;
inline bool wide;  // whether the device, which has another number then, has clusters of more than 8 blocks
inline unsigned order;  // of warps and lanes: 0 rising, 1 falling, else a new random one each time, of that seed
inline std::mt19937 random;

inline bool is_all(const uint8_t* p, size_t n, uint8_t x) { return !n || (*p == x && !std::memcmp(p, p + 1, n - 1)); }

inline void wait(const Barrier& barrier, unsigned generation) {
  Fiber& own = fibers[running];
  own.waits = &barrier;
  own.generation = generation;
  if (barrier.generation == generation && !_setjmp(own.at)) _longjmp(scheduler, 1);
}

inline void meet(Barrier& barrier, int count) {
  const unsigned mine = barrier.generation;
  barrier.arrive(count);
  wait(barrier, mine);
}

inline void enter() {
  for (;;) {
    body();
    fibers[running].done = true;
    if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
  }
}

// Runs a thread to where it has to wait.
inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.at, 1);
  fiber.stack.reset(new uint8_t[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline void end_thread(Block& own) {
  if (fibers[running].arrived) fail("a thread ends before it has awaited the cluster");
  if (--own.left) return;
  if (!is_all(memory + shared_bytes, kMemory - shared_bytes, kRubbish)) fail("a write past the end of shared memory");
  if (cluster_blocks > 1) std::memset(memory, kEnded, shared_bytes);  // others must leave it alone now
}

// Runs a thread of a block, if it has not to wait; whether it has run.
inline bool run_thread(int which) {
  Fiber& fiber = fibers[which];
  if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) return false;
  fiber.waits = nullptr;
  running = which;
  rank = which / threads.x;
  memory = memories[rank];
  thread = dim3(which % threads.x);
  Block& own = cluster[rank];
  if (!own.begun && cluster_blocks > 1 && !is_all(memory, kMemory, kRubbish)) fail("a write to a block not begun yet");
  own.begun = true;
  resume(fiber);
  if (fiber.done) end_thread(own);
  return true;
}

inline void put_in_order(std::vector<int>& numbers) {
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
}

// Blocks of a cluster, from this one on.
inline void run_cluster(dim3 first) {
  const int count = threads.x, all = cluster_blocks * count;
  while (int(fibers.size()) < all) fibers.emplace_back();
  for (int i = 0; i < all; i++) {
    fibers[i].waits = nullptr;
    fibers[i].done = fibers[i].arrived = false;
    fibers[i].groups.assign(1, {});
  }
  cluster_barrier = {};
  for (int i = 0; i < cluster_blocks; i++) {
    std::memset(memories[i], kRubbish, kMemory);
    cluster[i] = {};
    cluster[i].index = dim3(first.x + i, first.y, first.z);
    cluster[i].left = count;
  }
  std::vector<int> warps((all + kWarp - 1) / kWarp), lanes(kWarp);
  const auto ended = [&] {
    return std::all_of(cluster, cluster + cluster_blocks, [](const Block& x) { return !x.left; });
  };
  while (!ended()) {
    bool any = false;
    put_in_order(warps);
    put_in_order(lanes);
    for (const int warp : warps)
      for (bool more = true; more; any |= more) {
        more = false;
        for (const int lane : lanes) more |= warp * kWarp + lane < all && run_thread(warp * kWarp + lane);
      }
    if (!any) fail("threads wait for each other in vain");
  }
  for (int i = 0; i < cluster_blocks; i++)
    if (cluster_blocks > 1 && !is_all(memories[i], shared_bytes, kEnded)) fail("a write to a block that has ended");
}

template <typename... A>
int run_grid(void (*kernel)(A...), dim3 grid, int count, int bytes, int neighbours, A... arguments) {
  if (bytes > kMemory || count > kMostThreads || neighbours > kMostBlocks || grid.x % neighbours) return 1;
  threads = dim3(count);
  blocks = grid;
  cluster_blocks = neighbours;
  shared_bytes = bytes;
  body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += neighbours) run_cluster(dim3(x, y, z));
  return 0;
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
  Block& own = cluster[rank];
  own.slots[warp][thread.x % kWarp] = x;
  meet(own.warps[warp], kWarp);
  const auto result = f(own.slots[warp]);
  meet(own.warps[warp], kWarp);
  return result;
}

template <typename T, typename F>
T reduced(T x, F f) {
  static_assert(sizeof(T) == 4, "CUDA reduces words only");
  return together(shown(x), [&](const uint64_t* all) {
    T result = seen<T>(all[0]);
    for (int i = 1; i < kWarp; i++) result = f(result, seen<T>(all[i]));
    return result;
  });
}

}  // namespace cpu

#define threadIdx cpu::thread
#define blockIdx cpu::cluster[cpu::rank].index
#define blockDim cpu::threads
#define gridDim cpu::blocks

// -- CUDA's functions -----------------------------------------------------------------------------------------------

inline void __syncthreads() { cpu::meet(cpu::cluster[cpu::rank].whole, cpu::threads.x); }
inline int __syncthreads_or(int x) {
  cpu::Block& own = cpu::cluster[cpu::rank];
  const unsigned generation = own.whole.generation;
  if (!own.whole.waiting) own.votes[generation % 2] = false;
  own.votes[generation % 2] |= x != 0;
  __syncthreads();
  return own.votes[generation % 2];
}
inline void __syncwarp(unsigned = ~0u) {
  cpu::meet(cpu::cluster[cpu::rank].warps[cpu::thread.x / cpu::kWarp], cpu::kWarp);
}
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
template <typename T>
T __reduce_min_sync(unsigned, T x) {
  return cpu::reduced(x, [](T a, T b) { return min(a, b); });
}
template <typename T>
T __reduce_max_sync(unsigned, T x) {
  return cpu::reduced(x, [](T a, T b) { return max(a, b); });
}
template <typename T>
T __reduce_add_sync(unsigned, T x) {
  return cpu::reduced(x, [](T a, T b) { return T(uint32_t(a) + uint32_t(b)); });
}
inline int atomicAdd(int* p, int x) { return (*p += x) - x; }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return (*p += x) - x; }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) { return (*p += x) - x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
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
inline uint32_t __float_as_uint(float x) { return uint32_t(cpu::shown(x)); }
inline uint32_t __float2uint_rn(float x) { return x < 0 ? 0 : uint32_t(std::nearbyint(double(x))); }
inline uint32_t __float2uint_rz(float x) { return x < 0 ? 0 : uint32_t(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __expf(float x) { return std::exp(x); }
inline size_t __cvta_generic_to_shared(const void* p) { return static_cast<const uint8_t*>(p) - cpu::memory; }
inline void* __cvta_shared_to_generic(uint32_t at) {
  if (at >= cpu::kMemory) cpu::fail("an address outside of shared memory");
  return cpu::memory + at;
}

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum { cudaErrorInvalidDevice = 101, cudaErrorNotSupported = 801 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum { cudaFuncAttributePreferredSharedMemoryCarveout, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the kernel's launch"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = cpu::wide, cudaSuccess; }
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
  cpu::fibers[cpu::running].groups.back().push_back({to, from, T});
}
inline void close_group() { cpu::fibers[cpu::running].groups.push_back({}); }
template <int Latest>
void await_groups() {
  auto& mine = cpu::fibers[cpu::running].groups;
  while (int(mine.size()) - 1 > Latest) {
    for (const cpu::Copy& copy : mine[0]) std::memcpy(__cvta_shared_to_generic(copy.to), copy.from, copy.bytes);
    mine.erase(mine.begin());
  }
}
inline float exp2_fast(float x) { return std::exp2(x); }

template <typename... Arguments>
cudaError_t launch_early(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, bool, cudaStream_t,
                         Arguments... arguments) {
  return cpu::run_grid(kernel, grid, threads, bytes, 1, arguments...);
}

inline unsigned cluster_rank() { return cpu::rank; }
inline void cluster_arrive() {
  cpu::Fiber& own = cpu::fibers[cpu::running];
  if (own.arrived) cpu::fail("a thread arrives before it has awaited the cluster");
  own.arrived = true;
  own.arrival = cpu::cluster_barrier.generation;
  cpu::cluster_barrier.arrive(cpu::cluster_blocks * cpu::threads.x);
}
inline void cluster_await() {
  cpu::Fiber& own = cpu::fibers[cpu::running];
  if (!own.arrived) cpu::fail("a thread awaits the cluster before it has arrived");
  own.arrived = false;
  cpu::wait(cpu::cluster_barrier, own.arrival);
}
template <typename T>
T* of_rank(T* p, unsigned rank) {
  const size_t at = reinterpret_cast<const uint8_t*>(p) - cpu::memory;
  if (at + sizeof(T) > size_t(cpu::shared_bytes)) cpu::fail("an address outside of the block's shared memory");
  if (rank >= unsigned(cpu::cluster_blocks)) cpu::fail("a block that the cluster has not");
  if (!cpu::cluster[rank].left) cpu::fail("memory of a block that has ended");
  return reinterpret_cast<T*>(cpu::memories[rank] + at);
}
template <typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, int cluster, cudaStream_t,
                            Arguments... arguments) {
  return cpu::run_grid(kernel, grid, threads, bytes, cluster, arguments...);
}
template <typename Kernel>
bool has_clusters(Kernel, int, int, int cluster) {
  return cluster <= (cpu::wide ? cpu::kMostBlocks : 8);
}

}  // namespace lsa::device

// Where kernels may copy from, among how many multiprocessors they share their work, in which order threads run, and
// whether there are wide clusters.
extern "C" {
__attribute__((visibility("default"), used)) inline void cpu_set(const uint8_t* begin, const uint8_t* end, int count) {
  cpu::source_begin = begin;
  cpu::source_end = end;
  cpu::multiprocessors = count;
}
__attribute__((visibility("default"), used)) inline void cpu_order(unsigned order) {
  cpu::order = order;
  cpu::random.seed(order);
}
__attribute__((visibility("default"), used)) inline void cpu_wide(bool wide) { cpu::wide = wide; }
}
