"""What a run shows as files. Internal."""
