"""Small C kernels for the CPU, compiled at first use, and what compiles them."""
