"""Other people's checkpoints: a Hugging Face folder becomes the same `GPT`, and a `GPT` such a folder.

Only `config.json` and `*.safetensors` are read: no pickle, and no code that comes with a model.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minqstar.errors import UserError, first_line, require
from minqstar.files import aside, discard, in_words, replace_folder
from minqstar.lm.families import FAMILIES, Family, is_of, part_rows, read_architecture, their_names, written_config
from minqstar.lm.model import GPT, GPTConfig
from minqstar.text import read_text

INDEX = "model.safetensors.index.json"
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


def is_pretrained(folder: Path) -> bool:
    """Whether a folder is of Hugging Face's kind: its config.json names a model type."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


class Shards:
    """The tensors of a folder by name, each read when it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.file_of = folder, {}
        names = self._files()
        for name in names:
            path = folder / name
            require(path.is_file(), f"{folder} lacks {name}, which its {INDEX} names")
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as e:
                raise UserError(f"cannot read {path}: {first_line(e)}") from e
            self.file_of |= dict.fromkeys(file.keys(), file)
        self.left = {name for name in self.file_of if not name.endswith(BUFFERS)}

    def _files(self) -> list[str]:
        if not (self.folder / INDEX).is_file():
            if (self.folder / "model.safetensors").is_file():
                return ["model.safetensors"]
            pickles = any(file for kind in ("*.bin", "*.pt", "*.pth") for file in self.folder.glob(kind))
            how = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
            words = f"holds pickled weights, which can run code; transformers converts them: {how}"
            raise UserError(f"{self.folder} {words if pickles else 'holds no model.safetensors'}")
        try:
            names = json.loads(read_text(self.folder / INDEX, "the index"))["weight_map"]
            files = sorted(set(names.values()))
            inside = all(Path(name).name == name for name in files)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{self.folder / INDEX}: want a weight_map of tensor names to files") from e
        require(inside and bool(files), f"{self.folder / INDEX}: a file lies outside of the folder")
        return files

    def take(self, name: str) -> Tensor:
        """A tensor; a folder of the bare model has the same names without their first part."""
        bare = name.split(".", 1)[1]
        require(name in self.file_of or bare in self.file_of, f"{self.folder}: the weights lack {name}")
        name = name if name in self.file_of else bare
        self.left.discard(name)
        tensor = self.file_of[name].get_tensor(name)
        known = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        require(known, f"{self.folder}: {name} is of {tensor.dtype}: want plain floating-point weights")
        require(bool(tensor.isfinite().all()), f"{self.folder}: {name} holds numbers that are not finite")
        return tensor


def _described(folder: Path) -> tuple[Family, GPTConfig]:
    where = f"{folder / 'config.json'}"
    try:
        config = json.loads(read_text(folder / "config.json", "the configuration"))
    except (ValueError, RecursionError) as e:
        raise e if isinstance(e, UserError) else UserError(f"{where}: not JSON ({first_line(e)})") from e
    require(isinstance(config, dict), f"{where}: want an object")
    return read_architecture(config, where)


def pretrained_config(folder: Path) -> GPTConfig:
    """The architecture of a Hugging Face folder. UserError if `GPT` cannot be it."""
    return _described(folder)[1]


def load_pretrained(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a Hugging Face folder, in eval mode, its weights turned into `dtype`. UserError if it cannot be."""
    family, architecture = _described(folder)
    with torch.device("meta"):
        model = GPT(architecture)
    weights = {}
    with ExitStack() as stack:
        shards = Shards(folder, stack)
        for name, like in model.named_parameters():
            theirs, transposed, by_head = their_names(family, name)
            rows, parts = part_rows(architecture, like, len(theirs)), []
            for part, count in zip(theirs, rows, strict=True):
                tensor, shape = shards.take(part), (count, *like.shape[1:])
                shape = shape[::-1] if transposed else shape
                odd = f"{folder}: {part} is {tuple(tensor.shape)}, but config.json asks for {shape}"
                require(tensor.shape == shape, odd)
                parts.append(tensor.T if transposed else tensor)
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            if by_head:
                whole = rearrange(whole, "(nh three hs) ... -> (three nh hs) ...", nh=architecture.n_head, three=3)
            weights[name] = nn.Parameter(whole.to(device, dtype, copy=True).contiguous())
        if architecture.tied and "lm_head.weight" in shards.left:
            head = shards.take("lm_head.weight").to(device, dtype)
            require(
                torch.equal(head, weights["wte.weight"].data), f"{folder}: lm_head is tied, but is not the embedding"
            )
    unknown = ", ".join(sorted(shards.left)[:3])
    require(not shards.left, f"{folder}: {len(shards.left)} tensors have no place in this architecture: {unknown}")
    model.load_state_dict(weights, assign=True)
    model.init_positions(device)
    return model.eval()


def export(model: GPT, folder: Path, tokenizer=None):
    """Write a folder that transformers loads; UserError if the architecture is of no family, or the folder is there."""
    folder, config = Path(folder), model.config
    kind = next((kind for kind in FAMILIES if is_of(kind, config)), None)
    require(kind is not None, f"the architecture is of no family that transformers knows: {', '.join(FAMILIES)}")
    require(not folder.exists(), f"{folder} exists; choose another folder")
    tensors = {}
    for name, parameter in model.named_parameters():
        theirs, transposed, by_head = their_names(FAMILIES[kind], name)
        whole = parameter.detach().cpu()
        if by_head:
            whole = rearrange(whole, "(three nh hs) ... -> (nh three hs) ...", nh=config.n_head, three=3)
        parts = whole.split(part_rows(config, whole, len(theirs)))
        tensors |= {part: (t.T if transposed else t).contiguous() for part, t in zip(theirs, parts, strict=True)}
    written = written_config(kind, config) | {"dtype": str(model.wte.weight.dtype).removeprefix("torch.")}
    if tokenizer:
        written |= {"eos_token_id": list(tokenizer.ends), "pad_token_id": tokenizer.pad}
    new = aside(folder, "new")
    try:
        with in_words(f"cannot write {folder}"):
            new.mkdir(parents=True)
            (new / "config.json").write_text(json.dumps(written, indent=2))
            save_file(tensors, new / "model.safetensors", {"format": "pt"})
            if tokenizer:
                tokenizer.save_in(new)
            replace_folder(new, folder)
    except BaseException:
        if new.exists():
            discard(new, folder)
        raise
