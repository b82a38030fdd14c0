"""Use the promoted checkpoint in a diffusers script.

    python examples/promoted_checkpoint.py

This is what a server would do: load the model with plain diffusers, and apply the policy that has the alias `champion`.
`sparsetune promote` and `rollback` move the alias; the script stays the same.
"""

import torch
from diffusers import CogVideoXPipeline

import sparsetune
from sparsetune.models.demo import WEIGHTS
from sparsetune.video import write_video

PROMPT = "a purple star moving left over a grey background"

# The demo model; for CogVideoX-2b: "zai-org/CogVideoX-2b", torch.bfloat16, and .to("cuda").
pipe = CogVideoXPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)

with sparsetune.sparsify(pipe, "models:/demo-sparse@champion") as handle:
    output = pipe(
        PROMPT,
        num_frames=17,
        height=64,
        width=64,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    )
    stats = handle.stats()

path = "results/demo/champion.mp4"
write_video(path, (output.frames[0] * 255).round().astype("uint8"), fps=8)
print(f"{path}: sparsity {stats.sparsity:.3f} on {', '.join(sorted(set(stats.kernels.values())))}")
for reason, calls in stats.fallbacks.items():
    print(f"{calls} calls ran dense: {reason}")
