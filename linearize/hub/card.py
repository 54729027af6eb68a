"""The model card of a linearized folder: where it comes from, what it is made of, what it scored, how to load it."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from linearize.checkpoint import gguf_header
from linearize.checkpoint.describe import mixers_of
from linearize.checkpoint.open import open_config
from linearize.checkpoint.reading import reading
from linearize.checkpoint.sources import Located, relocate
from linearize.errors import InputError
from linearize.formats import code, each_string, markdown, plain
from linearize.hub.names import is_repo_id
from linearize.results.schema import COLUMNS
from linearize.results.table import markdown_table

# In every card written here. A README.md without it was written by hand and is published as it is.
MARK = "<!-- Written by linearize. Delete this line to keep a later push from rewriting this file. -->"

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(
    folder: Path, config: dict, adapter_of: str | None, repo: str | None, results: dict | None, recipe: str | None,
    foreign: Sequence[str] = (),
) -> str:  # fmt: skip
    """The text of README.md for a folder; a README.md in it that somebody wrote by hand is returned unchanged.

    Args:
        folder: to be published.
        config: its config.json; empty for an adapter.
        adapter_of: the base model's id if the folder holds an adapter.
        repo: the id to load from; None for the folder itself.
        results: the content of results.json; None if the model was not evaluated.
        recipe: the content of recipe.yaml, if there is one.
        foreign: files of code in it that others wrote.

    Returns:
        Markdown with the Hub's metadata at its head.
    """
    if (written := _by_hand(folder / "README.md")) is not None:
        told = all(file in written for file in foreign)
        return written if told else f"{written.rstrip()}\n\n{_warning(foreign)}\n"
    block = config.get("linearize", {})
    source, layers = block.get("source") or {}, list(block.get("layers", {}).values())
    base = adapter_of or source.get("id") or ""
    base_id = base if is_repo_id(base) else None
    licence, results = each_string(_licence(source), plain), each_string(results, plain)
    mixers = sorted({str(mixer["name"]) for mixer in layers})
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", recipe or ""))])
    name = (repo or folder.resolve().name).split("/")[-1]
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=("adapter" if adapter_of else "finetune") if base_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linearize", "linear-attention", *mixers],
        model_name=name if results else None,
        eval_results=_eval_results(results) or None,
        **licence,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        name=markdown(name),
        location=repo or str(folder),
        adapter=bool(adapter_of),
        origin=f"[{base_id}](https://huggingface.co/{base_id})" if base_id else markdown(base or "A local model"),
        mixers=[*map(markdown, mixers)],
        layers=_grouped(layers),
        replaced=len(layers),
        total=None if adapter_of else len(mixers_of(open_config(folder))),
        code="auto_map" in config,
        foreign=_warning(foreign) if foreign else None,
        licence=code(licence["license"]) if "license" in licence else None,
        table=markdown_table(results) if results else None,
        columns=[(name, COLUMNS[name]) for name in (results or {}).get("columns", ())],
        recipe=plain(recipe.strip(), lines=True) if recipe else None,
        fence=fence,  # longer than any in it
    )
    return f"{str(card).rstrip()}\n"


def _by_hand(readme: Path) -> str | None:
    """What somebody wrote: not this package, nor peft, which leaves a template full of what is needed."""
    written = readme.read_text(encoding="utf-8") if readme.is_file() else MARK
    return None if MARK in written or "[More Information Needed]" in written else written


def _warning(foreign: Sequence[str]) -> str:
    """What the card says of code that others wrote."""
    return (
        f"**Foreign code**: {', '.join(map(code, foreign))} came with the tokenizer of the source.\n"
        "Linearize neither wrote nor checked it; read it before you pass `trust_remote_code=True`."
    )


def _grouped(layers: list[dict]) -> list[tuple[int, str, str]]:
    """Layers with the same mixer together: how many, its name, its settings."""
    counts: dict[tuple[str, str], int] = {}
    for mixer in layers:
        settings = ", ".join(markdown(f"{key} {value}") for key, value in mixer.items() if key != "name")
        key = markdown(mixer["name"]), settings
        counts[key] = counts.get(key, 0) + 1
    return [(count, name, settings) for (name, settings), count in counts.items()]


def _licence(source: dict) -> dict:
    """Licence and language of the source, as card metadata: from its own card or its GGUF file; empty if unknown."""
    try:
        with reading("source", "is gone, out of reach, or was never recorded", "put it back"):
            return _stated(relocate(source))
    except InputError:
        return {}


def _stated(located: Located) -> dict:
    """Licence and language that a model states."""
    keys = ("license", "license_name", "license_link", "language")
    if located.gguf:
        values = gguf_header.settings(located.path / located.gguf)
        metadata = {key: values.get(f"general.{key.replace('_', '.')}") for key in keys}
    elif (located.path / "README.md").is_file():
        metadata = ModelCard.load(located.path / "README.md", ignore_metadata_errors=True).data.to_dict()
    else:
        return {}
    return {key: metadata[key] for key in keys if metadata.get(key) and _is_plain(metadata[key])}


def _is_plain(value: object) -> bool:
    """Whether a value of metadata is a text, or a list of texts: anything else the Hub does not take."""
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(each, str) for each in value)


def _eval_results(results: dict | None) -> list[EvalResult]:
    """What the model scored, in the Hub's own form: the student's column, before any training the converted one's."""
    if not results:
        return []
    column = next((results["columns"][name] for name in ("student", "converted") if name in results["columns"]), {})
    scores = [(task, score["metric"], score["value"]) for task, score in column.get("tasks", {}).items()]
    if "perplexity" in column:
        scores.append((f"{results['suite']} text", "perplexity", column["perplexity"]["value"]))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"\W+", "_", task),
            dataset_name=task,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for task, metric, value in scores
        if math.isfinite(value)  # the Hub refuses a card with .nan in it
    ]
