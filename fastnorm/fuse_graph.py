"""Graphs of torch.fx."""

from __future__ import annotations

import torch.fx

__all__ = ["fuse_graph"]


def fuse_graph(graph: torch.fx.GraphModule, refusals: dict[int, str]) -> None:
    """TODO"""
