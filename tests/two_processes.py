"""Compress together with other processes; what each of them holds in the end goes into a file of its own.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_processes.py RECIPE FOLDER
"""

import json
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from compressor import compute, pipeline, recipe
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.progress import Silent
from compressor.training import Training, train


def learnt(workload: tiny.Tiny, folder: Path) -> MultiTaskModel:
    """A network without batch norm after a few steps on labels."""
    plain = tiny.without_norms(workload)
    train(plain, tiny.bench(plain, folder, workload), Training(steps=4, distill="never"), "plain", 0)
    return plain


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loaded, base = recipe.load(path, ("stages.0.rounds=1", "stages.1.rounds=1", "stages.2.steps=4"))
    loaded = loaded.model_copy(update={"stages": loaded.stages[:3]})
    job = pipeline.prepare(loaded, base, Silent(), builds=False)
    model, scores = pipeline.compress(job, folder / "run")
    again, _ = pipeline.compress(job, folder / "run")
    plain = learnt(tiny.Tiny(batch_size=16, split_labels=False), folder)
    refused = ""
    try:
        compute.check_alike("their number", [torch.tensor(compute.rank())])
    except CompressError as error:
        refused = str(error)
    held = {"stages": model, "again": again, "plain": plain}
    state = {f"{kind}.{name}": v for kind, one in held.items() for name, v in one.module.state_dict().items()}
    save_file(state, folder / f"{compute.rank()}.safetensors")
    (folder / f"{compute.rank()}.json").write_text(json.dumps({"scores": scores, "refused": refused}))


if __name__ == "__main__":
    main()
