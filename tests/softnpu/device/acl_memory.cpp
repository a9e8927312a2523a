// libascendcl.so: memory of devices and pinned host memory, virtual memory (expandable segments),
// memory of other processes (IPC), copies and fills.
//
// All device memory of a process is one sparse memory file; an allocation is a range of it that is
// used once and given back to the system when it is freed. A range can be mapped at any address
// (expandable segments) and, through /proc, in another process.
#include "runtime.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

using softnpu::fail;

namespace {

enum class Kind { kDevice, kPinned, kReserved, kMapped, kImported };

struct Block {
  Kind kind;
  size_t size;
  int device;
  off_t offset;  // in the memory file
};

struct Physical {
  off_t offset;
  size_t size;
  int device;
};

std::mutex lock;
std::map<uintptr_t, Block> blocks;                 // by address; kReserved ones are kept apart
std::map<uintptr_t, size_t> reserved;
std::map<std::string, std::pair<void *, size_t>> imported;  // by key
size_t used[softnpu::kMaxDevices];
off_t file_end = 0;

uintptr_t address(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer); }

int memory_file() {
  static int file = [] {
    int made = memfd_create("softnpu", MFD_CLOEXEC);
    if (made < 0) std::perror("software NPU: memfd_create");
    return made;
  }();
  return file;
}

size_t page_aligned(size_t size) {
  const size_t page = 4096;
  return (size + page - 1) / page * page;
}

// Takes a range of the memory file. `lock` is held.
bool take(int device, size_t size, off_t *offset) {
  if (used[device] + size > softnpu::memory_size()) return false;
  off_t begin = file_end, end = begin + static_cast<off_t>(size);
  if (ftruncate(memory_file(), end) != 0) return false;
  file_end = end;
  used[device] += size;
  *offset = begin;
  return true;
}

// Gives the pages of a range back to the system. `lock` is held.
void give_back(int device, off_t offset, size_t size) {
  fallocate(memory_file(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
  used[device] -= size;
}

aclError out_of_memory(int device, size_t size) {
  return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
              "device " + std::to_string(device) + " has " +
                  std::to_string(softnpu::memory_size() - used[device]) + " bytes left of " +
                  std::to_string(softnpu::memory_size()) + ", and " + std::to_string(size) +
                  " are wanted; SOFTNPU_MEMORY_GB makes it larger");
}

aclError allocate(void **pointer, size_t wanted) {
  int device = softnpu::current_device();
  if (device < 0)
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "memory needs a device, and this thread has set none");
  size_t size = page_aligned(wanted ? wanted : 1);
  std::lock_guard<std::mutex> held(lock);
  off_t offset;
  if (!take(device, size, &offset)) return out_of_memory(device, size);
  void *mapped =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory_file(), offset);
  if (mapped == MAP_FAILED) {
    give_back(device, offset, size);
    return out_of_memory(device, size);
  }
  blocks[address(mapped)] = {Kind::kDevice, size, device, offset};
  *pointer = mapped;
  return ACL_SUCCESS;
}

// The block that an address is in, or nullptr. `lock` is held.
const Block *find(uintptr_t at, uintptr_t *begin = nullptr) {
  auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return nullptr;
  --after;
  if (at >= after->first + after->second.size) return nullptr;
  if (begin) *begin = after->first;
  return &after->second;
}

// Whether all of a range is memory of a device; it may lie in several blocks side by side.
bool is_device_range(const void *pointer, size_t size) {
  std::lock_guard<std::mutex> held(lock);
  uintptr_t at = address(pointer), end = at + size;
  while (at < end) {
    uintptr_t begin;
    const Block *block = find(at, &begin);
    if (!block || block->kind == Kind::kPinned) return false;
    at = begin + block->size;
  }
  return true;
}

aclError check_copy(const void *to, size_t room, const void *from, size_t size,
                    aclrtMemcpyKind kind) {
  if (size > room)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a copy of " + std::to_string(size) +
                                                " bytes has a destination of " +
                                                std::to_string(room));
  bool device_to = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  bool device_from = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  if (device_to && !is_device_range(to, size))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a copy to a device has a destination that is not one "
                                            "of its allocations, or leaves it");
  if (device_from && !is_device_range(from, size))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a copy from a device has a source that is not one of "
                                            "its allocations, or leaves it");
  return ACL_SUCCESS;
}

}  // namespace

namespace softnpu {

size_t memory_used(int device) {
  std::lock_guard<std::mutex> held(lock);
  return used[device];
}

}  // namespace softnpu

// --- allocations -------------------------------------------------------------------------------

EXPORT aclError aclrtMalloc(void **pointer, size_t size, aclrtMemMallocPolicy) {
  return allocate(pointer, size);
}
EXPORT aclError aclrtMallocAlign32(void **pointer, size_t size, aclrtMemMallocPolicy) {
  return allocate(pointer, size);
}
EXPORT aclError aclrtFree(void *pointer) {
  softnpu_flush();
  std::lock_guard<std::mutex> held(lock);
  auto found = blocks.find(address(pointer));
  if (found == blocks.end() || found->second.kind != Kind::kDevice)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree of what aclrtMalloc has not returned");
  Block block = found->second;
  blocks.erase(found);
  munmap(pointer, block.size);
  give_back(block.device, block.offset, block.size);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtMallocHost(void **pointer, size_t size) {
  if (posix_memalign(pointer, 4096, page_aligned(size ? size : 1)) != 0)
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no memory left");
  std::lock_guard<std::mutex> held(lock);
  blocks[address(*pointer)] = {Kind::kPinned, size ? size : 1, -1, 0};
  return ACL_SUCCESS;
}
EXPORT aclError aclrtFreeHost(void *pointer) {
  softnpu_flush();
  std::lock_guard<std::mutex> held(lock);
  auto found = blocks.find(address(pointer));
  if (found == blocks.end() || found->second.kind != Kind::kPinned)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost of what aclrtMallocHost has not returned");
  if (softnpu::is_late()) softnpu::forget_host_memory(pointer, found->second.size);
  blocks.erase(found);
  std::free(pointer);
  return ACL_SUCCESS;
}
// Registered host memory: the device reads host memory anyway, at the same address.
EXPORT aclError aclrtHostRegister(void *pointer, uint64_t, int, void **mapped) {
  if (mapped) *mapped = pointer;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtHostUnregister(void *) { return ACL_SUCCESS; }

EXPORT aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  std::lock_guard<std::mutex> held(lock);
  if (const Block *block = find(address(pointer))) {
    bool host = block->kind == Kind::kPinned;
    attributes->location.type = host ? ACL_MEM_LOCATION_TYPE_HOST : ACL_MEM_LOCATION_TYPE_DEVICE;
    attributes->location.id = host ? 0 : block->device;
  }
  return ACL_SUCCESS;
}

// --- copies and fills ----------------------------------------------------------------------------

EXPORT aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size,
                            aclrtMemcpyKind kind) {
  // Late, it waits for no stream; torch_npu synchronizes before it.
  if (!softnpu::is_late()) softnpu_flush();
  aclError code = check_copy(to, room, from, size, kind);
  if (code == ACL_SUCCESS) std::memmove(to, from, size);
  return code;
}
EXPORT aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size,
                                 aclrtMemcpyKind kind, aclrtStream stream) {
  if (!softnpu::is_late()) softnpu_flush();
  aclError code = check_copy(to, room, from, size, kind);
  if (code == ACL_SUCCESS) softnpu::submit(stream, [=] { softnpu::copy(to, from, size, kind); });
  return code;
}
EXPORT aclError aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t size,
                                              aclrtMemcpyKind kind, aclrtStream stream) {
  return aclrtMemcpyAsync(to, room, from, size, kind, stream);
}
EXPORT aclError aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
  if (!softnpu::is_late()) softnpu_flush();
  if (size > room || !is_device_range(to, size))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a fill leaves the memory that it is for");
  std::memset(to, value, size);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size,
                                aclrtStream stream) {
  if (!softnpu::is_late()) softnpu_flush();
  if (size > room || !is_device_range(to, size))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a fill leaves the memory that it is for");
  softnpu::submit(stream, [=] { std::memset(to, value, size); });
  return ACL_SUCCESS;
}

// --- virtual memory ------------------------------------------------------------------------------

EXPORT aclError aclrtReserveMemAddress(void **pointer, size_t size, size_t, void *wanted, uint64_t) {
  void *mapped =
      mmap(wanted, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED)
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses are left to reserve");
  std::lock_guard<std::mutex> held(lock);
  reserved[address(mapped)] = size;
  *pointer = mapped;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtReleaseMemAddress(void *pointer) {
  softnpu_flush();
  std::lock_guard<std::mutex> held(lock);
  auto found = reserved.find(address(pointer));
  if (found == reserved.end())
    return fail(ACL_ERROR_RT_PARAM_INVALID, "released addresses that were not reserved");
  munmap(pointer, found->second);
  reserved.erase(found);
  return ACL_SUCCESS;
}
EXPORT aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *,
                                                 aclrtMemGranularityOptions, size_t *size) {
  *size = 2 << 20;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size,
                                    const aclrtPhysicalMemProp *properties, uint64_t) {
  int device = properties ? static_cast<int>(properties->location.id) : softnpu::current_device();
  if (device < 0 || device >= softnpu::device_count())
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device " + std::to_string(device));
  std::lock_guard<std::mutex> held(lock);
  off_t offset;
  size = page_aligned(size);
  if (!take(device, size, &offset)) return out_of_memory(device, size);
  *handle = new Physical{offset, size, device};
  return ACL_SUCCESS;
}
EXPORT aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto *physical = static_cast<Physical *>(handle);
  std::lock_guard<std::mutex> held(lock);
  give_back(physical->device, physical->offset, physical->size);
  delete physical;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtMapMem(void *pointer, size_t size, size_t offset, aclrtDrvMemHandle handle,
                            uint64_t) {
  auto *physical = static_cast<Physical *>(handle);
  if (offset + size > physical->size)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "mapped more memory than the handle has");
  std::lock_guard<std::mutex> held(lock);
  off_t from = physical->offset + static_cast<off_t>(offset);
  void *mapped = mmap(pointer, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                      memory_file(), from);
  if (mapped == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::strerror(errno));
  blocks[address(mapped)] = {Kind::kMapped, size, physical->device, from};
  return ACL_SUCCESS;
}
EXPORT aclError aclrtUnmapMem(void *pointer) {
  softnpu_flush();
  std::lock_guard<std::mutex> held(lock);
  auto found = blocks.find(address(pointer));
  if (found == blocks.end() || found->second.kind != Kind::kMapped)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "unmapped what was not mapped");
  // Stays reserved: nothing else may be put there, and a late read is a fault and not old data.
  mmap(pointer, found->second.size, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  blocks.erase(found);
  return ACL_SUCCESS;
}

// --- memory of another process -------------------------------------------------------------------
// A key is "softnpu:<pid>:<file descriptor>:<offset>:<size>:<device>".

EXPORT aclError aclrtIpcMemGetExportKey(void *pointer, size_t, char *key, size_t room, uint64_t) {
  std::lock_guard<std::mutex> held(lock);
  uintptr_t begin;
  const Block *block = find(address(pointer), &begin);
  if (!block || block->kind != Kind::kDevice || begin != address(pointer))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "only whole allocations of aclrtMalloc are exported");
  int written = std::snprintf(key, room, "softnpu:%d:%d:%lld:%zu:%d", getpid(), memory_file(),
                              static_cast<long long>(block->offset), block->size, block->device);
  if (written < 0 || static_cast<size_t>(written) >= room)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "the room for a key is too small");
  return ACL_SUCCESS;
}
// Who may import is the system's decision (/proc), as for any process of the same user.
EXPORT aclError aclrtIpcMemSetImportPid(const char *, int32_t *, size_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtIpcMemImportByKey(void **pointer, const char *key, uint64_t) {
  int pid, descriptor, device;
  long long offset;
  size_t size;
  if (std::sscanf(key, "softnpu:%d:%d:%lld:%zu:%d", &pid, &descriptor, &offset, &size, &device) != 5)
    return fail(ACL_ERROR_RT_PARAM_INVALID, std::string("not a key of exported memory: ") + key);
  std::lock_guard<std::mutex> held(lock);
  if (imported.count(key))
    return fail(ACL_ERROR_RT_PARAM_INVALID, std::string("imported already: ") + key);
  std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
  int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0 || offset + static_cast<off_t>(size) > about.st_size) {
    if (file >= 0) close(file);
    return fail(ACL_ERROR_RT_PARAM_INVALID, "the memory of process " + std::to_string(pid) +
                                                " cannot be reached (has it ended?)");
  }
  void *mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file,
                      static_cast<off_t>(offset));
  close(file);
  if (mapped == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::strerror(errno));
  blocks[address(mapped)] = {Kind::kImported, size, device, 0};
  imported[key] = {mapped, size};
  *pointer = mapped;
  return ACL_SUCCESS;
}
EXPORT aclError aclrtIpcMemClose(const char *key) {
  softnpu_flush();
  std::lock_guard<std::mutex> held(lock);
  auto found = imported.find(key);
  if (found == imported.end()) return ACL_SUCCESS;  // the exporter closes its own key as well
  blocks.erase(address(found->second.first));
  munmap(found->second.first, found->second.second);
  imported.erase(found);
  return ACL_SUCCESS;
}
