// What a GPU is like, in the struct of the header that CuPy was compiled with; by itself, since that declares other functions too.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

extern "C" int hipMemGetInfo(size_t*, size_t*);

extern "C" cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  size_t free_bytes;
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Emulated H%d", 200 + device);
  hipMemGetInfo(&free_bytes, &p->totalGlobalMem);
  memset(p->uuid.bytes, device + 1, sizeof p->uuid.bytes);
  p->warpSize = 32, p->multiProcessorCount = 4, p->major = 9, p->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
