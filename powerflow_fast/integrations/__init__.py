"""powerflow_fast inside other trainers. Nothing here is imported by the library: each module needs its own package."""
