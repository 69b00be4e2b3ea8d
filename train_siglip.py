"""Train or fine-tune a SigLIP model (pairwise sigmoid loss) on large batches: accelerate launch train_siglip.py"""

from collections.abc import Sequence
from functools import partial

from lib.config import TrainConfig, parse_config
from lib.errors import one_line_errors

# The published protocol: 32k fresh and 32k remembered pairs, beta2 of 0.95 (Zhai et al., 2023, section 4).
DEFAULTS = TrainConfig(beta2=0.95)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line (or `arguments`) says."""
    config = parse_config(DEFAULTS, __doc__, arguments, of_another_script={"label_smoothing": "train_clip.py"})
    # Only now: torch and transformers take seconds, and neither --help nor a wrong flag should wait for them.
    from lib.losses import sigmoid
    from lib.losses.objective import Objective, dense_sigmoid
    from lib.train import train

    loss = partial(sigmoid, pos_weight=config.pos_weight)
    dense = partial(dense_sigmoid, pos_weight=config.pos_weight)
    train(config, Objective("siglip", loss, dense))


if __name__ == "__main__":
    with one_line_errors():
        main()
