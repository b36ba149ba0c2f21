"""Makes the golden files of tests/test_lora.py with PEFT itself: tests/golden/lora/ and tests/golden/lora-treasure.json.

    python3 -m venv build/peft
    build/peft/bin/pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 sentencepiece
    build/peft/bin/python tests/make_golden_lora.py

golden/lora/base is a random Mistral of two layers whose sizes divide nothing, in BF16. Beside it lies an adapter for each
entry of VARIANTS, as PEFT saved it. merged.safetensors holds what PEFT's merge_and_unload() makes of them, in FP32: for
each line of MERGES the tensors that differ from the base's, as LINE/TENSOR. nf4/ is the base as bitsandbytes rounds it,
and nf4_dora/ what the adapter "dora" changes in that. The lines are in the metadata.

lora-treasure.json is about demo/lora-treasure on demo/tiny-mistral: perplexity and greedy continuations (transformers and
PEFT in FP64), and of each tensor that PEFT merged in FP32 sixteen values and the sum of the squares."""
import copy
import json
import math
import os
import shutil
import zlib

import bitsandbytes.functional
import sentencepiece
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FOLDER = os.path.join(HERE, "golden", "lora")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS = {  # name -> the LoraConfig
    "plain": dict(r=4, lora_alpha=8),  # no target_modules: q_proj and v_proj
    "linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
    "rslora": dict(r=3, lora_alpha=5, target_modules=["v_proj", "o_proj", "up_proj"], use_rslora=True),
    "dora": dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    "patterns": dict(r=2, lora_alpha=3, target_modules=ALL, use_rslora=True,
                     rank_pattern={"model.layers.1": 4, "down_proj": 5, r"^model\.layers\.1\.self_attn\.q_proj": 1, "q_proj": 3},
                     alpha_pattern={r"layers\.0\.mlp\..*": 7, "v_proj|k_proj": 1, "proj": 9}),
    "regex": dict(r=2, lora_alpha=1, target_modules=r".*\.1\.(self_attn\.(q|o)_proj|mlp\.down_proj)"),
    "layers": dict(r=2, lora_alpha=2, target_modules=["q_proj", "mlp.up_proj", "model.layers.0.mlp.gate_proj"],
                   layers_to_transform=[1], layers_pattern="layers"),
    "one_layer": dict(r=1, lora_alpha=2, target_modules=["o_proj"], layers_to_transform=0),
    "exclude": dict(r=2, lora_alpha=2, target_modules=["self_attn.k_proj", "down_proj"], exclude_modules=["layers.0.mlp.down_proj"]),
    "exclude_regex": dict(r=2, lora_alpha=2, target_modules=["v_proj"], exclude_modules=r".*\.layers\.1\..*"),
    "fan_in_fan_out": dict(r=2, lora_alpha=2, target_modules=["o_proj", "k_proj"], fan_in_fan_out=True, bias="all"),
    "embeddings": dict(r=2, lora_alpha=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "dora_embeddings": dict(r=2, lora_alpha=2, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "saved": dict(r=2, lora_alpha=2, target_modules=["gate_proj", "k_proj"], modules_to_save=["embed_tokens", "lm_head", "norm", "1.mlp"]),
    "resized": dict(r=2, lora_alpha=2, target_modules=["q_proj"]),
    "resized_saved": dict(r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": dict(r=2, lora_alpha=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [22, 3, 0], "lm_head": [5]}),
    "tokens_resized": dict(r=2, lora_alpha=2, target_modules=["q_proj"], trainable_token_indices=[24, 4]),
    "bf16": dict(r=4, lora_alpha=8, target_modules=["v_proj"]),
}
MERGES = {  # name -> [(variant, weight)]
    **{name: [(name, 1.0)] for name in VARIANTS},
    "half": [("dora", 0.5)],
    "two": [("rslora", 1.0), ("regex", -0.75)],
    "three": [("plain", 0.5), ("dora", 1.25), ("exclude", 1.0)],
}
RESIZED = {"resized": 26, "resized_saved": 26, "tokens_resized": 25}


def base(folder=".", vocabulary=None, dtype=torch.float32):
    """The base model, with another vocabulary if need be."""
    model = MistralForCausalLM.from_pretrained(os.path.join(folder, "base"), dtype=dtype)
    if vocabulary:
        torch.manual_seed(1)
        model.resize_token_embeddings(vocabulary)
    return model


def make_adapter(name, options):
    """Save a random adapter in the directory `name`."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = get_peft_model(base(vocabulary=RESIZED.get(name)), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "modules_to_save" in parameter_name or "trainable_tokens_delta" in parameter_name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "magnitude_vector" in parameter_name:
                parameter *= 0.5 + torch.rand_like(parameter)
            elif "lora_" in parameter_name:
                parameter *= 0.2  # so that the base is not drowned
    if name == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(name)
    os.remove(os.path.join(name, "README.md"))
    path = os.path.join(name, "adapter_config.json")
    with open(path) as file:
        config = json.load(file)
    for key in "target_modules", "exclude_modules":  # sets, whose order differs from run to run
        if isinstance(config[key], list):
            config[key].sort()
    with open(path, "w") as file:
        json.dump(config, file, indent=1)


def merged(model, adapters):
    """The state of `model` after PEFT merged the adapters [(directory, weight)] into it, in this order."""
    for i, (directory, weight) in enumerate(adapters):
        if i == 0:
            model = PeftModel.from_pretrained(model, directory, adapter_name="0")
        else:
            model.load_adapter(directory, adapter_name=str(i))
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(str(i), weight)
    names = [str(i) for i in range(len(adapters))]
    return model.merge_and_unload(adapter_names=names if len(names) > 1 else None)


def make_variants():
    """tests/golden/lora/."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.makedirs(FOLDER)
    os.chdir(FOLDER)  # so that the paths that PEFT writes are names
    torch.manual_seed(0)
    config = MistralConfig(hidden_size=14, intermediate_size=19, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                           head_dim=6, vocab_size=23, max_position_embeddings=64, sliding_window=16, tie_word_embeddings=False)
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained("base")
    os.remove("base/generation_config.json")
    start, out = base().state_dict(), {}
    for name, options in VARIANTS.items():
        make_adapter(name, options)

    def note(line, model, start=start):
        for name, x in model.state_dict().items():
            if x.shape != start[name].shape or not torch.equal(x, start[name]):
                out[f"{line}/{name}"] = x.clone()

    for line, adapters in MERGES.items():
        note(line, merged(base(vocabulary=RESIZED.get(line)), adapters))
    rounded = base()
    for name, parameter in rounded.named_parameters():
        if "_proj" in name:
            codes, state = bitsandbytes.functional.quantize_4bit(parameter.data, blocksize=64, quant_type="nf4")
            parameter.data = bitsandbytes.functional.dequantize_4bit(codes, state).reshape(parameter.shape)
    note("nf4", rounded)
    note("nf4_dora", merged(copy.deepcopy(rounded), [("dora", 1.0)]), rounded.state_dict())
    lines = {**MERGES, "nf4": [], "nf4_dora": [("dora", 1.0)]}
    save_file(out, "merged.safetensors", {"merges": json.dumps(lines)})


def make_treasure():
    """tests/golden/lora-treasure.json."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.path.join(ROOT, "demo", "tiny-mistral", "tokenizer.model"))
    directory, adapter = (os.path.join(ROOT, "demo", name) for name in ("tiny-mistral", "lora-treasure"))
    with open(os.path.join(HERE, "golden", "tiny-mistral.json")) as file:
        prompts = [greedy["prompt"] for greedy in json.load(file)["tiny-mistral"]["greedy"]][1:3]
    out = {"made_with": "transformers and PEFT (make_golden_lora.py); eval, greedy: FP64; merged: FP32"}

    start = MistralForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    model = merged(MistralForCausalLM.from_pretrained(directory, dtype=torch.float32), [(adapter, 1.0)])
    out["merged"] = {}
    for name, x in model.state_dict().items():
        if not torch.equal(x, start[name]):
            at = [i * 40503 % x.numel() for i in range(1, 17)]
            out["merged"][name] = {"at": at, "values": x.flatten()[at].tolist(), "squares": float(x.double().square().sum())}

    # LoRA in FP64, so that the merged model is rounded nowhere
    model = merged(MistralForCausalLM.from_pretrained(directory, dtype=torch.float64), [(adapter, 1.0)]).double()
    with open(os.path.join(HERE, "text", "treasure-eval.txt"), encoding="utf-8") as file:
        ids = tokenizer.encode(file.read())
    with torch.no_grad():
        nll, ctx = 0.0, 512
        for i in range(0, len(ids), ctx - 1):
            window = torch.tensor([[1, *ids[i:i + ctx - 1]]])
            logits = model(window).logits[0, :-1].log_softmax(-1)
            nll -= float(logits.gather(1, window[0, 1:, None]).sum())
        nll /= len(ids)
        out["eval"] = {"treasure-eval": {"ctx": ctx, "tokens": len(ids), "nll": nll, "ppl": math.exp(nll)}}
        out["greedy"] = []
        for prompt in prompts:
            prompt_ids = [1, *tokenizer.encode(prompt)]
            made = model.generate(torch.tensor([prompt_ids]), do_sample=False, min_new_tokens=240, max_new_tokens=240)
            out["greedy"].append({"prompt": prompt, "prompt_ids": prompt_ids, "out_ids": made[0, len(prompt_ids):].tolist()})
    with open(os.path.join(HERE, "golden", "lora-treasure.json"), "w") as file:
        json.dump(out, file)


if __name__ == "__main__":
    make_variants()
    make_treasure()
