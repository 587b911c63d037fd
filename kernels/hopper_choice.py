"""Whether the tiles written for Hopper run."""

from __future__ import annotations

from .interface import HeadCall

# Whether sm_90 runs the kernels of hopper_tiles where those can stand in for the Triton tile kernels: right on an H200,
# and 1.0 to 1.5 times as fast as those were before their epilogues became cheaper (benchmarks/results/DEVICE.md).
HOPPER_TILES = True


def hopper_tiles_for(call: HeadCall):
    """The module hopper_tiles where its kernels are to run (`HOPPER_TILES`), else None. Gluon is experimental: only
    they load it."""
    if not HOPPER_TILES:
        return None
    from . import hopper_tiles

    return hopper_tiles if hopper_tiles.supported(call) else None
