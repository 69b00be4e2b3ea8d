"""Large-batch contrastive image-text training: losses, gradient caching, memory bank, data and evaluation."""
