"""The operators of `torch.ops.lance`, one module a family; importing this package registers them all."""

from lance_kernels.ops.tucker import tucker_project, tucker_reconstruct

__all__ = ["tucker_project", "tucker_reconstruct"]
