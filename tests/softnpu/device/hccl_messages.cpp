// libhccl.so: messages between two ranks, alone and in batches, through one mailbox for each pair.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "hccl_communicator.h"

using softnpu::bytes_of;
using softnpu::Communicator;
using softnpu::kMailBytes;
using softnpu::Mail;

namespace {

struct Message {
  bool outgoing;
  char *buffer;
  uint64_t bytes;
  int peer;
  uint64_t done = 0;
  bool finished = false;
};

// Moves what can be moved of one message; a message of no bytes still takes a turn.
bool move(Communicator &comm, Message &message) {
  Mail *mail = message.outgoing ? comm.mail(comm.rank(), message.peer)
                                : comm.mail(message.peer, comm.rank());
  if (message.outgoing == (mail->full != 0)) return false;
  uint64_t left = message.bytes - message.done;
  uint64_t size = message.outgoing ? std::min(left, kMailBytes) : mail->size;
  __sync_synchronize();
  if (message.outgoing) {
    std::memcpy(mail->data, message.buffer + message.done, size);
    mail->size = size;
  } else {
    // More than is expected: keep to the buffer; the sender's rest stays and is an error later.
    std::memcpy(message.buffer + message.done, mail->data, std::min(size, left));
  }
  __sync_synchronize();
  mail->full = message.outgoing ? 1 : 0;
  message.done += size;
  message.finished = message.done >= message.bytes;
  return true;
}

HcclResult exchange(Communicator &comm, std::vector<Message> messages) {
  for (const Message &message : messages)
    if (message.peer < 0 || message.peer >= comm.count()) return HCCL_E_PARA;
  bool wrong_size = false;
  auto step = [&] {
    bool moved = true, all = false;
    while (moved) {
      moved = false;
      all = true;
      for (size_t i = 0; i < messages.size(); i++) {
        Message &message = messages[i];
        if (message.finished) continue;
        all = false;
        // Messages of one direction between two ranks arrive in order.
        bool behind = std::any_of(messages.begin(), messages.begin() + i, [&](const Message &one) {
          return !one.finished && one.peer == message.peer && one.outgoing == message.outgoing;
        });
        if (!behind && move(comm, message)) moved = true;
        wrong_size = wrong_size || message.done > message.bytes;
      }
    }
    return all || wrong_size;
  };
  HcclResult code = comm.wait(step, "a message");
  if (wrong_size) return comm.give_up(HCCL_E_PARA, "a message is longer than its receiver expects");
  return code;
}

HcclResult start(HcclComm comm, std::vector<Message> messages) {
  // Messages of a group may be of several streams.
  softnpu_flush();
  return softnpu::run(
      nullptr, [=] { return exchange(*static_cast<Communicator *>(comm), messages); });
}

Message message(bool outgoing, void *buffer, uint64_t count, HcclDataType type, uint32_t peer) {
  return {outgoing, static_cast<char *>(buffer), count * bytes_of(type), static_cast<int>(peer)};
}

// Between HcclGroupStart and HcclGroupEnd messages are kept, and exchanged together at the end.
thread_local int groups = 0;
thread_local std::vector<std::pair<HcclComm, std::vector<Message>>> kept;

HcclResult start_or_keep(HcclComm comm, Message one) {
  if (!groups) return start(comm, {one});
  for (auto &[known, messages] : kept)
    if (known == comm) {
      messages.push_back(one);
      return HCCL_SUCCESS;
    }
  kept.push_back({comm, {one}});
  return HCCL_SUCCESS;
}

}  // namespace

extern "C" {

HcclResult HcclSend(void *buffer, uint64_t count, HcclDataType type, uint32_t to, HcclComm comm,
                    aclrtStream) {
  return start_or_keep(comm, message(true, buffer, count, type, to));
}
HcclResult HcclRecv(void *buffer, uint64_t count, HcclDataType type, uint32_t from, HcclComm comm,
                    aclrtStream) {
  return start_or_keep(comm, message(false, buffer, count, type, from));
}
HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm comm, aclrtStream) {
  std::vector<Message> messages;
  for (uint32_t i = 0; i < count; i++)
    messages.push_back(message(items[i].sendRecvType == HCCL_SEND, items[i].buf, items[i].count,
                               items[i].dataType, items[i].remoteRank));
  return start(comm, messages);
}
HcclResult HcclGroupStart() {
  groups++;
  return HCCL_SUCCESS;
}
HcclResult HcclGroupEnd() {
  if (groups == 0 || --groups > 0) return HCCL_SUCCESS;
  auto pairs = std::move(kept);
  kept.clear();
  for (auto &[comm, messages] : pairs) {
    HcclResult code = start(comm, messages);
    if (code != HCCL_SUCCESS) return code;
  }
  return HCCL_SUCCESS;
}

}  // extern "C"
