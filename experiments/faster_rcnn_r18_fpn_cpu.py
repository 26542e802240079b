"""Faster R-CNN, ResNet-18-FPN, small enough for a laptop or two CPU cores: your own photographs at 320 pixels.

    python -m fpn_jax.prepare --source=DIR --data_dir=data
    python -m fpn_jax.train --config=experiments/faster_rcnn_r18_fpn_cpu.py --workdir=runs/mine \
        --config.data.dataset=NAME --config.data.eval_split=SPLIT

Hardware: any CPU. Measured on aquarium (448 photographs, 7 classes; 127 to score on), 2 shared cores (AMD EPYC) as two
devices (XLA_FLAGS=--xla_force_host_platform_device_count=2), jax 0.10.2, other work beside it: 37 min, AP50 0.329, AP
0.127 (commit a133e36).
"""

import ml_collections

from experiments.faster_rcnn_r50_fpn import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """A narrow neck, few proposals, live batch norm and a cosine, for training from nothing in about an hour."""
    config = base()
    config.batch_size = 4
    config.eval_batch_size = 4
    config.num_steps = 3000
    config.eval_every = 500
    config.checkpoint_every = 250
    config.ema_decay = 0.999

    config.data.shorter = (256, 288, 320)
    config.data.longest = 448
    config.data.interpolation = "area"
    config.data.eval_split = "valid"
    config.data.num_threads = 2

    config.model.backbone.update(depth=18, width=32, norm="bn", frozen_stages=0)
    config.model.neck.channels = 64
    config.model.rpn.sizes = ((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))
    config.model.rpn.pre_nms_train = 500
    config.model.rpn.post_nms_train = 500
    config.model.rpn.pre_nms_test = 500
    config.model.rpn.post_nms_test = 300
    config.model.box_head.channels = 256
    config.model.box.canonical_size = 112.0
    config.model.box.samples = 128

    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.base_batch_size = 4
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 200
    config.optim.schedule = "cosine"
    config.optim.clip_norm = 10.0
    return config
