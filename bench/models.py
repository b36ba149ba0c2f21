"""The model that bench.py measures: what --model names, as a checkpoint of each type, and in other engines' formats."""
import os
import re
import shutil
import subprocess
import sys
import tempfile

from measure import BENCH, PEERS as PEERS_PY, ROOT, digest, execute, file_digest, need_room, read_shape, say, write_json

EXPORT = os.path.join(ROOT, "export.py")
# Types of weights: what `quantize` is told for them, and bits a weight, about. q4-g32 is q4 in groups of 32.
DTYPES = {"f32": (["f32"], 32), "f16": (["f16"], 16), "q8": (["q8"], 8.6), "q4": (["q4"], 4.4), "nf4": (["nf4"], 4.6),
          "gptq": (["q4", "--gptq"], 4.4), "awq": (["q4", "--awq"], 4.4)}
USUAL = ["f16", "q8", "q4", "nf4", "gptq"]
GROUPS = {"q8": 64, "q4": 128, "nf4": 64}       # that quantize takes unless it is told
SAME = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "window", "rope_theta", "norm_eps"]


def base(dtype):
    """A type without its group: q4 of q4-g32."""
    return dtype.partition("-g")[0]


def plain(name):
    """A model's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def execute_shown(args):
    """Runs a program that takes long: on a terminal with its own progress there. Raises a RuntimeError if it fails."""
    if not sys.stderr.isatty():
        execute(args)
    elif subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"{os.path.basename(args[1] if args[0] == sys.executable else args[0])} failed: see above")


def read_given(arguments):
    """({type: path}, shape) of checkpoints given as FILE or TYPE=FILE. Raises a RuntimeError unless they are of one model, and
    of a type each."""
    found, first = {}, None
    for argument in arguments:
        dtype, _, path = argument.partition("=")
        if base(dtype) not in DTYPES:
            dtype, path = "", argument
        if not os.path.exists(path):
            raise RuntimeError(f"{path}: no such file or directory")
        shape = read_shape(path)
        first = first or shape
        other = [name for name in SAME if shape[name] != first[name]]
        if other:
            raise RuntimeError(f"{path}: not the model of {next(iter(found.values()))}: another {other[0]}")
        if not dtype:
            dtype = shape["type"] + (f"-g{shape['group']}" if shape["group"] != GROUPS.get(shape["type"], 0) else "")
        if dtype in found:
            raise RuntimeError(f"{path} is {dtype}, as {found[dtype]} is: say what else it is, as in gptq={path}")
        found[dtype] = path
    return found, first


class Model:
    """`name`; `identity`, a fingerprint; `given`: {type: path} of the checkpoints that are there from the beginning; `source`
    of the other types: hf (the directory `path`), random, or bin, which makes them of `plain`, an f32 or f16 of the given ones
    or None; `random`: whether the weights mean nothing, so that quality does not either."""

    def __init__(self, o):
        self.o, self.path, self.given, self.plain, self.made = o, o.model[0], {}, None, {}
        if self.path.startswith("random:") and len(o.model) == 1:
            self.source, self.name = "random", self.path[7:]
            self.identity = digest(self.path)
        elif os.path.isdir(self.path) and len(o.model) == 1:
            if not os.path.exists(os.path.join(self.path, "config.json")):
                raise RuntimeError(f"{self.path}: no config.json: not a Hugging Face directory")
            self.source, self.name = "hf", os.path.basename(os.path.abspath(self.path))
            files = sorted(name for name in os.listdir(self.path) if name.endswith((".safetensors", ".json", ".model")))
            self.identity = digest(*(file_digest(os.path.join(self.path, name)) for name in files))
        else:
            self.given, self.shape = read_given(o.model)
            self.source, self.name = "bin", self.shape["name"] or os.path.basename(self.path)
            self.plain = self.given.get("f32") or self.given.get("f16")
            digests = [file_digest(path) for path in self.given.values()]
            self.identity = digests[0] if len(digests) == 1 else digest(*sorted(digests))
        self.random = self.source == "random" or self.name.endswith(", random")

    def dtypes(self, asked):
        """The types to measure: those asked for, a given checkpoint's name standing for its type too; or all."""
        if asked:
            return [next((own for own in self.given if base(own) == dtype), dtype) if dtype not in self.given else dtype
                    for dtype in asked]
        if self.source == "bin" and (len(self.given) > 1 or not self.plain):
            return list(self.given)
        return [dtype for dtype in USUAL if not (self.random and "--gptq" in DTYPES[dtype][0])]

    def file(self, ending):
        """A name in --dir that another model does not have."""
        return os.path.join(self.o.dir, f"{plain(self.name)}-{self.identity[:8]}-{ending}")

    def room(self, bits):
        """Raises a RuntimeError if --dir has no room for the weights in so many bits each."""
        need_room(self.o.dir, self.n_weights() * bits / 8)

    def n_weights(self):
        """How many there are, about: from a checkpoint's table, or the bytes of an HF directory's files in 16 bits."""
        if self.source == "hf":
            return sum(os.path.getsize(os.path.join(self.path, name)) for name in os.listdir(self.path)
                       if name.endswith(".safetensors")) / 2
        if self.source == "random":
            return {"mistral-nemo": 12.3e9, "mistral-7b-layer": 0.5e9}.get(self.name, 7.3e9)
        return (self.shape["ops"] + 2 * self.shape["ops_logits"]) / 2

    # Checkpoints

    def checkpoint(self, dtype):
        """The path of the checkpoint of a type; makes it if it is not there. Raises RuntimeErrors."""
        if dtype not in self.made:
            self.made[dtype] = self.given.get(dtype) or self.make(dtype)
        return self.made[dtype]

    def make(self, dtype):
        words, bits = DTYPES[base(dtype)]
        calibration = ["--calib", self.o.calib] if len(words) > 1 else []
        path = self.file(f"{dtype}-{file_digest(self.o.calib)[:8]}.bin" if calibration else f"{dtype}.bin")
        group = dtype.partition("-g")[2]
        if self.source == "bin" and not self.plain:
            own, given = next(iter(self.given.items()))
            raise RuntimeError(f"{given} is {base(own)}: other types are made from a Hugging Face directory, f32 or f16")
        program = shutil.which(self.o.quantize)
        if os.path.exists(path):
            if program and os.path.getmtime(path) < os.path.getmtime(program):
                say(f"{path} was made before this {self.o.quantize}: delete it to have it made anew")
            return path
        exported = self.source == "hf" and base(dtype) in ("f16", "f32")
        if not exported and not program:
            raise RuntimeError(f"{self.o.quantize} does not run (make quantize)")
        arguments = [path, *words, *calibration, *(["-g", group] if group else [])]
        whole = self.plain or self.file("f16.bin")
        if calibration and self.source == "hf":
            whole = self.checkpoint("f16")      # calibration reads the model more than once: no pipe will do
        self.room(bits)
        say(f"making {path}" + (" (calibration of a 7B takes minutes a layer)" if calibration else ""))
        if self.source == "random":
            execute_shown([self.o.quantize, "--random", self.name, *arguments])
        elif exported:
            execute_shown([sys.executable, EXPORT, self.path, path, "--dtype", dtype])
        elif os.path.exists(whole):
            execute_shown([self.o.quantize, whole, *arguments])
        else:
            self.pipe(arguments)
        return path

    def pipe(self, arguments):
        """export.py | quantize: straight to the type, without a file in between. Raises a RuntimeError if either fails."""
        with tempfile.TemporaryFile() as messages:
            export = subprocess.Popen([sys.executable, EXPORT, self.path, "-"], stdout=subprocess.PIPE, stderr=messages)
            quantize = subprocess.run([self.o.quantize, "-", *arguments], stdin=export.stdout, stdout=subprocess.DEVNULL,
                                      stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True)
            export.stdout.close()
            export.wait()
            messages.seek(0)
            said = messages.read().decode(errors="replace") if export.returncode > 0 else quantize.stderr
        if export.returncode or quantize.returncode:
            raise RuntimeError(((said or "").strip().splitlines() or ["export.py | quantize failed: see above"])[-1])

    # Other engines' models: (path, whether its weights are ours)

    def convert(self, target, dtype, path):
        """Whether `path` holds the checkpoint of a type as a target of export.py --to; makes it if it can. Random weights are
        as good as any others in the same shape, and Q4_0 is what llama.cpp is fastest with."""
        try:
            if not os.path.exists(path) and not self.random:
                say(f"making {path}")
                execute([sys.executable, EXPORT, "--to", target, self.checkpoint(dtype), path])
            return not self.random
        except RuntimeError as error:
            say(f"{path}: the same shape with random weights instead ({error})")
            return False

    def gguf(self, dtype, python):
        path = self.file(f"{dtype}.gguf")
        if self.convert("gguf", dtype, path):
            return path, True
        path = self.file(f"random-{dtype}.gguf")
        if not os.path.exists(path):
            self.room(DTYPES[base(dtype)][1])
            execute([python, os.path.join(BENCH, "random_gguf.py"), self.checkpoint(dtype), path])
        return path, False

    def hf(self, dtype, python):
        if self.source == "hf":
            return self.path, True
        path = self.file("hf")
        if dtype in ("f16", "f32") and self.convert("hf", dtype, path):
            return path, True
        path = self.file("random-hf")
        if not os.path.exists(os.path.join(path, "config.json")):
            self.room(16)
            with tempfile.TemporaryDirectory() as directory:
                shape = os.path.join(directory, "shape.json")
                write_json(shape, read_shape(self.checkpoint(dtype)))
                execute([python, PEERS_PY, "random", shape, path])
        return path, False
