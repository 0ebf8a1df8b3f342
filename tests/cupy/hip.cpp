// HIP's run time, as far as CuPy calls it. CuPy's own code, which is compiled and cannot be replaced piece by piece, runs on it as on a GPU node.
#include "device.h"

extern "C" {

// -- errors, versions, devices

const char* hipGetErrorName(int error) { return name_of(error); }
const char* hipGetErrorString(int error) { return name_of(error); }
int hipGetLastError() { return Success; }
int hipPeekAtLastError() { return Success; }
int hipDriverGetVersion(int* version) { return *version = 70051831, Success; }
int hipRuntimeGetVersion(int* version) { return *version = 70051831, Success; }

int hipGetDeviceCount(int* n) { return *n = n_devices(), *n ? Success : NoDevice; }
int hipGetDevice(int* device) { return *device = current, n_devices() ? Success : NoDevice; }
int hipSetDevice(int device) {
  if (device < 0 || device >= n_devices()) return InvalidDevice;
  current = device;
  return Success;
}
int hipDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 0 || device >= n_devices()) return InvalidDevice;
  // Numbers of hipDeviceAttribute_t, HIP 6 and 7.
  switch (attribute) {
    case 23: *value = lanes() == 64 ? 9 : 10; break;
    case 61: *value = 0; break;
    case 56: *value = 1024; break;
    case 63: *value = 4; break;
    case 74: *value = 65536; break;
    case 87: *value = lanes(); break;
    default: *value = 0;
  }
  return Success;
}
int hipGetDevicePropertiesR0600(char* p, int device) {
  if (device < 0 || device >= n_devices()) return InvalidDevice;
  // Offsets of hipDeviceProp_tR0600 (hip_runtime_api.h).
  memset(p, 0, 1472);
  snprintf(p, 256, "Emulated MI%d", 200 + device);
  *(size_t*)(p + 288) = memory_of_device();
  *(size_t*)(p + 296) = 65536;
  *(int*)(p + 308) = lanes();
  *(int*)(p + 320) = 1024;
  *(int*)(p + 360) = lanes() == 64 ? 9 : 10;
  *(int*)(p + 388) = 4;
  *(int*)(p + 584) = device + 1;
  snprintf(p + 1160, 256, "%s", arch());
  return Success;
}
int hipDeviceGetPCIBusId(char* text, int n, int device) {
  snprintf(text, n, "0000:%02x:00.0", device + 1);
  return device < n_devices() ? Success : InvalidDevice;
}
int hipDeviceSynchronize() { return recording() ? StreamCaptureUnsupported : flush_all(); }

// -- memory

int hipMalloc(void** p, size_t n) {
  if (!n_devices()) return NoDevice;
  if (!n) return *p = nullptr, Success;
  Held held(lock);
  if (used[current] + n > memory_of_device()) return OutOfMemory;
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  if (!*p) return OutOfMemory;
  memset(*p, 0xFD, n);
  used[current] += n;
  on_device[(uintptr_t)*p] = {n, current};
  return Success;
}
int hipFree(void* p) {
  if (!p) return Success;
  flush_all();
  Held held(lock);
  auto at = on_device.find((uintptr_t)p);
  if (at == on_device.end()) return InvalidValue;
  used[at->second.device] -= at->second.size;
  on_device.erase(at);
  free(p);
  return failure;
}
int hipHostMalloc(void** p, size_t n, unsigned) {
  Held held(lock);
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  memset(*p, 0xFD, n);
  pinned[(uintptr_t)*p] = {n, 0};
  return Success;
}
int hipHostFree(void* p) {
  flush_all();
  Held held(lock);
  if (pinned.erase((uintptr_t)p)) free(p);
  return Success;
}
int hipMemGetInfo(size_t* free_bytes, size_t* total) {
  Held held(lock);
  *total = memory_of_device();
  *free_bytes = *total - used[current];
  return Success;
}
int hipMemcpy(void* to, const void* from, size_t n, int kind) { return copy(to, from, n, kind, nullptr, true); }
int hipMemcpyAsync(void* to, const void* from, size_t n, int kind, Stream* stream) { return copy(to, from, n, kind, stream, false); }
int hipMemsetAsync(void* p, int value, size_t n, Stream* stream) {
  return put(stream, [=] { memset(p, value, n); return 0; });
}
int hipMemset(void* p, int value, size_t n) {
  if (recording()) return StreamCaptureImplicit;
  hipMemsetAsync(p, value, n, nullptr);
  return flush(legacy);
}
struct Attributes { int type, device; void *on_device, *on_host; int managed; unsigned flags; };
int hipPointerGetAttributes(Attributes* a, const void* p) {
  Held held(lock);
  memset(a, 0, sizeof *a);
  if (auto* found = within(on_device, p)) a->type = 2, a->device = found->device, a->on_device = (void*)p;
  else if (within(pinned, p)) a->type = 1, a->on_host = (void*)p;
  return Success;
}

// -- streams, events, graphs

int hipStreamCreateWithFlags(Stream** s, unsigned flags) {
  start_idle_work();
  auto* made = new Stream;
  made->flags = flags, made->blocking = !(flags & 1);
  Held held(lock);
  streams.push_back(made);
  return *s = made, Success;
}
int hipStreamCreate(Stream** s) { return hipStreamCreateWithFlags(s, 0); }
int hipStreamCreateWithPriority(Stream** s, unsigned flags, int) { return hipStreamCreateWithFlags(s, flags); }
int hipStreamGetFlags(Stream* s, unsigned* flags) { return *flags = s->flags, Success; }
int hipStreamGetPriority(Stream*, int* priority) { return *priority = 0, Success; }
int hipGetStreamDeviceId(Stream*) { return current; }
int hipStreamDestroy(Stream* s) {
  flush(*s);
  Held held(lock);
  // Its memory stays: idle work may be about to look at it.
  streams.erase(std::find(streams.begin(), streams.end(), s));
  return failure;
}
int hipStreamSynchronize(Stream* s) {
  Stream& on = s ? *s : legacy;
  if (on.recorded) return StreamCaptureUnsupported;
  if (!s) flush_all(true);
  return flush(on);
}
int hipStreamQuery(Stream* s) { return hipStreamSynchronize(s); }
int hipEventCreateWithFlags(Event** e, unsigned) { return *e = new Event, Success; }
int hipEventCreate(Event** e) { return hipEventCreateWithFlags(e, 0); }
int hipEventDestroy(Event* e) { return delete e, Success; }
int hipEventRecord(Event* e, Stream* s) {
  Held held(lock);
  Stream& on = s ? *s : legacy;
  if (!on.recorded) *e = {&on, on.issued};
  return Success;
}
int hipEventSynchronize(Event* e) { return e->stream ? flush(*e->stream, e->upto) : int(failure); }
int hipEventQuery(Event* e) { return hipEventSynchronize(e); }
int hipStreamWaitEvent(Stream*, Event* e, unsigned) { return hipEventSynchronize(e); }
int hipEventElapsedTime(float* ms, Event*, Event*) { return *ms = 1.f, Success; }
int hipLaunchHostFunc(Stream* s, void (*f)(void*), void* data) {
  return put(s, [=] { f(data); return 0; });
}

int hipStreamBeginCapture(Stream* s, int) {
  if (!s || s->recorded) return StreamCaptureUnsupported;
  Held held(lock);
  s->recorded = std::make_unique<Graph>();
  return Success;
}
int hipStreamEndCapture(Stream* s, Graph** graph) {
  Held held(lock);
  *graph = s->recorded.release();
  return *graph ? Success : InvalidValue;
}
int hipStreamIsCapturing(Stream* s, int* status) { return *status = s && s->recorded, Success; }
int hipStreamGetCaptureInfo(Stream* s, int* status, unsigned long long* id) { return *id = 0, hipStreamIsCapturing(s, status); }
int hipStreamGetCaptureInfo_v2(Stream* s, int* status, unsigned long long* id, void*, void*, void*) { return hipStreamGetCaptureInfo(s, status, id); }
int hipGraphInstantiate(Graph** exec, Graph* graph, void*, char*, size_t) { return *exec = new Graph(*graph), Success; }
int hipGraphDestroy(Graph* graph) { return delete graph, Success; }
int hipGraphExecDestroy(Graph* graph) { return flush_all(), delete graph, Success; }
int hipGraphLaunch(Graph* graph, Stream* s) {
  for (auto& work : graph->work)
    if (int error = put(s, work)) return error;
  return Success;
}

// -- kernels

int hipModuleLoadData(void** module, const char* image) {
  // A program of the CPU, after a header that hipRTC below has put before it.
  size_t n;
  if (memcmp(image, kMagic, sizeof kMagic)) return InvalidImage;
  memcpy(&n, image + sizeof kMagic, 8);
  const int fd = memfd_create("kernels", 0);
  if (write(fd, image + sizeof kMagic + 8, n) != (ssize_t)n) return OutOfMemory;
  // The file stays open: the linker knows a library by its file, and would take the next one of this number for it.
  *module = dlopen(("/proc/self/fd/" + std::to_string(fd)).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!*module) return say(dlerror()), InvalidImage;
  return Success;
}
int hipModuleLoad(void**, const char*) { return NotSupported; }
int hipModuleUnload(void*) { return Success; }
int hipModuleGetGlobal(void**, size_t*, void*, const char*) { return NotFound; }
int hipModuleGetFunction(Function** function, void* module, const char* name) {
  auto made = std::make_unique<Function>();
  *(void**)&made->launch = dlsym(module, (std::string(name) + "__launch").c_str());
  auto sizes = (int (*)(unsigned*))dlsym(module, (std::string(name) + "__sizes").c_str());
  if (!made->launch || !sizes) return NotFound;
  unsigned found[64];
  made->sizes.assign(found, found + sizes(found));
  return *function = made.release(), Success;
}
int hipFuncGetAttribute(int* value, int attribute, Function*) {
  // hipFuncAttribute: 8 is the dynamic shared memory that a launch may ask for.
  return *value = attribute == 8 ? 65536 : 0, Success;
}
int hipModuleLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream* s,
                          void** args, void** extra) {
  if (extra || !args || !gx || !gy || !gz || !bx || bx * by * bz > 1024 || gy > 65535 || gz > 65535 || shared > f->most_shared) {
    say("a launch of " + std::to_string(gx) + " x " + std::to_string(gy) + " x " + std::to_string(gz) + " blocks of " + std::to_string(bx) +
        " threads with " + std::to_string(shared) + " bytes of shared memory");
    return InvalidValue;
  }
  // Arguments are taken now, by the sizes that the kernel has for them.
  auto values = std::make_shared<std::vector<std::vector<char>>>();
  for (size_t i = 0; i < f->sizes.size(); i++) values->emplace_back((char*)args[i], (char*)args[i] + f->sizes[i]);
  return put(s, [=] {
    const unsigned how[8] = {gx, gy, gz, bx, by, bz, 0, 0};
    std::vector<void*> at;
    for (auto& value : *values) at.push_back(value.data());
    const char* fault = f->launch(how, shared, at.data());
    if (fault) say(fault);
    return fault ? LaunchFailure : Success;
  });
}
int hipOccupancyMaxActiveBlocksPerMultiprocessor(int* n, ...) { return *n = 1, Success; }

}  // extern "C"

#include "libraries.h"
