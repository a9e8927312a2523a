// libascendcl.so: late mode (SOFTNPU_LATE), in which a missing wait is a wrong result every time.
//
// A late stream is a list of items (operators, asynchronous copies, fills, replays, callbacks) that
// run when something is ordered behind them. A copy to the host takes a snapshot when its item runs,
// and its write is held until the host has waited for it. So there are two things to ask for: that
// the device runs on (`run_until`), which shows the host nothing, and that the host has waited
// (`wait_for`), which also lets the held writes land.
//
// What a stream or an event is ordered behind is a `Clock`: for each stream, how many of its items.
//
// SOFTNPU_LATE          0 (off), all, default (the first stream of each device), side (the others)
// SOFTNPU_LATE_QUERIES  how often a query says "not yet" before it waits (8)
// SOFTNPU_LATE_ITEMS    how many items wait before the device runs on by itself (50000)
#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

namespace softnpu {

namespace {

struct Item {
  uint64_t place;
  std::function<void()> run;
};

// A write to host memory that the host has not waited for.
struct Held {
  uint64_t place;
  char *to;
  std::vector<char> bytes;
};

enum class Mode { kOff, kAll, kDefault, kSide };

Mode chosen_mode() {
  const char *text = std::getenv("SOFTNPU_LATE");
  const std::string name = text ? text : "";
  if (name.empty() || name == "0") return Mode::kOff;
  if (name == "all") return Mode::kAll;
  if (name == "default") return Mode::kDefault;
  if (name == "side") return Mode::kSide;
  std::fprintf(stderr, "software NPU: SOFTNPU_LATE is %s; it may be 0, all, default or side\n",
               name.c_str());
  std::exit(2);
}

Mode mode() {
  static const Mode chosen = chosen_mode();
  return chosen;
}

int number(const char *variable, int otherwise) {
  const char *text = std::getenv(variable);
  return text && *text ? std::atoi(text) : otherwise;
}

std::mutex lock;      // guards all that follows; held for moments
std::mutex run_lock;  // held by the thread that runs items; taken before `lock`
size_t waiting = 0;   // items of all streams
std::string failure;  // of an item, for whoever waits next

// Where the item that this thread runs is.
thread_local Stream *running = nullptr;
thread_local uint64_t running_place = 0;

}  // namespace

struct StreamLists {
  Clock behind;   // what the last item is ordered behind, on other streams
  uint64_t issued = 0;
  std::deque<Item> items;
  std::deque<Held> held;
};

namespace {

std::vector<std::unique_ptr<StreamLists>> &lists() {
  static auto *all = new std::vector<std::unique_ptr<StreamLists>>;  // kept to the end
  return *all;
}
std::vector<Stream *> &streams() {
  static auto *all = new std::vector<Stream *>;
  return *all;
}

void merge(Clock &into, const Clock &other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); i++) into[i] = std::max(into[i], other[i]);
}

// Runs a stream's items up to a place. `run_lock` is held.
void run_stream(size_t which, uint64_t until) {
  for (;;) {
    Item item;
    Stream *stream;
    {
      std::lock_guard<std::mutex> held(lock);
      auto &items = lists()[which]->items;
      if (items.empty() || items.front().place > until) return;
      item = std::move(items.front());
      items.pop_front();
      waiting--;
      stream = streams()[which];
    }
    Stream *outer = running;
    const uint64_t outer_place = running_place;
    running = stream;
    running_place = item.place;
    try {
      item.run();
    } catch (const std::exception &error) {
      std::fprintf(stderr, "software NPU: an item of stream %d failed: %s\n", stream->id,
                   error.what());
      std::lock_guard<std::mutex> held(lock);
      if (failure.empty()) failure = error.what();
    }
    running = outer;
    running_place = outer_place;
  }
}

void run_clock(const Clock &clock) {
  for (size_t i = 0; i < clock.size(); i++)
    if (clock[i]) run_stream(i, clock[i]);
}

// Lets the writes to host memory land that a clock is behind.
void land(const Clock &clock) {
  std::lock_guard<std::mutex> guard(lock);
  for (size_t i = 0; i < clock.size(); i++) {
    auto &held = lists()[i]->held;
    while (!held.empty() && held.front().place <= clock[i]) {
      std::memcpy(held.front().to, held.front().bytes.data(), held.front().bytes.size());
      held.pop_front();
    }
  }
}

void reach(const Clock &clock, bool host) {
  if (running) return;  // an item does not wait for items
  for (;;) {
    if (run_lock.try_lock()) break;
    // An item may need the interpreter lock. Taken without it and given up before it is wanted
    // back: holding one while waiting for the other is how two threads wait for ever.
    WithoutInterpreterLock released;
    run_lock.lock();
    run_lock.unlock();
  }
  std::lock_guard<std::mutex> guard(run_lock, std::adopt_lock);
  run_clock(clock);
  if (host) land(clock);
}

bool reached(const Clock &clock) {
  std::lock_guard<std::mutex> guard(lock);
  for (size_t i = 0; i < clock.size(); i++) {
    const StreamLists &one = *lists()[i];
    if (!one.items.empty() && one.items.front().place <= clock[i]) return false;
    if (!one.held.empty() && one.held.front().place <= clock[i]) return false;
  }
  return true;
}

}  // namespace

bool is_late() { return mode() != Mode::kOff; }

bool is_running_item() { return running != nullptr; }

Stream *new_stream(int device, int id) {
  auto *stream = new Stream{device, id, true, 0};
  if (!is_late()) return stream;
  std::lock_guard<std::mutex> guard(lock);
  bool first = true;  // torch_npu makes a device's default stream before any other
  for (const Stream *other : streams()) first = first && (!other->id || other->device != device);
  const bool is_default = first || id == 0;
  if (mode() == Mode::kDefault) stream->late = is_default;
  if (mode() == Mode::kSide) stream->late = !is_default;
  stream->index = streams().size();
  streams().push_back(stream);
  lists().push_back(std::make_unique<StreamLists>());
  return stream;
}

// The stream that a null pointer means.
Stream *stream_of(aclrtStream stream) {
  static Stream *null_stream = new_stream(0, 0);
  return stream ? static_cast<Stream *>(stream) : null_stream;
}

Clock clock_of(aclrtStream which) {
  Stream *stream = stream_of(which);
  std::lock_guard<std::mutex> guard(lock);
  StreamLists &own = *lists()[stream->index];
  Clock clock = own.behind;
  if (clock.size() <= stream->index) clock.resize(stream->index + 1);
  clock[stream->index] = own.issued;
  return clock;
}

Clock clock_of_all() {
  std::lock_guard<std::mutex> guard(lock);
  Clock clock;
  for (const auto &one : lists()) clock.push_back(one->issued);
  return clock;
}

void put(aclrtStream which, std::function<void()> work, bool lazily) {
  if (running) return work();
  static const size_t most = number("SOFTNPU_LATE_ITEMS", 50000);
  Stream *stream = stream_of(which);
  bool too_many;
  {
    std::lock_guard<std::mutex> guard(lock);
    StreamLists &own = *lists()[stream->index];
    own.items.push_back({++own.issued, std::move(work)});
    too_many = ++waiting > most;
  }
  if (!stream->late && !lazily) run_until(clock_of(which));
  if (too_many) run_until(clock_of_all());
}

void order_behind(aclrtStream which, const Clock &clock) {
  put(which, [clock] { run_clock(clock); });
  std::lock_guard<std::mutex> guard(lock);
  merge(lists()[stream_of(which)->index]->behind, clock);
}

void run_until(const Clock &clock) { reach(clock, false); }

aclError wait_for(const Clock &clock) {
  reach(clock, true);
  std::string sentence;
  {
    std::lock_guard<std::mutex> guard(lock);
    sentence.swap(failure);
  }
  return sentence.empty() ? ACL_SUCCESS : fail(ACL_ERROR_RT_INTERNAL_ERROR, sentence);
}

aclError query(const Clock &clock, int *times, bool *complete) {
  static const int patience = number("SOFTNPU_LATE_QUERIES", 8);
  *complete = reached(clock) || ++*times > patience;
  if (!*complete) return ACL_SUCCESS;
  *times = 0;
  return wait_for(clock);
}

void copy(void *to, const void *from, size_t size, aclrtMemcpyKind kind) {
  if (kind == ACL_MEMCPY_DEVICE_TO_HOST && running && running->late) {
    auto *bytes = static_cast<const char *>(from);
    std::lock_guard<std::mutex> guard(lock);
    lists()[running->index]->held.push_back(
        {running_place, static_cast<char *>(to), std::vector<char>(bytes, bytes + size)});
    return;
  }
  std::memmove(to, from, size);
  if (kind != ACL_MEMCPY_HOST_TO_DEVICE || !running) return;
  // The device's own writes to the source are in order for the device, if not for the host.
  auto *source = static_cast<const char *>(from);
  std::lock_guard<std::mutex> guard(lock);
  for (const auto &one : lists())
    for (const Held &held : one->held) {
      const char *begin = std::max<const char *>(held.to, source);
      const char *end = std::min<const char *>(held.to + held.bytes.size(), source + size);
      if (begin < end)
        std::memcpy(static_cast<char *>(to) + (begin - source),
                    held.bytes.data() + (begin - held.to), end - begin);
    }
}

void forget_host_memory(void *pointer, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  auto *begin = static_cast<char *>(pointer), *end = begin + size;
  for (const auto &one : lists()) {
    auto &held = one->held;
    held.erase(std::remove_if(held.begin(), held.end(),
                              [&](const Held &h) { return h.to >= begin && h.to < end; }),
               held.end());
  }
}

}  // namespace softnpu

// --- for the boxed kernel and libhccl.so ---------------------------------------------------------

EXPORT int softnpu_is_late() { return softnpu::is_late(); }
EXPORT int softnpu_is_running_item() { return softnpu::is_running_item(); }

EXPORT void softnpu_put(void *stream, void (*run)(void *), void (*destroy)(void *), void *data) {
  std::shared_ptr<void> kept(data, destroy);
  softnpu::put(stream, [run, kept] { run(kept.get()); });
}
EXPORT void softnpu_progress(void *stream) {
  if (softnpu::is_late())
    softnpu::run_until(softnpu::clock_of(stream));
  else
    softnpu_flush();
}
EXPORT int softnpu_wait(void *stream) {
  if (softnpu::is_late()) return softnpu::wait_for(softnpu::clock_of(stream));
  softnpu_flush();
  return ACL_SUCCESS;
}
