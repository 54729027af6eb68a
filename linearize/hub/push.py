"""Publish a folder: check that it is complete, write its model card, upload it to the Hugging Face Hub.

Nothing is written to the folder. What goes up is what ``plan`` lists and nothing else: checkpoints, TensorBoard logs,
hidden and half-written files stay, and no file tells where something lies on this machine (see `names`).
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

from linearize.checkpoint import remote_code
from linearize.checkpoint.copying import sha256
from linearize.checkpoint.manifest import MANIFEST
from linearize.checkpoint.reading import reading
from linearize.checkpoint.shards import read_header
from linearize.errors import InputError
from linearize.formats import format_bytes
from linearize.hub import names
from linearize.hub.card import write_card
from linearize.results import file as results_file

# Matched against every part of a path. Optimiser states, logs and what an interrupted write left are not the model; a
# report names folders, and is made anew from results.json.
NOT_UPLOADED = (
    "*checkpoint*",
    "tb",
    "runs",
    "report.html",
    "__pycache__",
    "*.tmp",
    "*.partial",
    "*.incomplete",
    "*.lock",
    ".*",
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# httpx's in huggingface_hub 1, httpx2's in 2: the root of what is raised when no answer comes back at all.
TRANSPORT_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@dataclass(frozen=True)
class Upload:
    """What a push sends: path in the repository -> a file of the folder, or the bytes that take its place."""

    folder: Path
    files: dict[str, Path | bytes]
    card: str
    evaluated: bool

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
        return "\n".join([*lines, total, "", "README.md:", "", self.card])


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
        with_code: send the code along, so that ``trust_remote_code=True`` opens it where this package is missing.

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
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        files = {name: path for name, path in files.items() if not _left_out(name)}
        measured = _measured(folder)
        if measured:
            files["results.json"] = measured
        results = results_file.read(measured) if measured else None
        recipe = names.named("recipe.yaml", files["recipe.yaml"].read_bytes()) if "recipe.yaml" in files else b""
        config = remote_code.auto_map(config) if with_code and config else config
        card = write_card(folder, config, adapter_of, repo, results, recipe.decode())
        changed = _changed(files)
        if with_code:
            changed |= _code(folder, config, changed.get("config.json"))
        _keep_manifest(files, changed)
        sent: dict[str, Path | bytes] = {**files, **changed, "README.md": card.encode()}
        return Upload(folder, dict(sorted(sent.items())), card, bool(results))


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
        adapter_of = _json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
        if Path(adapter_of).is_dir() or not names.is_repo_id(adapter_of):
            raise InputError(
                f"{folder}/adapter_config.json: the adapter belongs to {adapter_of or 'no model'}, which others cannot "
                f"open; push the merged model instead (linearize merge {folder} --out MERGED), or push the base and "
                "name its Hub id as base_model_name_or_path"
            )
    else:
        config = _json(folder / "config.json")
        if config.get("model_type") != "linearized" or not isinstance(config.get("linearize"), dict):
            raise InputError(
                f"{folder}/config.json: model_type is {config.get('model_type')!r}, but only linearized folders can be "
                f"pushed; convert it first: linearize convert --model {folder} --out NEW"
            )
    _check_weights(folder, "adapter_model" if adapter_of else "model")
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder}: has no tokenizer_config.json; copy the source's tokenizer files into it")
    return config, adapter_of


def _check_weights(folder: Path, stem: str) -> None:
    index = folder / f"{stem}.safetensors.index.json"
    shards = set(_json(index).get("weight_map", {}).values()) if index.is_file() else {f"{stem}.safetensors"}
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise InputError(f"{folder}: {shard} is missing, so the folder is not complete; write it again")
        read_header(folder / shard)


def _json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path.parent}: has no {path.name}; push a folder that linearize wrote")
    with reading(path, "not valid JSON", "write the folder again"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected an object; write the folder again")
    return content


def _measured(folder: Path) -> Path | None:
    """The results of this very model: in its folder, or beside it, where ``linearize run`` writes them."""
    own, beside = folder / "results.json", folder.resolve().parent / "results.json"
    if not own.is_file() and not beside.is_file():
        return None
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    fingerprint = hashlib.sha256("".join(map(sha256, weights)).encode()).hexdigest()
    if own.is_file():
        if results_file.read(own).get("settings", {}).get("weights", fingerprint) != fingerprint:
            raise InputError(
                f"{own}: was measured on other weights than the folder holds now; run `linearize eval {folder}` again, "
                "or remove it to publish the model as not evaluated"
            )
        return own
    try:
        return beside if results_file.read(beside).get("settings", {}).get("weights") == fingerprint else None
    except InputError:  # somebody else's file
        return None


def _changed(files: dict[str, Path]) -> dict[str, bytes]:
    """What takes the place of files that name a path of this machine."""
    before = {name: files[name].read_bytes() for name in names.PATHS if name in files}
    after = {name: names.named(name, content) for name, content in before.items()}
    return {name: content for name, content in after.items() if content != before[name]}


def _code(folder: Path, config: dict, changed: bytes | None) -> dict[str, bytes]:
    """The modeling file of a folder, and a config.json that names it."""
    if not config:
        raise InputError(
            f"--with-code: {folder} holds an adapter, and code belongs to the model under it; merge the two (linearize "
            f"merge {folder} --out MERGED) and push that with its code"
        )
    named = remote_code.auto_map(json.loads(changed) if changed else config)
    return {"config.json": (json.dumps(named, indent=2) + "\n").encode(), remote_code.FILE: remote_code.code().encode()}


def _keep_manifest(files: dict[str, Path], changed: dict[str, bytes]) -> None:
    """Let the manifest among the files fit what is sent in their place."""
    if MANIFEST not in files or not changed:
        return
    manifest = json.loads(changed.get(MANIFEST) or files[MANIFEST].read_bytes())
    for name, content in changed.items():
        if name in manifest["files"] or name not in files:
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    changed[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()


def _left_out(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in NOT_UPLOADED)


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
