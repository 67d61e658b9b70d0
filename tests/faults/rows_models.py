"""Models and adapters: folders from anyone, whole or not, and the hub."""

import json
from collections.abc import Callable

from world import Preparation, Row, World, cut, edit_json, folder, remove, rows, toy, tuned, write

ASK = "infer --model toy --prompt 1+1= --max-new-tokens 2"
ANSWER = "infer --adapter tuned --prompt 1+1= --max-new-tokens 2"
TRAIN = "finetune --task arithmetic --model toy"
PICKLE = b"cos\nsystem\n(S'touch PWNED'\ntR."
EVIL = write("toy/evil.py", "open('PWNED', 'w')\nclass Evil: pass\n")
WEIGHTS, ADAPTER, CONFIG = "toy/model.safetensors", "tuned/adapter_model.safetensors", "tuned/adapter_config.json"
AGAIN = "copy or download it again"


def header(name: str, change: Callable[[dict], None]) -> Preparation:
    """A safetensors file with another header over the same data."""
    def prepare(world: World) -> None:
        path = world.folder / name
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        value = json.loads(data[8:8 + size])
        change(value)
        text = json.dumps(value).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size:])
    return prepare


def tensors(name: str, change: Callable[[dict], dict]) -> Preparation:
    """A safetensors file with other tensors."""
    def prepare(world: World) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(world.folder / name)), world.folder / name, metadata={"format": "pt"})
    return prepare


def shift(value: dict) -> None:
    first = next(name for name in value if name != "__metadata__")
    value[first]["data_offsets"][0] += 4


def widen(found: dict) -> dict:
    first = next(iter(found))
    return found | {first: found[first].new_zeros(2, 99)}


def hub(error: str) -> Preparation:
    """A hub that answers so whatever is asked of it."""
    def prepare(world: World) -> None:
        from huggingface_hub import errors

        kind = getattr(errors, error)

        def download(*args: object, **kwargs: object) -> str:
            fault = kind.__new__(kind)  # its constructor wants a whole HTTP response
            fault.args = ("503 Service Unavailable",)
            raise fault

        world.monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        world.monkeypatch.setattr("llama2tut.hub.out_of_reach", lambda: "")
    return prepare


def half_downloaded(world: World) -> None:
    """A hub cache in which a model's configuration has arrived and its weights have not."""
    snapshot = world.folder / "hub/models--someone--model/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((world.toy / "config.json").read_bytes())
    (world.folder / "hub/models--someone--model/refs").mkdir()
    (world.folder / "hub/models--someone--model/refs/main").write_text("0" * 40)
    world.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.folder / "hub"))


def spoilt(what: str, says: str, *given: Preparation, argv: str = ASK) -> Row:
    """A toy model, spoilt."""
    return Row(what=what, argv=argv, says=(says,), given=(toy, *given))


def untuned(what: str, says: str, *given: Preparation, argv: str = ANSWER) -> Row:
    """A toy model and its adapter, spoilt."""
    return Row(what=what, argv=argv, says=(says,), given=(tuned, *given))


ROWS = (
    Row(what="a model that is whole", argv=ASK, given=(toy,), code=0),
    spoilt("a model by no name", "--model tiny: there is no such folder or model: give a folder, a hub id such as",
           argv="infer --prompt a --model tiny"),
    spoilt("the alias, misspelt", "did you mean smollm2-135m?", argv="infer --prompt a --model smollm-135m"),
    spoilt("a file for a model", "--model toy/config.json is a file: give the folder",
           argv="infer --prompt a --model toy/config.json"),
    spoilt("no config.json", "toy has no config.json: give the folder that a model was saved to",
           remove("toy/config.json")),
    spoilt("a config.json that is no JSON", "toy/config.json is not valid JSON", write("toy/config.json", "{")),
    spoilt("a config.json that is a list", "toy/config.json holds no JSON object", write("toy/config.json", "[]")),
    spoilt("another architecture", "toy is a 'mistral' checkpoint; llama-recipes trains 'llama' only: give a model",
           edit_json("toy/config.json", model_type="mistral")),
    spoilt("no model type", "toy is a None checkpoint", edit_json("toy/config.json", model_type=...)),
    spoilt("a size that is missing", "toy/config.json has no vocab_size", edit_json("toy/config.json", vocab_size=...)),
    spoilt("a size that is a word", "toy/config.json has no hidden_size", edit_json("toy/config.json",
           hidden_size="x")),
    spoilt("another vocabulary than the weights",
           "model.embed_tokens.weight is of shape (264, 64) where config.json asks",
           edit_json("toy/config.json", vocab_size=300)),
    spoilt("ten million layers", "num_hidden_layers is 10000000 where a Llama has a whole number from 1 to",
           edit_json("toy/config.json", num_hidden_layers=10**7)),
    spoilt("a config.json that transformers refuses", "max_position_embeddings is long where a Llama has a",
           edit_json("toy/config.json", max_position_embeddings="long")),
    spoilt("an activation that does not exist", "--model toy cannot be loaded (KeyError: 'evil')",
           edit_json("toy/config.json", hidden_act="evil")),
    spoilt("the same before training", "cannot be loaded (KeyError: 'evil')", rows,
           edit_json("toy/config.json", hidden_act="evil"), argv=TRAIN),
    spoilt("attention that would be code from the hub", "toy wants attention code from the hub, which is never run",
           edit_json("toy/config.json", _attn_implementation="someone/kernel")),
    Row(what="attention that is not installed", argv=ASK, code=0,
        given=(toy, edit_json("toy/config.json", attn_implementation="flash_attention_2"))),
    spoilt("weights that are quantised already", "toy is quantised already: give the model that it was made from",
           edit_json("toy/config.json", quantization_config={"quant_method": "gptq", "bits": 4})),
    spoilt("no weights", "toy/model.safetensors cannot be read (No such file or directory): " + AGAIN, remove(WEIGHTS)),
    spoilt("weights that end early", "toy/model.safetensors has 433,404 bytes where its header asks for", cut(WEIGHTS,
           -100)),
    spoilt("weights that end in their header", "toy/model.safetensors is no safetensors file or was cut", cut(WEIGHTS,
           99)),
    spoilt("empty weights", "toy/model.safetensors is no safetensors file or was cut short: " + AGAIN, cut(WEIGHTS, 0)),
    spoilt("a header that is 2^64 bytes long", "toy/model.safetensors is no safetensors file or was cut short",
           write(WEIGHTS, b"\xff" * 8 + b"{}")),
    spoilt("tensors that overlap", "--model toy cannot be loaded (SafetensorError", header(WEIGHTS, shift)),
    spoilt("a pickle for weights", "toy holds pickled weights, which can run code and are never opened",
           remove(WEIGHTS), write("toy/pytorch_model.bin", PICKLE)),
    spoilt("a pickle in the name of safetensors", "toy/model.safetensors is no safetensors file", write(WEIGHTS,
           PICKLE)),
    Row(what="a pickle beside the weights", argv=ASK, given=(toy, write("toy/pytorch_model.bin", PICKLE)), code=0),
    spoilt("a shard that is missing", "toy/model-1.safetensors cannot be read (No such file or directory): " + AGAIN,
           remove(WEIGHTS), write("toy/model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}')),
    spoilt("an index that names nothing", "toy/model.safetensors.index.json names no weights", remove(WEIGHTS),
           write("toy/model.safetensors.index.json", "{}")),
    Row(what="an index left over beside whole weights", argv=ASK, code=0,
        given=(toy, write("toy/model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'))),
    spoilt("weights that are not finite", "--model toy: model.", tensors(WEIGHTS, lambda found: {
        name: value * float("nan") for name, value in found.items()})),
    Row(what="not finite, before training", argv=f"{TRAIN} --gpus 0 --limit 8 --max-steps 1", changes=("outputs*",),
        says=("has numbers that are not finite",), given=(toy, rows, tensors(WEIGHTS, lambda found: {
            name: value * float("nan") for name, value in found.items()}))),
    spoilt("no tokenizer", "toy has no tokenizer.json or tokenizer.model: copy", remove("toy/tokenizer.json")),
    spoilt("a tokenizer that is no JSON", "toy/tokenizer.json is not valid JSON", write("toy/tokenizer.json", "{nope")),
    spoilt("a tokenizer that is none", "toy/tokenizer.json cannot be loaded", write("toy/tokenizer.json",
           '{"model": 1}')),
    spoilt("a tokenizer's settings that are a list", "the tokenizer of", write("toy/tokenizer_config.json", "[]")),
    Row(what="a tokenizer with more tokens than the model", argv=f"{TRAIN} --dry-run", code=0,
        given=(toy, rows, edit_json("toy/tokenizer.json", added_tokens=[
            {"id": n, "content": f"<{n}>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": False} for n in range(259, 280)])), says=("280 tokens and the model 264: untrained rows are",)),
    spoilt("a tokenizer without an end", "the tokenizer has no eos token, so answers would never end; choose another",
           rows, edit_json("toy/tokenizer_config.json", eos_token=None), argv=f"{TRAIN} --dry-run"),
    spoilt("a tokenizer that brings code", "the tokenizer of", EVIL, edit_json(
        "toy/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})),
    Row(what="the same, and somebody says yes", shell="yes y | {llama2tut} infer --prompt a --model toy", given=(
        toy, EVIL, edit_json("toy/tokenizer_config.json", tokenizer_class="Evil",
                             auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})),
        says=("contains custom code",), lacks=("[y/N]",)),
    Row(what="a model that brings code", argv=ASK, given=(toy, EVIL, edit_json("toy/config.json", auto_map={
        "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})), code=0),
    Row(what="generation settings that are none", argv=ASK, given=(toy, write("toy/generation_config.json", "{")),
        code=0),
    untuned("an adapter for a model", "tuned is an adapter, not a model: give it as --adapter",
            argv="infer --model tuned --prompt a"),
    untuned("a model for an adapter", "--adapter toy is a whole model: give it as --model",
            argv="infer --adapter toy --prompt a"),
    untuned("no adapter", "--adapter gone does not exist: give a finetune run's output folder",
            argv="infer --adapter gone --prompt a"),
    untuned("a file for an adapter", f"--adapter {CONFIG} is a file: give its folder",
            argv=f"infer --adapter {CONFIG} --prompt a"),
    untuned("two missing adapters", "--adapter b does not exist", argv="compare --adapter a --adapter b"),
    untuned("a checkpoint for an adapter", "is a checkpoint of an unfinished run: give run",
            folder("run/checkpoints/step-5"), argv="infer --adapter run/checkpoints/step-5 --prompt a"),
    untuned("an unfinished run for an adapter", "--adapter run is an unfinished run: finish it with",
            folder("run/checkpoints/step-5"), argv="infer --adapter run --prompt a"),
    untuned("an adapter's settings that are no JSON", f"{CONFIG} is not valid JSON", write(CONFIG, "{")),
    untuned("an adapter of another kind", "--adapter tuned is of PEFT type 'IA3': only LORA can be used",
            edit_json(CONFIG, peft_type="IA3")),
    untuned("a negative rank", f"{CONFIG} has no r, lora_alpha", edit_json(CONFIG, r=-1)),
    untuned("another rank than the tensors", "--adapter tuned would load in part only", edit_json(CONFIG, r=4)),
    untuned("tensors of no Llama", "--adapter tuned: its tensor x.base_model.model", tensors(
        ADAPTER, lambda found: {f"x.{name}": value for name, value in found.items()})),
    Row(what="tensors saved from inside a wrapper", argv=ANSWER, code=0, says=("were saved from inside a wrapper",),
        given=(tuned, tensors(ADAPTER, lambda found: {f"module.{name}": value for name, value in found.items()}))),
    untuned("half of a layer's tensors", "--adapter tuned would load in part only", tensors(
        ADAPTER, lambda found: {name: value for name, value in found.items() if "0.mlp.up_proj.lora_A" not in name})),
    untuned("fewer targets than tensors", "--adapter tuned would load in part only", edit_json(CONFIG,
            target_modules=["q_proj"])),
    untuned("an adapter that starts at tokens", "starts at tokens that no prompt here has", edit_json(CONFIG,
            alora_invocation_tokens=[5])),
    untuned("an adapter that repeats layers", "repeats layers of its base", edit_json(CONFIG,
            layer_replication=[[0, 2]])),
    untuned("an adapter that names no base", "--model is missing: tuned does not say what it was trained on",
            edit_json(CONFIG, base_model_name_or_path=None), remove("tuned/llama2tut.yaml")),
    Row(what="the same, and the base is given", argv=f"{ANSWER} --model toy", code=0,
        given=(tuned, edit_json(CONFIG, base_model_name_or_path=""), remove("tuned/llama2tut.yaml"))),
    untuned("layers that the model has not", "--adapter tuned cannot be loaded", edit_json(CONFIG,
            target_modules=["x"])),
    untuned("a pattern that is none", "--adapter tuned cannot be loaded", edit_json(CONFIG, target_modules="((")),
    untuned("a library that PEFT would import", "cannot be loaded", edit_json(CONFIG, megatron_config={"a": 1},
            megatron_core="os")),
    untuned("an adapter that ends early", f"{ADAPTER} has 19,", cut(ADAPTER, -10)),
    untuned("an adapter without weights", f"{ADAPTER} cannot be read (No such file or directory): " + AGAIN,
            remove(ADAPTER)),
    untuned("a pickle for an adapter", "--adapter tuned holds pickled weights, which can run code and are never opened",
            remove(ADAPTER), write("tuned/adapter_model.bin", PICKLE)),
    untuned("an adapter for another shape", "--adapter tuned does not fit toy", tensors(ADAPTER, widen)),
    untuned("an adapter for fewer layers",
            "--adapter tuned would load in part only: base_model.model.model.layers.1.",
            tensors(ADAPTER, lambda found: {name: value for name, value in found.items() if ".layers.0." in name})),
    untuned("an adapter whose training went wrong", "--adapter tuned has numbers that are not finite",
            tensors(ADAPTER, lambda found: {name: value * float("nan") for name, value in found.items()})),
    untuned("an adapter whose base is gone", "--model gone: there is no such folder or model",
            edit_json(CONFIG, base_model_name_or_path="gone"), remove("tuned/llama2tut.yaml")),
    untuned("an adapter's own YAML with objects of Python's", "tuned/llama2tut.yaml:1: anchors, aliases and tags",
            write("tuned/llama2tut.yaml", "request: !!python/object/apply:os.system ['touch PWNED']\n")),
    untuned("an adapter's own YAML of other types", "tuned/llama2tut.yaml:2: seed wants a whole number, not 'x'",
            write("tuned/llama2tut.yaml", "request:\n  seed: x\n")),
    Row(what="an adapter whose YAML names code", argv="compare --adapter tuned",
        given=(tuned, write("own.py", "open('PWNED', 'w')\n"),
               write("tuned/llama2tut.yaml", "request:\n  task: own.py\n  model: toy\n")),
        says=("--task own.py: a Python task has no template to answer by",)),
    Row(what="a gated model, and no login", argv="infer --prompt a --model someone/model",
        given=(hub("GatedRepoError"),),
        says=("is gated: accept its licence at https://huggingface.co/someone/model, then log in with `hf",)),
    Row(what="a model that the hub does not show", argv="infer --prompt a --model someone/model",
        given=(hub("RepositoryNotFoundError"),),
        says=("no model on the hub that your login can see: check the spelling",)),
    Row(what="a hub that is down", argv="infer --prompt a --model someone/model", given=(hub("HfHubHTTPError"),),
        says=("could not be looked up (503 Service Unavailable): try again",)),
    Row(what="no network", argv="infer --prompt a --model someone/model", given=(hub("LocalEntryNotFoundError"),),
        says=("--model someone/model is no folder here and not in the hub's cache, and the hub cannot be reached",)),
    Row(what="HF_HUB_OFFLINE and nothing cached", argv="infer --prompt a --model someone/model",
        says=("not in the hub's cache, and HF_HUB_OFFLINE is set: run `hf download someone/model`",)),
    Row(what="a download that broke off", argv="infer --prompt a --model someone/model", given=(half_downloaded,),
        says=("--model someone/model is in the hub's cache, but", "is taken up by `hf download someone/model`")),
)
