"""Of processes that tests start: their programs are so small that they run as fast unoptimised, and compile faster."""

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
