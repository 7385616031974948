// A kernel of clusters, right or with a fault, for tests of device.h: `clusters WHAT ORDER`.
using namespace lsa::device;

constexpr int kBlocks = 4, kThreads = 64, kClusters = 3, kEach = kBlocks * kThreads;

// Each cluster's sum of `in`, found by its first block from what the warps of all have told it.
void sums(const int* in, int* out, std::string what) {
  int* const own = dynamic_shared<int>();
  const unsigned rank = cluster_rank(), warp = threadIdx.x / 32;
  int* const next = of_rank(own, (rank + 1) % kBlocks);
  cluster_arrive();
  if (what != "told before all have begun") cluster_await();
  if (what == "one block stays away" && rank == 2) return;
  if (what == "lanes stay away" && threadIdx.x % 32) return;
  const int sum = __reduce_add_sync(~0u, in[blockIdx.x * kThreads + threadIdx.x]);
  if (threadIdx.x % 32 == 0) *of_rank(&own[2 * rank + warp], 0) = sum;
  if (what == "told before all have begun") cluster_await();
  if (what != "no barrier") cluster_arrive();
  if (what == "arrived only") return;
  if (what != "no barrier") cluster_await();
  if (!rank && !threadIdx.x)
    for (int i = 0; i < 2 * kBlocks; i++) out[blockIdx.x / kBlocks] += own[i];
  if (what == "past the end") own[2 * kBlocks] = 1;
  if (what == "told late") *next = 1;
}

int main(int, char** arguments) {
  int in[kClusters * kEach], out[kClusters] = {}, want[kClusters] = {};
  for (int i = 0; i < kClusters * kEach; i++) want[i / kEach] += in[i] = i * i % 1009;
  cpu_order(std::atoi(arguments[2]));
  const int* const source = in;
  const int bytes = 2 * kBlocks * sizeof(int);
  const std::string what = arguments[1];
  if (launch_clusters(sums, kClusters * kBlocks, kThreads, bytes, kBlocks, nullptr, source, +out, what)) return 3;
  return std::memcmp(out, want, sizeof out) ? 2 : 0;
}
