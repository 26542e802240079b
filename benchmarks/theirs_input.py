"""torchvision's side of the input pipeline's benchmark: v2 transforms in a DataLoader. Needs torch and torchvision."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.ours_input import BATCH, LONGEST, OBJECTS, SHORTER
from benchmarks.timing import Made, Program, per_item


class Pictures(Dataset):
    """A COCO-format folder with images and boxes of each, transformed."""

    def __init__(self, folder: Path, transform: Any):
        content = json.loads((folder / "instances_train.json").read_text())
        self._files = [folder / "train" / image["file_name"] for image in content["images"]]
        self._boxes = torch.tensor([x["bbox"] for x in content["annotations"]]).reshape(-1, OBJECTS, 4)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> torch.Tensor:
        """The file as uint8 [3 h w]."""
        with Image.open(self._files[index]) as file:
            return v2.functional.pil_to_tensor(file.convert("RGB"))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.read(index)
        boxes = self._boxes[index]
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        size = tuple(image.shape[1:])
        return self._transform(
            tv_tensors.Image(image), tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
        )


def pictures(folder: str, kind: str, batches: int, workers: int) -> Made:
    """The programs of `benchmarks.ours_input.pictures`; workers: processes of the DataLoader, 0 for none."""
    torch.set_num_threads(1)  # as in the DataLoader's workers: images are spread over cores, not pieces of them
    cast = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)] if kind == "float32" else []
    resize = v2.Resize(SHORTER, max_size=LONGEST)
    fork = "fork" if workers else None  # the default of programs that are no one's child
    in_order = Pictures(Path(folder) / "coco", v2.Compose([*cast, resize]))
    flipped = Pictures(Path(folder) / "coco", v2.Compose([*cast, v2.RandomHorizontalFlip(0.5), resize]))

    def epoch(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sampler = torch.utils.data.RandomSampler(flipped, True, batches * BATCH, generator)
        for _ in DataLoader(
            flipped, BATCH, sampler=sampler, num_workers=workers, collate_fn=padded, multiprocessing_context=fork
        ):
            pass

    def first(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        return next(iter(DataLoader(in_order, BATCH, collate_fn=padded)))

    def outputs(batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, np.ndarray]:
        image = batch[0].permute(0, 2, 3, 1).numpy()
        return {"image": image * 255 if kind == "float32" else image, "boxes": batch[1].numpy()}

    def parts(_: int) -> dict[str, np.ndarray]:
        images = [tv_tensors.Image(in_order.read(row)) for row in range(len(in_order))]
        seconds = per_item(in_order.read, range(len(images))), per_item(v2.Compose([*cast, resize]), images)
        return dict(zip(("read and decode", "resize"), map(np.float64, seconds), strict=True))

    programs = {
        "epoch": Program(lambda seed: seed, epoch),
        "first": Program(lambda seed: seed, first, outputs),
        "parts": Program(lambda seed: seed, parts),
    }
    return Made(programs, {"cores": os.cpu_count()})


def padded(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and boxes -> batches of them, the images padded with zeros to multiples of 32 as torchvision's models."""
    images, boxes = zip(*samples, strict=True)
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
    batch = torch.zeros((len(images), 3, height, width), dtype=images[0].dtype)
    for canvas, image in zip(batch, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return batch, torch.stack([x.as_subclass(torch.Tensor) for x in boxes])
