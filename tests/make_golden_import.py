"""Makes the golden files of tests/test_import.py with the formats' own libraries: tests/golden/import/.

    python3 -m venv build/import
    build/import/bin/pip install torch==2.15.0 transformers==5.23.0 bitsandbytes==0.50.2 gptqmodel==7.7.0 accelerate \\
        sentencepiece protobuf ml_dtypes==0.6.0 safetensors==0.8.0 && build/import/bin/pip install --no-deps autoawq==0.2.9
    GPTQMODEL_CPU_WORKERS=2 build/import/bin/python tests/make_golden_import.py            # without a GPU; a minute
    GPTQMODEL_CPU_WORKERS=2 build/import/bin/python tests/make_golden_import.py --check    # all of demo/tiny-mistral instead; four

The model is a cut of demo/tiny-mistral: its first layer, of each matrix the first rows and columns. Some rows are made positive:
their zero is 0, which version 1 of GPTQ's format stores as 15 with a borrow. golden/import/NAME is what a library wrote
of it; expected.safetensors holds, as NAME/TENSOR, every 13th of the values that the library dequantizes that to, in FP32.
GPTQModel and bitsandbytes quantize and save it themselves. Of AutoAWQ the rounding to a grid and the packing are used
(pseudo_quantize_tensor, WQLinear_GEMM), not its search for scales, which wants calibration.

--check writes nothing: it exports all of demo/tiny-mistral in each of the formats with --dtype f32, and what the libraries
dequantize; prints by how much the logits differ, and the perplexities with the codes as they are; and fails if any
logit differs by more than 1e-3. It needs build/test_all and run."""
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TINY = os.path.join(ROOT, "demo", "tiny-mistral")
OUT = os.path.join(HERE, "golden", "import")
STEP = 13  # of the values that are kept
GPTQ = {"gptq-sym": dict(bits=4, group_size=128, sym=True), "gptq-asym": dict(bits=4, group_size=32, sym=False),
        "gptq-v2": dict(bits=4, group_size=64, sym=False, format="gptq_v2"), "gptq-8": dict(bits=8, group_size=64, sym=False),
        "gptq-act": dict(bits=4, group_size=64, sym=False, desc_act=True, act_group_aware=False)}
BNB = {"nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int8": dict(load_in_8bit=True),
       "nf4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)}


def cut(out):
    """Write the small model."""
    config = json.load(open(os.path.join(TINY, "config.json")))
    config.update(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                  vocab_size=60, torch_dtype="float16")
    sizes = {"q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128), "gate_proj": (256, 128),
             "up_proj": (256, 128), "down_proj": (128, 256), "embed_tokens": (60, 128), "lm_head": (60, 128)}
    tensors = {}
    for name, x in load_file(os.path.join(TINY, "model.safetensors")).items():
        if ".layers." not in name or ".layers.0." in name:
            rows, cols = sizes.get(name.split(".")[-2], (128, None))
            tensors[name] = (x[:rows, :cols] if cols else x[:rows]).half().contiguous()
            if name.endswith(("k_proj.weight", "down_proj.weight")):
                tensors[name][::5].abs_()
    os.makedirs(out)
    json.dump(config, open(os.path.join(out, "config.json"), "w"))
    save_file(tensors, os.path.join(out, "model.safetensors"), {"format": "pt"})
    shutil.copy(os.path.join(TINY, "tokenizer.model"), out)  # GPTQModel wants to see one


def finish(directory, values):
    """The values of all matrices: those given, of quantized ones, and the others, as the files have them."""
    for name, x in load_file(os.path.join(directory, "model.safetensors")).items():
        if x.dtype in (torch.float16, torch.bfloat16, torch.float32) and name.endswith((".weight")) and x.dim() > 0:
            values.setdefault(name, x.float())
    return {name: x.contiguous() for name, x in values.items()}


def gptq(source, out, settings, ids):
    """Quantize and save with GPTQModel; the values as its dequantize_weight() gives them with scales in FP32."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    model = GPTQModel.load(source, QuantizeConfig(device="cpu", **{"desc_act": False, **settings}))
    model.quantize([{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids], batch_size=1)
    model.save(out)
    del model
    model, values = GPTQModel.load(out, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16), {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            values[name + ".weight"] = module.dequantize_weight().float().T
    return finish(out, values)


def bitsandbytes(source, out, settings):
    """The same with bitsandbytes, through transformers."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.float16)
    model.save_pretrained(out)
    values = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.dtype = torch.float32
            values[name + ".weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scb = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB
            values[name + ".weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scb)
    return finish(out, values)


def awq(source, out, group):
    """The same with AutoAWQ's rounding, its packing and its dequantize_gemm(); no search for scales."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm
    quantizer = AwqQuantizer.__new__(AwqQuantizer)  # without a model
    quantizer.group_size, quantizer.w_bit, quantizer.zero_point = group, 4, True
    tensors, values = {}, {}
    for name, x in load_file(os.path.join(source, "model.safetensors")).items():
        tensors[name] = x = x.half()
        if "_proj" not in name:
            continue
        rounded, scales, zeros = quantizer.pseudo_quantize_tensor(x.float())
        linear = torch.nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=torch.float16)
        linear.weight.data = rounded.half()
        m = WQLinear_GEMM.from_linear(linear, 4, group, False, scales.t().contiguous(), zeros.t().contiguous())
        for part in "qweight", "qzeros", "scales":
            tensors[name.removesuffix("weight") + part] = getattr(m, part).contiguous()
        del tensors[name]
        values[name] = dequantize_gemm(m.qweight, m.qzeros, m.scales.float(), 4, group).t()
    os.makedirs(out)
    save_file(tensors, os.path.join(out, "model.safetensors"), {"format": "pt"})
    config = json.load(open(os.path.join(source, "config.json")))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
                                     "modules_to_not_convert": None}
    json.dump(config, open(os.path.join(out, "config.json"), "w"))
    return finish(out, values)


def every_format(source, work, ids):
    """Yield (name, directory, {tensor: its values in FP32}) of each format, made of the directory `source`."""
    makers = {**{name: (gptq, settings, ids) for name, settings in GPTQ.items()},
              **{name: (bitsandbytes, settings) for name, settings in BNB.items()}, "awq": (awq, 64)}
    for name, (make, *arguments) in makers.items():
        out = os.path.join(work, name)
        yield name, out, make(source, out, *arguments)
        gc.collect()


def golden(work):
    """Write golden/import."""
    source = os.path.join(work, "source")
    cut(source)
    ids = torch.randint(3, 60, (32, 64), generator=torch.Generator().manual_seed(1)).tolist()
    shutil.rmtree(OUT, ignore_errors=True)
    expected = {}
    for name, directory, values in every_format(source, work, ids):
        os.makedirs(os.path.join(OUT, name))
        shutil.copy(os.path.join(directory, "model.safetensors"), os.path.join(OUT, name))
        config = json.load(open(os.path.join(directory, "config.json")))
        config["quantization_config"].pop("meta", None)  # names of temporary files
        with open(os.path.join(OUT, name, "config.json"), "w") as file:
            json.dump(config, file, indent=1)
        expected.update({f"{name}/{tensor}": x.flatten()[::STEP].clone() for tensor, x in values.items() if "_proj" in tensor})
    save_file(expected, os.path.join(OUT, "expected.safetensors"))


def check(work):
    """Compare on all of demo/tiny-mistral; whether all agree."""
    sp = sentencepiece.SentencePieceProcessor(model_file=os.path.join(TINY, "tokenizer.model"))
    text = os.path.join(HERE, "text", "heldout-fairy.txt")
    ids = [[1] + sp.encode(paragraph)[:255] for paragraph in open(text).read().split("\n\n") if len(paragraph) > 200][:64]
    export = [sys.executable, os.path.join(ROOT, "export.py")]
    reference, ours, kept = (os.path.join(work, name) for name in ("reference.bin", "ours.bin", "kept.bin"))

    def logits(path):
        return np.frombuffer(subprocess.run([os.path.join(ROOT, "build", "test_all"), "logits", path], stdout=subprocess.PIPE,
                                            check=True).stdout, np.float32)

    good = True
    for name, directory, values in every_format(TINY, work, ids):
        plain = os.path.join(work, name + "-values")
        os.makedirs(plain)
        save_file({tensor: x for tensor, x in values.items() if not tensor.endswith("qweight")}, os.path.join(plain, "model.safetensors"))
        shutil.copy(os.path.join(TINY, "config.json"), plain)
        for place in plain, directory:
            for file in os.listdir(place):
                if file.startswith("tokenizer"):
                    os.remove(os.path.join(place, file))
            shutil.copy(os.path.join(TINY, "tokenizer.model"), place)
        for source, out, options in (plain, reference, ["--dtype", "f32"]), (directory, ours, ["--dtype", "f32"]), (directory, kept, []):
            subprocess.run([*export, source, out, *options], check=True)
        off = np.abs(logits(reference) - logits(ours)).max()
        good &= bool(off <= 1e-3)
        run = subprocess.run([os.path.join(ROOT, "run"), kept, "-m", "perplexity", "-f", text, "-q", "--against", reference],
                             stdout=subprocess.PIPE, check=True, text=True)
        print(f"{name}: logits differ by {off:g}; codes kept, against the values: {run.stdout.strip()}", flush=True)
    return good


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not check(folder)) if "--check" in sys.argv else golden(folder)
