"""`matsteer`: a thin table of commands. torch is imported by the commands that need it, never by --help."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from server.config import Settings, load_settings
from server.errors import ServerError

# Other packages add commands under this entry-point group: each entry is a typer app whose commands are merged here.
GROUP = "matsteer.commands"


class _Commands(TyperGroup):
    """The commands of this file first; those of other packages are imported only when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self._added()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or self._added().get(cmd_name)

    @staticmethod
    def _added() -> dict[str, Any]:
        added: dict[str, Any] = {}
        for entry in entry_points(group=GROUP):
            command: Any = typer.main.get_command(entry.load())
            added |= getattr(command, "commands", None) or {entry.name: command}
        return added


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, help="Steer a language model while it writes."
)
folders = typer.Typer(no_args_is_help=True, help="Work with checkpoint folders.")
app.add_typer(folders, name="checkpoints")

Model = Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded demo model.")]
Checkpoints = Annotated[Path | None, typer.Option(help="Folder of checkpoints.")]
Checkpoint = Annotated[str | None, typer.Option(help="NAME or NAME@VERSION; default: the obvious one.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]


@app.command()
def serve(
    model: Model = None,
    checkpoints: Checkpoints = None,
    checkpoint: Checkpoint = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    model_name: Annotated[str | None, typer.Option(help="The name that clients see.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model; 0: all cores.")] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="Texts generated together.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    queue_limit: Annotated[int | None, typer.Option(help="Texts that may wait; beyond: 429.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve a steered model over HTTP. Every setting can also be given as MATSTEER_NAME in the environment.

    Example: matsteer serve --model Qwen/Qwen2.5-0.5B --checkpoints checkpoints --port 8000
    """
    given = dict(locals())
    with _one_sentence():
        settings = load_settings(**given)
        _log(settings)
        from server.listener import listen, run

        with listen(settings) as bound:  # first: nobody should wait for the model to hear that the port is taken
            from server.app import create_app

            run(create_app(settings), bound, drain_s=settings.drain_s)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=X", help="A multiplier; repeat it.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Show the unsteered text beside it.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For temperatures above 0.")] = None,
    model: Model = None,
    checkpoints: Checkpoints = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """One generation in the terminal; without --set with the checkpoint's default multipliers.

    Example: matsteer generate "Q: What colour is the sky? A:" --set truthfulness=1.5 --baseline
    """
    from server.engine.types import Sampling
    from server.exchange import BASELINE, STEERED, Arm, Ask, Use

    with _one_sentence():
        steered = Arm(STEERED.name, (Use(attributes=_multipliers(set_)),))
        ask = Ask(
            prompts=(prompt,),
            arms=(steered, BASELINE) if baseline else (steered,),
            reference=1 if baseline else 0,
            sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature),
            seed=seed,
        )
        settings = load_settings(
            model=model,
            checkpoints=checkpoints,
            checkpoint=checkpoint,
            device=device,
            dtype=dtype,
            log_level="warning",
        )
        _log(settings)
        from server.assembly import open_service
        from server.terminal import show

        service = open_service(settings)
        try:
            answer = asyncio.run(service.generate(ask))
        finally:
            service.engine.stop()
        show(answer, prompt)


@folders.command("list")
def list_checkpoints(checkpoints: Checkpoints = None) -> None:
    """Every checkpoint and version.

    Example: matsteer checkpoints list --checkpoints checkpoints
    """
    with _one_sentence():
        from server.terminal import list_folders

        list_folders(load_settings(checkpoints=checkpoints).checkpoints)


@folders.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")], checkpoints: Checkpoints = None) -> None:
    """What a checkpoint holds, and how it was evaluated.

    Example: matsteer checkpoints show demo
    """
    with _one_sentence():
        from server.terminal import show_folder

        show_folder(load_settings(checkpoints=checkpoints).checkpoints, name)


@folders.command()
def verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME[@VERSION]]", help="Default: all of them.")] = None,
    checkpoints: Checkpoints = None,
    model: Annotated[str | None, typer.Option(help="Also check against this model.")] = None,
) -> None:
    """Check hashes, shapes and values; with --model also whether the checkpoint fits it. Exit status 1 if one fails.

    Example: matsteer checkpoints verify demo --model demo/model
    """
    with _one_sentence():
        from server.terminal import verify_folders

        if not verify_folders(load_settings(checkpoints=checkpoints, model=model), name, against=model is not None):
            raise typer.Exit(1)


def _multipliers(pairs: list[str] | None) -> dict[str, float] | None:
    if pairs is None:
        return None
    multipliers: dict[str, float] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name in multipliers:
            raise typer.BadParameter(f"--set gives {name!r} twice")
        try:
            multipliers[name] = float(value)
        except ValueError:
            equals = ""
        if not (name and equals and abs(multipliers[name]) < float("inf")):
            raise typer.BadParameter(f"--set takes NAME=NUMBER, as in truthfulness=1.5, not {pair!r}")
    return multipliers


def _log(settings: Settings) -> None:
    import logging

    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@contextmanager
def _one_sentence() -> Iterator[None]:
    """An error that a user can mend is one sentence, not a traceback."""
    try:
        yield
    except ServerError as error:
        print(f"matsteer: {error.message}", file=sys.stderr)
        raise typer.Exit(1) from None


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
