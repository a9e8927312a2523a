// libhccl.so: collectives, through each rank's slot of the shared file, a part at a time.
//
// Reductions go through the ranks in order, in float for the 16-bit floats; every rank gets the
// same bits.
#include <algorithm>
#include <cstring>
#include <vector>

#include "hccl_communicator.h"

using softnpu::bytes_of;
using softnpu::Communicator;
using softnpu::kSlotBytes;

#define HCCL_TRY(call)                            \
  do {                                            \
    HcclResult code_ = (call);                    \
    if (code_ != HCCL_SUCCESS) return code_;      \
  } while (0)

namespace softnpu {

uint64_t bytes_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0: return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64: return 8;
    case HCCL_DATA_TYPE_INT128: return 16;
    default: return 0;
  }
}

}  // namespace softnpu

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  BFloat16() = default;
  BFloat16(float value) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000)
      bits = static_cast<uint16_t>((wide >> 16) | 0x40);
    else
      bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
};

// Reduces `count` elements that lie `offset` bytes into every rank's slot.
template <typename Stored, typename Wide>
void reduce_as(Communicator &comm, void *out, uint64_t offset, uint64_t count, HcclReduceOp how) {
  auto *to = static_cast<Stored *>(out);
  for (uint64_t i = 0; i < count; i++) {
    auto element = [&](int rank) {
      return static_cast<Wide>(reinterpret_cast<Stored *>(comm.slot(rank) + offset)[i]);
    };
    Wide total = element(0);
    for (int rank = 1; rank < comm.count(); rank++) {
      Wide next = element(rank);
      switch (how) {
        case HCCL_REDUCE_SUM: total = static_cast<Wide>(total + next); break;
        case HCCL_REDUCE_PROD: total = static_cast<Wide>(total * next); break;
        case HCCL_REDUCE_MAX: total = std::max(total, next); break;
        default: total = std::min(total, next); break;
      }
    }
    to[i] = static_cast<Stored>(total);
  }
}

HcclResult reduce(Communicator &comm, void *out, uint64_t offset, uint64_t count,
                  HcclDataType type, HcclReduceOp how) {
  if (how > HCCL_REDUCE_MIN) return HCCL_E_NOT_SUPPORT;
  switch (type) {
    case HCCL_DATA_TYPE_FP32: reduce_as<float, float>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_FP64: reduce_as<double, double>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_BFP16: reduce_as<BFloat16, float>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_FP16: reduce_as<_Float16, float>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_INT8: reduce_as<int8_t, int8_t>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_UINT8: reduce_as<uint8_t, uint8_t>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_INT16: reduce_as<int16_t, int16_t>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_INT32: reduce_as<int32_t, int32_t>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_INT64: reduce_as<int64_t, int64_t>(comm, out, offset, count, how); break;
    case HCCL_DATA_TYPE_UINT64: reduce_as<uint64_t, uint64_t>(comm, out, offset, count, how); break;
    default: return HCCL_E_NOT_SUPPORT;
  }
  return HCCL_SUCCESS;
}

char *at(const void *pointer, uint64_t bytes) {
  return static_cast<char *>(const_cast<void *>(pointer)) + bytes;
}

// Calls part(first byte, bytes) until `total` bytes are done, `step` at a time.
template <typename Part>
HcclResult in_parts(uint64_t total, uint64_t step, Part part) {
  for (uint64_t first = 0; first < total; first += step)
    HCCL_TRY(part(first, std::min(step, total - first)));
  return HCCL_SUCCESS;
}

HcclResult all_reduce(Communicator &comm, void *send, void *recv, uint64_t count,
                      HcclDataType type, HcclReduceOp how, int root) {
  const uint64_t width = bytes_of(type);
  const uint32_t operation = root < 0 ? HCCL_CMD_ALLREDUCE : HCCL_CMD_REDUCE;
  HCCL_TRY(comm.agree({operation, static_cast<uint32_t>(type), static_cast<uint32_t>(how),
                       static_cast<uint32_t>(root), count}));
  return in_parts(count * width, kSlotBytes, [&](uint64_t first, uint64_t bytes) {
    std::memcpy(comm.slot(comm.rank()), at(send, first), bytes);
    HCCL_TRY(comm.barrier());
    if (root < 0 || comm.rank() == root)
      HCCL_TRY(reduce(comm, at(recv, first), 0, bytes / width, type, how));
    return comm.barrier();
  });
}

HcclResult broadcast(Communicator &comm, void *buffer, uint64_t count, HcclDataType type,
                     uint32_t root) {
  HCCL_TRY(comm.agree({HCCL_CMD_BROADCAST, static_cast<uint32_t>(type), 0, root, count}));
  const bool is_root = comm.rank() == static_cast<int>(root);
  return in_parts(count * bytes_of(type), kSlotBytes, [&](uint64_t first, uint64_t bytes) {
    if (is_root) std::memcpy(comm.slot(root), at(buffer, first), bytes);
    HCCL_TRY(comm.barrier());
    if (!is_root) std::memcpy(at(buffer, first), comm.slot(root), bytes);
    return comm.barrier();
  });
}

HcclResult all_gather(Communicator &comm, void *send, void *recv, uint64_t count,
                      HcclDataType type) {
  const uint64_t total = count * bytes_of(type);
  HCCL_TRY(comm.agree({HCCL_CMD_ALLGATHER, static_cast<uint32_t>(type), 0, 0, count}));
  return in_parts(total, kSlotBytes, [&](uint64_t first, uint64_t bytes) {
    std::memcpy(comm.slot(comm.rank()), at(send, first), bytes);
    HCCL_TRY(comm.barrier());
    for (int rank = 0; rank < comm.count(); rank++)
      std::memcpy(at(recv, rank * total + first), comm.slot(rank), bytes);
    return comm.barrier();
  });
}

HcclResult reduce_scatter(Communicator &comm, void *send, void *recv, uint64_t count,
                          HcclDataType type, HcclReduceOp how) {
  const uint64_t width = bytes_of(type), total = count * width;
  const uint64_t step = kSlotBytes / comm.count() / 16 * 16;
  HCCL_TRY(comm.agree({HCCL_CMD_REDUCE_SCATTER, static_cast<uint32_t>(type),
                       static_cast<uint32_t>(how), 0, count}));
  return in_parts(total, step, [&](uint64_t first, uint64_t bytes) {
    for (int rank = 0; rank < comm.count(); rank++)
      std::memcpy(comm.slot(comm.rank()) + rank * step, at(send, rank * total + first), bytes);
    HCCL_TRY(comm.barrier());
    HCCL_TRY(reduce(comm, at(recv, first), comm.rank() * step, bytes / width, type, how));
    return comm.barrier();
  });
}

HcclResult scatter(Communicator &comm, void *send, void *recv, uint64_t count, HcclDataType type,
                   uint32_t root) {
  const uint64_t total = count * bytes_of(type), step = kSlotBytes / comm.count() / 16 * 16;
  HCCL_TRY(comm.agree({HCCL_CMD_SCATTER, static_cast<uint32_t>(type), 0, root, count}));
  return in_parts(total, step, [&](uint64_t first, uint64_t bytes) {
    if (comm.rank() == static_cast<int>(root))
      for (int rank = 0; rank < comm.count(); rank++)
        std::memcpy(comm.slot(root) + rank * step, at(send, rank * total + first), bytes);
    HCCL_TRY(comm.barrier());
    std::memcpy(at(recv, first), comm.slot(root) + comm.rank() * step, bytes);
    return comm.barrier();
  });
}

using Sizes = std::vector<uint64_t>;  // one for each rank, in bytes

// Counts and offsets in elements, as the arguments of the V collectives have them, in bytes.
Sizes sizes(const void *counts, int ranks, uint64_t width) {
  auto *from = static_cast<const uint64_t *>(counts);
  Sizes found(from, from + ranks);
  for (uint64_t &one : found) one *= width;
  return found;
}

struct Parts {
  char *buffer;
  Sizes bytes, offsets;
};

HcclResult all_to_all(Communicator &comm, const Parts &send, const Parts &recv) {
  const uint64_t step = kSlotBytes / comm.count() / 16 * 16;
  HCCL_TRY(comm.agree({HCCL_CMD_ALLTOALLV, 0, 0, 0, 0}));
  // How many turns there are is what the largest part of any rank needs; what each sends is told
  // first, so that a receiver which expects something else fails.
  std::memcpy(comm.slot(comm.rank()), send.bytes.data(), send.bytes.size() * sizeof(uint64_t));
  HCCL_TRY(comm.barrier());
  uint64_t most = 0;
  bool fits = true;
  for (int rank = 0; rank < comm.count(); rank++) {
    auto *told = reinterpret_cast<uint64_t *>(comm.slot(rank));
    for (int to = 0; to < comm.count(); to++) most = std::max(most, told[to]);
    fits = fits && told[comm.rank()] == recv.bytes[rank];
  }
  HCCL_TRY(comm.barrier());
  if (!fits)
    return comm.give_up(HCCL_E_PARA, "an all_to_all sends this rank other sizes than it expects");
  return in_parts(most, step, [&](uint64_t first, uint64_t) {
    auto here = [&](uint64_t bytes) { return bytes > first ? std::min(step, bytes - first) : 0; };
    for (int to = 0; to < comm.count(); to++)
      std::memcpy(comm.slot(comm.rank()) + to * step, send.buffer + send.offsets[to] + first,
                  here(send.bytes[to]));
    HCCL_TRY(comm.barrier());
    for (int from = 0; from < comm.count(); from++)
      std::memcpy(recv.buffer + recv.offsets[from] + first,
                  comm.slot(from) + comm.rank() * step, here(recv.bytes[from]));
    return comm.barrier();
  });
}

Communicator &of(HcclComm comm) { return *static_cast<Communicator *>(comm); }

}  // namespace

extern "C" {

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  return softnpu::run(stream, [=] { return of(comm).agree({HCCL_CMD_BARRIER, 0, 0, 0, 0}); });
}
HcclResult HcclAllReduce(void *send, void *recv, uint64_t count, HcclDataType type,
                         HcclReduceOp how, HcclComm comm, aclrtStream stream) {
  return softnpu::run(stream, [=] {
    return all_reduce(of(comm), send, recv, count, type, how, -1);
  });
}
HcclResult HcclReduce(void *send, void *recv, uint64_t count, HcclDataType type, HcclReduceOp how,
                      uint32_t root, HcclComm comm, aclrtStream stream) {
  return softnpu::run(stream, [=] {
    return all_reduce(of(comm), send, recv, count, type, how, root);
  });
}
HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root,
                         HcclComm comm, aclrtStream stream) {
  return softnpu::run(stream, [=] { return broadcast(of(comm), buffer, count, type, root); });
}
HcclResult HcclAllGather(void *send, void *recv, uint64_t count, HcclDataType type, HcclComm comm,
                         aclrtStream stream) {
  return softnpu::run(stream, [=] { return all_gather(of(comm), send, recv, count, type); });
}
HcclResult HcclReduceScatter(void *send, void *recv, uint64_t count, HcclDataType type,
                             HcclReduceOp how, HcclComm comm, aclrtStream stream) {
  return softnpu::run(stream, [=] {
    return reduce_scatter(of(comm), send, recv, count, type, how);
  });
}
HcclResult HcclScatter(void *send, void *recv, uint64_t count, HcclDataType type, uint32_t root,
                       HcclComm comm, aclrtStream stream) {
  return softnpu::run(stream, [=] { return scatter(of(comm), send, recv, count, type, root); });
}
HcclResult HcclAlltoAllV(const void *send, const void *send_counts, const void *send_offsets,
                         HcclDataType send_type, const void *recv, const void *recv_counts,
                         const void *recv_offsets, HcclDataType recv_type, HcclComm comm,
                         aclrtStream stream) {
  // The counts are the host's and may be gone when a graph is replayed.
  const int ranks = of(comm).count();
  const uint64_t out = bytes_of(send_type), in = bytes_of(recv_type);
  Parts from{at(send, 0), sizes(send_counts, ranks, out), sizes(send_offsets, ranks, out)};
  Parts to{at(recv, 0), sizes(recv_counts, ranks, in), sizes(recv_offsets, ranks, in)};
  return softnpu::run(stream, [=] { return all_to_all(of(comm), from, to); });
}
HcclResult HcclAlltoAll(const void *send, uint64_t send_count, HcclDataType send_type,
                        const void *recv, uint64_t recv_count, HcclDataType recv_type,
                        HcclComm comm, aclrtStream stream) {
  Sizes out(of(comm).count(), send_count), in(of(comm).count(), recv_count), out_at, in_at;
  for (int rank = 0; rank < of(comm).count(); rank++) {
    out_at.push_back(rank * send_count);
    in_at.push_back(rank * recv_count);
  }
  return HcclAlltoAllV(send, out.data(), out_at.data(), send_type, recv, in.data(), in_at.data(),
                       recv_type, comm, stream);
}
// An all_to_all in which a rank sends the same part to all ranks.
HcclResult HcclAllGatherV(void *send, uint64_t count, void *recv, const void *counts,
                          const void *offsets, HcclDataType type, HcclComm comm,
                          aclrtStream stream) {
  const int ranks = of(comm).count();
  const uint64_t width = bytes_of(type);
  Parts from{at(send, 0), Sizes(ranks, count * width), Sizes(ranks, 0)};
  Parts to{at(recv, 0), sizes(counts, ranks, width), sizes(offsets, ranks, width)};
  return softnpu::run(stream, [=] { return all_to_all(of(comm), from, to); });
}

}  // extern "C"
