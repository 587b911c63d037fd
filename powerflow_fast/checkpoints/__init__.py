"""Folders of safetensors and JSON. Internal."""
