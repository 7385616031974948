// The demand of a step: what each lane's attention asks for, what comes in, what leaves; see residency/replacement.py,
// `pick` and `settle` in vllm_lsa/ops/resident_rows.py, whose Triton kernels do the same.
//
// `demand` runs in each layer, beside attention over the set as it was: so it changes no list, and what comes is copied
// into slots that the lane has to spare. A cluster of blocks has a lane. Each block looks at its share of the row's
// chunks; what they tell each other goes through shared memory. The first block decides, and copies. `settle` brings
// the lists of all layers up to date at the end of the step, with a block for each lane.
#include <cstdint>

#include "device.cuh"
#include "launch.cuh"

#define LSA_EXPORT extern "C" __attribute__((visibility("default")))

namespace lsa {
namespace {

using namespace device;
using namespace launching;

// Blocks of a cluster, and their threads. Small ones begin sooner: the most that every device with clusters has; where
// rows may be long and the device has it, more. Beside attention there is no room for blocks of 1,024 threads.
constexpr int kCluster = 8, kThreads = 256;
constexpr int kWideCluster = 16, kWideThreads = 512;
constexpr int kLongPages = 256;         // state pages of a row from which they are
constexpr int kSideBySide = 512 * 256;  // threads: about what a device holds at a time
constexpr int kStatePage = 64;
constexpr int kMostHeads = 128;  // of a lane
constexpr int kMostPicks = 32;   // a lane of a warp each
constexpr int kAhead = 16;       // logits that a thread asks for at a time
constexpr int kChunks = 4;       // and chunks
constexpr int kEntries = 8;      // entries of the lane's list that a thread keeps in mind
constexpr int kMostBytes = 48 << 10;  // of shared memory, without asking for more
constexpr uint64_t kNone = ~uint64_t(0);
constexpr float kLog2e = 1.44269504088896340736f;

constexpr int kSettleThreads = 256;
constexpr int kSettleRows = 64;  // side by side

struct Sets {
  const int *length, *state;  // [n]
  const int* pages;           // [rows, pages_stride]
  int64_t pages_stride;
  int* counts;      // [rows, lanes]
  const int *caps, *room;  // [rows, lanes]
  int *entry_chunk, *entry_slot;  // [state pages, lanes, 64] by entry
  uint8_t* held;                  // the same by chunk
  float* usage;
  int* picked;  // [n, lanes, most]: chunks that came, -1 for none
  int n, lanes, chunk, most, sink, recency;
};

struct Demand {
  Sets sets;
  const int* block_table;  // [n, ..]
  int64_t table_stride;
  float* logits;        // [state pages, q_heads, 64]
  int64_t* fetch_page;  // [n, layer_lanes, most]
  int* fetch_slot;
  unsigned long long* demanded;
  uint8_t* pool;
  int64_t host_delta, page_bytes;
  int layer_lanes, lane_first, q_heads, per_block;
  float threshold, decay;
};

// Where an entry, or a chunk, of a row's lane is in the paged buffers.
struct Lane {
  const int* const pages;  // of the row, in shared memory
  const int lanes, lane;
  __device__ int64_t at(int i) const {
    return (int64_t(pages[i / kStatePage]) * lanes + lane) * kStatePage + i % kStatePage;
  }
};

template <int C, int T>
struct Shared {
  static constexpr int kWarps = T / 32;
  float2 stats[C][kMostHeads];  // of each block's units: the highest logit, and the sum beside that
  float2 weights[kMostHeads];   // of a head: the highest logit, and what its exponentials are multiplied by
  // Of the first block. What each warp of each block found: the chunk with most mass, and how many may come.
  uint64_t best[C * kWarps];
  int wanted[C * kWarps];
  int64_t page[kMostPicks];
  int slot[kMostPicks], picked[kMostPicks];
};

template <int T>
struct Leaving {
  uint64_t least[2][T / 32];
  int victims[kMostPicks + 1];
};

__device__ float exp_fast(float x) { return exp2_fast(x * kLog2e); }

// What the highest of some logits is subtracted as; with no logits at all their exponentials are 0 anyway.
__device__ float finite(float top) { return top == -INFINITY ? 0 : top; }

__device__ uint64_t highest(uint64_t x) {
  for (int i = 16; i; i /= 2) x = max(x, uint64_t(__shfl_xor_sync(~0u, x, i)));
  return x;
}

__device__ uint64_t lowest(uint64_t x) {
  for (int i = 16; i; i /= 2) x = min(x, uint64_t(__shfl_xor_sync(~0u, x, i)));
  return x;
}

// Sums beside their highest logits, of all lanes of a warp together.
__device__ float2 together(float top, float total) {
  float high = top;
  for (int i = 16; i; i /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, i));
  total *= exp_fast(top - finite(high));
  for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
  return make_float2(high, total);
}

// In the order of mass, and of equals the oldest chunk first; 0 for none.
__device__ uint64_t by_mass(float mass, int chunk) { return uint64_t(__float_as_uint(mass)) << 32 | uint32_t(~chunk); }
__device__ int chunk_of(uint64_t key) { return ~uint32_t(key); }

// One row of `demand`, by a lane's cluster of C blocks of T threads, for all of which it holds the same.
template <int C, int T>
struct Search : Lane {
  static constexpr int kWarps = T / 32;
  const Demand& p;
  Shared<C, T>& shared;
  const int row, local, heads, full;
  __device__ Search(const Demand& p, Shared<C, T>& shared, const int* pages, int row, int local, int heads, int full)
      : Lane{pages, p.sets.lanes, p.lane_first + local},
        p(p),
        shared(shared),
        row(row),
        local(local),
        heads(heads),
        full(full) {}

  // The logit of the lane's first head; those of the others follow in steps of a page.
  __device__ float* logits(int chunk) const {
    const int64_t page = pages[chunk / kStatePage];
    return p.logits + (page * p.q_heads + local * heads) * kStatePage + chunk % kStatePage;
  }
  __device__ int2 range(unsigned rank) const {
    const int each = ((full + C - 1) / C + kStatePage - 1) / kStatePage * kStatePage;
    return make_int2(min(int(rank) * each, full), min(int(rank + 1) * each, full));
  }
  __device__ int64_t host_page(int chunk) const {
    const int64_t block = p.block_table[row * p.table_stride + chunk / p.per_block];
    return (block * lanes + lane) * p.per_block + chunk % p.per_block;
  }

  // Each head's highest logit and sum over the block's chunks, told to every block. Units of work are a head's chunks,
  // or so many parts of them that all warps have one.
  __device__ void tell_stats(int2 range, unsigned rank, int parts) const {
    const int self = threadIdx.x % 32;
    for (int unit = threadIdx.x / 32; unit < heads * parts; unit += kWarps) {
      const int head = unit % heads, step = 32 * parts;
      float top = -INFINITY, total = 0;
      for (int begin = range.x + 32 * (unit / heads) + self; begin - self < range.y; begin += kAhead * step) {
        float x[kAhead], high = top;
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
          const int chunk = begin + k * step;
          x[k] = chunk < range.y ? logits(chunk)[head * kStatePage] : -INFINITY;
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) high = fmaxf(high, x[k]);
        total *= exp_fast(top - finite(high));
#pragma unroll
        for (int k = 0; k < kAhead; k++) total += exp_fast(x[k] - finite(high));
        top = high;
      }
      const float2 stats = together(top, total);
      if (self < C) *of_rank(&shared.stats[rank][unit], self) = stats;
    }
  }

  // A chunk's mass is the mean of what it has of each head's softmax.
  __device__ void find_weights(int parts) const {
    const int self = threadIdx.x % 32;
    for (int head = threadIdx.x / 32; head < heads; head += kWarps) {
      float top = -INFINITY, total = 0;
      for (int i = self; i < C * parts; i += 32) {
        const float2 stats = shared.stats[i / parts][i % parts * heads + head];
        const float high = fmaxf(top, stats.x);
        total = total * exp_fast(top - finite(high)) + stats.y * exp_fast(stats.x - finite(high));
        top = high;
      }
      const float2 all = together(top, total);
      if (!self) shared.weights[head] = make_float2(finite(all.x), all.y > 0 ? 1 / (all.y * heads) : 0);
    }
  }

  // Of chunks from `begin` on, in steps of T; 0 for those from `end` on. All are asked for together.
  __device__ void masses(int begin, int end, float (&mass)[kChunks]) const {
    const float* of[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; k++) of[k] = logits(min(begin + k * T, end - 1)), mass[k] = 0;
#pragma unroll 4
    for (int head = 0; head < heads; head++) {
      const float2 by = shared.weights[head];
#pragma unroll
      for (int k = 0; k < kChunks; k++) mass[k] += exp_fast(of[k][head * kStatePage] - by.x) * by.y;
    }
#pragma unroll
    for (int k = 0; k < kChunks; k++)
      if (begin + k * T >= end) mass[k] = 0;
  }

  // Finds those with most mass, by the first warp of the first block, of what all warps of all blocks found: every lane
  // has some of those.
  __device__ void choose(int picks) const {
    const int self = threadIdx.x % 32;
    for (int step = 0; step < picks; step++) {
      uint64_t own = 0;
      int part = 0;
#pragma unroll
      for (int i = self; i < C * kWarps; i += 32) {
        const uint64_t best = shared.best[i];
        if (best > own) own = best, part = i;
      }
      const uint64_t first = highest(own);
      const int pick = chunk_of(first);
      part = __reduce_max_sync(~0u, own == first ? part : -1);
      __syncwarp();  // all have read what changes
      if (!self) {
        shared.picked[step] = pick;
        p.sets.held[at(pick)] = 1;
        *logits(pick) = -1;
        shared.best[part] = 0;
        shared.wanted[part]--;
      }
      __syncwarp();
      if (step + 1 == picks || !shared.wanted[part]) continue;
      // The warp that found it has another best one now.
      const int2 its = range(part / kWarps);
      uint64_t next = 0;
      for (int chunk = its.x + part % kWarps * 32 + self; chunk < its.y; chunk += T) {
        const float mass = *logits(chunk);
        if (mass > 0) next = max(next, by_mass(mass, chunk));
      }
      next = highest(next);
      if (!self) shared.best[part] = next;
      __syncwarp();
    }
  }

  // Says what comes into which slot, by the first warp of the first block. spare: the slot for the warp lane's pick.
  __device__ void name(int picks, int spare) const {
    const int self = threadIdx.x % 32;
    if (self < picks) {
      const int pick = shared.picked[self], place = (row * p.layer_lanes + local) * p.sets.most + self;
      p.sets.picked[(int64_t(row) * lanes + lane) * p.sets.most + self] = pick;
      p.fetch_page[place] = shared.page[self] = host_page(pick);
      p.fetch_slot[place] = shared.slot[self] = spare;
    }
    if (!self && picks) atomicAdd(p.demanded, static_cast<unsigned long long>(picks));
  }

  __device__ void copy(int picks) const {
    const int vectors = int(p.page_bytes / 16);
#pragma unroll 8
    for (int i = threadIdx.x; i < picks * vectors; i += T) {
      const int item = i / vectors, vector = i - item * vectors, slot = shared.slot[item];
      const uint8_t* const from = p.pool + p.host_delta + shared.page[item] * p.page_bytes;
      if (slot >= 0)
        reinterpret_cast<uint4*>(p.pool + slot * p.page_bytes)[vector] = reinterpret_cast<const uint4*>(from)[vector];
    }
  }
};

// Grid (blocks of a cluster, lanes of the layer, rows side by side).
template <int C, int T>
__global__ void __launch_bounds__(T, 1024 / T) demand(Demand p) {
  constexpr int kWarps = T / 32;
  Shared<C, T>& shared = *dynamic_shared<Shared<C, T>>();
  int* const pages = reinterpret_cast<int*>(&shared + 1);
  const unsigned rank = cluster_rank();
  const int self = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Sets& sets = p.sets;
  const int local = blockIdx.y, lane = p.lane_first + local, heads = p.q_heads / p.layer_lanes;
  const int parts = max(1, kWarps / heads);
  bool first_row = true;
  cluster_arrive();
  for (int row = blockIdx.z; row < sets.n; row += gridDim.z) {
    const int length = sets.length[row], mine = sets.state[row];
    const bool works = (length > 0) & (mine >= 0);
    const int64_t of_lane = int64_t(works ? mine : 0) * sets.lanes + lane;
    const int count = works ? sets.counts[of_lane] : 0, room = works ? min(sets.room[of_lane], sets.most) : 0;
    const Search<C, T> it(p, shared, pages, row, local, heads, works ? (length - 1) / sets.chunk : 0);
    const int2 range = it.range(rank);
    // Older than the kernels of this layer, and asked for before the scores are there: the pages, what the block's
    // chunks were used and whether they are held, and the slots for what comes.
    float used[kChunks];
    uint8_t held[kChunks];
    const auto look = [&](int begin) {
#pragma unroll
      for (int k = 0; k < kChunks; k++) {
        const int chunk = begin + k * T;
        used[k] = chunk < range.y ? sets.usage[it.at(chunk)] : 0;
        held[k] = chunk < range.y ? sets.held[it.at(chunk)] : 1;
      }
    };
    int spare = -1;
    if (works) {
      const int most = max(it.full, count + room - 1) / kStatePage + 1;
      for (int i = threadIdx.x; i < most; i += T) pages[i] = sets.pages[mine * sets.pages_stride + i];
      __syncthreads();
      look(range.x + threadIdx.x);
      if (!rank && int(threadIdx.x) < room) spare = sets.entry_slot[it.at(count + threadIdx.x)];
    }
    if (first_row) {
      cluster_await();  // all blocks have begun
      await_grid();
      let_next_begin();
      first_row = false;
    }
    if (!rank && int(threadIdx.x) < sets.most) {
      const int64_t of_layer = (row * p.layer_lanes + local) * sets.most + threadIdx.x;
      p.fetch_page[of_layer] = p.fetch_slot[of_layer] = -1;
      sets.picked[(int64_t(row) * sets.lanes + lane) * sets.most + threadIdx.x] = -1;
    }
    if (!works) continue;

    it.tell_stats(range, rank, parts);
    cluster_arrive();
    cluster_await();
    it.find_weights(parts);
    __syncthreads();
    int wanted = 0;
    uint64_t best = 0;
    for (int begin = range.x + threadIdx.x; begin - int(threadIdx.x) < range.y; begin += kChunks * T) {
      if (begin != range.x + int(threadIdx.x)) look(begin);
      float mass[kChunks];
      it.masses(begin, range.y, mass);
#pragma unroll
      for (int k = 0; k < kChunks; k++) {
        const int chunk = begin + k * T;
        if (chunk >= range.y) continue;
        sets.usage[it.at(chunk)] = fmaxf(used[k] * p.decay, mass[k]);
        const bool comes = !held[k] && mass[k] > p.threshold;
        *it.logits(chunk) = comes ? mass[k] : -1;
        wanted += comes;
        if (comes) best = max(best, by_mass(mass[k], chunk));
      }
    }
    wanted = __reduce_add_sync(~0u, wanted);
    if (wanted) best = highest(best);
    if (!self) {
      *of_rank(&shared.best[rank * kWarps + warp], 0) = best;
      *of_rank(&shared.wanted[rank * kWarps + warp], 0) = wanted;
    }
    cluster_arrive();
    cluster_await();
    if (rank) continue;

    wanted = 0;
    for (int i = self; i < C * kWarps; i += 32) wanted += shared.wanted[i];
    const int picks = min(int(__reduce_add_sync(~0u, wanted)), room);
    if (!picks) continue;
    __syncthreads();  // all have read what `choose` counts down
    if (!warp) {
      it.choose(picks);
      it.name(picks, spare);
    }
    __syncthreads();
    it.copy(picks);
  }
}

// One row of `settle`, by a lane's block of T threads.
template <int T>
struct Update : Lane {
  static constexpr int kWarps = T / 32;
  const Sets& p;
  Leaving<T>& shared;
  const int mine, full, count;
  __device__ Update(const Sets& p, Leaving<T>& shared, const int* pages, int lane, int mine, int full, int count)
      : Lane{pages, p.lanes, lane}, p(p), shared(shared), mine(mine), full(full), count(count) {}

  // In the order of use, and of equals the lowest entry first; none for an entry whose chunk, -1 for none, must stay.
  __device__ uint64_t key(int entry, int chunk) const {
    const bool may = chunk >= p.sink && chunk < full - p.recency && chunk >= 0;
    const int64_t where = at(may ? chunk : 0);
    const float used = may ? p.usage[where] : 0;
    const bool held = may && p.held[where] == 1;
    return held ? uint64_t(__float_as_uint(used)) << 32 | uint32_t(entry) : kNone;
  }

  // Strikes the least used of the entries that may leave off the list of what is held, up to `most` of them. Threads
  // keep the order of their first entries in mind.
  __device__ int leave(int most) const {
    int chunks[kEntries];
    uint64_t keys[kEntries];
#pragma unroll
    for (int k = 0; k < kEntries; k++) {
      const int entry = threadIdx.x + k * T;
      chunks[k] = entry < count - 1 ? p.entry_chunk[at(entry)] : -1;
    }
#pragma unroll
    for (int k = 0; k < kEntries; k++) keys[k] = key(threadIdx.x + k * T, chunks[k]);
    const auto own = [&] {
      uint64_t least = kNone;
#pragma unroll
      for (int k = 0; k < kEntries; k++) least = min(least, keys[k]);
      for (int entry = threadIdx.x + kEntries * T; entry < count - 1; entry += T)
        least = min(least, key(entry, p.entry_chunk[at(entry)]));
      return least;
    };
    int leaving = 0;
    uint64_t least = own();
    while (leaving < most) {
      uint64_t* const all = shared.least[leaving % 2];
      const uint64_t of_warp = lowest(least);
      if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = of_warp;
      __syncthreads();
      uint64_t first = all[0];
      for (int i = 1; i < kWarps; i++) first = min(first, all[i]);
      if (first == kNone) break;
      const int entry = int(uint32_t(first));
      if (entry % T == int(threadIdx.x)) {
        shared.victims[leaving] = entry;
        int chunk = -1;
#pragma unroll
        for (int k = 0; k < kEntries; k++)
          if (entry / T == k) keys[k] = kNone, chunk = chunks[k];
        p.held[at(chunk < 0 ? p.entry_chunk[at(entry)] : chunk)] = 0;
        least = own();
      }
      leaving++;
    }
    return leaving;
  }

  // Puts what came into the list, by the first warp; pick: of the warp lane. With less room than came, the last ones go
  // again.
  __device__ void enter(int pick, int picks, int leaving, int over) const {
    const int self = threadIdx.x % 32, kept = max(picks - max(over - leaving, 0), 0);
    const int swaps = min(kept, leaving), grown = kept - swaps;
    if (self < picks && self >= kept) p.held[at(pick)] = 0;
    const int fresh = self < kept ? p.entry_slot[at(count + self)] : -1, tail_slot = p.entry_slot[at(count - 1)];
    const int64_t gap = at(self < swaps ? shared.victims[self] : 0);
    const int freed = self < swaps ? p.entry_slot[gap] : -1;
    __syncwarp();
    // The first ones come to where others leave, the rest before the tail, which moves up. Freed slots are spare.
    const int64_t to = self < swaps ? gap : at(self < kept ? count - 1 + self - swaps : 0);
    if (self < kept) {
      p.entry_slot[to] = fresh;
      p.entry_chunk[to] = pick;
    }
    if (self < swaps) p.entry_slot[at(count + grown + self)] = freed;
    if (!self && grown) {
      const int64_t end = at(count - 1 + grown);
      p.entry_slot[end] = tail_slot;
      p.entry_chunk[end] = full;
    }
    __syncwarp();
    if (self) return;
    int now = count + grown;
    for (int step = kept; step < leaving; step++, now--) {
      // One less: the entry before the tail fills the gap, the tail moves down, the slot becomes spare.
      const int hole = shared.victims[step];
      const int64_t empty = at(hole), before = at(now - 2), tail = at(now - 1);
      const int slot = p.entry_slot[empty], last = p.entry_slot[tail];
      // A later victim that has just moved is found under its new number.
      for (int other = step + 1; other < leaving; other++)
        if (shared.victims[other] == now - 2) shared.victims[other] = hole;
      if (hole != now - 2) {
        p.entry_slot[empty] = p.entry_slot[before];
        p.entry_chunk[empty] = p.entry_chunk[before];
      }
      p.entry_slot[before] = last;
      p.entry_chunk[before] = full;
      p.entry_slot[tail] = slot;
    }
    if (now != count) p.counts[int64_t(mine) * p.lanes + lane] = now;
  }
};

// Grid (lanes, rows side by side).
__global__ void __launch_bounds__(kSettleThreads) settle(Sets p) {
  constexpr int T = kSettleThreads;
  __shared__ Leaving<T> shared;
  int* const pages = dynamic_shared<int>();
  const int lane = blockIdx.x, self = threadIdx.x % 32;
  await_grid();
  let_next_begin();
  for (int row = blockIdx.y; row < p.n; row += gridDim.y) {
    const int length = p.length[row], mine = p.state[row];
    if (length <= 0 || mine < 0) continue;
    const int64_t of_lane = int64_t(mine) * p.lanes + lane;
    const int count = p.counts[of_lane], cap = p.caps[of_lane];
    const int pick = self < p.most ? p.picked[(int64_t(row) * p.lanes + lane) * p.most + self] : -1;
    const int picks = __popc(__ballot_sync(~0u, pick >= 0)), over = count + picks - cap;
    if (!picks && over <= 0) continue;
    const Update<T> it(p, shared, pages, lane, mine, (length - 1) / p.chunk, count);
    const int most = max(it.full, count + picks - 1) / kStatePage + 1;
    for (int i = threadIdx.x; i < most; i += T) pages[i] = p.pages[mine * p.pages_stride + i];
    __syncthreads();
    const int leaving = over > 0 ? it.leave(min(over, p.most + 1)) : 0;
    __syncthreads();
    if (threadIdx.x < 32) it.enter(pick, picks, leaving, over);
    __syncthreads();
  }
}

template <int C, int T>
int64_t shared_bytes(const Demand& p) {
  return int64_t(sizeof(Shared<C, T>)) + p.sets.pages_stride * int64_t(sizeof(int));
}

template <int C, int T>
cudaError_t launch(const Demand& p, cudaStream_t stream) {
  const int64_t bytes = shared_bytes<C, T>(p);
  if (p.q_heads / p.layer_lanes > kMostHeads || p.sets.most > kMostPicks || bytes > kMostBytes)
    return cudaErrorInvalidValue;
  const dim3 grid(C, p.layer_lanes, min(p.sets.n, max(1, kSideBySide / T / C / p.layer_lanes)));
  return launch_clusters(demand<C, T>, grid, T, int(bytes), C, stream, p);
}

// What the first launch on a device finds out and sets.
struct Device {
  bool known, wide;
};

cudaError_t prepare(Device& device) {
  const auto large = demand<kWideCluster, kWideThreads>;
  cudaError_t error = divide_memory_alike(demand<kCluster, kThreads>);
  if (!error) error = divide_memory_alike(large);
  if (error) return error;
  device = {true, has_clusters(large, kWideThreads, kMostBytes, kWideCluster)};
  return cudaSuccess;
}

}  // namespace
}  // namespace lsa

// Every pointer is to device memory. host_delta, page_bytes: bytes, multiples of 16; host pages are at pool +
// host_delta. Returns a cudaError_t, 0 on success.
LSA_EXPORT int lsa_demand(const int* length, const int* state, const int* pages, int64_t pages_stride, int* counts,
                          const int* caps, const int* room, int* entry_chunk, int* entry_slot, uint8_t* held,
                          float* usage, int* picked, int n, int lanes, int chunk, int most, int sink, int recency,
                          const int* block_table, int64_t table_stride, float* logits, int64_t* fetch_page,
                          int* fetch_slot, unsigned long long* demanded, uint8_t* pool, int64_t host_delta,
                          int64_t page_bytes, int layer_lanes, int lane_first, int q_heads, int per_block,
                          float threshold, float decay, void* stream) {
  using namespace lsa;
  if (!n) return 0;
  const Demand p = {{length, state, pages, pages_stride, counts, caps, room, entry_chunk, entry_slot, held, usage,
                     picked, n, lanes, chunk, most, sink, recency},
                    block_table, table_stride, logits, fetch_page, fetch_slot, demanded, pool, host_delta, page_bytes,
                    layer_lanes, lane_first, q_heads, per_block, threshold, decay};
  static Device devices[kMaxDevices];
  int number;
  cudaError_t error = find_device(number);
  if (error) return error;
  Device& device = devices[number];
  if (!device.known) error = prepare(device);
  if (error) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  const bool fits = shared_bytes<kWideCluster, kWideThreads>(p) <= kMostBytes;
  if (pages_stride >= kLongPages && fits && device.wide) return launch<kWideCluster, kWideThreads>(p, on);
  return launch<kCluster, kThreads>(p, on);
}

// The same pointers and numbers as the first ones of `lsa_demand`.
LSA_EXPORT int lsa_settle(const int* length, const int* state, const int* pages, int64_t pages_stride, int* counts,
                          const int* caps, const int* room, int* entry_chunk, int* entry_slot, uint8_t* held,
                          float* usage, int* picked, int n, int lanes, int chunk, int most, int sink, int recency,
                          void* stream) {
  using namespace lsa;
  if (!n) return 0;
  const Sets p = {length, state, pages, pages_stride, counts, caps, room, entry_chunk, entry_slot, held, usage,
                  picked, n, lanes, chunk, most, sink, recency};
  const int64_t bytes = pages_stride * int64_t(sizeof(int));
  if (most > kMostPicks || bytes > kMostBytes - int64_t(sizeof(Leaving<kSettleThreads>))) return cudaErrorInvalidValue;
  const dim3 grid(lanes, min(n, kSettleRows));
  return launch_early(settle, grid, kSettleThreads, int(bytes), true, static_cast<cudaStream_t>(stream), p);
}
