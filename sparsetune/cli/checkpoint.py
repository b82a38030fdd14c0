"""`sparsetune checkpoint`: tuned checkpoints on disk or in MLflow."""

import dataclasses
import json
from pathlib import Path

import click

from sparsetune.cli import completion
from sparsetune.cli.console import log_note, only_results_on_stdout, print_json
from sparsetune.cli.main import Command, CommandGroup
from sparsetune.cli.options import build_config, config_options, json_option, output_option
from sparsetune.files import json_text


@click.group(cls=CommandGroup, name="checkpoint")
def command() -> None:
    """Show a tuned checkpoint, convert it from or to other formats, share it, verify it against a model, compare two.

    \b
    Examples:
      sparsetune checkpoint show results/demo/checkpoint
      sparsetune checkpoint convert CogVideoX-2b_0.06_0.07.pt results/upstream
      sparsetune checkpoint export results/wan2.1-t2v-1.3b/checkpoint --to lightx2v
      sparsetune checkpoint push results/cogvideox-2b/checkpoint OWNER/cogvideox-2b-sparse
      sparsetune checkpoint verify tuned.pt --model cogvideox-2b
      sparsetune checkpoint diff results/demo/checkpoint hf://OWNER/NAME
    """


@command.command(cls=Command, name="show")
@click.argument("path", shell_complete=completion.checkpoint)
@json_option("manifest and layers")
def show(path: str, as_json: bool) -> None:
    """Print the manifest of the checkpoint PATH, and each layer's thresholds.

    PATH is a checkpoint folder, a .safetensors file or SpargeAttn's .pt, or one in MLflow: models:/NAME@ALIAS,
    models:/NAME/VERSION, runs:/ID or a run id, or on the Hugging Face Hub: hf://OWNER/NAME, also with @REVISION.

    \b
    Examples:
      sparsetune checkpoint show results/demo/checkpoint --json
      sparsetune checkpoint show models:/demo-sparse@champion
    """
    from sparsetune.api import load_checkpoint
    from sparsetune.checkpoint import summarize
    from sparsetune.cli.tables import checkpoint_table, print_table

    checkpoint = load_checkpoint(path)
    layers = summarize(checkpoint)
    policy = checkpoint.policy
    manifest = checkpoint.manifest.model_dump(mode="json")
    rules = {
        "dense_fraction": policy.schedule.dense_fraction,
        "drop_scale": policy.schedule.drop_scale,
        "order": " and ".join(policy.order_names),
        "keep_text": policy.keep_text,
        "select_partial": policy.select_partial,
        "cache": None if policy.cache is None else str(policy.cache),
    }
    if as_json:
        rows = [dataclasses.asdict(layer) for layer in layers]
        print_json({"manifest": manifest, "policy": rules, "layers": rows})
        return
    for name, value in (manifest | rules).items():
        if value not in (None, {}, [], ()):
            click.echo(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    print_table(checkpoint_table(layers))


@command.command(cls=Command, name="convert")
@click.argument("source", shell_complete=completion.checkpoint)
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--allow-loss",
    is_flag=True,
    help="Write a .pt even if it loses parts of the policy (dense steps, token order).  [default: off]",
)
def convert(source: str, target: Path, allow_loss: bool) -> None:
    """Write the checkpoint SOURCE as TARGET, in the format that TARGET's suffix selects.

    SOURCE is anything that `show` accepts. `.pt` is SpargeAttn's format, `.safetensors` a single policy file, anything
    else a checkpoint folder.

    \b
    Example:
      sparsetune checkpoint convert results/demo/checkpoint tuned.pt --allow-loss
    """
    from sparsetune.checkpoint import convert as convert_checkpoint
    from sparsetune.tracking.lookup import resolve_checkpoint

    click.echo(convert_checkpoint(resolve_checkpoint(source), target, allow_loss=allow_loss))


@command.command(cls=Command, name="export")
@click.argument("path", shell_complete=completion.checkpoint)
@click.option(
    "--to",
    "engine",
    type=click.Choice(["diffusers", "sglang", "xdit", "lightx2v", "tensorrt-llm", "comfyui"]),
    required=True,
    help="Serving engine; those that can't run a policy say why.  [default: none, required]",
)
@output_option("File to write.  [default: standard output]")
@click.option(
    "--allow-loss",
    is_flag=True,
    help="Export even if the engine lacks parts of the policy, so that videos differ.  [default: off]",
)
def export(path: str, engine: str, output: Path | None, allow_loss: bool) -> None:
    """Write the checkpoint PATH as the settings of a serving engine, which has fewer of them.

    PATH is anything that `show` accepts. lightx2v: keys for the file of its --config_json. sglang: a file for its
    --config. xdit: arguments of its command line. Nothing can be exported to the others.

    \b
    Examples:
      sparsetune checkpoint export results/wan2.1-t2v-1.3b/checkpoint --to lightx2v -o sparge.json --allow-loss
      sparsetune checkpoint export results/wan2.1-t2v-1.3b/checkpoint --to xdit --allow-loss
    """
    from sparsetune.api import load_checkpoint
    from sparsetune.checkpoint.export import export as export_to
    from sparsetune.files import write_text

    exported = export_to(load_checkpoint(path), engine, allow_loss=allow_loss)
    if exported.differs:
        log_note(exported.differs)
    if exported.lost:
        log_note(f"lost: {'; '.join(exported.lost)}; evaluate what {engine} renders")
    if output is None:
        click.echo(exported.text)
    else:
        write_text(output, exported.text + "\n")
        click.echo(output)


@command.command(cls=Command, name="push")
@click.argument("path", shell_complete=completion.checkpoint)
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--result",
    type=click.Path(path_type=Path, exists=True),
    metavar="FOLDER",
    help="Evaluation or tuning of the checkpoint, for its card.  [default: the tuning's beside the checkpoint]",
)
@click.option("--license", metavar="ID", help="License for the card, in the Hub's spelling.  [default: none]")
@click.option(
    "--private",
    is_flag=True,
    help="Make a new repository private.  [default: as the Hub does, public unless the owner chose otherwise]",
)
def push(path: str, repo: str, result: Path | None, license: str | None, private: bool) -> None:
    """Push the checkpoint PATH to the Hugging Face Hub, with a model card; print the commit's address.

    PATH is anything that `show` accepts. The card has the base model, GPU, versions, quality with intervals, speed and
    gate; of videos, those of the worst and the median prompt are pushed. Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Example:
      sparsetune checkpoint push results/cogvideox-2b/checkpoint OWNER/cogvideox-2b-sparse --private
    """
    from sparsetune.checkpoint import hub, load_checkpoint, save_checkpoint
    from sparsetune.files import scratch_folder
    from sparsetune.report.card import model_card, source_of, videos_of
    from sparsetune.tracking.lookup import resolve_checkpoint

    repo = hub.HubReference.parse(repo).repo
    local = resolve_checkpoint(path)
    checkpoint = load_checkpoint(local)
    source = source_of(checkpoint, local, result)
    if source is None:
        log_note("no evaluation of the checkpoint was found, so its card has the search's figures; see --result")
    videos = {name: file for name, (file, _) in videos_of(source).items()}
    with scratch_folder() as folder:
        saved = save_checkpoint(checkpoint, folder / "checkpoint")
        card = model_card(checkpoint, repo, source, license)
        click.echo(hub.push(saved, repo, card, videos, private=private or None))


@command.command(cls=Command, name="pull")
@click.argument("repo", metavar="OWNER/NAME[@REVISION]")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def pull(repo: str, folder: Path | None) -> None:
    """Save a checkpoint from the Hugging Face Hub in FOLDER, by default one here that is named as the repository.

    Only a checkpoint's own files are downloaded. Commands also take hf://OWNER/NAME for a checkpoint.

    \b
    Example:
      sparsetune checkpoint pull OWNER/cogvideox-2b-sparse results/cogvideox-2b/checkpoint
    """
    from sparsetune.checkpoint import hub

    reference = hub.HubReference.parse(repo)
    click.echo(hub.pull(reference, folder or Path(reference.repo.rpartition("/")[2])))


@command.command(cls=Command, name="verify")
@click.argument("path", shell_complete=completion.checkpoint)
@config_options
@click.pass_context
def verify(ctx: click.Context, path: str) -> None:
    """Check that the checkpoint PATH fits a model: its layers, heads and head dimensions.

    A packaged model is built without its weights, so nothing is downloaded; any other is loaded.

    \b
    Example:
      sparsetune checkpoint verify tuned.pt --model cogvideox-2b
    """
    from sparsetune.api import load_checkpoint
    from sparsetune.models.loading import load_pipeline
    from sparsetune.models.random_weights import blueprint, blueprints
    from sparsetune.models.shapes import meta_pipeline
    from sparsetune.models.sparsify import policy_for

    config = build_config(ctx)
    with only_results_on_stdout():
        checkpoint = load_checkpoint(path)
        published = {name: source for source in blueprints() for name in (source, blueprint(source).hub_id)}
        known = published.get(config.model.source)
        pipe = meta_pipeline(blueprint(known)) if known else load_pipeline(config.model).pipe
        policy = policy_for(pipe, checkpoint)
    heads = sum(len(layer.heads) for layer in policy.layers)
    click.echo(f"{path} fits {config.model.name}: {len(policy.layers)} layers, {heads} heads")


@command.command(cls=Command, name="diff")
@click.argument("first", shell_complete=completion.checkpoint)
@click.argument("second", shell_complete=completion.checkpoint)
@json_option("the differences")
def diff(first: str, second: str, as_json: bool) -> None:
    """Print the differences between the policies of two checkpoints, layer by layer.

    \b
    Example:
      sparsetune checkpoint diff results/demo/checkpoint tuned.pt
    """
    from sparsetune.api import load_checkpoint
    from sparsetune.checkpoint import difference
    from sparsetune.cli.tables import difference_text

    found = difference(load_checkpoint(first).policy, load_checkpoint(second).policy)
    click.echo(json_text(dataclasses.asdict(found)) if as_json else difference_text(found))
