"""Train or fine-tune a CLIP model (symmetric InfoNCE) on large batches: accelerate launch train_clip.py"""

from collections.abc import Sequence
from functools import partial

from lib.config import TrainConfig, parse_config
from lib.errors import one_line_errors

# The published protocol: 4k fresh and 4k remembered pairs; scale clamped at 100, decay 0.2 (Radford et al., 2021).
DEFAULTS = TrainConfig(beta2=0.98, weight_decay=0.2, scale_max=100.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line (or `arguments`) says."""
    config = parse_config(DEFAULTS, __doc__, arguments, of_another_script={"pos_weight": "train_siglip.py"})
    # Only now: torch and transformers take seconds, and neither --help nor a wrong flag should wait for them.
    from lib.distributed import logsumexp_over_ranks
    from lib.losses import infonce
    from lib.losses.objective import Objective, dense_infonce
    from lib.train import train

    smoothing = config.label_smoothing
    loss = partial(infonce, label_smoothing=smoothing, merge_logsumexp=logsumexp_over_ranks)
    train(config, Objective("clip", loss, partial(dense_infonce, label_smoothing=smoothing)))


if __name__ == "__main__":
    with one_line_errors():
        main()
