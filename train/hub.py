"""``--push-to-hub``: the finished model with its card becomes a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from entropy_masking.errors import RunError, UsageError, one_line
from train.flags import Options
from train.resume import FLAGS, GIVEN, SUMMARY


def create_repository(options: Options, output: Path) -> str:
    """Create the repository, which may exist already, before a run takes its time; returns OWNER/NAME.

    Raises:
        UsageError: this user is not logged in, or the Hub refuses.
    """
    if not get_token():
        raise UsageError("--push-to-hub needs a login to the Hub; run `hf auth login`, or set HF_TOKEN")
    name = options.hub_model_id or output.absolute().name
    try:
        return HfApi().create_repo(name, private=options.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # of the Hub, or of an HTTP library that depends on the version of huggingface_hub
        fix = "check the login (`hf auth whoami`) and --hub-model-id, or leave out --push-to-hub"
        raise UsageError(f"cannot create the model {name} on the Hub ({one_line(error)}); {fix}") from None


def push(output: Path, repository: str) -> None:
    """Upload the model, its tokenizer and its card, without checkpoints and files of the run.

    Raises:
        RunError: the Hub cannot be reached, or refuses. The model stays where it is.
    """
    own = (FLAGS, GIVEN, SUMMARY)
    files = [file.name for file in output.iterdir() if file.is_file() and file.name not in own]
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=output,
            allow_patterns=[name for name in files if not name.startswith(".")],
            commit_message="Add the model",
        )
    except Exception as error:
        kept = f"{output} is finished, but was not pushed to {repository} ({one_line(error)})"
        raise RunError(f"{kept}; the same command without --overwrite pushes it") from None
    print(f"pushed to {repository}")
