"""Training runs: configs, optimizers, the training loop, exact checkpoints and run folders; independent of models."""

from moa_startup.extras import require

require("moa_train", "vision,lm,eval", "accelerate", "psutil", "rich", "safetensors", "tqdm", "yaml")
