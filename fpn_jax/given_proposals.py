"""Proposals from files of any kind that can be read, for Fast R-CNN on given boxes."""

import os
from pathlib import Path

from fpn_jax.data import proposals
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.errors import UserError
from fpn_jax.weights import files

READABLE = (*proposals.READABLE, ".pkl")


def read_proposals(path: str | os.PathLike) -> ProposalTable:
    """The proposals in a file: .npz and .json as `data.proposals` says, .pkl as Detectron and detectron2 write it.

    The suffix decides. Boxes of Detectron, whose last pixel belongs to the box, are taken as they are, like detectron2
    does: a pixel less at the right and the bottom. Nothing that a pickle wants to call is ever called. Raises a
    one-line `UserError` that names the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix not in READABLE:
        raise UserError(f"{path}: proposals are read from {', '.join(READABLE)}; give such a file")
    if path.suffix != ".pkl":
        return proposals.read(path)
    found = files.read_proposals_pickle(path)
    return ProposalTable.from_lists(found["ids"], found["boxes"], found["scores"], str(path), found["bbox_mode"] == 1)
