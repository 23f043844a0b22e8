"""Of tests and the processes they start: programs are so small that they run as fast unoptimised, and compile faster.

Loops by the emitters that came before XLA's own MLIR ones: compiling takes a third of the time without the latter.
"""

QUICK = " ".join(
  (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
  )
)
