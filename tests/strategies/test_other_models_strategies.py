"""Models of other packages under every strategy, beside one process: real ranks, the real DeepSpeed."""

from __future__ import annotations

import pytest
from strategies.test_strategies import PARAMETERS, VALUES, Seen, launch, same_training, write_frames
from support.other_models import INSTALLED

MODELS = [name for name in ("mace", "nequip") if name in INSTALLED]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not MODELS, reason="none of these packages is installed"),
]

ALONE = {
    "exact": "single,adam,64-true",
    "float32": "single,adam,32-true",
    "accumulate": "single,adam,64-true,accumulate",
    "ema": "single,adam,64-true,ema",
}
# every one with the training of one process that it is to equal
TWO = {
    "ddp": ("ddp,adam,64-true", "exact"),
    "ddp_accumulate": ("ddp,adam,64-true,accumulate", "accumulate"),
    "ddp_ema": ("ddp,adam,64-true,ema", "ema"),
    "ddp_rank_without_frames": ("ddp,adam,64-true,eval=1", "exact"),
    "fsdp": ("fsdp,adam,32-true", "float32"),
    "fsdp_rank_without_frames": ("fsdp,adam,32-true,eval=1", "float32"),
    "zero2": ("zero2,adam,32-true", "float32"),
    "zero3": ("zero3,adam,32-true", "float32"),
}
MOVED = 4e-3  # of a parameter in the 4 to 8 steps


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    model, folder = request.param, tmp_path_factory.mktemp(request.param)
    frames = write_frames(folder / "frames.xyz")
    two = [f"{case},model={model},name={name}" for name, (case, _) in TWO.items()]
    alone = [f"{case},model={model},name={name}" for name, case in ALONE.items()]
    alone.append(f"single,adam,64-true,from={folder}/ddp-0.ckpt,model={model},name=continued")
    return launch(folder, 2, frames, *two) | launch(folder, 1, frames, *alone)


@pytest.mark.parametrize("name", list(TWO))
def test_two_ranks_train_other_models_as_one_process(trained: dict[str, list[Seen]], name: str) -> None:
    expected = TWO[name][1]
    limits = (10 * VALUES, 10 * PARAMETERS) if expected == "float32" else (1e-8, 1e-8)
    same_training(trained[expected][0], trained[name], *limits, moved=MOVED)


def test_a_checkpoint_of_another_model_goes_on(trained: dict[str, list[Seen]]) -> None:
    (found,) = trained["continued"]
    assert 0 < len(found["steps"]) < len(trained["exact"][0]["steps"])
    same_training(trained["exact"][0], [found], 1e-8, 1e-8, moved=MOVED)
