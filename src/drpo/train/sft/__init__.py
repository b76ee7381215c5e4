"""Supervised fine-tuning on conversations: the model, head, optimisers and checkpoints of a run of `drpo train`."""
