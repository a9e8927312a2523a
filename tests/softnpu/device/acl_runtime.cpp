// libascendcl.so: life cycle, devices, contexts, properties and versions.
//
// SOFTNPU_DEVICES    number of devices (1)
// SOFTNPU_MEMORY_GB  memory of each (64); nothing is reserved, pages come with use
// SOFTNPU_SOC        name of the chip (Ascend910B3)
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <unistd.h>

namespace {

struct Context {
  int device;
};

Context contexts[softnpu::kMaxDevices];
bool started[softnpu::kMaxDevices];  // some thread has set this device
thread_local int current = -1;
// torch_npu reads a message while it makes further calls, so older ones stay where they are.
thread_local char messages[8][512];
thread_local int newest = 0;

int number(const char *variable, int otherwise) {
  const char *text = std::getenv(variable);
  return text && *text ? std::atoi(text) : otherwise;
}

aclError set_current(int device) {
  if (device < 0 || device >= softnpu::device_count())
    return softnpu::fail(ACL_ERROR_RT_INVALID_DEVICEID,
                         "there is no device " + std::to_string(device) + ": SOFTNPU_DEVICES is " +
                             std::to_string(softnpu::device_count()));
  current = device;
  contexts[device].device = device;
  started[device] = true;
  return ACL_SUCCESS;
}

}  // namespace

namespace softnpu {

int device_count() {
  int wanted = number("SOFTNPU_DEVICES", 1);
  return wanted < 0 ? 0 : wanted > kMaxDevices ? kMaxDevices : wanted;
}

int current_device() { return current; }

size_t memory_size() { return static_cast<size_t>(number("SOFTNPU_MEMORY_GB", 64)) << 30; }

aclError fail(aclError code, const std::string &sentence) {
  newest = (newest + 1) % 8;
  std::snprintf(messages[newest], sizeof messages[newest], "software NPU: %s", sentence.c_str());
  return code;
}

}  // namespace softnpu

using softnpu::fail;

// --- life cycle ------------------------------------------------------------------------------

EXPORT aclError aclInit(const char *) { return ACL_SUCCESS; }
EXPORT aclError aclFinalize() { return ACL_SUCCESS; }
EXPORT const char *aclGetRecentErrMsg() { return messages[newest]; }
// CANN's log has no reader here; errors come back as return codes.
EXPORT void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {}
EXPORT aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
EXPORT aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

// --- devices and contexts --------------------------------------------------------------------

EXPORT aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = softnpu::device_count();
  return ACL_SUCCESS;
}
EXPORT aclError aclrtSetDevice(int32_t device) { return set_current(device); }
EXPORT aclError aclrtGetDevice(int32_t *device) {
  if (current < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  *device = current;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtResetDevice(int32_t) {
  softnpu_flush();
  return ACL_SUCCESS;
}
EXPORT aclError aclrtResetDeviceForce(int32_t device) { return aclrtResetDevice(device); }

// A device has one context: contexts share its memory and its streams, as torch_npu expects.
EXPORT aclError aclrtCreateContext(aclrtContext *context, int32_t device) {
  aclError code = set_current(device);
  if (code == ACL_SUCCESS) *context = &contexts[device];
  return code;
}
EXPORT aclError aclrtDestroyContext(aclrtContext) { return ACL_SUCCESS; }
EXPORT aclError aclrtGetCurrentContext(aclrtContext *context) {
  if (current < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  *context = &contexts[current];
  return ACL_SUCCESS;
}
EXPORT aclError aclrtSetCurrentContext(aclrtContext context) {
  if (!context) return fail(ACL_ERROR_RT_CONTEXT_NULL, "the context is null");
  return set_current(static_cast<Context *>(context)->device);
}
EXPORT aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
  if (device < 0 || device >= softnpu::device_count())
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device " + std::to_string(device));
  if (flags) *flags = 0;
  *active = started[device];
  return ACL_SUCCESS;
}
// Every device's memory is host memory, so peers reach it.
EXPORT aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtDeviceGetBareTgid(int32_t *pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}

// --- properties: those of an Atlas A2 ----------------------------------------------------------

EXPORT const char *aclrtGetSocName() {
  const char *name = std::getenv("SOFTNPU_SOC");
  return name && *name ? name : "Ascend910B3";
}
EXPORT aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo which, int64_t *value) {
  switch (which) {
    case ACL_DEVICE_INFO_AI_CORE_NUM: *value = 20; return ACL_SUCCESS;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = 40; return ACL_SUCCESS;
    case ACL_DEVICE_INFO_L2_SIZE: *value = 192 << 20; return ACL_SUCCESS;
    default: return fail(ACL_ERROR_RT_PARAM_INVALID, "unknown capability " + std::to_string(which));
  }
}
EXPORT aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t *value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM: *value = 20; return ACL_SUCCESS;
    case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = 20; return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = 40; return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = softnpu::memory_size(); return ACL_SUCCESS;
    default:
      return fail(ACL_ERROR_RT_PARAM_INVALID, "unknown attribute " + std::to_string(attribute));
  }
}
EXPORT aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid *uuid) {
  std::memset(uuid, 0, sizeof *uuid);
  std::snprintf(uuid->bytes, sizeof uuid->bytes, "softnpu-%d", device);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free, size_t *total) {
  // torch_npu asks for the properties of a device before it sets one.
  *total = softnpu::memory_size();
  *free = *total - softnpu::memory_used(current < 0 ? 0 : current);
  return ACL_SUCCESS;
}

// --- settings that change nothing here -----------------------------------------------------------
// Time-outs and failure modes are about a device that can hang; results do not depend on them.

EXPORT aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetOpExecuteTimeOutV2(uint64_t wanted, uint64_t *actual) {
  if (actual) *actual = wanted;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
  // The CPU keeps infinities and NaNs, which is the default of an Atlas A2.
  if (mode == ACL_RT_OVERFLOW_MODE_INFNAN) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "only the INF/NAN overflow mode is implemented");
}

// --- versions ------------------------------------------------------------------------------------

EXPORT aclError aclsysGetVersionStr(char *, char *version) {
  std::strcpy(version, "8.5.0");
  return ACL_SUCCESS;
}
EXPORT aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion *version) {
  std::memset(version, 0, sizeof *version);
  std::strcpy(version->version, "8.5.0");
  std::strcpy(version->majorVersion, "8");
  std::strcpy(version->minorVersion, "5");
  std::strcpy(version->releaseVersion, "0");
  return ACL_SUCCESS;
}
