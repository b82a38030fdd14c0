import pytest

import sparsetune
from sparsetune.checkpoint import Checkpoint
from sparsetune.errors import CheckpointError
from sparsetune.models.loading import load_pipeline
from sparsetune.models.pipelines import demo_config
from sparsetune.models.sparsify import default_policy
from sparsetune.tracking.promotion import judge, promote
from sparsetune.tracking.results import find_candidate
from tests.tracking.recorded import Place, World, checkpoint_of, policy_of


def test_checkpoints_are_loaded_by_any_name(shared_place: Place, world: World) -> None:
    assert sparsetune.load_checkpoint("models:/demo-sparse@champion").policy == policy_of(0.9)
    assert sparsetune.load_checkpoint(world.sparser.tuning[:8]).policy == policy_of(0.8)


@pytest.mark.slow  # loads the demo model and renders
def test_promoted_checkpoint_is_installed_by_its_name_and_warns_of_other_settings(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load_pipeline(demo_config().model).pipe
    fitting = Checkpoint(default_policy(pipe), checkpoint_of(0.9, layers=()).manifest)
    recorded = place.reviewed(place.tuned(0.5, sparsity=0.5, checkpoint=fitting))
    promote(place.registry(), judge(place.registry(), find_candidate(place.client, recorded.tuning)))
    with sparsetune.sparsify(pipe, "models:/demo-sparse@champion") as handle:
        pipe("a red circle", num_frames=9, height=64, width=64, num_inference_steps=2, guidance_scale=1.0)
        assert handle.stats().sparsity > 0
    warned = [message for message in caplog.messages if message.startswith("the checkpoint was tuned for")]
    assert len(warned) == 1
    assert "num_frames 17 and renders 9" in warned[0] and "num_inference_steps 10 and renders 2" in warned[0]
    with pytest.raises(CheckpointError, match="the policy must have the model's 8 self-attention layers"):
        sparsetune.sparsify(pipe, "models:/demo-sparse@previous")
    _, sparse = sparsetune.create_pipelines("demo", recorded.tuning)
    assert sparse("a red circle", num_inference_steps=2).sparsity > 0
