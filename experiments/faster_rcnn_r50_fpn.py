"""Faster R-CNN, ResNet-50-FPN, 1x schedule: 90k steps of 16 images, shorter side 800. The base of all experiments.

    python -m fpn_jax.prepare --source=coco/2017 --data_dir=data
    python -m fpn_jax.train --config=experiments/faster_rcnn_r50_fpn.py --workdir=runs/faster_rcnn_r50_fpn \
        --config.init_from=torchvision://resnet50/IMAGENET1K_V1 --config.init_part=backbone

Hardware: 8 accelerators with 2 images each is the published setting. Duration: not measured by us yet.
Score to expect: from ImageNet weights 37.4 to 37.9 AP on val2017 with this schedule (published by mmdetection and
detectron2 for theirs). Without such weights, that is without `init_from`, train with
`--config.model.backbone.norm=gn --config.model.backbone.frozen_stages=0` and a much longer schedule (He et al. 2019).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Every value that an experiment can change, with torchvision's semantics and the 1x schedule."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the initial weights, the order of the images and the sampling of anchors and RoIs
    config.batch_size = 16  # images per step, over all devices of all processes
    config.accumulate = 1  # pieces the batch is cut into on each device, for less memory
    config.num_steps = 90_000
    config.eval_every = 10_000  # steps; 0: only at the end
    config.checkpoint_every = 1_000  # steps; also at the end; 0: only then
    config.eval_batch_size = 16
    config.pictures = 8  # of the evaluation split, drawn at the end
    config.init_from = ""  # weights to start from: a file, a workdir, torchvision://NAME/WEIGHTS or detectron2://...
    config.init_part = ""  # which part of them: "backbone", ...; "": everything they have
    config.init_reset_classes = False  # True: other classes than theirs; the class layers start anew
    config.stages = ()  # runs before this one that make its weights, see faster_rcnn_r50_fpn_4step.py
    config.join_within = 300.0  # seconds; several processes wait so long for each other at the start
    config.dead_after = 60.0  # seconds; a process that is silent for so long is given up, and with it the job
    config.stall_after = 1800.0  # seconds without a step or a batch that end a job, or warn if it is one process
    config.ema_decay = 0.0  # of averaged weights, which are then the ones evaluated; 0: none

    config.mesh = mesh = ml_collections.ConfigDict()  # of all devices of all processes, see training/sharding.py
    mesh.data = 0  # devices that the batch is split over; 0: all that the others leave
    mesh.fsdp = 1  # a second axis that it is split over
    mesh.space = 1  # devices, of one process, that share the rows of an image; heights of buckets divide by 32 * space
    mesh.shard_params = ""  # "data" or "fsdp": parameters, averages and optimizer state are split over it

    config.data = data = ml_collections.ConfigDict()
    data.data_dir = "data"  # or gs://BUCKET/FOLDER
    data.cache_dir = ""  # where data of gs:// is copied to; "": ~/.cache/fpn_jax/data
    data.dataset = "coco/2017"
    data.train_split = "train"
    data.eval_split = "validation"
    data.classes = ""  # the data set's own; "coco_91", "coco_80": torchvision's and detectron2's labels for COCO
    data.shorter = (800,)  # pixels; one is drawn for every training image, evaluation takes the last
    data.longest = 1333
    data.buckets = ()  # (height, width) pairs, multiples of 32; (): chosen from shorter and longest
    data.rounding = "floor"  # of resized sides; detectron2: "round"
    data.interpolation = "linear"  # detectron2: "antialias"; "area" where images shrink a lot
    data.pixels = "uint8"  # torchvision: "float32", resized images unrounded, which take four times the memory
    data.flip = 0.5  # probability
    data.max_objects = 0  # per image; 0: as many as the data set's fullest image has
    data.proposals_train = ""  # Fast R-CNN's regions: a workdir of an RPN, or a file, see fpn_jax/given_proposals.py
    data.proposals_eval = ""
    data.max_proposals = (2000, 1000)  # per image in training, in evaluation: the best of those given
    data.skip_empty = True  # whether images without objects are left out in training
    data.num_threads = 8
    data.num_workers = 0  # processes that read ahead; 0: threads of this one

    config.model = model = ml_collections.ConfigDict()
    model.detector = "faster_rcnn"  # or "rpn", "fast_rcnn"
    model.frozen_parts = ()  # of backbone, neck, rpn_head, box_head: not trained at all
    model.dtype = "float32"  # of activations; parameters are always float32. "bfloat16" on accelerators
    model.pixels = ml_collections.ConfigDict(  # what the backbone's weights expect; detectron2: "bgr", 255.0, ...
        {"order": "rgb", "white": 1.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    )
    model.backbone = ml_collections.ConfigDict(
        {
            "name": "resnet",
            "depth": 50,
            "blocks": (),  # per stage; (): those of the depth
            "last_level": 5,  # 4: no further than C4
            "width": 64,
            "groups": 1,
            "width_per_group": 64,
            "norm": "frozen_bn",
            "norm_eps": 1e-5,
            "stride_in_1x1": False,
            "frozen_stages": 2,
            "remat": (),  # stages, of 2 to 5, whose activations are computed again in the backward pass: less memory
        }
    )
    model.image_pyramid = ml_collections.ConfigDict(
        {"scales": (), "level": 5}  # powers of two: the backbone sees the image at each, and gives this level's maps
    )
    model.neck = ml_collections.ConfigDict(  # see fpn_jax/models/necks/fpn.py for what each switch does
        {
            "name": "fpn",
            "channels": 256,
            "levels": (),  # read of the backbone; (): all
            "outputs": (),  # given, besides the extra level; (): those read
            "lateral": True,
            "top_down": True,
            "smooth": True,
            "upsampling": "nearest",
            "merge": "sum",
            "activation": "none",
            "extra_level": True,
            "norm": "none",
            "norm_eps": 1e-5,
        }
    )
    model.rpn_head = ml_collections.ConfigDict({"convs": 1, "channels": 0, "shared": True})
    model.rpn = rpn = ml_collections.ConfigDict()  # see fpn_jax/models/heads/rpn.py for what detectron2 has
    rpn.levels = (2, 3, 4, 5, 6)
    rpn.sizes = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    rpn.ratios = (0.5, 1.0, 2.0)
    rpn.anchor_rounding = True
    rpn.anchor_order = "ratio_major"
    rpn.anchor_stride = "image"
    rpn.positive_iou = 0.7
    rpn.negative_iou = 0.3
    rpn.low_quality_matches = True
    rpn.samples = 256
    rpn.positive_fraction = 0.5
    rpn.sampling = "random"
    rpn.beta = 1 / 9
    rpn.normalizer = "sampled"
    rpn.delta_weights = (1.0, 1.0, 1.0, 1.0)
    rpn.pre_nms_train = 2000
    rpn.pre_nms_test = 1000
    rpn.post_nms_train = 2000
    rpn.post_nms_test = 1000
    rpn.nms_iou = 0.7
    rpn.min_size = 1e-3
    rpn.score_threshold = 0.0
    model.box_head = ml_collections.ConfigDict(
        {
            "name": "fc",
            "channels": 1024,
            "fcs": 2,
            "convs": 0,
            "conv_channels": 256,
            "norm": "none",
            "norm_eps": 1e-5,
            "separate_levels": (),  # levels with a head of their own; (): one for all
        }
    )
    model.box = box = ml_collections.ConfigDict()  # see fpn_jax/models/heads/box.py
    box.levels = (2, 3, 4, 5)
    box.k0 = 4
    box.canonical_size = 224.0
    box.level_eps = 1e-6
    box.pooling = "align"
    box.pooled_size = 7
    box.sampling_ratio = 2
    box.aligned = False
    box.background = "first"
    box.positive_iou = 0.5
    box.samples = 512
    box.positive_fraction = 0.25
    box.sampling = "random"
    box.add_ground_truth = True
    box.beta = 1 / 9
    box.delta_weights = (10.0, 10.0, 5.0, 5.0)
    box.score_threshold = 0.05
    box.nms_iou = 0.5
    box.detections = 100
    box.min_size = 1e-2

    config.optim = optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # or "adamw"
    optim.learning_rate = 0.02  # at base_batch_size images per step
    optim.base_batch_size = 16  # the rate grows linearly with batch_size / base_batch_size; 0: it does not
    optim.momentum = 0.9  # adamw: beta 1
    optim.adam_b2 = 0.999
    optim.weight_decay = 1e-4
    optim.decay_norms_and_biases = False
    optim.clip_norm = 0.0  # global norm of the gradients; 0: no clipping
    optim.warmup_steps = 1000
    optim.warmup_factor = 1 / 1000
    optim.schedule = "step"  # or "cosine", "constant"
    optim.step_at = (2 / 3, 8 / 9)  # fractions of num_steps, 60k and 80k of 90k
    optim.step_factor = 0.1
    return config
