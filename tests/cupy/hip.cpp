// ROCm's libraries as far as CuPy and mpillama call them, on the CPU: HIP's run time, hipRTC and RCCL.
//
// CuPy's own code, which is compiled and cannot be replaced piece by piece, runs on it as it would on a GPU node. It is as lazy as a GPU may
// be: what is put on a stream is done when somebody waits for that stream, or for an event on it, and not before. So results that are read too
// early, and memory that is used again too early, show as wrong numbers. Host memory that is not pinned is read at once, as HIP does.
//
// hipRTC gives the text to g++ with emulate.h before it. EMULATED_GPUS, EMULATED_MEMORY (bytes of each device) and EMULATED_ARCH say what there is.
#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <regex>
#include <string>
#include <thread>
#include <vector>

extern char** environ;

namespace {

enum { Success = 0, InvalidValue = 1, OutOfMemory = 2, NoDevice = 100, InvalidDevice = 101, InvalidImage = 200, NotFound = 500, IllegalAddress = 700,
       LaunchFailure = 719, NotSupported = 801, StreamCaptureUnsupported = 900, StreamCaptureImplicit = 906, Unknown = 999 };

const char* name_of(int error) {
  switch (error) {
    case Success: return "hipSuccess";
    case InvalidValue: return "hipErrorInvalidValue";
    case OutOfMemory: return "hipErrorOutOfMemory";
    case NoDevice: return "hipErrorNoDevice";
    case InvalidDevice: return "hipErrorInvalidDevice";
    case InvalidImage: return "hipErrorInvalidImage";
    case NotFound: return "hipErrorNotFound";
    case IllegalAddress: return "hipErrorIllegalAddress";
    case LaunchFailure: return "hipErrorLaunchFailure";
    case NotSupported: return "hipErrorNotSupported";
    case StreamCaptureUnsupported: return "hipErrorStreamCaptureUnsupported";
    case StreamCaptureImplicit: return "hipErrorStreamCaptureImplicit";
    default: return "hipErrorUnknown";
  }
}

const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}
int n_devices() { return atoi(setting("EMULATED_GPUS", "1")); }
size_t memory_of_device() { return strtoull(setting("EMULATED_MEMORY", "4294967296"), nullptr, 10); }
const char* arch() { return setting("EMULATED_ARCH", "gfx90a:sramecc+:xnack-"); }
int lanes() { return strncmp(arch(), "gfx9", 4) ? 32 : 64; }

using Work = std::function<int()>;
struct Graph { std::vector<Work> work; };
struct Stream {
  bool blocking = true;
  unsigned flags = 0;
  std::mutex working;
  std::deque<Work> queue;
  size_t issued = 0, done = 0;
  std::unique_ptr<Graph> recorded;
};
struct Event { Stream* stream = nullptr; size_t upto = 0; };
struct Function { const char* (*launch)(const unsigned*, size_t, void**); std::vector<unsigned> sizes; unsigned most_shared = 65536; };
struct Block { size_t size; int device; };
using Blocks = std::map<uintptr_t, Block>;

using Held = std::lock_guard<std::mutex>;
// Never destroyed: idle work goes on while the process ends.
Stream& legacy = *new Stream;
std::vector<Stream*>& streams = *new std::vector<Stream*>{&legacy};
Blocks &on_device = *new Blocks, &pinned = *new Blocks;
size_t used[64];
// Of all these; never held while work is done.
std::mutex& lock = *new std::mutex;
std::atomic<int> failure{Success};
thread_local int current = 0;

void say(const std::string& text) { fprintf(stderr, "rocm: %s\n", text.c_str()); }

const Block* within(const Blocks& known, const void* p, size_t n = 1) {
  auto at = known.upper_bound((uintptr_t)p);
  if (at == known.begin()) return nullptr;
  --at;
  return (uintptr_t)p + n <= at->first + at->second.size ? &at->second : nullptr;
}

// Does what was put on a stream before. What has gone wrong stays, as it does on a device.
int flush(Stream& s, size_t upto = ~size_t(0)) {
  Held one(s.working);
  for (;;) {
    Work work;
    {
      Held held(lock);
      if (s.queue.empty() || s.done >= upto) return failure;
      work = std::move(s.queue.front());
      s.queue.pop_front();
    }
    if (!failure)
      if (int error = work()) failure = error;
    Held held(lock);
    s.done++;
  }
}

std::vector<Stream*> known_streams(bool only_blocking) {
  Held held(lock);
  std::vector<Stream*> found;
  for (auto* s : streams)
    if (s->blocking || !only_blocking) found.push_back(s);
  return found;
}
int flush_all(bool only_blocking = false) {
  for (auto* s : known_streams(only_blocking)) flush(*s);
  return failure;
}

// Others may wait for this rank's part of a collective while it waits for them by other means: in the end all is done.
void start_idle_work() {
  static std::once_flag once;
  std::call_once(once, [] {
    std::thread([] {
      for (;;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        for (auto* s : known_streams(false))
          if (s != &legacy) flush(*s);
      }
    }).detach();
  });
}

int put(Stream* s, Work work) {
  Stream& on = s ? *s : legacy;
  // The legacy stream waits for all that are not apart from it, and they for it.
  if (&on == &legacy) flush_all(true);
  else if (on.blocking) flush(legacy);
  Held held(lock);
  if (on.recorded) {
    on.recorded->work.push_back(std::move(work));
    return Success;
  }
  if (failure) return failure;
  on.queue.push_back(std::move(work));
  on.issued++;
  return Success;
}

bool recording() {
  Held held(lock);
  for (auto* s : streams)
    if (s->recorded) return true;
  return false;
}

int copy(void* to, const void* from, size_t n, int kind, Stream* stream, bool wait) {
  if (!n) return Success;
  bool to_device, from_device, to_pinned, from_pinned;
  {
    Held held(lock);
    to_device = within(on_device, to, n), from_device = within(on_device, from, n);
    to_pinned = within(pinned, to, n), from_pinned = within(pinned, from, n);
  }
  if (kind != 4 && (to_device != (kind == 1 || kind == 3) || from_device != (kind == 2 || kind == 3))) {
    say("a copy of kind " + std::to_string(kind) + " whose memory is not of that kind");
    return InvalidValue;
  }
  Stream& on = stream ? *stream : legacy;
  if (wait && recording()) return StreamCaptureImplicit;
  if (!from_device && !from_pinned) {
    // The bytes are taken now.
    if (on.recorded) return StreamCaptureUnsupported;
    auto taken = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + n);
    if (int error = put(stream, [=] { memcpy(to, taken->data(), n); return 0; })) return error;
  } else if (int error = put(stream, [=] { memmove(to, from, n); return 0; })) {
    return error;
  }
  return wait || !(to_device || to_pinned) ? flush(on) : Success;
}

struct Blas { Stream* stream; int mode; };

// Ranks of a communicator, and where they leave numbers for each other.
struct Meeting { std::atomic<int> arrived, round, over; };
constexpr size_t kPart = 1 << 16;
// Calls that are recorded, or not done yet, keep `calls`.
struct Comm { Meeting* meeting; float* parts; int rank, size, device; std::shared_ptr<int> calls = std::make_shared<int>(0); };

int meet(Comm& comm) {
  Meeting& m = *comm.meeting;
  const int round = m.round;
  if (++m.arrived == comm.size) m.arrived = 0, m.round++;
  while (m.round == round) {
    if (m.over) return LaunchFailure;
    usleep(20);
  }
  return Success;
}
bool is_on_device(const void* p, size_t n) {
  Held held(lock);
  return within(on_device, p, n);
}
// NCCL's numbers of types: 7 is float32, 6 float16, 9 bfloat16.
float number(const void* p, size_t i, int type) {
  if (type == 7) return ((const float*)p)[i];
  if (type == 6) return (float)((const _Float16*)p)[i];
  const unsigned bits = (unsigned)((const unsigned short*)p)[i] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
void put_number(void* p, size_t i, int type, float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  if (type == 7) ((float*)p)[i] = x;
  else if (type == 6) ((_Float16*)p)[i] = (_Float16)x;
  else ((unsigned short*)p)[i] = (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
// EMULATED_NCCL_FAILS says at which rank something fails, and what: 1:join, 1:call, 1:later.
bool fails(const Comm& comm, const char* what) {
  return setting("EMULATED_NCCL_FAILS", "") == std::to_string(comm.rank) + ":" + what;
}

constexpr char kMagic[16] = {'c', 'o', 'd', 'e', '-', 'o', 'f', '-', 't', 'h', 'e', '-', 'C', 'P', 'U', ' '};

struct Program { std::string text, log; std::vector<char> code; };

int run(const std::vector<std::string>& command, std::string& output) {
  std::vector<char*> argv;
  for (auto& part : command) argv.push_back((char*)part.c_str());
  argv.push_back(nullptr);
  char path[] = "/tmp/hiprtcXXXXXX";
  const int fd = mkstemp(path);
  unlink(path);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_adddup2(&files, fd, 1);
  posix_spawn_file_actions_adddup2(&files, fd, 2);
  pid_t child;
  int status = 1;
  // Libraries that Python was started with are none of the compiler's.
  std::vector<char*> env;
  for (char** e = environ; *e; e++)
    if (strncmp(*e, "LD_PRELOAD=", 11)) env.push_back(*e);
  env.push_back(nullptr);
  if (!posix_spawnp(&child, argv[0], &files, nullptr, argv.data(), env.data())) waitpid(child, &status, 0);
  posix_spawn_file_actions_destroy(&files);
  const off_t n = lseek(fd, 0, SEEK_END);
  output.resize(n);
  if (pread(fd, output.data(), n, 0) != n) output = "unreadable";
  close(fd);
  return status;
}

std::vector<char> bytes_of(const std::string& path) {
  std::vector<char> bytes;
  if (FILE* f = fopen(path.c_str(), "rb")) {
    char piece[65536];
    for (size_t n; (n = fread(piece, 1, sizeof piece, f)) > 0;) bytes.insert(bytes.end(), piece, piece + n);
    fclose(f);
  }
  return bytes;
}

}  // namespace

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

// -- hipRTC

const char* hiprtcGetErrorString(int error) { return error ? "HIPRTC_ERROR_COMPILATION" : "HIPRTC_SUCCESS"; }
int hiprtcVersion(int* major, int* minor) { return *major = 7, *minor = 0, 0; }
int hiprtcCreateProgram(void** p, const char* text, const char*, int, const char**, const char**) { return *p = new Program{text, "", {}}, 0; }
int hiprtcDestroyProgram(void** p) { return delete (Program*)*p, 0; }
int hiprtcCompileProgram(Program* p, int n, const char** options) {
  // EMULATED_COMPILES names a file that gets a byte for each of our own kernels.
  if (p->text.find("MPL_EXPORT(") != std::string::npos)
    if (FILE* f = fopen(setting("EMULATED_COMPILES", "/dev/null"), "a")) fputc('.', f), fclose(f);
  char folder[] = "/tmp/hiprtcXXXXXX";
  if (!mkdtemp(folder)) return 6;
  const std::string source = std::string(folder) + "/k.cpp", target = std::string(folder) + "/k.so";
  std::string text = p->text;
  if (text.find("MPL_EXPORT(") == std::string::npos) {
    // A kernel of CuPy's own.
    static const std::regex kernel("extern\\s+\"C\"\\s+__global__\\s+void\\s+(\\w+)\\s*\\(");
    for (std::sregex_iterator at(p->text.begin(), p->text.end(), kernel), end; at != end; ++at) text += "\nMPL_EXPORT(" + (*at)[1].str() + ")\n";
  }
  if (FILE* f = fopen(source.c_str(), "w")) fwrite(text.data(), 1, text.size(), f), fclose(f);
  std::vector<std::string> command{"g++", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-DMPL_EMULATE"};
  for (int i = 0; i < n; i++) {
    const std::string option = options[i];
    if (option.rfind("-D", 0) == 0 || option.rfind("-std", 0) == 0 || option.rfind("-I", 0) == 0) command.push_back(option);
  }
  command.push_back("-DMPL_WARP=" + std::to_string(lanes()));
  for (auto* part : {"-include", setting("EMULATED_PRELUDE", "prelude.h"), source.c_str(), "-o", target.c_str()}) command.push_back(part);
  const int status = run(command, p->log);
  const auto code = bytes_of(target);
  unlink(source.c_str()), unlink(target.c_str()), rmdir(folder);
  if (status) return 6;
  const size_t size = code.size();
  p->code.assign(kMagic, kMagic + sizeof kMagic);
  p->code.insert(p->code.end(), (const char*)&size, (const char*)&size + 8);
  p->code.insert(p->code.end(), code.begin(), code.end());
  return 0;
}
int hiprtcGetCodeSize(Program* p, size_t* n) { return *n = p->code.size(), 0; }
int hiprtcGetCode(Program* p, char* to) { return memcpy(to, p->code.data(), p->code.size()), 0; }
int hiprtcGetProgramLogSize(Program* p, size_t* n) { return *n = p->log.size() + 1, 0; }
int hiprtcGetProgramLog(Program* p, char* to) { return memcpy(to, p->log.c_str(), p->log.size() + 1), 0; }
int hiprtcAddNameExpression(Program*, const char*) { return 1; }
int hiprtcGetLoweredName(Program*, const char*, const char**) { return 1; }


// -- hipBLAS: what `CupyDevice.gemm` calls. Matrices are by columns.

int hipblasCreate(Blas** handle) { return *handle = new Blas{nullptr, 0}, 0; }
int hipblasDestroy(Blas* handle) { return delete handle, 0; }
int hipblasSetStream(Blas* handle, Stream* stream) { return handle->stream = stream, 0; }
int hipblasGetStream(Blas* handle, Stream** stream) { return *stream = handle->stream, 0; }
int hipblasSetPointerMode(Blas* handle, int mode) { return handle->mode = mode, 0; }
int hipblasGetPointerMode(Blas* handle, int* mode) { return *mode = handle->mode, 0; }
int hipblasGemmEx(Blas* handle, int ta, int tb, int m, int n, int k, const float* alpha, const void* a, int type_a, int lda, const void* b,
                  int type_b, int ldb, const float* beta, float* c, int type_c, int ldc, int compute, int) {
  // Operations, types and ways to compute as hipBLAS 3 numbers them: transposed, plain; float32 or float16; float32.
  if (handle->mode || ta != 112 || tb != 111 || type_a != type_b || (type_a != 0 && type_a != 2) || type_c != 0 || compute != 2) return 3;
  if (*alpha != 1.f || *beta != 0.f || (handle->stream && handle->stream->recorded)) return 3;
  return put(handle->stream, [=] {
    auto at = [&](const void* x, size_t i) { return type_a == 0 ? ((const float*)x)[i] : (float)((const _Float16*)x)[i]; };
    for (int col = 0; col < n; col++)
      for (int row = 0; row < m; row++) {
        float sum = 0;
        for (int i = 0; i < k; i++) sum += at(a, (size_t)row * lda + i) * at(b, (size_t)col * ldb + i);
        c[(size_t)col * ldc + row] = sum;
      }
    return 0;
  });
}

// -- RCCL, between processes of a host, over a file in shared memory whose name is in the id

struct UniqueId { char bytes[128]; };

const char* ncclGetErrorString(int error) { return error ? "unhandled system error" : "no error"; }
int ncclGetVersion(int* version) { return *version = 22703, 0; }
int ncclGetUniqueId(UniqueId* id) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  memset(id, 0, sizeof *id);
  snprintf(id->bytes, sizeof id->bytes, "/rccl-%d-%ld", getpid(), (long)now.tv_nsec);
  return 0;
}
int ncclCommInitRankConfig(Comm** comm, int size, UniqueId id, int rank, void*) {
  const int fd = shm_open(id.bytes, O_RDWR | O_CREAT, 0600);
  const size_t n = sizeof(Meeting) + (size_t)size * kPart * sizeof(float);
  if (fd < 0 || ftruncate(fd, n)) return 2;
  auto* meeting = (Meeting*)mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (meeting == MAP_FAILED) return 2;
  auto* made = new Comm{meeting, (float*)(meeting + 1), rank, size, current};
  if (fails(*made, "join")) return 2;
  const int error = meet(*made);
  shm_unlink(id.bytes);
  if (error) return delete made, 2;
  return *comm = made, 0;
}
int ncclCommInitAll(Comm**, int, const int*) { return 5; }
int ncclCommCount(Comm* comm, int* size) { return *size = comm->size, 0; }
int ncclCommUserRank(Comm* comm, int* rank) { return *rank = comm->rank, 0; }
int ncclCommCuDevice(Comm* comm, int* device) { return *device = comm->device, 0; }
int ncclCommGetAsyncError(Comm* comm, int* error) { return *error = comm->meeting->over || fails(*comm, "later") ? 6 : 0, 0; }
int ncclCommAbort(Comm* comm) { return comm->meeting->over = 1, 0; }
int ncclCommDestroy(Comm* comm) {
  flush_all();
  // RCCL would wait without end.
  if (comm->calls.use_count() > 1) say("a communicator is destroyed while a graph has recorded its calls"), abort();
  return 0;
}
int ncclGroupStart() { return 0; }
int ncclGroupEnd() { return 0; }
int ncclAllReduce(const void* from, void* to, size_t n, int type, int op, Comm* comm, Stream* stream) {
  const int width = type == 7 ? 4 : 2;
  if ((type != 7 && type != 6 && type != 9) || op != 0 || !is_on_device(from, n * width) || !is_on_device(to, n * width)) return 4;
  if (fails(*comm, "call")) return 2;
  return put(stream, [=, calls = comm->calls] {
    for (size_t begin = 0; begin < n; begin += kPart) {
      const size_t part = std::min(kPart, n - begin);
      float* mine = comm->parts + comm->rank * kPart;
      for (size_t i = 0; i < part; i++) mine[i] = number(from, begin + i, type);
      if (meet(*comm)) return LaunchFailure;
      for (size_t i = 0; i < part; i++) {
        float sum = 0;
        for (int rank = 0; rank < comm->size; rank++) sum += comm->parts[rank * kPart + i];
        put_number(to, begin + i, type, sum);
      }
      if (meet(*comm)) return LaunchFailure;
    }
    return Success;
  });
}
int ncclBroadcast(const float* from, float* to, size_t n, int type, int root, Comm* comm, Stream* stream) {
  if (type != 7 || !is_on_device(from, n * sizeof(float)) || !is_on_device(to, n * sizeof(float))) return 4;
  return put(stream, [=, calls = comm->calls] {
    for (size_t begin = 0; begin < n; begin += kPart) {
      const size_t part = std::min(kPart, n - begin);
      if (comm->rank == root) memcpy(comm->parts, from + begin, part * sizeof(float));
      if (meet(*comm)) return LaunchFailure;
      memcpy(to + begin, comm->parts, part * sizeof(float));
      if (meet(*comm)) return LaunchFailure;
    }
    return Success;
  });
}

}  // extern "C"
