// libascendcl.so: ACL graphs (aclmdlRI*): capture, task groups and their update, replay.
//
// A graph is a list of calls. While a thread captures, what it submits runs and is kept; a replay
// runs the list again on the same memory. A task group is a part of the list that can be exchanged
// between replays, as vllm-ascend does with the lengths of attention.
//
// A replay is asynchronous: the host may ask for it and update task groups afterwards, behind an
// external event that the graph waits for. So a replay waits in a queue until somebody needs its
// results (softnpu_flush), and stops at events that have not been recorded. torch_npu 2.10.0 loses
// the captured wait (it makes such an event when it is first recorded), so a replay also waits for
// the thread that asked for it to update the task groups, when another thread needs the results.
//
// A difference to an NPU: what is captured has also run once.
#include "runtime.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <dlfcn.h>

using softnpu::fail;

namespace {

struct List;

struct Item {
  void (*run)(void *) = nullptr;
  void (*destroy)(void *) = nullptr;
  void *data = nullptr;
  std::unique_ptr<List> group;  // a task group in place of a call
};

struct List {
  std::vector<Item> items;
  std::atomic<int> late_replays{0};  // that were asked for in late mode and have not run
  bool fresh = false;  // of a task group: updated since it ran last; guarded by queue_lock
  List() = default;
  List(const List &) = delete;
  ~List() {
    for (Item &item : items)
      if (item.destroy) item.destroy(item.data);
  }
  void run() {
    for (Item &item : items) {
      if (item.group)
        item.group->run();
      else
        item.run(item.data);
    }
  }
};

// What this thread records into: a graph, a task group in it, or the update of one.
thread_local List *recording = nullptr;
thread_local List *outer = nullptr;      // the graph, while a task group is recorded
thread_local List *capture = nullptr;    // the graph that this thread captures
thread_local List *updated = nullptr;    // the task group that this thread updates
thread_local bool replaying_here = false;

// The graph that some thread captures; torch_npu captures one at a time.
List *active_capture = nullptr;
struct Replay {
  List *graph;
  std::thread::id asked_by;
};
std::mutex queue_lock;
std::condition_variable queue_signal;
std::deque<Replay> queue;    // replays that were asked for, oldest first
constexpr std::chrono::seconds kLongestUpdate{5};  // then a replay runs as it was
std::mutex replay_lock;      // held by the thread that runs them
bool replay_running = false; // guarded by queue_lock

// Whether this thread may run a replay. `queue_lock` is held.
bool may_run(const Replay &replay) {
  if (replay.asked_by == std::this_thread::get_id()) return true;
  for (const Item &item : replay.graph->items)
    if (item.group && !item.group->fresh) return false;
  return true;
}

// Whether this thread may run the oldest replay. `queue_lock` is held.
bool may_run_oldest() { return queue.empty() || may_run(queue.front()); }

// An item of late mode.
void run_late(const Replay &replay) {
  {
    softnpu::WithoutInterpreterLock released;
    std::unique_lock<std::mutex> held(queue_lock);
    queue_signal.wait_for(held, kLongestUpdate, [&] { return may_run(replay); });
    for (Item &item : replay.graph->items)
      if (item.group) item.group->fresh = false;
  }
  replay.graph->late_replays--;
  replay.graph->run();
}

// Whether it came to that; if not, the replay's own thread does not mean to update it.
bool wait_for_updates() {
  {
    std::lock_guard<std::mutex> held(queue_lock);
    if (may_run_oldest()) return true;
  }
  softnpu::WithoutInterpreterLock released;
  std::unique_lock<std::mutex> held(queue_lock);
  return queue_signal.wait_for(held, kLongestUpdate, may_run_oldest);
}

bool nothing_to_do() {
  std::lock_guard<std::mutex> held(queue_lock);
  return queue.empty() && !replay_running;
}

}  // namespace

namespace softnpu {

namespace {
// Of the Python that this process may be; looked up, because the runtime does not link to Python.
template <typename Function>
Function python(const char *name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}
}  // namespace

WithoutInterpreterLock::WithoutInterpreterLock() : state_(nullptr) {
  static auto is_initialized = python<int (*)()>("Py_IsInitialized");
  static auto is_held = python<int (*)()>("PyGILState_Check");
  static auto save = python<void *(*)()>("PyEval_SaveThread");
  if (is_initialized && is_held && save && is_initialized() && is_held()) state_ = save();
}

WithoutInterpreterLock::~WithoutInterpreterLock() {
  static auto restore = python<void (*)(void *)>("PyEval_RestoreThread");
  if (state_) restore(state_);
}

void submit(aclrtStream stream, std::function<void()> work) {
  if (is_late() && !softnpu_is_capturing()) return put(stream, std::move(work));
  if (!is_late() || !updated) work();
  if (!softnpu_is_capturing()) return;
  softnpu_record([](void *data) { (*static_cast<std::function<void()> *>(data))(); },
                 [](void *data) { delete static_cast<std::function<void()> *>(data); },
                 new std::function<void()>(std::move(work)));
}

}  // namespace softnpu

EXPORT int softnpu_is_capturing() {
  return recording != nullptr && !replaying_here && !softnpu::is_running_item();
}
EXPORT int softnpu_is_updating() { return updated != nullptr && !softnpu::is_running_item(); }

EXPORT void softnpu_record(void (*run)(void *), void (*destroy)(void *), void *data) {
  Item item;
  item.run = run;
  item.destroy = destroy;
  item.data = data;
  recording->items.push_back(std::move(item));
}

EXPORT void softnpu_flush() {
  if (softnpu::is_late()) {
    if (!updated) softnpu::run_until(softnpu::clock_of_all());
    return;
  }
  // Calls of a replay get here as well, and so does the update that a replay waits for.
  if (replaying_here || updated || nothing_to_do()) return;
  const bool updates_came = wait_for_updates();
  std::unique_lock<std::mutex> running(replay_lock, std::try_to_lock);
  if (!running.owns_lock()) {
    softnpu::WithoutInterpreterLock released;
    running.lock();
    // Taken without the interpreter lock and given up again before it is wanted back: holding one
    // while waiting for the other is how two threads wait for ever.
    running.unlock();
  } else {
    struct Mark {
      explicit Mark(bool on) { set(on); }
      ~Mark() { set(false); }
      static void set(bool on) {
        std::lock_guard<std::mutex> held(queue_lock);
        replay_running = replaying_here = on;
      }
    } mark(true);
    bool first = true;
    for (;;) {
      List *next;
      {
        std::lock_guard<std::mutex> held(queue_lock);
        if (queue.empty() || !(may_run_oldest() || (first && !updates_came))) break;
        next = queue.front().graph;
        queue.pop_front();
        for (Item &item : next->items)
          if (item.group) item.group->fresh = false;
      }
      first = false;
      next->run();
    }
  }
  softnpu_flush();
}

// --- capture -----------------------------------------------------------------------------------

EXPORT aclError aclmdlRICaptureBegin(aclrtStream, aclmdlRICaptureMode) {
  softnpu_flush();
  if (active_capture) return fail(ACL_ERROR_STREAM_CAPTURE_CONFLICT, "a capture is on already");
  capture = recording = active_capture = new List;
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureGetInfo(aclrtStream, aclmdlRICaptureStatus *status, aclmdlRI *graph) {
  *status = capture ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph) *graph = capture;
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureEnd(aclrtStream, aclmdlRI *graph) {
  if (!capture)
    return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "this thread ends a capture that it has not begun");
  if (outer) return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "a task group is not ended");
  *graph = capture;
  capture = recording = active_capture = nullptr;
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *) { return ACL_SUCCESS; }

// --- task groups -----------------------------------------------------------------------------------

EXPORT aclError aclmdlRICaptureTaskGrpBegin(aclrtStream) {
  if (!capture || outer)
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED,
                "a task group begins inside a capture, and outside of any other task group");
  Item item;
  item.group = std::make_unique<List>();
  outer = capture;
  recording = item.group.get();
  capture->items.push_back(std::move(item));
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureTaskGrpEnd(aclrtStream, aclrtTaskGrp *handle) {
  if (!outer) return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "no task group has begun");
  *handle = reinterpret_cast<aclrtTaskGrp>(recording);
  recording = outer;
  outer = nullptr;
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream, aclrtTaskGrp handle) {
  if (capture || updated)
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED,
                "a task group is updated outside of a capture, one at a time");
  updated = reinterpret_cast<List *>(handle);
  recording = new List;
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream) {
  if (!updated) return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "no update has begun");
  List *made = recording, *group = updated;
  recording = updated = nullptr;
  if (made->items.size() != group->items.size()) {
    std::string found = std::to_string(made->items.size());
    delete made;
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED,
                "an update has " + found + " calls and its task group " +
                    std::to_string(group->items.size()));
  }
  group->items.swap(made->items);
  delete made;
  std::lock_guard<std::mutex> held(queue_lock);
  group->fresh = true;
  queue_signal.notify_all();
  return ACL_SUCCESS;
}

// --- replay ------------------------------------------------------------------------------------------

EXPORT aclError aclmdlRIExecuteAsync(aclmdlRI graph, aclrtStream stream) {
  if (!graph) return fail(ACL_ERROR_RT_PARAM_INVALID, "the graph is null");
  if (softnpu::is_late()) {
    const Replay replay{static_cast<List *>(graph), std::this_thread::get_id()};
    // A task group has the parameters of one replay: the last one runs before they change again.
    if (replay.graph->late_replays) softnpu_flush();
    replay.graph->late_replays++;
    softnpu::put(stream, [replay] { run_late(replay); }, /*lazily=*/true);
    return ACL_SUCCESS;
  }
  std::lock_guard<std::mutex> held(queue_lock);
  queue.push_back({static_cast<List *>(graph), std::this_thread::get_id()});
  return ACL_SUCCESS;
}
EXPORT aclError aclmdlRIDestroy(aclmdlRI graph) {
  softnpu_flush();
  delete static_cast<List *>(graph);
  return ACL_SUCCESS;
}
