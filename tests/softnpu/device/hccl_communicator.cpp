// libhccl.so: communicators.
//
// Every rank holds a lock on its own byte of the shared file. The system drops it when the process
// ends, however it ends, which is how the others learn of it within a fraction of a second.
#include "hccl_communicator.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

namespace softnpu {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_of(const char *variable, double otherwise) {
  const char *text = std::getenv(variable);
  double value = text && *text ? std::atof(text) : 0;
  return value > 0 ? value : otherwise;
}

bool set_lock(int file, int rank) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(file, F_SETLK, &lock) == 0;
}

bool is_locked_by_another(int file, int rank) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(file, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace

HcclResult Communicator::give_up(HcclResult code, const std::string &sentence) {
  state_ = code;
  std::fprintf(stderr, "software NPU: HCCL communicator %s, rank %d of %d: %s\n",
               public_name_.c_str(), rank_, count_, sentence.c_str());
  return code;
}

HcclResult Communicator::create(int count, int rank, const std::string &path_name,
                                const HcclCommConfig *config, HcclComm *made) {
  if (count < 1 || count > kMaxRanks || rank < 0 || rank >= count) return HCCL_E_PARA;
  auto *one = new Communicator;
  one->count_ = count;
  one->rank_ = rank;
  one->path_name_ = one->public_name_ = path_name;
  if (config && config->hcclCommName[0]) one->public_name_ = config->hcclCommName;
  HcclResult code = one->attach();
  if (code != HCCL_SUCCESS) {
    delete one;
    return code;
  }
  *made = one;
  return HCCL_SUCCESS;
}

HcclResult Communicator::attach() {
  path_ = "/dev/shm/softnpu-hccl-" + path_name_;
  file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file_ < 0) return give_up(HCCL_E_OPEN_FILE_FAILURE, path_ + ": " + std::strerror(errno));
  const uint64_t head = 16384;
  static_assert(sizeof(SharedHead) <= 16384, "the head fits in front of the slots");
  size_ = head + count_ * kSlotBytes + static_cast<uint64_t>(count_) * count_ * sizeof(Mail);
  // Reserved at once: without room, writing to the mapping would end the process with SIGBUS.
  int failed = posix_fallocate(file_, 0, static_cast<off_t>(size_));
  if (failed)
    return give_up(HCCL_E_MEMORY, "/dev/shm has no room for " + std::to_string(size_) +
                                      " bytes: " + std::strerror(failed));
  void *mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  if (mapped == MAP_FAILED) return give_up(HCCL_E_MEMORY, std::strerror(errno));
  head_ = static_cast<SharedHead *>(mapped);
  slots_ = static_cast<char *>(mapped) + head;
  mails_ = reinterpret_cast<Mail *>(slots_ + count_ * kSlotBytes);
  if (!set_lock(file_, rank_))
    return give_up(HCCL_E_PARA, "another process has this rank already");
  head_->ranks[rank_].pid = getpid();
  __sync_add_and_fetch(&head_->attached, 1);
  auto deadline = Clock::now() + std::chrono::duration<double>(
                                     seconds_of("HCCL_CONNECT_TIMEOUT", 120));
  while (head_->attached < count_) {
    if (Clock::now() > deadline) {
      unlink(path_.c_str());
      return give_up(HCCL_E_TIMEOUT, "only " + std::to_string(head_->attached) +
                                         " ranks came within HCCL_CONNECT_TIMEOUT");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  HcclResult code = barrier();
  if (rank_ == 0) unlink(path_.c_str());
  return code;
}

Communicator::~Communicator() {
  if (head_) {
    head_->ranks[rank_].left = 1;
    munmap(head_, size_);
  }
  if (file_ >= 0) close(file_);
}

int Communicator::first_dead_rank() {
  for (int other = 0; other < count_; other++) {
    if (other == rank_) continue;
    if (head_->ranks[other].left) return other;
    // A process holds no lock against itself; its other ranks live as long as this one.
    if (head_->ranks[other].pid != getpid() && !is_locked_by_another(file_, other)) return other;
  }
  return -1;
}

HcclResult Communicator::wait(const std::function<bool()> &ready, const char *what) {
  if (state_ != HCCL_SUCCESS) return state_;
  for (int spin = 0; spin < 200; spin++) {
    if (ready()) return HCCL_SUCCESS;
    sched_yield();
  }
  auto began = Clock::now(), looked = began;
  auto limit = std::chrono::duration<double>(seconds_of("HCCL_EXEC_TIMEOUT", 600));
  while (!ready()) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    auto now = Clock::now();
    if (now - looked > std::chrono::milliseconds(200)) {
      looked = now;
      int dead = first_dead_rank();
      // It may have done its part and left between the two looks.
      if (dead >= 0 && !ready())
        return give_up(HCCL_E_REMOTE, std::string(what) + ": rank " + std::to_string(dead) +
                                          " has ended or left the communicator");
      if (now - began > limit)
        return give_up(HCCL_E_TIMEOUT, std::string(what) + " took longer than HCCL_EXEC_TIMEOUT");
    }
  }
  return HCCL_SUCCESS;
}

HcclResult Communicator::barrier() {
  if (state_ != HCCL_SUCCESS) return state_;
  int phase = head_->phase;
  if (__sync_add_and_fetch(&head_->arrived, 1) == count_) {
    head_->arrived = 0;
    __sync_synchronize();
    head_->phase = phase + 1;
    return HCCL_SUCCESS;
  }
  HcclResult code = wait([&] { return head_->phase != phase; }, "a collective");
  __sync_synchronize();
  return code;
}

HcclResult Communicator::agree(const Intent &intent) {
  head_->ranks[rank_].intent = intent;
  HcclResult code = barrier();
  if (code != HCCL_SUCCESS) return code;
  for (int other = 0; other < count_; other++) {
    const Intent &theirs = head_->ranks[other].intent;
    if (std::memcmp(&theirs, &intent, sizeof intent) == 0) continue;
    auto text = [](const Intent &one) {
      return "operation " + std::to_string(one.operation) + " of " + std::to_string(one.count) +
             " elements of type " + std::to_string(one.type) + ", reduction " +
             std::to_string(one.reduction) + ", root " + std::to_string(one.root);
    };
    return give_up(HCCL_E_PARA, "ranks disagree: this one calls " + text(intent) + "; rank " +
                                    std::to_string(other) + " calls " + text(theirs));
  }
  return barrier();
}

HcclResult run(aclrtStream stream, std::function<HcclResult()> work) {
  softnpu_progress(stream);
  HcclResult code = work();
  if (code != HCCL_SUCCESS || !softnpu_is_capturing()) return code;
  softnpu_record(
      [](void *data) {
        HcclResult again = (*static_cast<std::function<HcclResult()> *>(data))();
        if (again != HCCL_SUCCESS)
          throw std::runtime_error("software NPU: a collective in a replayed graph failed: " +
                                   std::to_string(again));
      },
      [](void *data) { delete static_cast<std::function<HcclResult()> *>(data); },
      new std::function<HcclResult()>(std::move(work)));
  return code;
}

}  // namespace softnpu

using softnpu::Communicator;

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo *info) {
  static std::atomic<int> made{0};
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  std::memset(info, 0, sizeof *info);
  std::snprintf(info->internal, 100, "%d-%d-%ld%09ld", getpid(), ++made, now.tv_sec, now.tv_nsec);
  return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfo(uint32_t count, const HcclRootInfo *info, uint32_t rank,
                                HcclComm *comm) {
  return Communicator::create(count, rank, info->internal, nullptr, comm);
}
HcclResult HcclCommInitRootInfoConfig(uint32_t count, const HcclRootInfo *info, uint32_t rank,
                                      const HcclCommConfig *config, HcclComm *comm) {
  return Communicator::create(count, rank, info->internal, config, comm);
}
HcclResult HcclCreateSubCommConfig(HcclComm *parent, uint32_t count, uint32_t *ranks, uint64_t id,
                                   uint32_t rank, HcclCommConfig *config, HcclComm *made) {
  if (!ranks) {  // this rank is no member
    *made = nullptr;
    return HCCL_SUCCESS;
  }
  auto *whole = static_cast<Communicator *>(*parent);
  return Communicator::create(count, rank, whole->path_name() + "-" + std::to_string(id), config,
                              made);
}
HcclResult HcclCommDestroy(HcclComm comm) {
  softnpu_flush();
  delete static_cast<Communicator *>(comm);
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommName(HcclComm comm, char *name) {
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s",
                static_cast<Communicator *>(comm)->public_name().c_str());
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *count) {
  *count = static_cast<Communicator *>(comm)->count();
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank) {
  *rank = static_cast<Communicator *>(comm)->rank();
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *error) {
  *error = static_cast<Communicator *>(comm)->state();
  return HCCL_SUCCESS;
}
// torch_npu asks which of the fields of HcclCommConfig are known: those up to the name.
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_COMM_NAME + 1; }
// Determinism: ranks are always reduced in the same order.
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
const char *HcclGetErrorString(HcclResult code) {
  switch (code) {
    case HCCL_SUCCESS: return "no error";
    case HCCL_E_PARA: return "ranks disagree, or an argument is wrong (software NPU)";
    case HCCL_E_REMOTE: return "another rank has ended (software NPU)";
    case HCCL_E_TIMEOUT: return "another rank did not come in time (software NPU)";
    case HCCL_E_NOT_SUPPORT: return "not implemented by the software NPU";
    default: return "an error of the software NPU's HCCL; its sentence is on stderr";
  }
}

}  // extern "C"
