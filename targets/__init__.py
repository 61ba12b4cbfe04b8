"""How to build and run a program: Program -> BuildPlan -> Artifact -> Runner. TVM is imported here and nowhere else."""
