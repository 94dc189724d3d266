"""Vision: timm ViTs with any FFN, masked autoencoders, image shards and probes.

Importing this package registers `vit_{tiny,small,base,large}_patch16_{variant}` with timm.
"""

from __future__ import annotations

from moa_startup.extras import require

require("moa_vision", "vision", "timm")

from moa_vision import vit

__all__ = ["vit"]
