"""From captions and photos on a disk to batches of tensors."""
