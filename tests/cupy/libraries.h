// What CuPy and mpillama ask of hipRTC, hipBLAS and RCCL. Part of hip.cpp, by whose streams it goes.
#pragma once

namespace {

struct Program { std::string text, log; std::vector<char> code; };

std::vector<char> rest_of(FILE* f) {
  std::vector<char> bytes;
  char piece[65536];
  for (size_t n; f && (n = fread(piece, 1, sizeof piece, f)) > 0;) bytes.insert(bytes.end(), piece, piece + n);
  return bytes;
}

int run(const std::vector<std::string>& command, std::string& output) {
  // Libraries that Python was started with are none of the compiler's.
  std::string line = "exec env -u LD_PRELOAD";
  for (auto& part : command) line += " '" + part + "'";
  FILE* pipe = popen((line + " 2>&1").c_str(), "r");
  const auto said = rest_of(pipe);
  output.assign(said.begin(), said.end());
  return pipe ? pclose(pipe) : 1;
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

}  // namespace

extern "C" {

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
  if (FILE* f = fopen(source.c_str(), "w")) fwrite(p->text.data(), 1, p->text.size(), f), fclose(f);
  std::vector<std::string> command{"g++", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-DMPL_EMULATE"};
  for (int i = 0; i < n; i++) {
    const std::string option = options[i];
    if (option.rfind("-D", 0) == 0 || option.rfind("-std", 0) == 0 || option.rfind("-I", 0) == 0) command.push_back(option);
  }
  command.push_back("-DMPL_WARP=" + std::to_string(lanes()));
  for (auto* part : {"-include", setting("EMULATED_PRELUDE", "prelude.h"), source.c_str(), "-o", target.c_str()}) command.push_back(part);
  const int status = run(command, p->log);
  FILE* made = fopen(target.c_str(), "rb");
  const auto code = rest_of(made);
  if (made) fclose(made);
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
