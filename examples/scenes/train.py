"""Train the embedded network from nothing: `python -m examples.scenes.train`, from the repository's root.

Every random choice follows from --seed, and a run that was killed goes on from its last snapshot with the same batches.
On two cores it takes about 10 minutes where the processor multiplies bfloat16 and about twice that with --no-bf16. The
network is not at its plateau then: fine-tuning a pruned one is also more training, which helps it stay within budgets.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from compressor.errors import CompressError
from compressor.workload import Batch

from .workload import Scenes

OUT = Path(__file__).with_name("scenes.safetensors")
WEIGHTS = {"segmentation": 1.0, "depth": 3.0, "normals": 1.0}


def main(
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = OUT,
    steps: Annotated[int, typer.Option(help="Batches of 32.")] = 2300,
    train_scenes: int = 16000,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16 where PyTorch deems it safe.")] = True,
    every: Annotated[int, typer.Option(help="Steps between snapshots.")] = 500,
) -> None:
    """Train, snapshot, and print the figures on unseen scenes."""
    torch.manual_seed(seed)
    workload = Scenes(train_scenes=train_scenes)
    net = workload.build().to(device, memory_format=torch.channels_last)
    optimiser = AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps, pct_start=0.15)
    state = {"net": net, "optimiser": optimiser, "schedule": schedule}
    settings = {"steps": steps, "train_scenes": train_scenes, "seed": seed, "bf16": bf16}
    snapshot = out.with_suffix(".snapshot.pt")
    done = _resume(snapshot, settings, state, device)
    started, seen = time.perf_counter(), []
    for step, batch in enumerate(islice(_epochs(workload, seed), done, steps), done + 1):
        losses = task_losses(workload, net, batch, device, bf16)
        optimiser.zero_grad()
        sum(weight * losses[name] for name, weight in WEIGHTS.items()).backward()
        optimiser.step()
        schedule.step()
        seen.append([losses[name].item() for name in WEIGHTS])
        if step % every == 0 or step == steps:
            parts = {name: part.state_dict() for name, part in state.items()}
            _write(snapshot, partial(torch.save, {"step": step, "settings": settings, **parts}))
            pace = (step - done) * workload.batch_size / (time.perf_counter() - started)
            means = zip(WEIGHTS, torch.tensor(seen).mean(0).tolist(), strict=True)
            text = ", ".join(f"{name} {mean:.4f}" for name, mean in means)
            print(f"step {step}/{steps}: {text}; {pace:.0f} images/s", flush=True)
            seen.clear()
    _write(out, partial(save_file, {name: value.contiguous() for name, value in net.cpu().state_dict().items()}))
    snapshot.unlink()
    for name, value in evaluate(workload, net).items():
        print(f"{name}: {value:.4f}")


def evaluate(workload: Scenes, net: nn.Module) -> dict[str, float]:
    """Each task's figure on the validation scenes, in float32."""
    net.eval()
    metrics = workload.metrics()
    with torch.inference_mode():
        for batch in workload.batches("validate", 0):
            outputs = net(*batch.inputs)
            for task in workload.tasks:
                metrics[task.name].update(outputs[task.output], batch.labels[task.name])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _epochs(workload: Scenes, seed: int) -> Iterator[Batch]:
    for epoch in count():
        yield from workload.batches("train", seed * 1000 + epoch)


def task_losses(workload: Scenes, net: nn.Module, batch: Batch, device: str, bf16: bool) -> Mapping[str, torch.Tensor]:
    """Each task's loss, in float32 whatever the network computes in."""
    image = batch.inputs[0].to(device, memory_format=torch.channels_last)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        outputs = net(image)
    labels = {name: label.to(device) for name, label in batch.labels.items()}
    return workload.losses(outputs, Batch((image,), labels))


def _resume(snapshot: Path, settings: dict[str, Any], state: dict[str, Any], device: str) -> int:
    if not snapshot.exists():
        return 0
    saved = torch.load(snapshot, map_location=device, weights_only=True)
    if saved["settings"] != settings:
        raise CompressError(f"{snapshot} is of a run with {saved['settings']}. Go on with these, or delete it.")
    for name, part in state.items():
        part.load_state_dict(saved[name])
    print(f"going on from step {saved['step']} of {snapshot}")
    return int(saved["step"])


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Write beside the file and rename, so that a file of that name is always whole."""
    beside = path.with_name(path.name + ".partial")
    save(beside)
    beside.replace(path)


if __name__ == "__main__":
    typer.run(main)
