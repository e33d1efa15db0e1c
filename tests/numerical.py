"""Which files of tests/kernels hold kernels to numbers: on a GPU, or in Triton's interpreter."""

OPS = ("inverse", "eigen", "update", "polar", "plan", "moments", "selfcheck", "memcheck")
NUMERICAL = [f"test_{op}.py" for op in OPS]
