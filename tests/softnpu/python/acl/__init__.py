"""pyACL, as much of it as vllm-ascend uses."""
