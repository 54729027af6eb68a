"""The model card of a linearized folder: where it comes from, what it is made of, what it scored, how to load it."""

import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linearize.checkpoint.sources import relocate
from linearize.errors import InputError
from linearize.results.schema import COLUMNS
from linearize.results.table import markdown_table

# In every card written here. A README.md without it was written by hand and is published as it is.
MARK = "<!-- Written by linearize. Delete this line to keep a later push from rewriting this file. -->"

TEMPLATE = """\
---
{{ card_data }}
---
{{ mark }}

# {{ name }}

{% if adapter -%}
A trained adapter for {{ origin }}, whose softmax attention was replaced by a linear recurrence.
{%- else -%}
{{ origin }} with softmax attention replaced by {{ mixers | join(", ") }} in {{ replaced }} of its {{ total }} layers.
While text is generated, the state of a replaced layer has a fixed size, however long the text becomes.

| layers | mixer | settings |
|---:|---|---|
{%- for count, mixer, settings in layers %}
| {{ count }} | {{ mixer }} | {{ settings }} |
{%- endfor %}
{%- endif %}

## Use

With the package `linearize` installed:

```python
import linearize  # registers the model type with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ location }}")
tokenizer = AutoTokenizer.from_pretrained("{{ location }}")
```

`linearize generate {{ location }}` opens a chat.
{%- if code %}

Without it, the code in this repository does the same; it needs PyTorch and transformers only:

```python
model = AutoModelForCausalLM.from_pretrained("{{ location }}", trust_remote_code=True)
```
{%- endif %}

## Results

{% if table -%}
{{ table }}

What the columns are:
{% for column, text in columns %}
- **{{ column }}**: {{ text }}.
{%- endfor %}

All columns were measured with the same harness, prompts, settings and seed; ± is one standard error. The distance to
*source* is what the conversion has cost, the distance to *window* is what the recurrent memory and the training have
brought. Perplexity (lower is better) depends on the tokenizer and the text: compare it between these columns only.
{%- else -%}
This model was **not evaluated** before it was published; nothing is known about what the conversion has cost.
`linearize eval` compares it with its source and with a window-only control.
{%- endif %}
{% if recipe %}
## Recipe

```yaml
{{ recipe }}
```
{% endif %}
## Licence

{% if licence -%}
Inherited from the source: `{{ licence }}`. The weights are derived from the source's, so its terms apply to them.
{%- else -%}
The licence of the source is not known. The weights are derived from the source's, so its terms, whatever they are,
apply to them: find them out before you use this model.
{%- endif %}
"""


def write_card(folder: Path, config: dict, adapter_of: str | None, repo: str | None, results: dict | None) -> str:
    """The text of README.md for a folder; a README.md in it that somebody wrote by hand is returned unchanged.

    Args:
        folder: holds recipe.yaml, if there is a recipe.
        config: its config.json; empty for an adapter.
        adapter_of: the base model's id if the folder holds an adapter.
        repo: the id to load from; None for the folder itself.
        results: the content of results.json; None if the model was not evaluated.
    """
    readme = folder / "README.md"
    if readme.is_file():
        written = readme.read_text(encoding="utf-8")
        # peft leaves a template full of these; nobody wrote that.
        if MARK not in written and "[More Information Needed]" not in written:
            return written
    block = config.get("linearize", {})
    source, layers = block.get("source") or {}, list(block.get("layers", {}).values())
    base = adapter_of or source.get("id") or ""
    base_id = base if is_repo_id(base) else None
    licence = _licence(source)
    mixers = sorted({mixer["name"] for mixer in layers})
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
    recipe = folder / "recipe.yaml"
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        mark=MARK,
        name=name,
        location=repo or str(folder),
        adapter=bool(adapter_of),
        origin=f"[{base_id}](https://huggingface.co/{base_id})" if base_id else f"`{base or 'A local model'}`",
        mixers=mixers,
        layers=_grouped(layers),
        replaced=len(layers),
        total=config.get("num_hidden_layers", config.get("text_config", {}).get("num_hidden_layers")),
        code="auto_map" in config,
        licence=licence.get("license"),
        table=markdown_table(results) if results else None,
        columns=[(name, COLUMNS[name]) for name in (results or {}).get("columns", ())],
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else None,
    )
    return f"{str(card).rstrip()}\n"


def is_repo_id(name: str) -> bool:
    """Whether a name has the form ``organisation/name`` of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _grouped(layers: list[dict]) -> list[tuple[int, str, str]]:
    """Layers with the same mixer together: how many, its name, its settings."""
    counts: dict[tuple[str, str], int] = {}
    for mixer in layers:
        settings = ", ".join(f"{key} {value}" for key, value in mixer.items() if key != "name")
        counts[mixer["name"], settings] = counts.get((mixer["name"], settings), 0) + 1
    return [(count, name, settings) for (name, settings), count in counts.items()]


def _licence(source: dict) -> dict:
    """Licence and language of the source, as card metadata: from its own card or its GGUF file; empty if unknown."""
    try:
        found = relocate(source)
    except (InputError, KeyError):  # gone, out of reach, or never recorded
        return {}
    keys = ("license", "license_name", "license_link", "language")
    if found.gguf:
        from gguf import GGUFReader

        names = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
        fields = GGUFReader(found.path / found.gguf).fields
        held = {key: fields.get(f"general.{name}") for key, name in names.items()}
        metadata = {key: field.contents() for key, field in held.items() if field}
    elif (found.path / "README.md").is_file():
        metadata = ModelCard.load(found.path / "README.md", ignore_metadata_errors=True).data.to_dict()
    else:
        return {}
    return {key: metadata[key] for key in keys if metadata.get(key)}


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
