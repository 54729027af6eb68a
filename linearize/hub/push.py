"""Publish a folder: check that it is complete, write its model card, upload it to the Hugging Face Hub.

Nothing is written to the folder. What goes up is what ``plan`` lists and nothing else: checkpoints, TensorBoard logs,
hidden and half-written files stay, no file tells where something lies on this machine (see `names`), and code that is
not this package's goes up only with ``with_code``, named on the card.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from linearize.checkpoint import adapters, fit, links, remote_code, shards, tokenizer_files
from linearize.checkpoint.identity import identity
from linearize.checkpoint.manifest import MANIFEST, facts_of
from linearize.checkpoint.open import open_config
from linearize.checkpoint.reading import read_json, reading
from linearize.errors import InputError
from linearize.formats import format_bytes
from linearize.hub import names
from linearize.hub.card import write_card
from linearize.results import file as results_file

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# httpx's in huggingface_hub 1, httpx2's in 2: the root of what is raised when no answer comes back at all.
TRANSPORT_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@dataclass(frozen=True)
class Upload:
    """What a push sends: path in the repository -> a file of the folder, or the bytes in its place; `left` stay."""

    folder: Path
    files: dict[str, Path | bytes]
    card: str
    evaluated: bool
    left: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its path in the repository."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }

    def to_dict(self) -> dict:
        """JSON-safe form: sizes in place of contents."""
        return {"folder": str(self.folder), "files": self.sizes(), "evaluated": self.evaluated, "card": self.card}

    def text(self) -> str:
        """The listing that ``--dry-run`` prints."""
        sizes = self.sizes()
        lines = [f"{format_bytes(size):>12}  {path}" for path, size in sizes.items()]
        total = f"{format_bytes(sum(sizes.values())):>12}  in {len(sizes)} files; nothing was uploaded"
        left = [f"not part of the model: {shards.names(self.left)}"] if self.left else []
        return "\n".join([*lines, *left, total, "", "README.md:", "", self.card])


def push(
    folder: str | Path,
    repo: str,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    message: str | None = None,
    with_code: bool = False,
) -> str:
    """Upload a linearized folder, with a model card, to the Hugging Face Hub.

    Weights of an earlier push that this one does not replace are deleted in the same commit: a stale shard would
    otherwise be loaded in place of the new ones.

    Args:
        folder: what ``linearize convert`` or ``merge`` wrote, or a trained adapter whose base model is on the Hub.
        repo: ``organisation/name``, or a name alone for your own account. Made if it does not exist.
        private: make it a private repository.
        dry_run: upload and write nothing.
        token: of the Hub; None for the one that ``hf auth login`` or HF_TOKEN left.
        message: of the commit.
        with_code: send the code along, so that ``trust_remote_code=True`` opens it where this package is missing; also
            code of others that the folder's tokenizer names, which the card then says.

    Returns:
        The address of the repository; with ``dry_run`` the files, their sizes and the card, as text.

    Raises:
        InputError: the folder is incomplete or not linearized, ``repo`` is malformed or holds something else, you are
            not logged in or may not write there, or the Hub cannot be reached.

    Example:
        >>> print(linearize.push("runs/demo/merged", "my-name/SmolLM2-135M-GLA", dry_run=True))
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--repo {repo}: not the name of a repository ({reason}); give organisation/name") from error
    upload = plan(folder, repo, with_code)
    if dry_run:
        return upload.text()
    if not (token or get_token()):
        raise InputError(
            f"--repo {repo}: you are not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN to a "
            "token with write access from https://huggingface.co/settings/tokens"
        )
    with _explained(repo):
        return _send(HfApi(token=token, library_name="linearize"), upload, repo, private, message)


def plan(folder: str | Path, repo: str | None = None, with_code: bool = False) -> Upload:
    """Check a folder and collect what a push would send.

    Args:
        folder: as in ``push``.
        repo: named in the card as the id to load from; None for the folder itself.
        with_code: as in ``push``.

    Raises:
        InputError: as ``push``, for everything that concerns the folder.
    """
    folder = Path(folder)
    with reading(folder, "a file of it is damaged, so it cannot be published", "write the folder again"):
        config, adapter_of = _checked(folder)
        code = with_code or bool(config) and remote_code.asked(folder)
        foreign = remote_code.foreign(folder) if with_code else []
        files, left = _files(folder, "adapter_model.safetensors" if adapter_of else shards.SINGLE, foreign)
        results = _measured(folder)
        if results:
            files["results.json"] = results
        measured = names.values("results.json", results_file.read(results)) if results else None
        changed = _changed(files, code, bool(foreign))
        recipe = changed.get("recipe.yaml") or (files["recipe.yaml"].read_bytes() if "recipe.yaml" in files else b"")
        if (facts_of(folder).get("source") or {}).get("path"):  # however much its id looks like one of the Hub
            recipe = names.of_local_source(recipe)
            changed |= {"recipe.yaml": recipe} if recipe else {}
        config = {**config, "auto_map": remote_code.AUTO_MAP} if code else remote_code.without_foreign(config)
        card = write_card(folder, config, adapter_of, repo, measured, recipe.decode(), foreign)
        card = names.named("README.md", card.encode()).decode()
        if code:
            changed |= _code(folder, changed.get("config.json"), config)
        left = [name for name in left if name not in changed]
        _keep_manifest(files, changed, left)
        sent: dict[str, Path | bytes] = {**files, **changed, "README.md": card.encode()}
        return Upload(folder, dict(sorted(sent.items())), card, bool(results), tuple(left))


def card(folder: str | Path, repo: str | None = None) -> str:
    """The model card that a push of this folder would publish; arguments and errors as in ``plan``."""
    return plan(folder, repo).card


# -- the folder --------------------------------------------------------------------------------------------------------


def _checked(folder: Path) -> tuple[dict, str | None]:
    """The folder's config.json and None, or for an adapter an empty dict and the Hub id of its base model."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that `linearize convert`, `train` or `merge` wrote")
    adapter_of, config = None, {}
    if (folder / "adapter_config.json").is_file():
        adapter_of = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
        if Path(adapter_of).is_dir() or not names.is_repo_id(adapter_of):
            raise InputError(
                f"{folder}/adapter_config.json: the adapter belongs to {adapter_of or 'no model'}, which others cannot "
                f"open; push the merged model instead (linearize merge {folder} --out MERGED), or push the base and "
                "name its Hub id as base_model_name_or_path"
            )
    else:
        config = read_json(folder / "config.json", "push a folder that linearize wrote")
        if config.get("model_type") != "linearized" or not isinstance(config.get("linearize"), dict):
            raise InputError(
                f"{folder}/config.json: model_type is {config.get('model_type')!r}, but only linearized folders can be "
                f"pushed; convert it first: linearize convert --model {folder} --out NEW"
            )
    if adapter_of:
        adapters.check(folder)
    else:
        listed = shards.listed(folder, shards.SINGLE)
        absent = sorted(name for name in listed if not (folder / name).is_file())
        if absent and absent != [shards.SINGLE] or listed == set(absent):
            raise InputError(f"{folder}: {shards.names(absent)} is missing, so it is not complete; write it again")
        fit.check(folder, fit.empty(open_config(folder), folder), shards.read_folder(folder))
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder}: has no tokenizer_config.json; copy the source's tokenizer files into it")
    tokenizer_files.check(folder)
    return config, adapter_of


def _files(folder: Path, weights: str, foreign: list[str]) -> tuple[dict[str, Path], list[str]]:
    """What goes up as it stands, by its path in the repository, and what stays here."""
    every = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    held = shards.listed(folder, weights)
    files = {
        name: links.own(folder, path)
        for name, path in every.items()
        if name in foreign or names.is_published(name) and (path.suffix != ".safetensors" or name in held)
    }
    hidden = [name for name in every if name not in files and not any(part[0] == "." for part in name.split("/"))]
    return files, hidden


def _measured(folder: Path) -> Path | None:
    """The results of this very model: in its folder, or beside it, where ``linearize run`` writes them."""
    own, beside = folder / "results.json", folder.resolve().parent / "results.json"
    if not own.is_file() and not beside.is_file():
        return None
    now = identity(folder)

    def same(results: Path, least: tuple[str, ...] = ()) -> bool:  # earlier versions did not say of which tokenizer
        said = results_file.read(results).get("settings", {})
        return all(said.get(key, None if key in least else now[key]) == now[key] for key in ("weights", "tokenizer"))

    if own.is_file():
        if not same(own):
            raise InputError(
                f"{own}: was measured on other weights than the folder holds now, or with another tokenizer; run "
                f"`linearize eval {folder}` again, or remove it to publish the model as not evaluated"
            )
        return own
    try:
        return beside if same(beside, ("weights",)) else None
    except InputError:  # somebody else's file
        return None


def _changed(files: dict[str, Path], code: bool, foreign: bool) -> dict[str, bytes]:
    """What takes the place of files that name a path of this machine, or code that does not go up."""
    changed = {}
    for name, path in files.items():
        if path.suffix not in (".json", ".yaml", ".jsonl") or name.endswith(".index.json"):
            continue
        before = path.read_bytes()
        after = names.named(name, before)
        if name in remote_code.SETTINGS and not (foreign and name != "config.json"):
            values = json.loads(after)
            if (kept := remote_code.without_foreign(values)) != values:
                after = (json.dumps(kept, indent=2) + "\n").encode()
        if after != before:
            changed[name] = after
    return changed


def _code(folder: Path, changed: bytes | None, config: dict) -> dict[str, bytes]:
    """The modeling file of a folder, and a config.json that names it."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--with-code: {folder} holds an adapter, and code belongs to the model under it; merge the two (linearize "
            f"merge {folder} --out MERGED) and push that with its code"
        )
    named = {**(json.loads(changed) if changed else config), "auto_map": remote_code.AUTO_MAP}
    return {"config.json": (json.dumps(named, indent=2) + "\n").encode(), remote_code.FILE: remote_code.code().encode()}


def _keep_manifest(files: dict[str, Path], changed: dict[str, bytes], left: list[str]) -> None:
    """Let the manifest among the files fit what is sent in their place, and what is not sent."""
    if MANIFEST not in files or not (changed or left):
        return
    manifest = json.loads(changed.get(MANIFEST) or files[MANIFEST].read_bytes())
    for name, content in changed.items():
        if name in manifest["files"] or name not in files:
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name in files or name in changed}
    changed[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()


# -- the upload --------------------------------------------------------------------------------------------------------


def _send(api: HfApi, upload: Upload, repo: str, private: bool, message: str | None) -> str:
    # None leaves it to the organisation's default, which may be private.
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    info = api.model_info(repo)
    held = (info.config or {}).get("model_type", "linearized")
    if held != "linearized":
        raise InputError(f"--repo {repo}: holds a {held} model, which a push would overwrite; choose another name")
    if private and not info.private:
        raise InputError(
            f"--repo {repo}: exists and is public; make it private in its settings, or choose another name"
        )
    remote = [entry.rfilename for entry in info.siblings or []]
    stale = [name for name in remote if name not in upload.files and any(fnmatch(name, kind) for kind in WEIGHTS)]
    api.create_commit(
        repo,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, content) for name, content in upload.files.items()),
        ],
        commit_message=message or "Upload a linearized model",
    )
    return f"{api.endpoint}/{repo}"


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one paragraph that says what to do."""
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled as error:
        raise InputError(f"--repo {repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except (HfHubHTTPError, TRANSPORT_ERROR, RuntimeError, ValueError) as error:
        # The client wraps what went wrong with one file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise InputError(f"--repo {repo}: {_advice(cause)}") from error


def _advice(error: BaseException) -> str:
    said = " ".join(str(error).split())
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return (
            "the Hub does not accept your token; run `hf auth login` with a token that has write access "
            f"(https://huggingface.co/settings/tokens), or set HF_TOKEN to one ({said})"
        )
    if status == 403:
        return f"you may not write there; use your account, an organisation of yours, or another token ({said})"
    if status is not None or isinstance(error, ValueError):
        return f"the Hub refused the upload, and nothing was published; mend what it names and push again ({said})"
    return f"the Hub cannot be reached ({type(error).__name__}: {said}); check the network and HF_ENDPOINT"
