// The same by the names and numbers of CUDA: its driver, its run time, NVRTC and cuBLAS. NCCL has RCCL's names.
#include "hip.cpp"

// Of hopper.
constexpr unsigned kOptIn = 232448;

extern "C" {

const char* cudaGetErrorName(int error) { return hipGetErrorName(error); }
const char* cudaGetErrorString(int error) { return hipGetErrorString(error); }
int cudaGetLastError() { return Success; }
int cudaDriverGetVersion(int* version) { return *version = 13000, Success; }
int cudaRuntimeGetVersion(int* version) { return *version = 13000, Success; }
int cudaGetDevice(int* device) { return hipGetDevice(device); }
int cudaGetDeviceCount(int* n) { return hipGetDeviceCount(n); }
int cudaSetDevice(int device) { return hipSetDevice(device); }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  // cudaDeviceAttr: threads of a block, lanes, multiprocessors, compute capability, shared memory to opt in.
  switch (attribute) {
    case 1: *value = 1024; break;
    case 10: *value = 32; break;
    case 16: *value = 4; break;
    case 75: *value = 9; break;
    case 97: *value = kOptIn; break;
    default: *value = 0;
  }
  return Success;
}
int cudaDeviceGetPCIBusId(char* text, int n, int device) { return hipDeviceGetPCIBusId(text, n, device); }
int cudaDeviceSynchronize() { return hipDeviceSynchronize(); }

int cudaMalloc(void** p, size_t n) { return hipMalloc(p, n); }
int cudaFree(void* p) { return hipFree(p); }
int cudaHostAlloc(void** p, size_t n, unsigned flags) { return hipHostMalloc(p, n, flags); }
int cudaFreeHost(void* p) { return hipHostFree(p); }
int cudaMemGetInfo(size_t* free_bytes, size_t* total) { return hipMemGetInfo(free_bytes, total); }
int cudaMemcpy(void* to, const void* from, size_t n, int kind) { return hipMemcpy(to, from, n, kind); }
int cudaMemcpyAsync(void* to, const void* from, size_t n, int kind, Stream* s) { return hipMemcpyAsync(to, from, n, kind, s); }
int cudaMemset(void* p, int value, size_t n) { return hipMemset(p, value, n); }
int cudaMemsetAsync(void* p, int value, size_t n, Stream* s) { return hipMemsetAsync(p, value, n, s); }
struct CudaAttributes { int type, device; void *on_device, *on_host; long reserved[8]; };
int cudaPointerGetAttributes(CudaAttributes* a, const void* p) {
  Attributes found;
  hipPointerGetAttributes(&found, p);
  *a = {found.type, found.device, found.on_device, found.on_host, {}};
  return Success;
}

int cudaStreamCreate(Stream** s) { return hipStreamCreate(s); }
int cudaStreamCreateWithFlags(Stream** s, unsigned flags) { return hipStreamCreateWithFlags(s, flags); }
int cudaStreamCreateWithPriority(Stream** s, unsigned flags, int) { return hipStreamCreateWithFlags(s, flags); }
int cudaStreamGetFlags(Stream* s, unsigned* flags) { return hipStreamGetFlags(s, flags); }
int cudaStreamGetPriority(Stream* s, int* priority) { return hipStreamGetPriority(s, priority); }
int cudaStreamDestroy(Stream* s) { return hipStreamDestroy(s); }
int cudaStreamSynchronize(Stream* s) { return hipStreamSynchronize(s); }
int cudaStreamQuery(Stream* s) { return hipStreamQuery(s); }
int cudaStreamWaitEvent(Stream* s, Event* e, unsigned flags) { return hipStreamWaitEvent(s, e, flags); }
int cudaStreamIsCapturing(Stream* s, int* status) { return hipStreamIsCapturing(s, status); }
int cudaStreamBeginCapture(Stream* s, int mode) { return hipStreamBeginCapture(s, mode); }
int cudaStreamEndCapture(Stream* s, Graph** graph) { return hipStreamEndCapture(s, graph); }
int cudaGraphInstantiate(Graph** exec, Graph* graph, unsigned long long) { return hipGraphInstantiate(exec, graph, nullptr, nullptr, 0); }
int cudaGraphDestroy(Graph* graph) { return hipGraphDestroy(graph); }
int cudaGraphExecDestroy(Graph* graph) { return hipGraphExecDestroy(graph); }
int cudaGraphLaunch(Graph* graph, Stream* s) { return hipGraphLaunch(graph, s); }
int cudaEventCreate(Event** e) { return hipEventCreate(e); }
int cudaEventCreateWithFlags(Event** e, unsigned flags) { return hipEventCreateWithFlags(e, flags); }
int cudaEventDestroy(Event* e) { return hipEventDestroy(e); }
int cudaEventRecord(Event* e, Stream* s) { return hipEventRecord(e, s); }
int cudaEventSynchronize(Event* e) { return hipEventSynchronize(e); }
int cudaEventQuery(Event* e) { return hipEventQuery(e); }
int cudaEventElapsedTime(float* ms, Event* a, Event* b) { return hipEventElapsedTime(ms, a, b); }

int cuInit(unsigned) { return Success; }
int cuDriverGetVersion(int* version) { return *version = 13000, Success; }
int cuDeviceGetCount(int* n) { return hipGetDeviceCount(n); }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
int cuGetErrorName(int error, const char** text) { return *text = hipGetErrorName(error), Success; }
int cuGetErrorString(int error, const char** text) { return *text = hipGetErrorName(error), Success; }
int cuCtxGetCurrent(void** context) { return *context = &legacy, Success; }
int cuCtxSetCurrent(void*) { return Success; }
int cuModuleLoadData(void** module, const char* image) { return hipModuleLoadData(module, image); }
int cuModuleUnload(void* module) { return hipModuleUnload(module); }
int cuModuleGetFunction(Function** function, void* module, const char* name) {
  const int error = hipModuleGetFunction(function, module, name);
  if (!error) (*function)->most_shared = 49152;
  return error;
}
int cuFuncGetAttribute(int* value, int attribute, Function* f) { return *value = attribute == 8 ? f->most_shared : 0, Success; }
int cuFuncSetAttribute(Function* f, int attribute, unsigned value) {
  if (attribute != 8 || value > kOptIn) return InvalidValue;
  f->most_shared = value;
  return Success;
}
int cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream* s,
                   void** args, void** extra) {
  return hipModuleLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, s, args, extra);
}

const char* nvrtcGetErrorString(int error) { return error ? "NVRTC_ERROR_COMPILATION" : "NVRTC_SUCCESS"; }
int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }
int nvrtcCreateProgram(void** p, const char* text, const char* name, int n, const char** headers, const char** names) {
  return hiprtcCreateProgram(p, text, name, n, headers, names);
}
int nvrtcDestroyProgram(void** p) { return hiprtcDestroyProgram(p); }
int nvrtcCompileProgram(Program* p, int n, const char** options) { return hiprtcCompileProgram(p, n, options); }
int nvrtcGetCUBINSize(Program* p, size_t* n) { return hiprtcGetCodeSize(p, n); }
int nvrtcGetCUBIN(Program* p, char* to) { return hiprtcGetCode(p, to); }
int nvrtcGetPTXSize(Program*, size_t* n) { return *n = 1, 0; }
int nvrtcGetPTX(Program*, char* to) { return *to = 0, 0; }
int nvrtcGetProgramLogSize(Program* p, size_t* n) { return hiprtcGetProgramLogSize(p, n); }
int nvrtcGetProgramLog(Program* p, char* to) { return hiprtcGetProgramLog(p, to); }
int nvrtcGetNumSupportedArchs(int* n) { return *n = 1, 0; }
int nvrtcGetSupportedArchs(int* archs) { return *archs = 90, 0; }

int cublasCreate_v2(Blas** handle) { return hipblasCreate(handle); }
int cublasDestroy_v2(Blas* handle) { return hipblasDestroy(handle); }
int cublasSetStream_v2(Blas* handle, Stream* s) { return hipblasSetStream(handle, s); }
int cublasSetPointerMode_v2(Blas* handle, int mode) { return hipblasSetPointerMode(handle, mode); }
int cublasGetPointerMode_v2(Blas* handle, int* mode) { return hipblasGetPointerMode(handle, mode); }
int cublasGemmEx(Blas* handle, int ta, int tb, int m, int n, int k, const float* alpha, const void* a, int type_a, int lda, const void* b,
                 int type_b, int ldb, const float* beta, float* c, int type_c, int ldc, int compute, int how) {
  // CUBLAS_COMPUTE_32F, not its fast and less exact kin.
  if (compute != 68 || how != -1) return 7;
  return hipblasGemmEx(handle, ta + 111, tb + 111, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c, ldc, 2, 160);
}

}  // extern "C"
