"""Our objectives and kernels inside other trainers: TRL and verl. Each module needs that package."""
