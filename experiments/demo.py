"""A small Faster R-CNN on FPN, trained from nothing on the embedded scenes: what `make demo` runs.

    python -m fpn_jax.prepare --source=scenes --data_dir=data
    python -m fpn_jax.train --config=experiments/demo.py --workdir=runs/demo

Measured on 2 shared cores (AMD EPYC, as two CPU devices, see the Makefile): AP50 0.784, AP 0.530 on `val`; with
`--config.seed=1` 0.777 and 0.512. From an empty environment, the installation included, `make demo` took 3 min 40 s.
"""

import ml_collections

from experiments.faster_rcnn_r50_fpn import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """Everything narrower than the base, batch norm, and Adam: minutes on two CPU cores."""
    config = base()
    config.batch_size = 8
    config.num_steps = 750
    config.eval_every = 375
    config.checkpoint_every = 100
    config.eval_batch_size = 8
    config.ema_decay = 0.99

    config.data.dataset = "scenes"
    config.data.eval_split = "val"
    config.data.shorter = (256,)
    config.data.longest = 320
    config.data.buckets = ((256, 320), (320, 256))  # each costs a compilation
    config.data.num_threads = 2

    config.model.backbone.update(depth=18, blocks=(1, 1, 1, 1), width=16, norm="bn", frozen_stages=0)
    config.model.neck.channels = 32
    # Objects are 8 to 256 px: anchors half the paper's size put the smallest within reach.
    config.model.rpn.sizes = ((12.0,), (24.0,), (48.0,), (96.0,), (192.0,))
    config.model.rpn.pre_nms_train = 300
    config.model.rpn.post_nms_train = 300
    config.model.rpn.pre_nms_test = 200
    config.model.rpn.post_nms_test = 200
    config.model.rpn.samples = 128
    config.model.box_head.channels = 128
    config.model.box.canonical_size = 112.0
    config.model.box.samples = 64
    config.model.box.positive_fraction = 0.5  # the classes are what takes longest to learn

    config.optim.name = "adamw"
    config.optim.learning_rate = 5e-3
    config.optim.adam_b2 = 0.99
    config.optim.base_batch_size = 0
    config.optim.warmup_steps = 50
    config.optim.schedule = "cosine"
    config.optim.clip_norm = 10.0
    return config
