"""Options of a run: their types and bounds, from YAML or the command line."""

from .files import load_config
from .options import PowerFlowConfig

__all__ = ["PowerFlowConfig", "load_config"]
