// libascendcl.so: streams, events and host callbacks.
//
// What is put on a stream has run when the call returns, so waiting for a stream or an event is
// waiting for the replays of graphs that nobody needed yet; but in late mode (acl_late.cpp).
#include "runtime.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>

using softnpu::Event;
using softnpu::fail;
using softnpu::Stream;

namespace {

std::atomic<int> streams{0};
std::mutex recorded_lock;
std::condition_variable recorded_signal;
constexpr std::chrono::seconds kLongestWait{60};

double now() {
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

void mark(Event *event, bool recorded) {
  std::lock_guard<std::mutex> held(recorded_lock);
  event->recorded = recorded;
  if (recorded) event->milliseconds = now();
  recorded_signal.notify_all();
}

aclError new_stream(aclrtStream *stream) {
  int device = softnpu::current_device();
  if (device < 0)
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "a stream needs a device, and this thread has set none");
  *stream = softnpu::new_stream(device, ++streams);
  return ACL_SUCCESS;
}

aclError new_event(aclrtEvent *event, uint32_t flags) {
  *event = new Event{softnpu::current_device(), (flags & ACL_EVENT_EXTERNAL) != 0};
  return ACL_SUCCESS;
}

aclError wait_for_device() {
  if (softnpu::is_late()) return softnpu::wait_for(softnpu::clock_of_all());
  softnpu_flush();
  return ACL_SUCCESS;
}

aclError launch(aclrtStream stream, void (*function)(void *), void *data) {
  if (!softnpu::is_late()) softnpu_flush();
  softnpu::submit(stream, [=] { function(data); });
  return ACL_SUCCESS;
}

}  // namespace

namespace softnpu {

void wait_until_recorded(Event *event) {
  {
    std::lock_guard<std::mutex> held(recorded_lock);
    if (event->recorded) return;
  }
  WithoutInterpreterLock released;
  std::unique_lock<std::mutex> held(recorded_lock);
  if (!recorded_signal.wait_for(held, kLongestWait, [&] { return event->recorded; }))
    throw std::runtime_error(
        "software NPU: the replay of a graph waited 60 s for an external event that nobody "
        "recorded; what needs the replay's results came before the event");
}

}  // namespace softnpu

// --- streams -----------------------------------------------------------------------------------

EXPORT aclError aclrtCreateStream(aclrtStream *stream) { return new_stream(stream); }
EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) {
  return new_stream(stream);
}
EXPORT aclError aclrtDestroyStream(aclrtStream stream) {
  softnpu_flush();
  if (!softnpu::is_late()) delete static_cast<Stream *>(stream);  // events may speak of it
  return ACL_SUCCESS;
}
EXPORT aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
EXPORT aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
  *id = stream ? static_cast<Stream *>(stream)->id : 0;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  if (softnpu::is_late()) {
    bool complete;
    aclError code = softnpu::query(softnpu::clock_of(stream),
                                   &softnpu::stream_of(stream)->queries, &complete);
    if (!complete) *status = ACL_STREAM_STATUS_NOT_READY;
    return code;
  }
  softnpu_flush();
  return ACL_SUCCESS;
}
EXPORT aclError aclrtSynchronizeStream(aclrtStream stream) { return softnpu_wait(stream); }
EXPORT aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
  return softnpu_wait(stream);
}
EXPORT aclError aclrtSynchronizeDevice() { return wait_for_device(); }
EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return wait_for_device(); }

// Settings without an effect on results: failure modes, tags, what a profiler keeps. The switch that reports overflows is off and stays so.
EXPORT aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr which,
                                        aclrtStreamAttrValue *value) {
  if (which != ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK || !value->overflowSwitch) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "overflow detection is not implemented");
}
EXPORT aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t on) {
  if (!on) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "overflow detection is not implemented");
}
EXPORT aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t *on) {
  *on = 0;
  return ACL_SUCCESS;
}

// --- host functions ------------------------------------------------------------------------------

EXPORT aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtProcessReport(int32_t) {
  // Callbacks have run where they were launched; a thread that serves reports has nothing to do.
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return ACL_SUCCESS;
}
EXPORT aclError aclrtLaunchCallback(aclrtCallback function, void *data, aclrtCallbackBlockType,
                                    aclrtStream stream) {
  return launch(stream, function, data);
}
EXPORT aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *data) {
  return launch(stream, function, data);
}

// --- events --------------------------------------------------------------------------------------

EXPORT aclError aclrtCreateEvent(aclrtEvent *event) { return new_event(event, 0); }
EXPORT aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flags) {
  return new_event(event, flags);
}
EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flags) {
  return new_event(event, flags);
}
EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
  delete static_cast<Event *>(event);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  auto *which = static_cast<Event *>(event);
  if (softnpu::is_late()) {
    which->clock = softnpu::clock_of(stream);
    which->queries = 0;
  }
  mark(which, true);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
  auto *which = static_cast<Event *>(event);
  if (which->external) softnpu::submit(stream, [which] { mark(which, false); });
  return ACL_SUCCESS;
}
EXPORT aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  auto *which = static_cast<Event *>(event);
  if (which->external && softnpu_is_capturing()) {
    // Only replays wait: the capture itself comes before the first record.
    softnpu_record([](void *data) { softnpu::wait_until_recorded(static_cast<Event *>(data)); },
                   [](void *) {}, which);
  } else if (softnpu::is_late() && !softnpu_is_capturing()) {
    softnpu::order_behind(stream, which->clock);
  }
  return ACL_SUCCESS;
}
EXPORT aclError aclrtSynchronizeEvent(aclrtEvent event) {
  if (softnpu::is_late()) return softnpu::wait_for(static_cast<Event *>(event)->clock);
  softnpu_flush();
  return ACL_SUCCESS;
}
EXPORT aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  if (softnpu::is_late()) {
    auto *which = static_cast<Event *>(event);
    bool complete;
    aclError code = softnpu::query(which->clock, &which->queries, &complete);
    if (!complete) *status = ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return code;
  }
  softnpu_flush();
  return ACL_SUCCESS;
}
EXPORT aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus *status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
  auto *first = static_cast<Event *>(start), *last = static_cast<Event *>(end);
  if (!first->recorded || !last->recorded)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "the time between events needs both to be recorded");
  *milliseconds = static_cast<float>(last->milliseconds - first->milliseconds);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *microseconds) {
  *microseconds = static_cast<uint64_t>(static_cast<Event *>(event)->milliseconds * 1000);
  return ACL_SUCCESS;
}
