"""Load a language model, its tokenizer, or a sentence encoder by name: of the kit (`base.kit`), a folder, or one on the hub."""

import contextlib
import functools
import os
from pathlib import Path

from lwzlib.base.kit import ModelError, kit_folder

FLASH_NEEDS = ("It needs a CUDA GPU and the package `kernels` (pip install -e '.[gpu]'), which fetches its kernel from the hub "
               "once; or give model.attention=sdpa")


def resolve(name: str) -> str:
    """The folder or hub name to load. Raises ModelError if a kit model is not prepared or a folder does not exist."""
    if name.startswith("kit:"):
        return kit_folder(name)
    folder = Path(name).expanduser()
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not folder.is_dir():
        raise ModelError(f"model folder {name} does not exist")
    return str(folder) if folder.is_dir() else name


@contextlib.contextmanager
def _loading(what: str, attention: str = ""):
    """Silence, and a ModelError of one line for what cannot be loaded, or not with this `attention`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot load {what}: {str(error).splitlines()[0]}") from error
    except ImportError as error:  # of transformers, where it finds neither the package nor the kernel
        if not attention.startswith("flash"):
            raise
        raise ModelError(f"cannot load {what} with model.attention = {attention!r}: {str(error).splitlines()[0]} "
                         f"{FLASH_NEEDS}") from error


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """Tokenizer that pads on the left, with the end of a text where it has no padding of its own. Raises ModelError."""
    from transformers import AutoTokenizer

    with _loading(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str):
    """Configuration of a model. Raises ModelError."""
    from transformers import AutoConfig

    with _loading(f"the configuration of {name}"):
        return AutoConfig.from_pretrained(resolve(name))


def load_model(name: str, dtype: str, attention: str, trust_remote_code: bool = False, scorer: bool = False,
               spread: bool = False):
    """(model in eval mode, `computed_in(dtype)`; tokenizer that pads on the left). A `scorer` gives one number per text, by a
    new head where the model has none, drawn from torch's generator. A model to `spread` lies on all GPUs of a process that
    has them to itself: it may be larger than each. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    from lwzlib.base.fast_cpu import computed_in, speed_up

    tokenizer = load_tokenizer(name, trust_remote_code)
    if spread := spread and torch.cuda.device_count() > 1 and "RANK" not in os.environ:
        torch.cuda.empty_cache()  # what another model's work left unused counts as taken
    kind, head = (AutoModelForSequenceClassification, {"num_labels": 1}) if scorer else (AutoModelForCausalLM, {})
    if scorer:
        logging.set_verbosity_error()  # else a report that the head is new
    with _loading(f"model {name}", attention):
        model = kind.from_pretrained(resolve(name), dtype=getattr(torch, computed_in(dtype)), attn_implementation=attention,
                                     trust_remote_code=trust_remote_code, device_map="auto" if spread else None, **head)
    model.config.pad_token_id = tokenizer.pad_token_id
    if is_deepspeed_zero3_enabled():  # it has put its shards where they belong
        restore_rotations(model)
    elif not spread:
        model.to("cuda" if scorer and torch.cuda.is_available() else "cpu")
    if not scorer:
        speed_up(model, tokenizer)
    return model.eval(), tokenizer


def restore_rotations(model) -> None:
    """Give a model that ZeRO-3 loaded its rotary frequencies in float32, as it has them elsewhere and in vLLM: DeepSpeed makes
    all that is computed while it loads in the weights' dtype, and bfloat16 is off by up to 0.4%. For models in which all layers
    share one rotation, as in Llama and Qwen2."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            whole = type(module)(module.config)
            for name in ("inv_freq", "original_inv_freq"):
                setattr(module, name, getattr(whole, name).to(getattr(module, name).device))


def input_device(model):
    """Device on which a model wants its input: that of its weights, or of the process where ZeRO-3 has taken them away."""
    from accelerate import PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled

    return PartialState().device if is_deepspeed_zero3_enabled() else model.device


@contextlib.contextmanager
def unsharded():
    """Load the models inside the block whole, also where ZeRO-3 would shard them over all processes: one that a single
    process uses alone would wait for the others for ever."""
    from transformers.integrations import deepspeed as zero

    active = zero._hf_deepspeed_config_weak_ref and zero._hf_deepspeed_config_weak_ref()
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active:
            zero.set_hf_deepspeed_config(active)


@functools.cache
def _load_encoder(name: str):
    import torch
    from sentence_transformers import SentenceTransformer

    from lwzlib.base.fast_cpu import computed_in

    with _loading(f"sentence encoder {name}"), torch.random.fork_rng(), unsharded():  # loaded in the midst of training
        # bfloat16: three times as fast on a CPU that has it, cosines equal to three digits
        return SentenceTransformer(resolve(name), model_kwargs={"dtype": getattr(torch, computed_in("bfloat16"))})


def embed(texts: list[str], name: str, batch: int = 64):
    """Unit vectors (n, d) float32 by a sentence encoder. A text longer than its context is cut (256 tokens for kit:minilm)."""
    encoder = _load_encoder(name)
    return encoder.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False).astype("float32")
