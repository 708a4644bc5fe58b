"""Command `lwz push`: a trained model and its card, to the hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from lwzlib.base.rows import RunError, visible_files
from lwzlib.cli.options import EXHIBITS, out, say

app = typer.Typer()
_OF_A_MODEL = (".safetensors", ".json", ".jinja", ".txt", ".model")  # weights, tokenizer; nothing of the training
_HINTS = {401: "the token is not valid there: make one that may write, and `hf auth login`",
          403: "the token may not write there: is the name yours, and the token one that may write?",
          404: "there is no such user or organisation, or the token may not see it",
          409: "somebody else changes that repository at the moment: try again"}


@app.command(rich_help_panel=EXHIBITS)
def push(run_dir: Path, arm: Annotated[str, typer.Option(help="The arm whose model goes out.")],
         to: Annotated[str, typer.Option(help="user/name on the hub; it is made if it is not there.")],
         private: Annotated[bool, typer.Option(help="If it is made, nobody else sees it.")] = False,
         yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False):
    """Upload an arm's model and its card to the hub.

    The card is made anew. The token is that of HF_TOKEN, or of `hf auth login`."""
    from lwzlib.exhibits.model_card import trained_stage, write_card

    folder = trained_stage(run_dir, arm) / "model"
    token = _token(to)
    write_card(run_dir, arm, to)
    files = [file for file in visible_files(folder) if file.suffix in _OF_A_MODEL or file.name == "README.md"]
    table = Table("file", Column("bytes", justify="right"), box=None)
    for file in files:
        table.add_row(str(file.relative_to(folder)), f"{file.stat().st_size:,}")
    table.add_row("in all", f"{sum(file.stat().st_size for file in files):,}", style="bold")
    say(f"{folder} to {to}:")
    out.print(table)
    if left := [str(file.relative_to(folder)) for file in visible_files(folder) if file not in files]:
        say(f"stays here: {', '.join(left)}")
    if not yes and not typer.confirm(f"Upload {len(files)} files to {'a private' if private else 'a PUBLIC'} {to}?"):
        write_card(run_dir, arm)  # which named the repository
        raise typer.Exit(1)
    try:
        say(f"done: {_upload(folder, files, to, token, private)}")
    except RunError:
        write_card(run_dir, arm)
        raise


def _token(to: str) -> str:
    """The person's token. Raises RunError without one, for a name that no hub takes, or where the hub is switched off."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise RunError(f"--to {to}: {str(error).splitlines()[0]}") from None
    if to.count("/") != 1:
        raise RunError(f"--to {to}: must be user/name, such as ada/nano-base-think")
    if constants.is_offline_mode():
        raise RunError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it for this command")
    if not (token := get_token()):
        raise RunError("no token of the hub: set HF_TOKEN, or run `hf auth login` once")
    return token


def _upload(folder: Path, files: list[Path], to: str, token: str, private: bool) -> str:
    """Make the repository if needed, and put the files into it, as one commit; returns its address. Raises RunError."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(to, private=private or None, exist_ok=True)
        if private and not api.model_info(to).private:
            raise RunError(f"{to} is there already, and is public: make it private first, or give another name")
        done = api.upload_folder(repo_id=to, folder_path=folder, commit_message="Model and card of the LongWriter-Zero kit",
                                 allow_patterns=[str(file.relative_to(folder)) for file in files])
    except HfHubHTTPError as error:
        code, said = error.response.status_code, error.server_message or error.response.reason_phrase
        raise RunError(f"{api.endpoint} refused {to} ({code} {said}): {_HINTS.get(code, 'nothing was changed there')}".replace(
            token, "***")) from None
    except ValueError as error:  # what the hub says of the card's header
        raise RunError(f"{api.endpoint} refused the card of {to}: {' '.join(str(error).split())}") from None
    except httpx.TransportError as error:
        raise RunError(f"{api.endpoint} cannot be reached ({type(error).__name__}: {error})") from None
    return done.commit_url
