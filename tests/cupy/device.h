// Devices on the CPU: their memory, and streams that are as lazy as a GPU's may be. What is put on a stream is done when somebody waits for
// that stream, or for an event on it, and not before. So results that are read too early, and memory that is used again too early, show as
// wrong numbers. Host memory that is not pinned is read at once, as HIP does.
//
// EMULATED_GPUS, EMULATED_MEMORY (bytes of each) and EMULATED_ARCH say what there is.
#pragma once
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
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
#include <string>
#include <thread>
#include <vector>

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

constexpr char kMagic[16] = {'c', 'o', 'd', 'e', '-', 'o', 'f', '-', 't', 'h', 'e', '-', 'C', 'P', 'U', ' '};

}  // namespace
