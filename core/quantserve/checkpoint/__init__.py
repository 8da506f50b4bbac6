"""What a checkpoint is made of, read without its weights: config, quant config, tensor headers, tokenizer limits."""

from quantserve.checkpoint.data import Checkpoint, Location, Tensor, overridden
from quantserve.checkpoint.reader import open_checkpoint

__all__ = ["Checkpoint", "Location", "Tensor", "open_checkpoint", "overridden"]
