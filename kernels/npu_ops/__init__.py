"""torch_npu's operators on CPU tensors: their schemas, their documented limits, their answers.

`surface.install()` puts them behind `torch.ops.npu` and `torch.ops.atb`, so that an NPU's code path
runs, and fails where an NPU would, on any machine. One module a family of operators: the answer in
plain Python functions, each taking exactly what the schema names, and `<family>_checks.py` beside
it with the limits. What an operator allows beyond its documentation is a named allowance
(`settings.ALLOWANCES`).
"""
