"""Whole trainings, one after another, under as many processes as the environment says.

Run as a script by each rank: an argument is a file of options, and after a colon the step at
which the run is stopped.
"""

import os
import sys
from pathlib import Path

import torch

from mmrag_recipes import loop
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.config_reranker import TrainRerankerConfig
from mmrag_recipes.options import build, read_file
from mmrag_recipes.train import train
from mmrag_recipes.train_reranker import train_reranker


def run(argument: str) -> None:
    path, _, stop = argument.partition(":")
    original = loop.train_step

    def stops(task, optimizer, step, config, number):
        if stop and number == int(stop):
            raise KeyboardInterrupt
        return original(task, optimizer, step, config, number)

    loop.train_step = stops
    try:
        if Path(path).stem.startswith("reranker"):
            train_reranker(build(TrainRerankerConfig, read_file(Path(path)), path))
        else:
            train(build(TrainConfig, read_file(Path(path)), path))
    except KeyboardInterrupt:
        print("stopped", path)
    finally:
        loop.train_step = original


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, argument in enumerate(sys.argv[1:]):
        # A group of its own for each run.
        os.environ["MASTER_PORT"] = os.environ["MASTER_PORTS"].split()[number]
        run(argument)
