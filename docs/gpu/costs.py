"""The largest costs of a decoding step: operators by their own time, of eager steps with a tree of eight nodes.

python docs/gpu/costs.py [cuda|cpu] [SHAPE]
"""

import sys

import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.check import shapes
from paceline.spec.plan.step_times import open_idle
from paceline.spec.tree import TreeShape

STEPS, ROWS = 10, 20


def main(device_name: str = "cuda", shape: str = "qwen3-0.6b") -> None:
    device = torch.device(device_name)
    model = shapes.random_model(shapes.shape_config(shape), shapes.settled_dtype("auto", device), device)
    runner = open_idle(model, "eager", NgramDrafter(), TreeShape.parse("2x1x1x1"))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.no_grad():
        for _ in range(3):
            runner.run(lambda phase: None)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(STEPS):
                runner.run(lambda phase: None)
    for order in ("self_cuda_time_total", "self_cpu_time_total")[device.type == "cpu" :]:
        print(f"{STEPS} steps of {shape}, by {order}")
        print(profile.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60))


if __name__ == "__main__":
    main(*sys.argv[1:])
