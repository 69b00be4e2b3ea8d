"""The gradient-cached step: a batch of any size at the memory of one chunk, with exact gradients."""
