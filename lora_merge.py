#!/usr/bin/env python3
"""Merge LoRA adapters into a Hugging Face directory with a Mistral model:

    python3 lora_merge.py BASE ADAPTER[:WEIGHT] [ADAPTER[:WEIGHT] ...] OUT [--dtype f32|f16|bf16] [--base-quant nf4]

For a weight W [out, in] of the base, an adapter holds two thin matrices A [r, in] and B [out, r]. The merged weight is
W + scaling B A: a model like any other, which costs nothing more to run. OUT becomes a Hugging Face directory with the
base's shards and types; `export.py --lora` writes a checkpoint at once, through the same code. What the PEFT library
saves is read as PEFT 0.21 reads it. What is not merged here, and a base that export.py would not take, is refused by name.

Sources: LoRA arXiv 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, QLoRA (NF4) 2305.14314; for what they leave open,
PEFT's tuners/lora/, tuners/tuners_utils.py, utils/other.py and utils/save_and_load.py.

Top to bottom: errors, files and weights (export.py uses these too), the adapter's configuration, its tensors,
a 4-bit base, the merged weights, the directory, the command line.
"""
import argparse, contextlib, json, math, os, re, shutil, signal, struct, sys, time
from types import SimpleNamespace

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take a while: until outcome() Ctrl-C ends this without a word
try:
    import ml_dtypes  # importing it is also what makes numpy, and so safetensors, know bfloat16
    import numpy as np
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    sys.exit(f"{os.path.basename(sys.argv[0])}: Python: {error} (pip install -r requirements.txt)")

# ---------------------------------------------------------------------------- errors and files


class Bad(Exception):
    """Input that cannot be used; the message is the line shown: WHAT: what is wrong (what to do)."""


def outcome(program, out, work):
    """Run work(), which makes `out` and returns lines that sum it up: (0, the lines), or (1, [what went wrong])."""
    # Signals that end a program raise KeyboardInterrupt in work(), which then cleans up; what is ignored (nohup) stays so.
    handlers = {number: handler for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                if (handler := signal.getsignal(number)) is not signal.SIG_IGN}

    def stop(*_):
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # a second signal must not end the cleaning up
        raise KeyboardInterrupt

    try:
        for number in handlers:
            signal.signal(number, stop)
        status, lines = 0, work()
    except Bad as error:
        status, lines = 1, [f"{program}: {error}"]
    except OSError as error:  # of the output: what reads the input raises Bad
        status, lines = 1, [f"{program}: {out}: {error.strerror}"]
    except KeyboardInterrupt:
        status, lines = 1, [f"{program}: {out}: interrupted"]
    except MemoryError:
        status, lines = 1, [f"{program}: {out}: no memory"]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, [printable(line) for line in lines]


def printable(text):
    """Text as one line for a terminal, of 1005 characters at most: what a file's names and numbers put into it may be
    long, and control characters in it would be obeyed."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-300:]}"


def show(value):
    """A value as JSON, short enough for a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + "..."


def demand(where, key, value, wanted):
    """Raise Bad, naming the file, the key and the value, unless value is the only one supported."""
    if value != wanted:
        raise Bad(f"{where}: {key} is {show(value)} (only {show(wanted)} is supported)")


@contextlib.contextmanager
def form(where):
    """Inside, a value of an unexpected JSON type or an absent one is bad input in the file `where`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, re.error) as error:
        raise Bad(f"{where}: not in the expected form ({type(error).__name__}: {error})")


@contextlib.contextmanager
def time_limit(where, seconds=5):
    """Inside, regular expressions of the file `where` are matched; Bad if that takes so long, as some would take years."""
    def stop(*_):
        raise Bad(f"{where}: its regular expressions take longer than {seconds} s to match")

    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # of computing: a busy machine, or Ctrl-Z, is not their fault
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def opened(path):
    """A file, opened for reading; Bad if it is no regular one: a pipe would be waited for, and a device may have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Bad(f"{path}: not a regular file")
    return open(path, "rb")


def read(path, optional=False):
    """The bytes of a file; b"" if it is absent and may be."""
    if optional and not os.path.exists(path):
        return b""
    try:
        with opened(path) as file:
            return file.read()
    except OSError as error:
        raise Bad(f"{path}: {error.strerror}")


def read_json(path, optional=False):
    """The object in a JSON file; {} if it is absent and may be."""
    data = read(path, optional)
    with form(path):
        value = json.loads(data) if data or not optional else {}
        return dict(value.items())  # fails for what is no object


@contextlib.contextmanager
def temporary(path):
    """The name beside `path` of a file or directory to be made: renamed to it in the end, removed if anything goes wrong."""
    if not path:  # realpath() would make the current directory of it
        raise Bad("OUT is empty (give it a name)")
    path = os.path.realpath(path)  # a link stays a link
    name = f"{path}.tmp.{os.getpid()}"

    def remove():
        shutil.rmtree(name, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(name)

    remove()  # left by a process that was killed and had this one's number
    try:
        yield name
        os.replace(name, path)
    except BaseException:
        remove()
        raise


def progress(started, done, total):
    """On a terminal, rewrite the line: percent, MB/s, time left; `started` in seconds of time.monotonic()."""
    if sys.stderr.isatty():
        speed = done / (time.monotonic() - started + 1e-9)
        left = round((total - done) / speed)
        line = f"{100 * done // total}%, {speed / 1e6:.0f} MB/s, {left // 60}:{left % 60:02} left" if done < total else ""
        print(f"\r{line:40}", end="\r", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- weights

NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}  # by safetensors' names
OVERFLOW = {"F32": math.inf, "F16": 65520.0, "BF16": float.fromhex("0x1.ffp127")}  # the least that rounds to infinity


def rounded(name, x, dtype):
    """x, f32, rounded to nearest even as "F32", "F16" or "BF16"; Bad, naming the tensor, if that is not finite."""
    peak = max(x.max(), -x.min())  # NaN if there is one
    if not peak < OVERFLOW[dtype]:
        raise Bad(f"{name}: holds {peak}, too large for {dtype.lower()} (use --dtype f32)" if np.isfinite(peak)
                  else f"{name}: holds a value that is not finite (the checkpoint, or the adapter, is damaged)")
    return x.astype(NUMPY[dtype])


class Weights:
    """The tensors of a directory's safetensors files by their names there, read in pieces."""
    scalars = ()  # endings of the names of tensors that may have no dimension

    def __init__(self, directory, file="model.safetensors"):
        self.directory, shards, places = directory, [os.path.join(directory, file)], {}
        index = shards[0] + ".index.json"
        if not os.path.exists(shards[0]) and os.path.exists(index):
            with form(index):
                places = read_json(index)["weight_map"]
                shards = [os.path.join(directory, name) for name in sorted(set(places.values()))]
        self.tensors, self.used = {}, set()  # name -> (shard, shape, type); the names that were checked
        for shard in shards:
            with self.open(shard) as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if name in self.tensors:
                        raise Bad(f"{name}: in {self.tensors[name][0]} and in {shard} (which of the two counts?)")
                    self.tensors[name] = shard, part.get_shape(), part.get_dtype()
                    if not math.prod(part.get_shape() or [name.endswith(self.scalars)]):
                        raise Bad(f"{name}: the shape is {part.get_shape()} in {os.path.basename(shard)}")
        for name in places:
            if name not in self.tensors:
                raise Bad(f"{name}: named in {index}, but in none of its files (download them again)")

    def open(self, shard):
        """A safetensors file, opened; Bad if it is absent or cut."""
        if not os.path.isfile(shard):
            raise Bad(f"{shard}: missing (download it again; only safetensors files are read)")
        try:
            return safe_open(shard, "numpy")
        except (SafetensorError, OSError) as error:
            raise Bad(f"{shard}: not a whole safetensors file: {error} (download it again)")

    def check(self, name, shape, reason="config.json"):
        """Bad unless the tensor is there, has this shape, which follows from `reason`, and is of a type that is read."""
        if name not in self.tensors:
            raise Bad(f"{name}: this tensor is missing")
        shard, found, _ = self.tensors[name]
        if found != shape:
            raise Bad(f"{name}: the shape is {found} in {os.path.basename(shard)}, but {shape} by {reason}")
        self.check_type(name)
        self.used.add(name)

    def check_type(self, name):
        """Bad unless a tensor is of a type that is read."""
        shard, _, dtype = self.tensors[name]
        if dtype not in NUMPY:
            raise Bad(f"{name}: the type is {dtype} in {os.path.basename(shard)} (only BF16, F16 and F32 are supported)")

    def rows(self, name, start, stop):
        """Rows start to stop - 1 of a tensor [out, in], as f32 [stop - start, in]; of a vector, as [stop - start, 1].

        All values of weights come through here. The shard is opened anew for every piece: that costs
        little and gives back what was mapped, so that memory does not grow with the shards."""
        self.check_type(name)
        with self.open(self.tensors[name][0]) as file:
            rows = file.get_slice(name)[start:stop]
        return rows.astype(np.float32).reshape(stop - start, -1)


# ---------------------------------------------------------------------------- the adapter's configuration

EMBEDDING, CLASSIFIER = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")

# Keys of adapter_config.json that are read, with PEFT's defaults (target_modules: for Mistral). A value has the default's
# type, or this one.
DEFAULTS = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
            "target_modules": ["q_proj", "v_proj"], "exclude_modules": [], "layers_to_transform": [],
            "layers_pattern": [], "modules_to_save": [], "trainable_token_indices": {}, "ensure_weight_tying": False,
            "init_lora_weights": True}
OTHER_TYPES = {"lora_alpha": float, "target_modules": str, "exclude_modules": str, "layers_to_transform": int,
               "layers_pattern": str, "trainable_token_indices": list, "init_lora_weights": str}
# Keys that do not change what a trained adapter computes. fan_in_fan_out is one of them because PEFT turns it off for
# linear layers, and Mistral has no others; the biases are not because they show in the tensors.
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "fan_in_fan_out",
                  "inference_mode", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
                  "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
# Values of init_lora_weights that leave the base alone. The others (pissa, olora, corda, loftq, lora_ga) change it first.
INIT = [True, False, "gaussian", "eva", "orthogonal", "mica"]


def read_adapter_config(path):
    """The object in adapter_config.json as a namespace of the keys in DEFAULTS; Bad, naming the key, for any other kind
    of adapter and any variant of LoRA that is not merged here."""
    values = read_json(path)
    demand(path, "peft_type", values.get("peft_type"), "LORA")
    for key, value in values.items():
        if key not in DEFAULTS and key not in WITHOUT_EFFECT and value:
            raise Bad(f"{path}: {key} is {show(value)} (this variant of LoRA is not supported)")
    values = {key: values[key] for key in DEFAULTS if values.get(key) is not None}
    for key, value in values.items():
        kinds = [type(DEFAULTS[key]), *([OTHER_TYPES[key]] if key in OTHER_TYPES else [])]
        if type(value) not in kinds:
            raise Bad(f"{path}: {key} is {show(value)} ({' or '.join(kind.__name__ for kind in kinds)} is expected)")
    c = SimpleNamespace(**{**DEFAULTS, **values})
    if c.init_lora_weights not in INIT:
        raise Bad(f"{path}: init_lora_weights is {show(c.init_lora_weights)}, which changed the base before training "
                  "(save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it)")
    return c


def is_named(module, names):
    """Whether a module's dotted name fits: `names` is a regular expression for all of it (str), or a list of endings."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def is_target(c, module):
    """Whether the configuration c puts a LoRA on a module: PEFT's check_target_module_exists()."""
    if c.exclude_modules and is_named(module, c.exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in c.modules_to_save):
        return False
    if isinstance(c.target_modules, str) and c.target_modules.lower() == "all-linear":
        return LINEAR.fullmatch(module + ".weight") is not None  # the classifier is not meant
    if not is_named(module, c.target_modules):
        return False
    if isinstance(c.target_modules, str) or module in c.target_modules or c.layers_to_transform == []:
        return True  # what is named in full is meant whatever the layers are
    layers = [c.layers_to_transform] if isinstance(c.layers_to_transform, int) else c.layers_to_transform
    patterns = [c.layers_pattern] if isinstance(c.layers_pattern, str) else c.layers_pattern
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns or [r"[^.]*"])
    return next((int(match[1]) in layers for match in found if match), False)


def is_saved(c, module):
    """Whether modules_to_save names a module, or one that it is in, by the end of its name: PEFT's _set_trainable()."""
    return any(re.search(re.escape(name) + r"(\.|$)", module) for name in c.modules_to_save)


def rank_and_scaling(c, module):
    """(r, scaling) of a module's LoRA; scaling is alpha / r, or alpha / sqrt(r). The first pattern that fits decides."""
    def pick(patterns, default):
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    r, alpha = pick(c.rank_pattern, c.r), pick(c.alpha_pattern, c.lora_alpha)
    if type(r) is not int or not 0 < r < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 2**128:
        raise ValueError(f"rank {show(r)} and alpha {show(alpha)} for {module}")
    return r, alpha / math.sqrt(r) if c.use_rslora else alpha / r


# ---------------------------------------------------------------------------- the adapter's tensors

# Names of a module's whole weight, the one that PEFT loads first; of a resized embedding it saves several.
WHOLE = ("weight", "modules_to_save.weight", "base_layer.weight", "token_adapter.base_layer.weight")
PART = re.compile(r"(.+?)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|original_module\.weight|"
                  r"token_adapter\.trainable_tokens_delta|(?:\w+\.)?bias|" + "|".join(map(re.escape, WHOLE)) + ")")


class Adapter:
    """A directory that PEFT saved an adapter in: its configuration c, and its tensors by module and part, each of which
    must be taken once. `weight` multiplies the scaling, as PEFT's set_scale() does."""

    def __init__(self, directory, weight=1.0):
        self.name, self.weight, self.where = directory, weight, os.path.join(directory, "adapter_config.json")
        with form(self.where):
            self.c = read_adapter_config(self.where)
        safe, pickle = (os.path.join(directory, "adapter_model." + kind) for kind in ("safetensors", "bin"))
        if os.path.exists(pickle) and not os.path.exists(safe):
            raise Bad(f"{pickle}: a pickle, which is not read (PEFT's save_pretrained() makes safetensors of it)")
        self.weights, self.parts = Weights(directory, os.path.basename(safe)), {}
        for name in self.weights.tensors:
            match = PART.fullmatch(name.removeprefix("base_model.model."))
            if not match:
                raise Bad(f"{name}: in {self.name}, but not a part of a LoRA")
            if match.groups() in self.parts:
                raise Bad(f"{name}: in {self.name} with and without base_model.model. (which of the two counts?)")
            self.parts[match.groups()] = name  # (module, part) -> the name in the file, until it is taken
        self.loras, self.replaced, self.token_rows = [], 0, 0  # for the report; loras: [(r, scaling)]

    def take(self, module, part, shape, reason):
        """The name in the file of a part that must be there and have this shape, which follows from `reason`."""
        name = self.parts.pop((module, part), None)
        if name is None:
            raise Bad(f"{module}.{part}: missing in {self.name} (by its adapter_config.json it should be there)")
        self.weights.check(name, shape, reason)
        return name

    def take_whole(self, module):
        """The name in the file of a module's whole weight, None if there is none; further copies of it are taken too."""
        names = [self.parts.pop((module, part), None) for part in WHOLE]
        resized = self.parts.pop((module, "original_module.weight"), None)  # resized, but not trained
        names = [name for name in names if name]
        for name in names[1:] + [resized] * bool(resized and names):
            self.weights.check(name, self.weights.tensors[names[0]][1], names[0])
        return names[0] if names else None

    def load(self, name):
        """A tensor as f32 [out, in], a vector as [out, 1]."""
        return self.weights.rows(name, 0, self.weights.tensors[name][1][0])

    def finish(self, base):
        """Bad if a tensor was not taken, unless it is a bias of zeros. base: the base's tensors, as in Weights."""
        for (module, part), name in self.parts.items():
            if part.endswith("bias"):
                if self.load(name).any():
                    raise Bad(f"{name}: not zero in {self.name} (Mistral has no biases)")
                continue
            shape, own = self.weights.tensors[name][1], base.get(module + ".weight")
            raise Bad(f"{name}: {shape} in {self.name}, but " + (
                f"not used for the base's {own[1]}: its adapter_config.json does not name it" if own
                else f"the base has no {module}"))

    def __str__(self):
        def span(values):
            low, high = f"{min(values):.4g}", f"{max(values):.4g}"
            return low if low == high else f"{low} to {high}"

        what = []
        if self.loras:
            ranks, scalings = zip(*self.loras)
            what.append(f"{'DoRA' if self.c.use_dora else 'LoRA'}, rank {span(ranks)}, scaling {span(scalings)}"
                        + (f" times {self.weight:g}" if self.weight != 1 else ""))
        counts = (len(self.loras), "matrices"), (self.replaced, "whole tensors"), (self.token_rows, "token rows")
        return f"{self.name}: {', '.join([*what, *(f'{noun}: {n}' for n, noun in counts if n)])}"


class Lora:
    """A change of a weight [out, in] by scaling left @ right, with left [out, r] and right [r, in].

    Of a linear layer left is B and right is A. PEFT has an embedding the other way round, as a matrix [dim, vocabulary]:
    there left is A transposed, right is B transposed, and DoRA's lengths are the columns' instead of the rows'."""

    def __init__(self, adapter, name, shape, r, scaling):
        """Takes the matrices for the tensor `name`, of the base's shape [out, in], from the adapter;
        r, scaling: rank_and_scaling()."""
        (out, cols), module = shape, name.removesuffix(".weight")
        self.adapter, self.embedding = adapter, name == EMBEDDING
        parts = ([("lora_embedding_A", [r, out]), ("lora_embedding_B", [cols, r])] if self.embedding
                 else [("lora_B.weight", [out, r]), ("lora_A.weight", [r, cols])])
        if adapter.c.use_dora:
            parts.append(("lora_magnitude_vector", [cols if self.embedding else out]))
        self.names = [adapter.take(module, part, size, f"the base's {shape} and rank {r}") for part, size in parts]
        if not abs(scaling * adapter.weight) <= float(np.finfo(np.float32).max):
            raise Bad(f"{adapter.where}: the scaling of {module} is {scaling:g}, times {adapter.weight:g}: too large for f32")
        self.scaling = np.float32(scaling * adapter.weight)
        adapter.loras.append((r, scaling))

    def load(self, base_pieces):
        """Read the matrices; returns the function apply(x, base, start): x, the rows of the weight from `start` on as
        the adapters before this one left them, with this one merged. base: the same rows of the base; base_pieces()
        yields all of the base as (start, rows). All are f32."""
        left, right, *magnitude = (self.adapter.load(name) for name in self.names)
        if self.embedding:
            left, right = left.T, right.T

        def plain(x, base, start):
            return x + left[start:start + len(x)] @ right * self.scaling

        # DoRA gives each row (here: column) the length in `magnitude`. What it has before that is measured on the base
        # with this adapter alone, as in training, whatever was merged before; PEFT does the same.
        def dora(x, base, start):
            lengths = np.linalg.norm(plain(base, base, start), axis=1, keepdims=True)
            return magnitude[0][start:start + len(x)] / lengths * plain(x, base, start)

        if magnitude and self.embedding:
            squares = sum(np.square(plain(base, base, start), dtype=np.float64).sum(0) for start, base in base_pieces())
            factor = magnitude[0][:, 0] / np.sqrt(squares).astype(np.float32)
            return lambda x, base, start: factor * plain(x, base, start)
        return dora if magnitude else plain


class Tokens:
    """A change of an embedding or classifier: its rows `ids` become what was trained (trainable_token_indices)."""

    def __init__(self, adapter, name, ids):
        self.adapter, self.name, self.ids = adapter, name, np.array(ids)

    def load(self, base_pieces):
        """As Lora.load()."""
        values = self.adapter.load(self.name)

        def apply(x, base, start):
            x, inside = x.copy(), (self.ids >= start) & (self.ids < start + len(x))
            x[self.ids[inside] - start] = values[inside]
            return x
        return apply


# ---------------------------------------------------------------------------- a 4-bit base

# bitsandbytes' NF4: what a weight over the largest of its block is rounded to (QLoRA, appendix E).
NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
NF4_BOUNDS = (NF4[1:] + NF4[:-1]) / 2


def nf4(x):
    """x [rows, cols] f32, quantized to NF4 and back: blocks of 64 neighbours in the flattened matrix, an f32 scale each.
    The first element of x must be the first of a block.

    Double quantization, which rounds the scales too, is not modelled: it moves the weights of demo/tiny-mistral by 0.2%
    where NF4 moves them by 9.2%. Nor is a rounding of the result: bitsandbytes returns BF16 for a base in BF16."""
    blocks = np.pad(x.ravel(), (0, -x.size % 64)).reshape(-1, 64)
    scale = np.maximum(np.abs(blocks).max(1, keepdims=True), np.float32(1e-38))
    codes = np.searchsorted(NF4_BOUNDS, blocks * (1 / scale))
    return (NF4[codes] * scale).ravel()[:x.size].reshape(x.shape)


# ---------------------------------------------------------------------------- the merged weights


def pieces(shape):
    """The rows of a tensor in pieces of about a million numbers: [(start, stop)]. Before each lies a multiple of 64
    numbers, so that it begins with a whole block of NF4."""
    cols = math.prod(shape[1:])
    together = 64 // math.gcd(64, cols)  # so many rows have a multiple of 64 numbers
    step = max(1, 2**20 // (together * cols)) * together
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class MergedWeights(Weights):
    """The Weights of a base with adapters merged in; without any, the base's own.

    base: Weights whose names, shapes and types are those of a model; config: the object in its config.json; adapters:
    [(directory, weight)] in the order in which they are merged; base_quant: None, or "nf4": the base's linear layers are
    first rounded as bitsandbytes does. Attributes: config, with the result's vocab_size and tie_word_embeddings;
    tokenizer, the directory with its tokenizer: an adapter's, if that resized the vocabulary and brings one.

    First each adapter in turn plans, in add(): a tensor that it replaces goes to `sources`, what it does to one to
    `changes`, and what does not fit is refused, by names, shapes and types. Then settle() decides what is known after the
    last adapter only: the size of the vocabulary, and whether the embedding is still tied. Matrices are read and multiplied
    in rows() alone, a piece at a time, as the result is written."""

    def __init__(self, base, config, adapters=(), base_quant=None):
        self.base, self.base_quant, self.config, self.tokenizer = base, base_quant, dict(config), base.directory
        self.tensors, self.used = dict(base.tensors), set()
        self.sources = {}  # tensor -> (Weights, name there), where that is not (self.base, tensor)
        self.changes = {}  # tensor -> [Lora or Tokens] in the order of the adapters
        self.loaded = self.merged = None, None  # (tensor, its changes as functions); ((tensor, start), merged rows)
        self.moved = {}  # tensor -> (squared length of its change, that of the base), of what has been read
        self.adapters = [Adapter(*adapter) for adapter in adapters]
        self.tied = bool(config.get("tie_word_embeddings"))
        if self.tied:  # for now a tensor of its own with the embedding's values; settle() sees what became of it
            self.tensors[CLASSIFIER], self.sources[CLASSIFIER] = self.tensors[EMBEDDING], (self.base, EMBEDDING)
        for adapter in self.adapters:
            self.add(adapter)
        self.settle()

    # What the adapters change: names, shapes and types are checked here, the values are read in rows().

    def add(self, adapter):
        """Plan all changes of one adapter; Bad if it does not fit."""
        with form(adapter.where), time_limit(adapter.where):
            names = [name for name in self.tensors if name.endswith(".weight")]
            targets = [name for name in names
                       if is_target(adapter.c, name.removesuffix(".weight")) and len(self.tensors[name][1]) == 2]
            scalings = [rank_and_scaling(adapter.c, name.removesuffix(".weight")) for name in targets]
            saved = [name for name in names if is_saved(adapter.c, name.removesuffix(".weight"))]
        if not targets:
            raise Bad(f"{adapter.where}: target_modules is {show(adapter.c.target_modules)}, which the base has none of")
        self.add_whole(adapter, saved)
        for name, scaling in zip(targets, scalings):
            if self.tied and name in (EMBEDDING, CLASSIFIER):
                raise Bad(f"{adapter.where}: a LoRA for {name}, but the base has tie_word_embeddings (not supported)")
            self.changes.setdefault(name, []).append(Lora(adapter, name, self.tensors[name][1], *scaling))
        self.add_tokens(adapter)
        adapter.finish(self.tensors)

    def add_whole(self, adapter, saved):
        """Plan what an adapter replaces: the tensors of modules_to_save (`saved`), and the embedding and the classifier
        wherever they are in it, because PEFT also saves them when the vocabulary was resized."""
        found = {name: adapter.take_whole(name.removesuffix(".weight")) for name in {*saved, EMBEDDING, CLASSIFIER}}
        if self.tied and not found[CLASSIFIER] and (EMBEDDING not in saved or adapter.c.ensure_weight_tying):
            found[CLASSIFIER] = found[EMBEDDING]  # of what modules_to_save names PEFT trains a copy, which is not tied
        for name, source in sorted(found.items()):
            if source:
                self.replace(adapter, name, source)
            elif name in saved and not (self.tied and name == CLASSIFIER):
                raise Bad(f"{name}: missing in {adapter.name} (modules_to_save is {show(adapter.c.modules_to_save)})")

    def replace(self, adapter, name, source):
        """Plan that the adapter's tensor `source` replaces the tensor `name`; nothing if it is the same."""
        shard, shape, dtype = self.tensors[name]
        new = list(shape)
        if name in (EMBEDDING, CLASSIFIER):  # may have another number of tokens
            new[:1] = adapter.weights.tensors[source][1][:1]
        adapter.weights.check(source, new, f"the base's {shape}")
        if self.is_equal(name, adapter.weights, source):
            return
        self.may_replace(adapter, source, name in self.changes or self.source(name)[0] is not self.base)
        if new != shape and any(os.path.exists(os.path.join(adapter.name, file)) for file in TOKENIZER[:2]):
            self.tokenizer = adapter.name
        self.tensors[name], self.sources[name] = (shard, new, dtype), (adapter.weights, source)
        adapter.replaced += 1

    def add_tokens(self, adapter):
        """Plan the rows that an adapter replaces by trainable_token_indices: a list for the embedding, or a dict."""
        indices = adapter.c.trainable_token_indices
        with form(f"{adapter.where}: trainable_token_indices"):
            tokens = {}
            for key, ids in (indices if isinstance(indices, dict) else {"embed_tokens": indices}).items():
                name = {"embed_tokens": EMBEDDING, "lm_head": CLASSIFIER}[key.removeprefix("model.")]
                if not all(type(id) is int and 0 <= id < self.tensors[name][1][0] for id in ids):
                    raise ValueError(f"{show(ids)} for {name} {self.tensors[name][1]}")
                if name in tokens or len(set(ids)) < len(ids):
                    raise ValueError(f"{show(ids)}: twice for {name}")
                if ids:
                    tokens[name] = ids
        if self.tied and tokens:  # PEFT keeps them tied; what it may save of the classifier is a copy
            if tokens.pop(CLASSIFIER, tokens.get(EMBEDDING)) != tokens.get(EMBEDDING):
                raise Bad(f"{adapter.where}: trainable_token_indices is {show(indices)}, but in the base "
                          "embed_tokens and lm_head are one (tie_word_embeddings)")
            adapter.parts.pop((CLASSIFIER.removesuffix(".weight"), "token_adapter.trainable_tokens_delta"), None)
        for name, ids in tokens.items():
            module, shape = name.removesuffix(".weight"), self.tensors[name][1]
            source = adapter.take(module, "token_adapter.trainable_tokens_delta", [len(ids), shape[1]],
                                  f"trainable_token_indices and the base's {shape}")
            self.may_replace(adapter, source, any(
                isinstance(change, Lora) or set(change.ids) & set(ids) for change in self.changes.get(name, [])))
            change = Tokens(adapter, source, ids)
            for each in (EMBEDDING, CLASSIFIER) if self.tied else (name,):
                self.changes.setdefault(each, []).append(change)
            adapter.token_rows += len(ids)

    @staticmethod
    def may_replace(adapter, source, changed):
        """Bad if an adapter cannot replace something by its tensor `source`; changed: one before it changed that."""
        if adapter.weight != 1:
            raise Bad(f"{source}: replaces the base's, so {adapter.name} cannot have the weight {adapter.weight:g}")
        if changed:
            raise Bad(f"{source}: {adapter.name} would replace what an adapter before it changed")

    def settle(self):
        """After all adapters: a tied embedding becomes one tensor again if it can, and the vocabulary has one size."""
        if self.tied:
            same = self.changes.get(EMBEDDING) == self.changes.get(CLASSIFIER)
            if same and self.is_equal(EMBEDDING, *self.source(CLASSIFIER)):
                for entries in self.tensors, self.sources, self.changes:
                    entries.pop(CLASSIFIER, None)
            else:
                self.config["tie_word_embeddings"] = False
        shapes = [self.tensors[name][1] for name in (EMBEDDING, CLASSIFIER) if name in self.tensors]
        if any(name in self.sources for name in (EMBEDDING, CLASSIFIER)):
            if shapes[0] != shapes[-1]:
                raise Bad(f"{EMBEDDING}: {shapes[0]} with the adapters, but {CLASSIFIER}: {shapes[-1]}")
            self.config["vocab_size"] = shapes[0][0]

    def is_equal(self, name, weights, source):
        """Whether the tensor `name`, before changes, has the shape and values of the tensor `source` in `weights`."""
        shape = self.tensors[name][1]
        return self.source(name) == (weights, source) or shape == weights.tensors[source][1] and all(
            np.array_equal(self.base_rows(name, *piece), weights.rows(source, *piece)) for piece in pieces(shape))

    # The values.

    def source(self, name):
        """Where a tensor is before the changes: (Weights, its name there)."""
        return self.sources.get(name, (self.base, name))

    def is_rounded(self, name):
        """Whether a tensor is rounded by base_quant; bitsandbytes leaves embedding and classifier alone."""
        return bool(self.base_quant) and LINEAR.fullmatch(name) is not None and name not in self.sources

    def base_rows(self, name, start, stop):
        """As rows(), of what the changes are made to. For is_rounded() tensors `start` must be that of a piece."""
        weights, source = self.source(name)
        rows = weights.rows(source, start, stop)
        return nf4(rows) if self.is_rounded(name) else rows

    def rows(self, name, start, stop):
        """As Weights.rows(). Computed in whole pieces, so that the values do not depend on which rows are asked for."""
        if name not in self.changes and not self.is_rounded(name):
            return self.base_rows(name, start, stop)
        return np.concatenate([self.merged_piece(name, *piece)[max(0, start - piece[0]):stop - piece[0]]
                               for piece in pieces(self.tensors[name][1]) if piece[0] < stop and start < piece[1]])

    def merged_piece(self, name, start, stop):
        """A piece of a tensor, f32 [stop - start, in]; the last one is kept, since readers take it in several bites."""
        if self.merged[0] == (name, start):
            return self.merged[1]
        changes = self.changes.get(name, [])
        with np.errstate(all="ignore"):  # what is not finite is found here or by rounded()
            if self.loaded[0] != name:
                def base_pieces():
                    return ((piece[0], self.base_rows(name, *piece)) for piece in pieces(self.tensors[name][1]))
                self.loaded = name, [change.load(base_pieces) for change in changes]
            base = x = self.base_rows(name, start, stop)
            for apply in self.loaded[1]:
                x = apply(x, base, start)
            if changes:
                new, old = (float(np.square(part, dtype=np.float64).sum()) for part in (x - base, base))
                if math.isfinite(old) and not math.isfinite(new):
                    raise Bad(f"{name}: not finite with {'; '.join(str(change.adapter) for change in changes)} "
                              "(the scaling is too large, or the adapter is damaged)")
                moved = self.moved.get(name, (0, 0))
                self.moved[name] = moved[0] + new, moved[1] + old
        self.merged = (name, start), x
        return x

    def report(self):
        """Lines for the user, after all rows have been read: each adapter, how much changed, and where most."""
        parts = [f"matrices changed: {len(self.moved)}"] * bool(self.moved)
        moved = [(math.sqrt(new / old), name) for name, (new, old) in self.moved.items() if old]
        if moved:
            parts += ["largest relative change {:.3g}% ({})".format(100 * max(moved)[0], max(moved)[1])]
        replaced = sum(weights is not self.base for weights, _ in self.sources.values())
        if replaced:
            parts += [f"tensors replaced: {replaced}"]
        if self.base_quant:
            parts += [f"rounded to {self.base_quant} before: {sum(map(self.is_rounded, self.tensors))}"]
        return [*map(str, self.adapters), ", ".join(parts)] if parts else []


# ---------------------------------------------------------------------------- the directory

TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "chat_template.jinja", "chat_template.json")


@contextlib.contextmanager
def new_directory(path):
    """A directory that becomes `path`, where nothing may be yet: temporary()."""
    if os.path.lexists(path):
        raise Bad(f"{path}: exists already (remove it, or give another name)")
    with temporary(path) as name:
        os.mkdir(name)
        yield name


def write_safetensors(path, metadata, tensors, weights):
    """Write a safetensors file a piece at a time; yields the number of bytes of each.

    metadata: {str: str}; tensors: [(name, "F32", "F16" or "BF16")]; their shapes and values are those of `weights`."""
    tensors = sorted(tensors, key=lambda tensor: -NUMPY[tensor[1]].itemsize)  # so that each is aligned to its type
    header, end = {"__metadata__": metadata}, 0
    for name, dtype in tensors:
        shape, start = weights.tensors[name][1], end
        end += math.prod(shape) * NUMPY[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, dtype in tensors:
            for start, stop in pieces(weights.tensors[name][1]):
                data = rounded(name, weights.rows(name, start, stop), dtype).tobytes()
                file.write(data)
                yield len(data)


def merge(base, adapters, out, dtype=None, base_quant=None):
    """Write the base with the adapters merged in as the new directory `out`; returns lines that sum it up.

    base, out: directories; adapters: [(directory, weight)]; dtype: None, as each tensor is in the base, or "F32", "F16",
    "BF16"; base_quant: None or "nf4". Raises Bad for bad input, OSError if `out` cannot be written."""
    import export  # here, because it imports this file; its checks of a model are wanted here too
    weights = export.open_model(base, adapters, base_quant)
    shards = {}  # path in the base -> [(tensor, type)]
    for name, (shard, _, own) in weights.tensors.items():
        weights.check_type(name)  # also of what is no part of the model
        keep = dtype is None or not name.endswith(".weight")  # rotary_emb.inv_freq must not be rounded
        shards.setdefault(shard, []).append((name, own if keep else dtype))
    total = sum(math.prod(weights.tensors[name][1]) * NUMPY[kind].itemsize
                for tensors in shards.values() for name, kind in tensors)
    if dtype:
        key = "dtype" if "dtype" in weights.config else "torch_dtype"
        weights.config[key] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]

    started, written, places = time.monotonic(), 0, {}
    with new_directory(out) as directory:
        def save(name, data):
            with open(os.path.join(directory, name), "wb") as file:
                file.write(data)

        for number, (shard, tensors) in enumerate(shards.items(), 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            places.update(dict.fromkeys([name for name, _ in tensors], file))
            with weights.open(shard) as base_file:
                metadata = {"format": "pt", **(base_file.metadata() or {})}  # transformers wants to be told
            for n in write_safetensors(os.path.join(directory, file), metadata, tensors, weights):
                written += n
                progress(started, written, total)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            save("model.safetensors.index.json", json.dumps(index, indent=2).encode())
        for source, names in (base, ["generation_config.json"]), (weights.tokenizer, TOKENIZER):
            for name in names:
                if os.path.exists(os.path.join(source, name)):
                    save(name, read(os.path.join(source, name)))
        # last: what a kill leaves behind has no config.json, and is no model to anyone
        save("config.json", json.dumps(weights.config, indent=2).encode())
    return [*weights.report(), f"{out}: {total / 1e6:.1f} MB in {len(shards)} file{'s' * (len(shards) > 1)}, "
            f"{time.monotonic() - started:.1f} s"]


# ---------------------------------------------------------------------------- the command line


def adapter_argument(text):
    """The argument ADAPTER or ADAPTER:WEIGHT as (directory, weight); what is the name of a directory is no weight."""
    directory, colon, weight = text.rpartition(":")
    if not colon or os.path.isdir(text):
        return text, 1.0
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", weight) or not math.isfinite(float(weight)):
        raise argparse.ArgumentTypeError(f"{printable(text)}: no such directory, and after the colon no number like 0.5 or -2")
    return directory, float(weight)


BASE_QUANT_HELP = "for adapters trained on a 4-bit base (QLoRA): round the base's linear layers first"


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lora_merge.py", description="Merge PEFT LoRA adapters into a Hugging Face directory with a Mistral model.")
    parser.add_argument("base", metavar="BASE", help="config.json, *.safetensors, tokenizer")
    parser.add_argument("adapters", metavar="ADAPTER[:WEIGHT]", nargs="+", type=adapter_argument,
                        help="adapter_config.json, adapter_model.safetensors; WEIGHT multiplies the scaling (default 1)")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"), help="of all weights (default: as in the base)")
    parser.add_argument("--base-quant", choices=("nf4",), help=BASE_QUANT_HELP)
    args = parser.parse_intermixed_args()  # options may also stand between the adapters and OUT
    sys.stderr = sys.stderr or open(os.devnull, "w")
    status, lines = outcome("lora_merge.py", args.out, lambda: merge(
        args.base, args.adapters, args.out, args.dtype and args.dtype.upper(), args.base_quant))
    print("\n".join(lines), file=sys.stderr)
    return status


if __name__ == "__main__":
    import lora_merge  # as export.py knows it, not a second time as __main__: one class Bad
    sys.exit(lora_merge.main())
