// A communicator of libhccl.so: ranks are processes of one host and share a file in /dev/shm.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include <sys/types.h>

#include "hccl/hccl.h"
#include "runtime.h"

namespace softnpu {

constexpr int kMaxRanks = 64;
constexpr uint64_t kSlotBytes = 1 << 20;     // a rank's part of a collective at a time
constexpr uint64_t kMailBytes = 256 << 10;   // a message's part at a time

// What a rank is about to do, so that ranks which disagree fail and do not exchange garbage.
struct Intent {
  uint32_t operation, type, reduction, root;
  uint64_t count;
};

struct SharedHead {
  volatile int attached, arrived, phase;
  struct {
    volatile pid_t pid;
    volatile int left;
    Intent intent;
  } ranks[kMaxRanks];
};

struct Mail {
  volatile int full;
  volatile uint64_t size;
  char data[kMailBytes];
};

class Communicator {
 public:
  // Blocks until all ranks are there, for HCCL_CONNECT_TIMEOUT seconds (120) at most.
  static HcclResult create(int count, int rank, const std::string &path_name,
                           const HcclCommConfig *config, HcclComm *made);
  ~Communicator();

  int count() const { return count_; }
  int rank() const { return rank_; }
  const std::string &path_name() const { return path_name_; }
  const std::string &public_name() const { return public_name_; }
  HcclResult state() const { return state_; }

  char *slot(int rank) { return slots_ + static_cast<uint64_t>(rank) * kSlotBytes; }
  Mail *mail(int from, int to) { return &mails_[from * count_ + to]; }

  // Waits until every rank has come here. An error is for good: later calls get it at once.
  HcclResult barrier();
  // Waits until every rank has come here, and checks that all mean to do the same.
  HcclResult agree(const Intent &intent);
  // Waits until `ready`, and fails as soon as a rank is gone, or after HCCL_EXEC_TIMEOUT seconds.
  HcclResult wait(const std::function<bool()> &ready, const char *what);
  // Writes the sentence to stderr and makes the error the communicator's state.
  HcclResult give_up(HcclResult code, const std::string &sentence);

 private:
  Communicator() = default;
  HcclResult attach();
  int first_dead_rank();

  int count_ = 0, rank_ = 0, file_ = -1;
  std::string path_name_, public_name_, path_;
  uint64_t size_ = 0;
  SharedHead *head_ = nullptr;
  char *slots_ = nullptr;
  Mail *mails_ = nullptr;
  HcclResult state_ = HCCL_SUCCESS;
};

// Does the work now, behind what came before it, and again in each replay of a captured graph.
HcclResult run(aclrtStream stream, std::function<HcclResult()> work);

uint64_t bytes_of(HcclDataType type);

}  // namespace softnpu
