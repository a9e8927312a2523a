// What the files of the software runtime (libascendcl.so) share, and what libhccl.so and the boxed
// kernel use of it.
//
// A stream of this device has run what is put on it when the call returns. The one exception is the
// replay of a captured graph: it waits until somebody needs its results (acl_graph.cpp says why),
// so everything that reads or writes memory calls `softnpu_flush` first.
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
}

#ifdef SOFTNPU_RUNTIME  // the rest is for the files of libascendcl.so alone
#include <functional>
#include <string>

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

// Does the work now, and again in each replay if this thread is capturing.
void submit(std::function<void()> work);

// Lets other Python threads run while this one waits; a thread that holds the interpreter lock
// would otherwise keep a replay from calling operators that are written in Python.
class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock();
  ~WithoutInterpreterLock();

 private:
  void *state_;
};

struct Event {
  int device;
  bool external;          // may be waited for inside a graph and recorded outside
  bool recorded = false;
  double milliseconds = 0;
};

// Blocks a replay until an external event has been recorded; throws after a minute.
void wait_until_recorded(Event *event);

}  // namespace softnpu

#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
