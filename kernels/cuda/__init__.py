"""CUDA C++ kernels: NVIDIA GPUs through NVRTC, and the CPU through the host threads of tests/gpu/host."""
