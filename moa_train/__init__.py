"""The run: configuration, optimizer, the only training loop, exact checkpoints and the run folder; knows no model."""

from moa_startup.extras import require

require("moa_train", "vision,lm", "accelerate", "jsonargparse", "psutil", "rich", "safetensors", "tqdm", "yaml")
