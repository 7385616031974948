// What launches have in common, in CUDA's own words.
#ifndef LSA_CUDA_LAUNCH
#define LSA_CUDA_LAUNCH

namespace lsa::launching {

constexpr int kMaxDevices = 64;

// The current device, whose number says where it is in tables of kMaxDevices.
inline cudaError_t find_device(int& device) {
  const cudaError_t error = cudaGetDevice(&device);
  if (error) return error;
  return device < kMaxDevices ? cudaSuccess : cudaErrorInvalidDevice;
}

// A multiprocessor divides its memory anew for a kernel that wants less shared memory, and has to be idle for that.
template <typename Kernel>
cudaError_t divide_memory_alike(Kernel kernel) {
  const auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  return cudaFuncSetAttribute(kernel, carveout, cudaSharedmemCarveoutMaxShared);
}

}  // namespace lsa::launching

#endif
