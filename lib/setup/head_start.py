"""New heads, trained alone on stored outputs of the pretrained trunks before the first step.

A random head sends the trunk gradients that change what it knows; a head that fits already does not (LP-FT, Kumar et
al., Fine-Tuning can Distort Pretrained Features, 2022, arXiv:2202.10054).
"""

from dataclasses import replace
from math import ceil

from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from lib.backends.optim import Rates, build_optimizer, build_schedule
from lib.config import FittedConfig
from lib.data import Prepare, Source, TrainingData
from lib.data.shard_source import count_pairs
from lib.distributed import rank_and_world_size
from lib.losses import Pairs
from lib.losses.objective import Objective
from lib.losses.positives import Ids, SameText
from lib.setup.first_step import bias_from_counts
from lib.setup.recipe import NEW_HEADS
from lib.setup.tower_outputs import FrozenTrunks
from lib.towers import TwoTowers

LARGEST_BATCH = 1024  # the loss is dense here
ENOUGH = 128  # pairs of a batch that suit new heads, where a pass over the data has 16 batches or more


def fit_heads(
    config: FittedConfig,
    objective: Objective,
    towers: TwoTowers,
    source: Source,
    same_text: SameText,
    trunks: FrozenTrunks,
    prepare: Prepare,
) -> None:
    """Train the heads, scale and bias for --head-epochs passes over the data without augmentation, without a memory.

    The rate is 1e-3, or --head-lr if that is higher: the latter is theirs beside the trunk, where they fit already.
    Every rank trains them on whole batches and gets the same: no collective is needed, and no rank has to wait for
    another after the trunks' outputs are stored.
    """
    still = replace(prepare, images=replace(prepare.images, augment="none"))
    stored = trunks.store(still, source, also_training=True)
    count = count_pairs(source)
    batch = min(max(config.effective_batch, min(ENOUGH, count // 16)), LARGEST_BATCH)
    steps = ceil(config.head_epochs * count / batch)
    data = TrainingData(
        source, stored, effective_batch=batch, chunk_size=batch, rank=0, world_size=1, workers=0, seed=config.seed
    )
    rates = Rates(max(config.head_lr, NEW_HEADS))  # of the trunks too, which get no gradient here
    optimizer = build_optimizer(
        towers, config.optimizer, rates=rates, weight_decay=config.weight_decay, beta2=config.beta2
    )
    schedule = build_schedule(optimizer, "cosine", steps // 10, steps)
    device, loss = towers.logit_scale.device, objective.of_run(config.positives, same_text).dense
    trained = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    bar = tqdm(data.steps(0, steps), "new heads", steps, unit="step", disable=rank_and_world_size()[0] != 0)
    for number, chunks in enumerate(bar):
        (chunk,) = chunks
        ids = Ids(*(column.to(device) for column in Ids.of(chunk)))
        if number == 0 and towers.use_bias and not towers.pretrained_bias:
            of_loss = ids if config.positives == "group" else ids.each_its_group()
            towers.set_scale_and_bias(None, bias_from_counts(of_loss, config.pos_weight, same_text))
        output = towers(**chunk.to(device).inputs)
        pairs = Pairs(output.image_embeds, output.text_embeds, *ids)
        loss(pairs, None, output.logit_scale, output.logit_bias).backward()
        if config.grad_clip:
            clip_grad_norm_(trained, config.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if config.scale_max and not config.scale_schedule:
            towers.clamp_logit_scale(config.scale_max)
    towers.pretrained_bias = towers.use_bias
