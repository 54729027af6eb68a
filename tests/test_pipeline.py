"""What can be known before the work is refused before it, and nothing is written."""

from pathlib import Path

import pytest
from helpers.tiny import save_source

import linearize
from linearize import pipeline
from linearize.errors import InputError
from linearize.evaluation import work
from linearize.evaluation.suite import BehaviourSpec, Suite, TextSpec
from linearize.recipe import load as recipes


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose positions are a learned table of 256."""
    return save_source(tmp_path_factory.mktemp("source") / "gpt2", "gpt2", max_position_embeddings=256)


SHORT = ["train.distil.seq_len=128", "train.distil.tokens=2048"]
AHEAD = [
    (["train.distil.seq_len=512"], r"train\.distil\.seq_len: found 512; .* learned positions for 256"),
    ([*SHORT, "calibrate={seq_len: 300}"], r"calibrate\.seq_len: found 300"),
    ([*SHORT, "eval.suite=smok"], "unknown suite 'smok'"),
    ([*SHORT, "eval.suite=absent.yaml"], "absent.yaml: cannot be read"),
    ([*SHORT, "data.0.path=absent.jsonl"], "found nothing named 'absent.jsonl'"),
    ([*SHORT, "train.distil.top_k=100000"], "expected at most the vocabulary"),
    ([*SHORT, "convert.layers=77"], "layers: found 77"),
]


@pytest.mark.parametrize(("changes", "expected"), AHEAD, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_run_looks_ahead(changes: list[str], expected: str, learned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        linearize.run(learned, tmp_path / "out", set=changes)
    assert not (tmp_path / "out").exists()


def test_check_and_dry_run_say_the_same(learned: Path, tmp_path: Path) -> None:
    long = ["train.distil.seq_len=512"]
    plan = linearize.convert(learned, tmp_path / "o", set=long, dry_run=True)
    assert not isinstance(plan, Path) and "learned positions" in plan.later[0] and "learned positions" in plan.text()
    (tmp_path / "mine.yaml").write_text(recipes.to_yaml(recipes.resolve(str(learned), long)))
    with pytest.raises(InputError, match=r"mine\.yaml: train\.distil\.seq_len: found 512"):
        linearize.check(tmp_path / "mine.yaml")
    assert pipeline.problems(recipes.resolve(str(learned), SHORT)) == []


def test_train_itself_refuses_what_nobody_looked_for(learned: Path, tmp_path: Path) -> None:
    model = Path(str(linearize.convert(learned, tmp_path / "0", window=16)))
    for stage in (linearize.train, linearize.calibrate):
        with pytest.raises(InputError, match=r"seq_len: found 1024; .* learned positions for 256"):
            stage(model, tmp_path / "1")


@pytest.mark.parametrize("out", ["full", "file", "source"])
def test_a_dry_run_refuses_the_outputs_that_the_run_refuses(out: str, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    target = llama_folder if out == "source" else tmp_path / out
    for dry in (True, False):
        with pytest.raises(InputError, match=r"the output|is the source"):
            linearize.convert(llama_folder, target, dry_run=dry)


def test_a_suite_of_the_package_is_shortened_to_the_context() -> None:
    """As many tokens in shorter blocks, each length once; what fits stays as it is."""
    suite = Suite("s", perplexity=[TextSpec("t", 512, 8), TextSpec("t", 2048, 2)], behaviour=BehaviourSpec())
    short, lines = work.fitted(suite, 256)
    assert short.perplexity == [TextSpec("t", 256, 16)] and len(lines) == 3
    assert short.behaviour is not None and (short.behaviour.state, short.behaviour.tokens) == (256, 128)
    assert work.fitted(suite, 1024)[0].perplexity == [TextSpec("t", 512, 8), TextSpec("t", 1024, 4)]
    for context in (None, 4096):
        assert work.fitted(suite, context) == (suite, [])
    work.check(short, 256)
    with pytest.raises(InputError, match=r"length: 256, or take one of the package"):
        work.check(suite, 256)


@pytest.mark.slow
def test_the_default_suite_on_a_short_context(learned: Path, tmp_path: Path) -> None:
    model = Path(str(linearize.convert(learned, tmp_path / "0", window=16)))
    results = linearize.evaluate(model, limit=2, columns=["source", "student"], progress=False)
    assert results["settings"]["suite"]["perplexity"] == [{"text": "wikitext2_valid", "length": 256, "blocks": 16}]


@pytest.mark.parametrize("name", ["tokenizer.json", "pytorch_model.bin", "tiny.gguf"])
def test_a_replaced_file_of_the_source_is_noticed(name: str, tmp_path: Path) -> None:
    source, stage = tmp_path / "source", tmp_path / "out" / "0-converted"
    source.mkdir()
    stage.mkdir(parents=True)
    if name != "tiny.gguf":
        (source / "config.json").write_text("{}")
    (source / name).write_text("{}")
    wanted = recipes.load("smollm2-135m", [f"source.id={source}"])
    (stage / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    for old in (False, True):  # earlier versions did not say
        read = pipeline._inputs(wanted)
        (stage / "linearize.json").write_text("{}")
        pipeline._record(stage, None, {"source": read["source"], "data": []} if old else read)
        assert pipeline._finished(stage, wanted, None, pipeline._inputs(wanted), False)
        (source / name).write_text(f"[{old}]")
        if old:
            assert pipeline._finished(stage, wanted, None, pipeline._inputs(wanted), False)
            continue
        with pytest.raises(InputError, match="was made from other files.*(tokenizer|other_weights)"):
            pipeline._finished(stage, wanted, None, pipeline._inputs(wanted), False)
