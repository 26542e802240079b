"""However the batch, the rows of an image and the state are spread over devices: the results are those of one."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fpn_jax import common
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.training import sharding
from fpn_jax.training.checkpoint import Checkpoints
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.sharding import MeshOptions
from fpn_jax.training.state import inference_variables, init_variables, make_state
from fpn_jax.training.step import make_detect, make_train_step
from fpn_jax.types import TrainState

STEPS = 3
HEIGHT, WIDTH = 320, 64  # the lowest that rows are cut of, and narrow, to be quick


def tall(batch):
    """Images of HEIGHT rows made of those of 64, with objects further down in each."""
    parts = HEIGHT // 64
    down = 64.0 * np.arange(len(batch.image))[:, None, None] * batch.valid[..., None]
    return batch.replace(
        image=np.tile(batch.image, (1, parts, 1, 1)),
        size=np.full_like(batch.size, (HEIGHT - 8, WIDTH - 8)),
        boxes=(batch.boxes + down * np.array([0, 1, 0, 1])).astype(np.float32),
    )


@pytest.fixture
def train(tiny_config, make_batch, monkeypatch):
    """train(devices, options) -> (state, metrics by step, detections, compiled step) of the tiny detector.

    Without `detects` there are no detections, to save their compilation.
    """
    tiny_config.optim.update(name="sgd", learning_rate=0.01, warmup_steps=0, schedule="constant", clip_norm=1.0)
    tiny_config.model.box.score_threshold = 0.0
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)  # else nothing of a tiny model were split

    def run(devices: int, options: MeshOptions, detects: bool = True):
        mesh, over = sharding.make_mesh(jax.devices()[:devices], options), options.shard_params
        detector = build_detector(tiny_config.model, 3)
        variables = init_variables(detector, (HEIGHT, WIDTH), 0)
        schedule = make_schedule(tiny_config.optim, 4, STEPS)
        optimizer = make_optimizer(tiny_config.optim, schedule, variables["params"], detector.frozen)
        state = sharding.put_state(mesh, make_state(variables, optimizer, 0.9), over)
        step = make_train_step(detector, optimizer, schedule, 0, ema_decay=0.9, mesh=mesh, shard_params=over)
        batches = [sharding.put_batch(mesh, vars(tall(make_batch(4, seed)))) for seed in range(STEPS + 1)]
        compiled = step.lower(state, batches[0]).compile()
        metrics = []
        for batch in batches[:STEPS]:
            state, values = compiled(state, batch)  # refuses a state that is laid out otherwise than the first
            metrics.append({name: float(value) for name, value in values.items()})
        found = None
        if detects:
            found = sharding.local_rows(make_detect(detector, mesh)(inference_variables(state), batches[-1]))
        return state, metrics, found, compiled

    return run


def assert_same(one, other):
    for a, b in zip(one[1], other[1], strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5), name
    for kind in ("params", "ema_params"):
        for a, b in zip(*(jax.tree.leaves(getattr(x[0], kind)) for x in (one, other)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    if other[2] is None:
        return
    assert one[2].valid.any()
    np.testing.assert_array_equal(one[2].valid, other[2].valid)
    np.testing.assert_allclose(one[2].scores, other[2].scores, atol=1e-4)
    for mine, theirs in zip(rows_of_images(one[2]), rows_of_images(other[2]), strict=True):
        # Scores that differ by rounding alone may come in another order: each detection has its like, and its own.
        off = np.abs(mine[:, None] - theirs).max(-1)
        assert off.min(1).max(initial=0) <= 1e-2 and sorted(off.argmin(1)) == list(range(len(mine)))


def rows_of_images(found):
    """Box, label and 100 times the score of each valid detection, an array [d 6] for each image."""
    rows = np.concatenate([found.boxes, found.labels[..., None], 100 * found.scores[..., None]], -1)
    return [image[valid] for image, valid in zip(rows, found.valid, strict=True)]


def operations(compiled, kind):
    """The shapes of the results of all operations of a kind."""
    lines = re.findall(rf"= (.*?) (?:{kind})(?:-start)?\(", compiled.as_text())
    return [tuple(map(int, x.split(","))) for line in lines for x in re.findall(r"\w\d+\[([\d,]+)\]", line)]


def test_a_split_state_and_split_rows_change_nothing_but_the_memory(train):
    """One device, against parameters split over the axis of the batch, and each image's rows over two of four."""
    one = train(1, MeshOptions())

    split = train(4, MeshOptions(shard_params="data"), detects=False)
    assert_same(one, split)
    state, compiled = split[0], split[3]
    halves = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    # Each split parameter is gathered, and nothing else is: no picture, no map.
    assert sorted(np.prod(x) for x in operations(compiled, "all-gather")) == sorted(x.size for x in halves)
    assert len(halves) > 10
    there = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    batch = HEIGHT * WIDTH * 3 + 2 * 4 + 4 * (4 * 4 + 4 + 1)  # one image, its size and four objects
    assert compiled.memory_analysis().argument_size_in_bytes <= there + batch + 1024
    assert there < 0.5 * sum(x.nbytes for x in jax.tree.leaves(state))

    rows = train(4, MeshOptions(space=2))
    assert_same(one, rows)
    heights = [shape[1] for shape in operations(rows[3], "convolution") if len(shape) == 4]
    assert max(heights) == HEIGHT // 2 // 2  # of the stem's map
    assert HEIGHT // 2 in [shape[1] for shape in operations(one[3], "convolution") if len(shape) == 4]
    assert operations(rows[3], "collective-permute")  # the rows next to the cut


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (4, MeshOptions(fsdp=2, shard_params="fsdp")),
        (2, MeshOptions(space=2)),
        (8, MeshOptions(data=2, fsdp=2, space=2, shard_params="data")),
    ],
)
def test_axes_together_give_the_results_of_one_device(train, tiny_config, norm, devices, options):
    tiny_config.model.backbone.norm = norm
    assert_same(train(1, MeshOptions()), train(devices, options))


def test_arrays_are_split_along_their_longest_dimension_that_divides():
    mesh = sharding.make_mesh(options=MeshOptions(fsdp=4))
    shapes = {"longest": (64, 100), "not": (64, 101), "none": (63, 101), "few": (8, 8), "scalar": ()}
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    parts = {x: place.shard_shape(shapes[x]) for x, place in sharding.layout(mesh, arrays, "fsdp").items()}
    assert parts == shapes | {"longest": (64, 25), "not": (16, 101)}
    assert all(place.is_fully_replicated for place in sharding.layout(mesh, arrays).values())


def test_the_state_that_is_put_on_devices_can_be_donated():
    """Its memory is not that of the values it was made of, so that a step writes the next one over it."""
    mesh = sharding.make_mesh(sharding.first_device())
    given = {str(i): jnp.ones((64, 1024)) for i in range(20)}  # NumPy places them by chance
    state = sharding.put_replicated(mesh, given)
    places = {x.unsafe_buffer_pointer() for x in state.values()}
    after = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(state)
    assert {x.unsafe_buffer_pointer() for x in after.values()} == places
    np.testing.assert_array_equal(list(given.values()), 1)


def test_rows_of_a_batch_go_in_and_come_out_once():
    mesh = sharding.make_mesh(options=MeshOptions(fsdp=2, space=2))
    image = np.arange(8 * 64 * 2 * 3, dtype=np.uint32).astype(np.uint8).reshape(8, 64, 2, 3)
    batch = sharding.put_batch(mesh, {"image": image, "size": np.full((8, 2), 64), "boxes": np.zeros((8, 1, 4)),
                                      "labels": np.arange(8), "valid": np.ones((8, 1), bool)})  # fmt: skip
    assert batch.image.addressable_shards[0].data.shape == (2, 32, 2, 3)
    np.testing.assert_array_equal(batch.image, image)
    np.testing.assert_array_equal(sharding.local_rows(batch.labels), np.arange(8))


def test_a_state_split_in_one_way_comes_back_in_another(tmp_path):
    def make(seed):
        params = {"kernel": jax.random.normal(jax.random.key(seed), (64, 128)), "bias": jnp.arange(3.0)}
        return TrainState(jnp.int32(4), params, {}, {"trace": params}, {})

    ways = {"": MeshOptions(), "fsdp": MeshOptions(fsdp=2, shard_params="fsdp"), "data": MeshOptions(space=2)}
    for way, options in ways.items():
        with Checkpoints(f"{tmp_path}/{way}", writes=True) as checkpoints:
            checkpoints.save(sharding.put_state(sharding.make_mesh(options=options), make(0), way), {})
    for written in ways:
        for way, options in ways.items():
            like = sharding.put_state(sharding.make_mesh(options=options), make(1), way)
            with Checkpoints(f"{tmp_path}/{written}") as checkpoints:
                state, _ = checkpoints.restore(like)
                variables, step = checkpoints.restore_weights({"params": like.params, "batch_stats": {}}, "latest")
            assert step == 4
            for found in (state.params, variables["params"], state.opt_state["trace"]):
                np.testing.assert_array_equal(found["kernel"], make(0).params["kernel"])
                assert found["kernel"].sharding == like.params["kernel"].sharding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 3}, "mesh.data=3, mesh.fsdp=1, mesh.space=1: their product must be the number of devices, 8; mesh"),
        ({"fsdp": 3}, "mesh.data=0, mesh.fsdp=3, mesh.space=1: their product must be the number of devices, 8; lower"),
        ({"fsdp": 4, "space": 4}, "mesh.data=0, mesh.fsdp=4, mesh.space=4: their product must be the number of"),
        ({"space": 0}, "mesh.space is 0; at least 1"),
        ({"data": -1}, "mesh.data is -1; at least 0"),
        ({"shard_params": "space"}, "mesh.shard_params is 'space'; choose data or fsdp, or leave it empty"),
        ({"shard_params": "fsdp"}, "mesh.shard_params is 'fsdp', but mesh.fsdp is 1; raise that, or split over data"),
        ({"model": 2}, "mesh.model: the mesh has no such axis; choose some of data, fsdp, space, shard_params"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(UserError) as refused:
        sharding.make_mesh(options=common.mesh_options(ml_collections.ConfigDict({"mesh": options})))
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_what_does_not_fit_on_the_mesh_is_refused_in_one_line():
    mesh = sharding.make_mesh(options=MeshOptions(space=4))
    sharding.check_batch_size(mesh, 2, "batch_size")
    with pytest.raises(UserError, match=r"batch_size is 3, .* over 2 groups of 4 devices \(mesh.space\); try 4"):
        sharding.check_batch_size(mesh, 3, "batch_size")
    sharding.check_buckets(mesh, ((384, 96),), 32, 64)
    with pytest.raises(
        UserError, match=r"the bucket 448x96 cannot .* mesh.space=4 .* are multiples of 128 and at least 320"
    ):
        sharding.check_buckets(mesh, ((384, 96), (448, 96)), 32, 64)
    with pytest.raises(UserError, match=r"the bucket 256x96 cannot .* at least 320"):
        sharding.check_buckets(mesh, ((256, 96),), 32, 64)
    sharding.check_buckets(sharding.make_mesh(), ((32, 32),), 32, 64)
    two_hosts = [SimpleNamespace(process_index=i // 3, id=i) for i in range(6)]
    with pytest.raises(UserError, match=r"mesh.space is 2, but the devices that share an image must be of one process"):
        sharding.make_mesh(two_hosts, MeshOptions(space=2))


def test_buckets_that_are_chosen_suit_the_mesh_and_old_configs_have_the_defaults(tiny_config):
    tiny_config.data.update(shorter=(100,), longest=160, buckets=())
    tiny_config.mesh.space = 4
    assert all(height % 128 == 0 for height, _ in common.pipeline_options(tiny_config).buckets)
    del tiny_config.mesh
    assert common.mesh_options(tiny_config) == MeshOptions()
    assert any(height % 128 for height, _ in common.pipeline_options(tiny_config).buckets)


def test_scoring_takes_the_mesh_of_the_run_where_it_can():
    assert sharding.fitting(MeshOptions(space=2)) == MeshOptions(space=2)
    assert sharding.fitting(MeshOptions(fsdp=16, shard_params="fsdp")) == MeshOptions()


def test_the_mesh_in_words():
    def words(**options):
        return sharding.describe(sharding.make_mesh(options=MeshOptions(**options)), options.get("shard_params", ""))

    assert words() == "8 devices"
    assert words(space=2) == "8 devices (data 4 x space 2)"
    assert words(shard_params="data") == "8 devices (data 8, parameters split over data)"
