// libacl_op_compiler.so: options of the operator compiler are taken; an operator that reaches the
// compiler has gone past the boxed kernel, and is refused by name.
#include <cstddef>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "acl/acl_op_compiler.h"

namespace {

[[noreturn]] void refuse(const char *name) {
  std::string sentence = "software NPU: the ACL operator " + std::string(name) +
                         " was asked for past PyTorch's dispatcher and is not implemented";
  std::fprintf(stderr, "%s\n", sentence.c_str());
  throw std::runtime_error(sentence);
}

}  // namespace

extern "C" {

aclError aclSetCompileopt(aclCompileOpt, const char *) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 256; }
aclError aclGetCompileopt(aclCompileOpt, char *value, size_t room) {
  if (room) value[0] = 0;
  return ACL_SUCCESS;
}
// How an NPU's kernels are chosen (determinism, and the like); here there is one of each.
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclopSetCompileFlag(aclOpCompileFlag) { return ACL_SUCCESS; }
aclError aclopCompileAndExecute(const char *name, int, const aclTensorDesc *const[],
                                const aclDataBuffer *const[], int, const aclTensorDesc *const[],
                                aclDataBuffer *const[], const aclopAttr *, aclopEngineType,
                                aclopCompileType, const char *, aclrtStream) {
  refuse(name);
}
aclError aclopCompileAndExecuteV2(const char *name, int, aclTensorDesc *[], aclDataBuffer *[], int,
                                  aclTensorDesc *[], aclDataBuffer *[], aclopAttr *,
                                  aclopEngineType, aclopCompileType, const char *, aclrtStream) {
  refuse(name);
}

}  // extern "C"
