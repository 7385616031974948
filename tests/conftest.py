import tests.kernels  # noqa: F401 - the first to import Triton, which it may have to interpret
