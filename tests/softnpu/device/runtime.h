// What the files of the software runtime (libascendcl.so) share, and what libhccl.so and the boxed
// kernel use of it.
//
// A stream of this device has run what is put on it when the call returns. The one exception is the
// replay of a captured graph: it waits until somebody needs its results (acl_graph.cpp says why),
// so everything that reads or writes memory calls `softnpu_flush` first. In late mode (acl_late.cpp)
// streams are lists, and `softnpu_flush` lets the device run all of them.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
// Runs every replay that was asked for and has not run. Waits, without Python's interpreter lock,
// for a thread that is running one. Throws std::runtime_error if a replay waits too long for an
// event.
void softnpu_flush(void);

// Whether what this thread does now belongs in a graph (a capture, or the update of a task group).
int softnpu_is_capturing(void);

// Adds a call to the graph that this thread captures. `destroy` frees `data` with the graph.
void softnpu_record(void (*run)(void *), void (*destroy)(void *), void *data);

// Whether this thread updates a task group, which only records.
int softnpu_is_updating(void);

// Late mode: whether it is on; whether this thread runs an item.
int softnpu_is_late(void);
int softnpu_is_running_item(void);
// Appends an item to a stream; `destroy` frees `data` once it has run.
void softnpu_put(void *stream, void (*run)(void *), void (*destroy)(void *), void *data);
// Lets the device run what a stream is ordered behind; the host has not waited for it.
void softnpu_progress(void *stream);
// The host waits for a stream. Returns an aclError.
int softnpu_wait(void *stream);
}

#ifdef SOFTNPU_RUNTIME  // the rest is for the files of libascendcl.so alone
#include <functional>
#include <string>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_rt.h"

namespace softnpu {

constexpr int kMaxDevices = 16;

int device_count();
// The device that this thread has set, or -1.
int current_device();
size_t memory_size();   // bytes of one device
size_t memory_used(int device);

// Keeps the sentence for aclGetRecentErrMsg, which torch_npu prints, and returns the code.
aclError fail(aclError code, const std::string &sentence);

// Does the work now, and again in each replay if this thread is capturing. In late mode it becomes an
// item of the stream, and belongs to the graph alone while a task group is updated.
void submit(aclrtStream stream, std::function<void()> work);

// Lets other Python threads run while this one waits; a thread that holds the interpreter lock
// would otherwise keep a replay from calling operators that are written in Python.
class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock();
  ~WithoutInterpreterLock();

 private:
  void *state_;
};

// For each stream, by its index, how many of its items something is ordered behind.
using Clock = std::vector<uint64_t>;

struct Stream {
  int device;
  int id;
  bool late;
  size_t index;     // in late mode
  int queries = 0;  // that have said "not yet" since the last wait
};

struct Event {
  int device;
  bool external;          // may be waited for inside a graph and recorded outside
  bool recorded = false;
  double milliseconds = 0;
  Clock clock{};          // in late mode: what the recording stream was ordered behind
  int queries = 0;
};

// Late mode: acl_late.cpp says how it works.
bool is_late();
bool is_running_item();
Stream *new_stream(int device, int id);
Stream *stream_of(aclrtStream stream);
Clock clock_of(aclrtStream stream);
Clock clock_of_all();
// Appends an item; a stream that is not late runs it at once, or `lazily` with the next one.
void put(aclrtStream stream, std::function<void()> work, bool lazily = false);
void order_behind(aclrtStream stream, const Clock &clock);
// Lets the device run; the host has not waited.
void run_until(const Clock &clock);
// The host waits: what was written to its memory lands, and a failed item is this call's error.
aclError wait_for(const Clock &clock);
// Whether it is complete; says "not yet" a few times, then waits.
aclError query(const Clock &clock, int *times, bool *complete);
// A copy as an item does it: what goes to the host is held, what comes from it is read now.
void copy(void *to, const void *from, size_t size, aclrtMemcpyKind kind);
// Host memory is freed; writes that are held for it never land.
void forget_host_memory(void *pointer, size_t size);

// Blocks a replay until an external event has been recorded; throws after a minute.
void wait_until_recorded(Event *event);

}  // namespace softnpu

#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
