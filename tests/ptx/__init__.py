"""nvcc's PTX, executed on the CPU: build.py compiles it and the interpreter, backend.py loads and steers them."""
