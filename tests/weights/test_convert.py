"""Weights by the commands: fetched, put into a workdir, evaluated, trained from and written out again."""

import functools
import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.torchvision.fasterrcnn_resnet50_fpn import get_config as torchvision_r50
from fpn_jax import common, evaluate, train
from fpn_jax.convert import convert_in, convert_out
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.training import checkpoint
from fpn_jax.training.state import init_variables
from fpn_jax.weights import files, loader, names, published, semantics


@pytest.fixture
def config(tiny_config, scenes_dir):
    """A small detector of the eight classes of the scenes, whose training moves nothing."""
    tiny_config.data.data_dir = str(scenes_dir)
    tiny_config.model.backbone.norm = "frozen_bn"
    tiny_config.update(num_steps=1, checkpoint_every=1, eval_every=0, pictures=0, ema_decay=0.0)
    tiny_config.optim.update(name="sgd", learning_rate=0.0)
    return tiny_config


@pytest.fixture
def arrays(config):
    """Its weights under torchvision's names: other ones than a run of this seed starts from."""
    detector = build_detector(config.model, 8)
    shapes = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: rng.uniform(0.01, 0.1, x.shape).astype(np.float32), shapes)
    return loader.export(variables, "torchvision", 7)


@pytest.fixture
def file(tmp_path, arrays):
    path = tmp_path / "weights.pth"
    files.write_arrays(path, arrays)
    return str(path)


def weights_of(workdir, which="best"):
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        return checkpoints.saved_weights(which)[0]


def assert_has(variables, arrays):
    back = loader.export(variables, "torchvision", 7)
    assert back.keys() == arrays.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name], name)


def test_in_evaluated_trained_and_out(tmp_path, config, arrays, file):
    workdir = str(tmp_path / "run")
    lines = convert_in(config, file, workdir)
    assert lines[0].endswith(f"weights.pth: {len(arrays)} arrays of a torchvision Faster R-CNN, ResNet-FPN")
    assert_has(weights_of(workdir), arrays)
    names_there = json.loads((tmp_path / "run" / "classes.json").read_text())["names"]
    assert len(names_there) == 8
    with pytest.raises(UserError, match=r"--workdir=.*/run: there are weights in it already; give another folder"):
        convert_in(config, file, workdir)

    # Training there starts from them: with a rate of 0 they are the same afterwards.
    metrics = train.train(config, workdir)
    assert_has(weights_of(workdir, "latest"), arrays)
    assert np.isfinite(metrics["AP"])
    # What was converted stays, whatever the training makes of it.
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.has_initial and checkpoints.latest_step == 1
    assert (tmp_path / "run" / "initial" / "0").exists() and (tmp_path / "run" / "best" / "1").exists()

    # The demo's width is no torchvision ResNet's, and the message says which key is in the way.
    with pytest.raises(UserError, match=r"model\.backbone\.width is 4: torchvision's ResNet has 64 and no other"):
        convert_out(workdir, str(tmp_path / "out.pth"), "torchvision", "best")
    with pytest.raises(UserError, match=r"model\.pixels\.white is 1\.0, and detectron2 has 255\.0"):
        convert_out(workdir, str(tmp_path / "out.pth"), "detectron2", "best")
    out = str(tmp_path / "out.safetensors")
    convert_out(workdir, out, "fpn_jax", "best")
    again = loader.load(weights_of(workdir), files.read_arrays(out), out, 7)
    assert_has(again.variables, arrays)


@pytest.mark.parametrize("reset", [False, True])
def test_init_from_a_file(tmp_path, config, arrays, file, reset):
    config.init_from = file
    config.init_reset_classes = reset
    train.train(config, str(tmp_path / "run"))
    found = loader.export(weights_of(tmp_path / "run", "latest"), "torchvision", 7)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array) != (reset and "box_predictor" in name), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"frozen_stages": 2}, ["frozen_stages=2", "norm=frozen_bn", "--config.init_from=..."]),
        ({"frozen_stages": 1, "norm": "bn"}, ["frozen_stages=1 never", "--config.model.backbone.norm=gn"]),
        ({"frozen_stages": 0, "norm": "gn"}, []),
    ],
)
def test_random_weights_that_stay_random_are_told(config, monkeypatch, changes, named):
    monkeypatch.setattr(train, "init_variables", lambda *_: {})
    config.model.backbone.update(changes)
    fresh = SimpleNamespace(latest_step=None, has_initial=False)
    _, lines = train._starting_weights(config, None, (64, 64), None, fresh)
    assert len(lines) == bool(named) and all(name in lines[0] for name in named)
    config.init_from = "neck.pth"
    loaded = loader.Loaded({}, names.formats("torchvision")[0], 1, fresh=["params/backbone/stem_conv/kernel"])
    monkeypatch.setattr(common, "load_weights", lambda *_: loaded)
    _, told = train._starting_weights(config, None, (64, 64), None, fresh)
    assert told[1:] == lines
    continued = SimpleNamespace(latest_step=3)
    assert train._starting_weights(config, None, (64, 64), None, continued)[1] == []


@pytest.mark.parametrize("key", ["train_split", "eval_split"])
def test_a_split_that_is_not_there_is_told_by_the_key_to_set(tmp_path, config, key):
    config.data[key] = "valid"
    with pytest.raises(UserError, match=rf"no split 'valid' .* it has train, val: set data\.{key} to one of them"):
        train.train(config, str(tmp_path / "run"))


def test_init_from_a_part_of_a_workdir(tmp_path, config, arrays, file):
    convert_in(config, file, str(tmp_path / "first"))
    config.init_from = str(tmp_path / "first")
    config.init_part = "backbone, neck"
    train.train(config, str(tmp_path / "second"))
    found = loader.export(weights_of(tmp_path / "second", "latest"), "torchvision", 7)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array) == name.startswith("backbone."), name


def test_a_workdir_is_taken_over_whole_whatever_it_was_begun_from(tmp_path, config, file):
    """How its weights came there, in part or with fresh class layers, is no matter of the copy's."""
    convert_in(config, file, str(tmp_path / "first"))
    config.init_from, config.init_part, config.init_reset_classes = str(tmp_path / "first"), "backbone", True
    config.data.data_dir = str(tmp_path / "gone")
    checkpoint.write_config(str(tmp_path / "first"), config)
    classes = common.Classes.read(str(tmp_path / "first"))
    classes = common.Classes(classes.names, [10 + i for i in classes.category_ids])
    classes.write(str(tmp_path / "first"))
    convert_in(None, str(tmp_path / "first"), str(tmp_path / "copy"))
    assert common.Classes.read(str(tmp_path / "copy")) == classes
    first, copy = (loader.export(weights_of(tmp_path / name), "torchvision", 7) for name in ("first", "copy"))
    assert first.keys() == copy.keys() and all(np.array_equal(first[name], copy[name]) for name in first)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        del args


def test_published_weights_from_the_address_to_the_score(tmp_path, config, file, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (served / name).write_bytes(content)
    handler = functools.partial(Quiet, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(published.BASES, "torchvision", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(published.TORCHVISION, "tiny/V1", published.Published(name))
        monkeypatch.setenv(published.CACHE_VARIABLE, str(tmp_path / "cache"))
        convert_in(config, "torchvision://tiny/V1", str(tmp_path / "run"))
        server.shutdown()
    metrics = evaluate.evaluate(str(tmp_path / "run"), None, "best", 0, None, tight=True)
    assert metrics["num_images"] == 5
    assert (tmp_path / "run/eval/val_tight/detections.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], r"weights\.pth: "),
        (lambda data: b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00trueatR.", r"weights\.pth: .*system"),
        (lambda data: b"<html>404</html>", r"weights\.pth: "),
    ],
)
def test_a_spoiled_file_leaves_no_half_loaded_model(tmp_path, config, file, spoil, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        convert_in(config, file, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_before_everything_fits(tmp_path, config, arrays, file):
    config.model.neck.channels = 16
    with pytest.raises(UserError, match=r"Nothing was loaded"):
        convert_in(config, file, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    files.write_arrays(file, arrays | {"rpn.head.conv.0.0.bias": np.full(8, np.nan, np.float32)})
    config.model.neck.channels = 8
    with pytest.raises(UserError, match=r"rpn\.head\.conv\.0\.0\.bias holds numbers that are not finite"):
        convert_in(config, file, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_training_that_does_not_fit_leaves_the_workdir_as_it_is(tmp_path, config, file):
    workdir = str(tmp_path / "run")
    convert_in(config, file, workdir)
    before = (tmp_path / "run" / "config.json").read_text()
    config.model.neck.channels = 16
    with pytest.raises(UserError, match=r"another architecture"):
        train.train(config, workdir)
    config.model.neck.channels, config.init_from = 8, file
    with pytest.raises(UserError, match=r"config\.init_from=.*: .*run has weights of fpn_jax\.convert already"):
        train.train(config, workdir)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_remarks_on_what_the_weights_do_not_tell(tmp_path, config, file):
    config.model.box.aligned = True
    lines = convert_in(config, file, str(tmp_path / "run"))
    assert "remark: model.box.aligned is True, and torchvision has False" in lines
    assert any("model.backbone.norm_eps is 1e-05: torchvision's COCO_V1 file" in line for line in lines)


def test_tight_padding_is_torchvisions(config):
    config.data.update(shorter=(800,), longest=1333, buckets=())
    options = common.pipeline_options(config)
    sizes = np.array([[576, 1024], [480, 640], [1024, 576], [576, 1024]])
    assert common.pad_tightly(options, sizes).buckets == ((768, 1344), (800, 1088), (1344, 768))


def test_half_precision_weights_become_float32(tmp_path, config, arrays):
    path = str(tmp_path / "half.safetensors")
    files.write_arrays(path, {name: array.astype(np.float16) for name, array in arrays.items()})
    convert_in(config, path, str(tmp_path / "run"))
    assert_has(weights_of(tmp_path / "run"), {name: np.float32(np.float16(x)) for name, x in arrays.items()})


def test_another_number_of_classes(tmp_path, config, file):
    config.data.classes = "coco_80"
    with pytest.raises(
        UserError, match=r"has 9 class slots .*, the list coco_80 81; give --config= .* --reset_classes"
    ):
        convert_in(config, file, str(tmp_path / "run"))
    config.init_reset_classes = True
    lines = convert_in(config, file, str(tmp_path / "run"))
    assert "new, with random values: box_head/classes, box_head/deltas" in lines[0]
    config.data.classes, config.data.dataset, config.init_reset_classes = "", "nowhere", False
    lines = convert_in(config, file, str(tmp_path / "numbers"))
    assert any("called by their numbers, 1 to 8" in line for line in lines)
    assert common.Classes.read(str(tmp_path / "numbers")).category_ids == list(range(1, 9))


def test_the_code_for_torchvision_names_what_it_cannot_do():
    from experiments.detectron2.faster_rcnn_R_50_FPN_1x import get_config

    config = get_config()
    with pytest.raises(UserError, match=r"model\.pixels\.order is 'bgr', and torchvision has 'rgb'"):
        semantics.check(config.model, "torchvision")
    semantics.check(config.model, "detectron2")
    assert {*semantics.FIXED} == {*names.frameworks()}


def test_no_limit_is_more_than_there_is_to_torchvision():
    """Which takes 0 for none: its detector would load and find nothing."""
    config = torchvision_r50()
    config.model.rpn.update(pre_nms_train=0, pre_nms_test=0)
    code = semantics.torchvision_code(config, 91, "weights.pth")
    assert "rpn_pre_nms_top_n_train=1000000000, rpn_pre_nms_top_n_test=1000000000," in code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": {"norm": "gn"}},
            r"model\.backbone\.norm is 'gn': torchvision's detectors have 'frozen_bn' or 'bn'",
        ),
        ({"neck": {"norm": "gn"}}, r"model\.neck\.norm is 'gn': .* have 'none' or 'bn'"),
        ({"neck": {"norm": "bn", "norm_eps": 1e-3}}, r"model\.neck\.norm_eps is 0\.001: .* have 1e-5"),
        ({"box_head": {"fcs": 3}}, r"model\.box_head\.convs is 0: .* have 0 with fcs 2, or 4 with fcs 1"),
        ({"box_head": {"convs": 4, "fcs": 1}}, r"model\.box_head\.norm is 'none': .* have 'bn' with norm_eps 1e-5"),
        ({"box": {"levels": (3, 4, 5)}}, r"model\.box\.levels is \(3, 4, 5\): .* have levels from the finest on"),
        ({"rpn_head": {"channels": 128}}, r"model\.rpn_head\.channels is 128: .* have 0, the neck's 256"),
        ({"rpn": {"levels": (3, 4, 5, 6)}}, r"model\.rpn\.levels is \(3, 4, 5, 6\): .* have all levels of the neck"),
        (
            {"backbone": {"width": 32}},
            r"width is 32: torchvision's ResNet has 64 and no other; train with model\.backbone\.width=64, .*--names=",
        ),
    ],
)
def test_code_is_only_written_for_what_torchvision_can_build(change, message):
    from experiments.faster_rcnn_r50_fpn import get_config

    config = get_config()
    assert "torch.load('x.pth', weights_only=True)" in semantics.torchvision_code(config, 91, "x.pth")
    assert "safetensors.torch.load_file('x.safetensors')" in semantics.torchvision_code(config, 91, "x.safetensors")
    for part, values in change.items():
        config.model[part].update(values)
    with pytest.raises(UserError, match=message):
        semantics.torchvision_code(config, 91, "x.pth")
