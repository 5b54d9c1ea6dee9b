"""The CUDA kernels on the CPU: build.py compiles them, backend.py loads and steers them."""
