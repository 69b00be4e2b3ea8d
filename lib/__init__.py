"""Large-batch contrastive image-text training."""

import os

# Read when torch starts: chunks of texts of many lengths leave gaps between memory blocks of fixed size, which segments
# that grow can use. What the user has set holds.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
