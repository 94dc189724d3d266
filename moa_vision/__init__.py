"""Vision half: timm-registered ViTs with any FFN, masked autoencoders, image shards and data.

Importing this package registers `vit_{tiny,small,base,large}_patch16_{variant}` with timm.
"""

from moa_startup.extras import require

require("moa_vision", "vision", "timm")

from moa_vision import vit

__all__ = ["vit"]
