"""The Triton kernels. Importing a module of this folder imports Triton."""
