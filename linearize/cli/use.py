"""The verbs that use a finished model: generate and push."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize import verbs
from linearize.cli.app import Folder, Json, WithCode, app, next_step, note, show
from linearize.errors import InputError


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Model folder or Hub id.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="Text to answer.  [default: chat on the terminal]")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest.  [default: the model's]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample within this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without chat template.")] = False,
    quantize: Annotated[str | None, typer.Option(help="Hold the weights as int8, int4 or nf4.")] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Write exactly what the source writes, drafted by the student.")
    ] = False,
    state: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from a saved state.")] = None,
    save_state: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the state behind each answer.")] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or chat.

    A saved state is what was read and written so far, in a file of constant size: of it only what is new is read.

    \b
    Example:
      linearize generate runs/demo/merged --prompt "Why is the sky blue?" --max-new-tokens 60
    """
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed
    }  # fmt: skip
    exported = verbs.is_graph(folder)  # torch stays out then
    if prompt is None:
        if as_json:
            raise InputError("generate --json: needs --prompt; a chat on the terminal is not one result")
        if lossless and quantize:
            raise InputError("generate: lossless writes what the source's own weights write; leave quantize out")
        if exported:
            asked = {"quantize": quantize, "lossless": lossless, "state": state, "save_state": save_state}
            return verbs.graph_chat(folder, sys.stdin, sys.stdout, settings | {"system": system}, asked)
        model, tokenizer = verbs.load(folder, quantize=quantize)
        drafting = verbs.Lossless.of(folder, model) if lossless else None
        talk = verbs.Chat(model, tokenizer, system=system, drafting=drafting, **settings)
        if state is not None:
            talk.resume(state)
        verbs.chat(talk, sys.stdin, sys.stdout, save_state)
        return
    settings |= {"system": system, "raw": raw, "quantize": quantize, "lossless": lossless}
    settings |= {"state": state, "save_state": save_state}
    run = verbs.graph_generate if exported else verbs.generate
    answer = run(folder, prompt, stream=None if as_json else sys.stdout, **settings)
    if as_json:
        show(answer.to_dict(), as_json)
    else:
        passes = answer.tokens_per_pass
        drafted = "" if passes is None else f", {passes:.2f} tokens per pass of the source"
        note(f"\n{sum(answer.new_tokens)} tokens, {answer.tokens_per_second:.1f} tokens/s{drafted}")


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Option(help="organisation/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the card and the files.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    with_code: WithCode = False,
    as_json: Json = False,
) -> None:
    """Upload a folder, with a model card, to the Hugging Face Hub.

    \b
    Example:
      linearize push runs/demo/merged --repo my-org/smollm2-135m-gla --dry-run
    """
    if dry_run and as_json:
        return show(verbs.push_plan(folder, repo, with_code).to_dict(), as_json)
    answer = verbs.push(folder, repo, private=private, dry_run=dry_run, message=message, with_code=with_code)
    show({"url": answer}, as_json, answer)
    if dry_run:
        next_step(as_json, "the same without --dry-run, which uploads it")
