"""The software NPU inside a process: kernels for torch_npu's operators, and their trace."""
