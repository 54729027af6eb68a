"""Export back to the source's format: the same tensors, the same configuration, the same logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.conversion import run, tensors_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from linearize.conversion.export import export
from linearize.errors import InputError


@pytest.mark.parametrize("kind", ["llama_folder", "sharded_folder"])
def test_a_folder_without_new_weights_turns_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(kind)
    converted = run(source, tmp_path / "converted", mixer={"name": "gla"})
    back = export(converted, "source", tmp_path / "back")
    assert tensors_of(back) == tensors_of(source)
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, back))
    assert {**before, "_name_or_path": None} == {**after, "_name_or_path": None}
    x = torch.arange(40).view(2, 20)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, back)]
    assert type(models[0]) is type(models[1])
    with torch.no_grad():
        assert torch.equal(models[0](x).logits, models[1](x).logits)
    assert AutoTokenizer.from_pretrained(back)("a river").input_ids
    names = {path.name for path in back.iterdir()}
    assert "tokenizer.json" in names and not names & {"recipe.yaml", "linearize.json", "README.md"}
    assert run(back, tmp_path / "again", mixer={"name": "gla"}).is_dir()


def test_links_share_the_bytes(llama_folder: Path, tmp_path: Path) -> None:
    converted = run(llama_folder, tmp_path / "converted")
    back = export(converted, "source", tmp_path / "back", link=True)
    assert (back / "model.safetensors").samefile(converted / "model.safetensors")


def test_what_cannot_be_exported_is_refused(
    llama_folder: Path, scaled_mixer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = run(llama_folder, tmp_path / "converted")
    added = run(llama_folder, tmp_path / "added", mixer={"name": scaled_mixer})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    broken = Path(shutil.copytree(converted, tmp_path / "broken"))
    (broken / "config.json").write_text(json.dumps({"model_type": "linearized"}))
    for folder, to, text in (
        (added, "source", "weights that its mixers added .model.layers.0.self_attn.mixer.scale"),
        (converted, "fla", "unknown format. Available: onnx, pt2, source"),
        (converted, "sauce", "unknown format. Did you mean 'source'"),
        (llama_folder, "source", "not a linearized model"),
        (broken, "source", "not a linearized model"),
        (adapter, "source", "merge them first"),
        (tmp_path / "nothing", "source", "has no config.json"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            export(folder, to, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
