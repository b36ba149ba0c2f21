"""Checkpoints of other programs, as export.py reads and writes them.

Read: Hugging Face directories quantized by GPTQ, AWQ or bitsandbytes, and GGUF files. Each is a Weights whose tensors have
the Hugging Face names and shapes [out, in], whatever the names, the packing and the order of rows in the file. Where a tensor
is stored as codes, a weight being scale * (code - zero) with one scale and zero for a group of inputs, as in our own file
(FORMAT.md), or on the steps of NF4, kind() says so and stored() gives the codes, so that they go over as they are. rows() gives
the values.
Written: GGUF files, and Hugging Face directories with FP16 weights or in the format of GPTQ or AWQ, from a checkpoint of ours.

Sources: GPTQModel's qlinear/__init__.py and utils/model.py; AutoAWQ's modules/linear/gemm.py and utils/packing_utils.py;
bitsandbytes' functional.py (QuantState) and nn/modules.py; ggml's docs/gguf.md and ggml-quants.c; llama.cpp's
convert_hf_to_gguf.py.

Top to bottom: what they share, GPTQ, AWQ, bitsandbytes, GGUF, our own file, the way out.
"""
import json, math, os, re, struct, sys, time
from types import SimpleNamespace

import numpy as np
from lora_merge import NF4, NUMPY, Bad, Weights, demand, form, new_directory, opened, progress, rounded, show
from sentencepiece import sentencepiece_model_pb2

# ---------------------------------------------------------------------------- what they share

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of pieces


def group_size(g_idx, largest=128):
    """The largest of 128, 64 and 32 for which each run of so many columns is of one group and the runs fill the row; 32 need
    not fill it; None if there is none. g_idx: [in], the group of each column."""
    for size in (size for size in (128, 64, 32) if size <= largest):
        if len(g_idx) % size == 0 or size == 32:
            runs = np.pad(g_idx, (0, -len(g_idx) % size), mode="edge").reshape(-1, size)
            if (runs == runs[:, :1]).all():
                return size
    return None


def neighbours(cols, size):
    """The group of each of `cols` columns, groups being `size` neighbours; -1: all of them. [cols]"""
    return np.arange(cols) // (cols if size == -1 else size)


def spans(rows, cols=1):
    """The rows of a tensor in pieces of about a million numbers and whole panels: [(start, stop)]."""
    step = max(1, 2**20 // (32 * cols)) * 32
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def half(x):
    """x, f32, rounded to FP16 and back; infinite where that is too large."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


class Packed(Weights):
    """Weights of which some are stored as codes. A subclass has codes(), group_index() and may have doubts()."""

    def __init__(self):
        self.tensors, self.used = {}, set()  # as Weights'; the type of a packed tensor is that of its values, "F32"
        self.packed = {}  # name of a packed tensor -> whatever the subclass needs to read it
        self.kinds, self.reasons, self.notes = {}, {}, []  # kind() of a tensor; why it is None; lines for the user

    def codes(self, name, start, stop):
        """Rows of a packed tensor: codes u8 [n, in], scales and zeros, both f32 [n, groups]."""
        raise NotImplementedError

    def group_index(self, name):
        """The group of each column of a packed tensor: [in] whole numbers."""
        raise NotImplementedError

    def bits(self, name):
        """The type of our file that holds the tensor's codes: "q4", "q8" or "nf4"; None for values that are not on such a grid."""
        raise NotImplementedError

    def doubts(self, name):
        """Why our file cannot hold the tensor's scales or zeros, as a phrase; None if it can."""

    def kind(self, name):
        """(type, group) with which our file holds a tensor's codes, scales and zeros as they are; None if it cannot, and
        then reasons[name] says why; None too for a tensor that is not packed."""
        if name in self.packed and name not in self.kinds:
            bits, group, reason = self.bits(name), None, None
            if not bits:
                reason = "codes that are no even steps"
            else:
                # activations are rounded by the same groups: for 8 bits smaller ones are better, as quantize has them
                group = group_size(self.group_index(name), 64 if bits == "q8" else 128)
                reason = self.doubts(name) if group else "groups that are not 32, 64 or 128 neighbours"
            self.kinds[name] = None if reason else (bits, group)
            self.reasons[name] = reason
        return self.kinds.get(name)

    def stored(self, name, start, stop):
        """Rows of a tensor that has a kind(): codes u8 [n, in]; scales and zeros f32 [n, groups], of groups as kind() says."""
        codes, scales, zeros = self.codes(name, start, stop)
        groups = self.group_index(name)[::self.kind(name)[1]]
        return codes, scales[:, groups], zeros[:, groups]

    def rows(self, name, start, stop):
        """As Weights.rows(): the values."""
        if name not in self.packed:
            return super().rows(name, start, stop)
        codes, scales, zeros = self.codes(name, start, stop)
        groups = self.group_index(name)
        return scales[:, groups] * (codes - zeros[:, groups])

    def fold(self, c):
        """Look for orders of the inputs that make a group's inputs neighbours, and that the matrices before can follow. c: the
        config. Called before kind()."""


class PackedDirectory(Packed):
    """A Hugging Face directory with quantized modules: for each, tensors MODULE.PART instead of MODULE.weight."""
    scalars = ("weight_format",)
    pattern = marks = None  # of a subclass: a tensor's name as (module, part); the parts that only packed modules have

    def __init__(self, directory, config, settings):
        Weights.__init__(self, directory)
        self.raw = self.tensors  # as they are in the files
        Packed.__init__(self)
        self.config, self.settings, self.tokenizer = config, settings, directory  # settings: quantization_config
        self.cache = None, None  # the last module that was read, and its parts
        modules = {}
        for name in self.raw:
            match = re.fullmatch(self.pattern, name)
            if match:
                modules.setdefault(match[1], {})[match[2]] = name
        for module, parts in modules.items():
            if parts.keys() & self.marks:
                self.packed[module + ".weight"] = parts
        inside = {name for parts in self.packed.values() for name in parts.values()}
        self.tensors = {name: entry for name, entry in self.raw.items() if name not in inside}
        for name, parts in self.packed.items():
            if name in self.tensors:
                raise Bad(f"{name}: is there beside {sorted(parts.values())[0]} (the checkpoint is damaged)")
            self.tensors[name] = self.raw[next(iter(parts.values()))][0], self.logical_shape(name), "F32"

    def logical_shape(self, name):
        """[out, in] of a packed tensor; Bad if its parts do not fit together."""
        raise NotImplementedError

    def part(self, name, part, types, shape=None):
        """Check a part of a packed tensor, its type one of `types` and its shape `shape` (None: any), and return its shape."""
        if part not in self.packed[name]:
            raise Bad(f"{name.removesuffix('.weight')}.{part}: this tensor is missing")
        full = self.packed[name][part]
        shard, found, dtype = self.raw[full]
        if dtype not in types:
            raise Bad(f"{full}: the type is {dtype} (only {', '.join(types)} is supported)")
        if shape is not None and found != shape:
            raise Bad(f"{full}: the shape is {found} in {os.path.basename(shard)}, but {shape} by its other parts and config.json")
        return found

    def read(self, name, part):
        """A part of a packed tensor as it is."""
        full = self.packed[name][part]
        with self.open(self.raw[full][0]) as file:
            return file.get_tensor(full)

    def matrix(self, name, part, kind):
        """The shape of a part that has two dimensions and this type."""
        shape = self.part(name, part, [kind])
        if len(shape) != 2:
            raise Bad(f"{self.packed[name][part]}: the shape is {shape}, but a matrix is expected")
        return shape

    def doubts(self, name):
        """As Packed.doubts(), where whole numbers are stored as zeros."""
        scales = self.load(name).scales
        return None if (half(scales) == scales).all() else "scales that are no FP16 numbers"

    def load(self, name):
        """What unpack() makes of a packed tensor's parts; that of the last one is kept."""
        if self.cache[0] != name:
            self.cache = None, None
            self.cache = name, self.unpack(name)
        return self.cache[1]

    def no_bias(self, name):
        """Bad if a packed module has a bias that is not zero: some programs write zeros."""
        if "bias" in self.packed[name]:
            self.part(name, "bias", NUMPY)
            if self.read(name, "bias").astype(np.float32).any():
                raise Bad(f"{self.packed[name]['bias']}: not zero (Mistral has no biases)")


def checked_group(size):
    """A quantization_config's group_size; Bad if it is none."""
    if type(size) is not int or not (size == -1 or 0 < size < 2**31):
        raise Bad(f"config.json: quantization_config.group_size is {show(size)} (a positive number, or -1, is expected)")
    return size


def finite(name, x):
    """x as f32, Bad if it is not finite; the name is that of the tensor in the file."""
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise Bad(f"{name}: holds a value that is not finite (the checkpoint is damaged)")
    return x


def split_words(x, bits):
    """The numbers of `bits` bits in 32-bit words, the lowest first: u8 [..., 32 / bits]."""
    return (x.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)).astype(np.uint8)


def join_words(x, bits):
    """The inverse: the last dimension, 32 / bits numbers, as one i32."""
    return np.bitwise_or.reduce(x.astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32), -1).view(np.int32)


# ---------------------------------------------------------------------------- GPTQ


class GPTQ(PackedDirectory):
    """GPTQ's format, of AutoGPTQ and GPTQModel, with 4 or 8 bits. Parts of a module, n being the codes in a word of 32 bits:
    qweight i32 [in / n, out], packed along in; qzeros i32 [groups, out / n], packed along out; scales [groups, out];
    g_idx i32 [in], the group of each input, which with act-order are not neighbours. Version 1 of the format stores a
    zero less 1, version 2 ("gptq_v2") as it is."""
    pattern = r"(.+)\.(qweight|qzeros|scales|g_idx|bias)"
    marks = {"qweight", "qzeros", "scales", "g_idx"}

    def __init__(self, directory, config, settings):
        where = "config.json: quantization_config"
        self.n_bits, self.group = settings.get("bits"), checked_group(settings.get("group_size"))
        if self.n_bits not in (4, 8) or type(self.n_bits) is not int:
            raise Bad(f"{where}.bits is {show(self.n_bits)} (4 and 8 are supported)")
        self.claimed = settings.get("checkpoint_format") or "gptq"
        if self.claimed not in ("gptq", "gptq_v2"):
            raise Bad(f"{where}.checkpoint_format is {show(self.claimed)} (gptq and gptq_v2 are supported)")
        demand(where, "is_marlin_format", settings.get("is_marlin_format") or False, False)
        self.row_order, self.column_order = {}, {}  # of tensors that fold() reorders: [out], [in], where each row or column comes from
        super().__init__(directory, config, settings)
        self.version = self.find_version()

    def logical_shape(self, name):
        n, shape = 32 // self.n_bits, self.matrix(name, "qweight", "I32")
        cols, out = shape[0] * n, shape[1]
        groups = int(neighbours(cols, self.group)[-1]) + 1
        if out % n:
            raise Bad(f"{self.packed[name]['qweight']}: the shape is {shape} (the second number must be a multiple of {n})")
        self.part(name, "scales", NUMPY, [groups, out])
        self.part(name, "qzeros", ["I32"], [groups, out // n])
        if "g_idx" in self.packed[name]:
            self.part(name, "g_idx", ["I32", "I64"], [cols])
        elif self.settings.get("desc_act"):
            raise Bad(f"{name.removesuffix('.weight')}.g_idx: this tensor is missing (desc_act is true: it says which group "
                      "each input is in; download the checkpoint again)")
        self.no_bias(name)
        return [out, cols]

    def find_version(self):
        """1 or 2, as the values show: read the right way, a zero stands where the weights of a group have their middle, since
        weights are as often positive as negative; the wrong way, it is 1 off. What checkpoint_format says is only
        followed where that leaves doubt."""
        middles = []  # of each module, with both readings: by how much a row's mean code is above its mean zero [2, out]
        for name in self.packed:
            shape = self.raw[self.packed[name]["qweight"]][1]
            with self.open(self.tensors[name][0]) as file:
                words = file.get_slice(self.packed[name]["qweight"])[:min(shape[0], 128 * self.n_bits // 32)]  # of 128 inputs
            codes = split_words(words, self.n_bits).mean((0, 2))
            groups, zeros = self.read_groups(name)[:len(words) * 32 // self.n_bits], self.read(name, "qzeros")
            middles.append(np.stack([codes - self.zeros(zeros, version)[groups].mean(0) for version in (1, 2)]))
        claimed = 2 if self.claimed == "gptq_v2" else 1
        if not middles:
            return claimed
        off = np.abs(np.median(np.concatenate(middles, 1), 1))
        found = 1 if off[0] < off[1] else 2
        if found != claimed and off[found - 1] < 0.25:
            self.notes.append(f"checkpoint_format is {self.claimed}, but the zeros are stored as in version {found}: read so")
            return found
        return claimed

    def zeros(self, qzeros, version):
        """The zeros f32 [groups, out] in the tensor qzeros, i32 [groups, out / n].

        Version 1's writers take 1 from each number in a word by one subtraction from the whole word; a zero of 0 borrows from its
        neighbour. The addition here undoes that."""
        ones = np.uint32(0x11111111 if self.n_bits == 4 else 0x01010101) if version == 1 else np.uint32(0)
        return split_words(qzeros.view(np.uint32) + ones, self.n_bits).reshape(len(qzeros), -1).astype(np.float32)

    def read_groups(self, name):
        """The group of each input as the file has it: [in]."""
        cols, n_groups = self.tensors[name][1][1], self.raw[self.packed[name]["scales"]][1][0]
        if "g_idx" not in self.packed[name]:
            return neighbours(cols, self.group)
        groups = self.read(name, "g_idx")
        if groups.min() < 0 or groups.max() >= n_groups:
            raise Bad(f"{self.packed[name]['g_idx']}: holds {groups.min()} to {groups.max()}, but there are {n_groups} groups")
        return groups

    def group_index(self, name):
        return self.load(name).groups

    def unpack(self, name):
        """A module's parts: words u32 [in / n, out], scales, zeros f32 [groups, out], groups [in] in the order of the columns."""
        groups = self.read_groups(name)
        scales = finite(self.packed[name]["scales"], self.read(name, "scales"))
        return SimpleNamespace(
            words=self.read(name, "qweight"), scales=scales, zeros=self.zeros(self.read(name, "qzeros"), self.version),
            groups=groups[self.column_order[name]] if name in self.column_order else groups)

    def bits(self, name):
        return f"q{self.n_bits}"

    def codes(self, name, start, stop):
        m, rows = self.load(name), slice(start, stop)
        if name in self.row_order:
            rows = self.row_order[name][rows]
        codes = split_words(m.words[:, rows], self.n_bits).transpose(1, 0, 2).reshape(stop - start, -1)
        if name in self.column_order:
            codes = codes[:, self.column_order[name]]
        return codes, m.scales[:, rows].T, m.zeros[:, rows].T

    def fold(self, c):
        def follow(name, order, *before):
            """Order the columns of `name` so if that makes groups neighbours; `before`: (tensor, the order of its rows)."""
            if group_size(self.read_groups(name)[order]):
                self.column_order[name] = order
                self.row_order.update(before)
                self.folded.append(name)
        self.folded = []
        for layer in range(c.n_layers):
            down, gate, up, wo, v = (f"model.layers.{layer}.{module}.weight" for module in (
                "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj"))
            if {down, gate, up} <= self.packed.keys() and not group_size(self.read_groups(down)):
                # each hidden unit is a row of w1 and w3 and a column of w2: any order will do
                order = np.argsort(self.read_groups(down), kind="stable")
                follow(down, order, (gate, order), (up, order))
            if {wo, v} <= self.packed.keys() and not group_size(self.read_groups(wo)):
                # a column of wo belongs to a query head, a row of wv to all query heads of its key head: these must agree
                shape = c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim
                order = np.argsort(self.read_groups(wo).reshape(shape)[:, :1], -1, kind="stable")
                columns = np.take_along_axis(np.arange(math.prod(shape)).reshape(shape), np.broadcast_to(order, shape), -1)
                rows = np.arange(c.n_kv_heads)[:, None] * c.head_dim + order[:, 0]
                follow(wo, columns.ravel(), (v, rows.ravel()))
        if self.folded:
            self.notes.append(f"act-order: inputs of {len(self.folded)} matrices reordered, and the rows that make them")
        self.cache = None, None


# ---------------------------------------------------------------------------- AWQ


class AWQ(PackedDirectory):
    """AutoAWQ's format for its GEMM kernels, 4 bits: qweight i32 [in, out / 8] and qzeros i32 [groups, out / 8], both packed along
    out, the eight of a word in the order 0 2 4 6 1 3 5 7; scales [groups, out]. Groups are neighbours."""
    pattern = r"(.+)\.(qweight|qzeros|scales|bias)"
    marks = {"qweight", "qzeros", "scales"}
    places = [0, 4, 1, 5, 2, 6, 3, 7]  # of column 0 to 7 in a word

    def __init__(self, directory, config, settings):
        where = "config.json: quantization_config"
        demand(where, "bits", settings.get("bits", settings.get("w_bit")), 4)
        demand(where, "version", str(settings.get("version", "gemm")).lower(), "gemm")
        self.group = checked_group(settings.get("group_size", settings.get("q_group_size")))
        super().__init__(directory, config, settings)

    def logical_shape(self, name):
        cols, words = self.matrix(name, "qweight", "I32")
        out, groups = words * 8, int(neighbours(cols, self.group)[-1]) + 1
        self.part(name, "scales", NUMPY, [groups, out])
        self.part(name, "qzeros", ["I32"], [groups, words])
        self.no_bias(name)
        return [out, cols]

    def group_index(self, name):
        return neighbours(self.tensors[name][1][1], self.group)

    def unpack(self, name):
        """A module's parts: words u32 [in, out / 8]; scales, zeros f32 [groups, out]."""
        zeros = split_words(self.read(name, "qzeros"), 4)[..., self.places]
        return SimpleNamespace(words=self.read(name, "qweight"), zeros=zeros.reshape(len(zeros), -1).astype(np.float32),
                               scales=finite(self.packed[name]["scales"], self.read(name, "scales")))

    def bits(self, name):
        return "q4"

    def codes(self, name, start, stop):
        m, first = self.load(name), start // 8  # whole words
        codes = split_words(m.words[:, first:-(-stop // 8)], 4)[..., self.places].reshape(len(m.words), -1)
        codes = codes[:, start - 8 * first:stop - 8 * first].T
        return codes, m.scales[:, start:stop].T, m.zeros[:, start:stop].T


# ---------------------------------------------------------------------------- bitsandbytes


class BnbInt8(PackedDirectory):
    """LLM.int8: weight i8 [out, in], SCB f32 [out], the rows' largest absolute values; a weight is SCB / 127 * code."""
    pattern = r"(.+)\.(weight|SCB|weight_format|bias)"
    marks = {"SCB", "weight_format"}

    def logical_shape(self, name):
        shape = self.matrix(name, "weight", "I8")
        self.part(name, "SCB", ["F32"], [shape[0]])
        if "weight_format" in self.packed[name]:
            self.part(name, "weight_format", ["U8"], [])
            if self.read(name, "weight_format") != 0:
                raise Bad(f"{name}_format: is {self.read(name, 'weight_format')} (only 0, row by row, is supported)")
        self.no_bias(name)
        return shape

    def group_index(self, name):
        return neighbours(self.tensors[name][1][1], -1)

    def bits(self, name):
        return "q8"

    def unpack(self, name):
        """A module's part: scales f32 [out]."""
        return SimpleNamespace(scales=finite(self.packed[name]["SCB"], self.read(name, "SCB")) / np.float32(127))

    def doubts(self, name):
        """The f32 scale of a row is rounded to FP16: a row moves by 2^-11 of itself at most, as little as the numbers of FP16."""
        scales = self.load(name).scales
        if (np.abs(scales - half(scales)) > np.abs(scales) * 2**-10.99).any():
            return "scales out of FP16's range"
        if not self.notes:
            self.notes.append("scales of INT8 rows rounded to FP16 (by 0.05% at most; --dtype f32 keeps them)")
        return None

    def codes(self, name, start, stop):
        with self.open(self.raw[self.packed[name]["weight"]][0]) as file:
            codes = file.get_slice(self.packed[name]["weight"])[start:stop]
        scales = self.load(name).scales[start:stop, None]
        return codes.view(np.uint8) ^ np.uint8(128), scales, np.full_like(scales, 128)


class BnbNF4(PackedDirectory):
    """NF4: weight u8 [out in / 2, 1], two codes a byte, the first in the high half: places in quant_map f32 [16], the code book;
    absmax, a scale for each block of 64 (or so) weights of the flattened matrix. With double quantization absmax is u8, codes into
    nested_quant_map f32 [256], with scales nested_absmax for blocks of 256 and an offset."""
    pattern = r"(.+)\.(weight|weight\..+|bias)"
    state, fp4 = "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"
    marks = {"weight.absmax", "weight.quant_map", state, fp4}

    def __init__(self, directory, config, settings):
        self.states = {}  # tensor -> (blocksize, nested_blocksize, nested_offset)
        super().__init__(directory, config, settings)

    def logical_shape(self, name):
        parts = self.packed[name]
        if self.fp4 in parts:
            raise Bad(f"{name}: the type is fp4 (of bitsandbytes' 4-bit types nf4 is supported)")
        self.part(name, self.state, ["U8"])
        where = parts[self.state]
        with form(where):
            s = json.loads(self.read(name, self.state).tobytes())
            shape, block, nested = list(s["shape"]), s["blocksize"], s.get("nested_blocksize", 256)
            demand(where, "quant_type", s["quant_type"], "nf4")
            if not (len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in (*shape, block, nested))):
                raise ValueError(f"shape {show(shape)}, blocksize {show(block)}, nested_blocksize {show(nested)}")
            self.states[name] = block, nested, float(s.get("nested_offset", 0))
        n = math.prod(shape)
        blocks = -(-n // block)
        self.part(name, "weight", ["U8"], [-(-n // 2), 1])
        self.part(name, "weight.quant_map", ["F32"], [16])
        self.part(name, "weight.absmax", ["U8"] if "weight.nested_absmax" in parts else ["F32"], [blocks])
        if "weight.nested_absmax" in parts:
            self.part(name, "weight.nested_absmax", ["F32"], [-(-blocks // nested)])
            self.part(name, "weight.nested_quant_map", ["F32"], [256])
        self.no_bias(name)
        return shape

    def unpack(self, name):
        """A module's parts: absmax f32 [blocks], block, their size."""
        parts, (block, nested, offset) = self.packed[name], self.states[name]
        # a code of our file is a place in the one code book, and so it is in bitsandbytes' kernels
        if not np.abs(self.read(name, "weight.quant_map") - NF4).max() <= 1e-6:
            raise Bad(f"{parts['weight.quant_map']}: not the 16 values of NF4 (no other code book is supported)")
        absmax = self.read(name, "weight.absmax")
        if "weight.nested_absmax" in parts:
            codes, scales = absmax, self.read(name, "weight.nested_absmax")
            absmax = self.read(name, "weight.nested_quant_map")[codes] * scales[np.arange(len(codes)) // nested] + np.float32(offset)
        return SimpleNamespace(absmax=finite(parts["weight.absmax"], absmax), block=block)

    def run(self, name):
        """How many inputs from the first on, from the next on and so forth share a scale in every row. Blocks go on from one row to the
        next: they begin at multiples of their size in the flattened matrix, rows at multiples of theirs."""
        return math.gcd(self.tensors[name][1][1], self.states[name][0])

    def group_index(self, name):
        return neighbours(self.tensors[name][1][1], self.run(name))

    def bits(self, name):
        return "nf4"

    def doubts(self, name):
        """The f32 scale of a block is rounded to FP16. It moves by 2^-11 of itself, or, where it is so small that FP16 has fewer bits for
        it, by 2^-8 of the row's largest at most, which is what the code book's rounding to 8 bits does to any block."""
        for piece in spans(*self.tensors[name][1]):
            scales = np.abs(self.absmax(name, *piece)) / np.float32(127)
            if (np.abs(scales - half(scales)) > scales.max(1, keepdims=True) * 2**-8).any():
                return "scales out of FP16's range"
        if not self.notes:
            self.notes.append("values of NF4 rounded to 8 bits (by 0.4% of a block's largest at most; --dtype f32 keeps them)")
        return None

    def absmax(self, name, start, stop):
        """Those of the blocks that rows lie in, one for each run of inputs: f32 [n, runs]."""
        m, cols = self.load(name), self.tensors[name][1][1]
        return m.absmax[np.arange(start * cols, stop * cols, self.run(name)) // m.block].reshape(stop - start, -1)

    def places(self, name, start, stop):
        """The codes of rows, places in the code book: u8 [n, in]."""
        cols = self.tensors[name][1][1]
        first, last = start * cols, stop * cols  # among the flattened weights
        with self.open(self.raw[self.packed[name]["weight"]][0]) as file:
            data = file.get_slice(self.packed[name]["weight"])[first // 2:-(-last // 2)]
        return np.concatenate([data >> 4, data & 15], 1).ravel()[first % 2:][:last - first].reshape(-1, cols)

    def codes(self, name, start, stop):
        """As Packed.codes(), but a weight is about scale * (NF4_CODES[code] - zero)."""
        scales = self.absmax(name, start, stop) / np.float32(127)
        return self.places(name, start, stop), scales, np.full_like(scales, 128)

    def rows(self, name, start, stop):
        """As Packed.rows(): what bitsandbytes dequantizes, with a code book and scales of f32."""
        if name not in self.packed:
            return super().rows(name, start, stop)
        return NF4[self.places(name, start, stop)] * self.absmax(name, start, stop)[:, self.group_index(name)]


def bitsandbytes(directory, config, settings):
    """The reader of what bitsandbytes saves: INT8 or NF4."""
    return (BnbInt8 if settings.get("load_in_8bit") else BnbNF4)(directory, config, settings)


DIRECTORIES = {"gptq": GPTQ, "awq": AWQ, "bitsandbytes": bitsandbytes}  # by quantization_config.quant_method

# ---------------------------------------------------------------------------- GGUF

# Types of tensors: number -> (name, weights in a block, bytes of a block). Those of TYPES_READ are read.
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
         8: ("Q8_0", 32, 34), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2)}
TYPE_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
OTHER_TYPES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
               19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
               28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # of metadata; as struct's
STRING, ARRAY = 8, 9

GGUF_NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
              "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GGUF_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name):
    """The Hugging Face name of a tensor in a GGUF file; the name itself where there is none."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in GGUF_NAMES:
        return f"model.layers.{match[1]}.{GGUF_NAMES[match[2]]}.weight"
    outside = GGUF_OUTSIDE.get(name.removesuffix(".weight"))
    return f"{outside}.weight" if outside else name


def rope_order(n_heads, head_dim):
    """Where the rows of wq or wk in a GGUF file of llama.cpp come from: [n_heads head_dim] rows of Hugging Face's.

    llama.cpp rotates element 2 i of a head with element 2 i + 1, Hugging Face (and we) i with i + head_dim / 2."""
    return np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


class GGUF(Packed):
    """A GGUF file with a Mistral model, of architecture llama (what llama.cpp calls it) or mistral.

    metadata: {key: value}; config: the same as in a config.json."""

    def __init__(self, path):
        super().__init__()
        self.path = self.tokenizer = path
        self.entries = {}  # tensor -> (type name, offset in the file, bytes of a row)
        self.orders = {}  # tensor -> where its rows are in the file
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                with form(path):
                    self.read_header(file)
        except OSError as error:
            raise Bad(f"{path}: {error.strerror}")
        with form(path):
            c = self.config = self.make_config()
            head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
            heads = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"]}
            for name, (_, shape, _) in self.tensors.items():
                match = re.fullmatch(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.weight", name)
                if match and shape[0] == heads[match[1]] * head_dim and head_dim % 2 == 0:  # if not, check() will say so
                    self.orders[name] = np.argsort(rope_order(heads[match[1]], head_dim))

    def read_header(self, file):
        """Read all that stands before the tensors' data."""
        def take(n):
            if n > self.size - file.tell():
                raise Bad(f"{self.path}: ends within its header, after {self.size} bytes (download it again)")
            return file.read(n)

        def number(kind):
            return struct.unpack("<" + kind, take(struct.calcsize("<" + kind)))[0]

        def string():
            return take(number("Q")).decode()

        def value(kind):
            if kind == STRING:
                return string()
            if kind != ARRAY:
                return number(VALUES[kind])
            kind, n = number("I"), number("Q")
            if kind in VALUES:
                dtype = np.dtype("<" + VALUES[kind])
                return np.frombuffer(take(n * dtype.itemsize), dtype, n).tolist() if n else []
            if kind != STRING:
                raise ValueError("an array of arrays")
            if n > (self.size - file.tell()) // 8:
                take(8 * n)  # fails
            return [string() for _ in range(n)]

        if take(4) != b"GGUF":
            raise Bad(f"{self.path}: not a GGUF file, and not a directory (give the directory that holds config.json, or a GGUF file)")
        version = number("I")
        if version not in (2, 3):
            raise Bad(f"{self.path}: version {version} of GGUF (2 and 3 are supported)")
        n_tensors, n_keys = number("Q"), number("Q")
        self.metadata = {}
        for _ in range(n_keys):
            key = string()
            self.metadata[key] = value(number("I"))
        if self.metadata.get("split.count", 0) > 1:
            raise Bad(f"{self.path}: split.count is {self.metadata['split.count']} (join the parts: llama-gguf-split --merge)")
        entries = []
        for _ in range(n_tensors):
            name, n_dims = string(), number("I")
            if not 1 <= n_dims <= 4:
                raise Bad(f"{self.path}: {show(name)} has {n_dims} dimensions")
            entries.append((name, [number("Q") for _ in range(n_dims)][::-1], number("I"), number("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        start = file.tell() + -file.tell() % alignment
        for name, shape, kind, offset in entries:
            if kind not in TYPES:
                raise Bad(f"{name}: the type is {OTHER_TYPES.get(kind, f'number {kind}')} in {os.path.basename(self.path)} "
                          f"({', '.join(TYPE_NUMBERS)} are supported)")
            kind, block, size = TYPES[kind]
            if shape[-1] % block or not 0 < math.prod(shape) < 2**48:
                raise Bad(f"{name}: the shape is {shape}, not one for {kind}")
            row = shape[-1] // block * size
            if start + offset + math.prod(shape[:-1]) * row > self.size:
                raise Bad(f"{name}: not inside {os.path.basename(self.path)}, which has {self.size} bytes (download it again)")
            full = hf_name(name)
            if full in self.tensors:
                raise Bad(f"{name}: is twice in {os.path.basename(self.path)}")
            own = kind if kind in NUMPY else "F32"
            if own != kind:
                self.packed[full] = name
            self.tensors[full], self.entries[full] = (self.path, shape, own), (kind, start + offset, row)

    def make_config(self):
        """What config.json would say."""
        m, arch = self.metadata, self.metadata.get("general.architecture")
        if arch not in ("llama", "mistral"):
            raise Bad(f"{self.path}: general.architecture is {show(arch)} (llama and mistral are supported)")

        def get(key, *default):
            if not default and f"{arch}.{key}" not in m:
                raise Bad(f"{self.path}: {arch}.{key} is missing")
            return m.get(f"{arch}.{key}", *default)

        heads = get("attention.head_count")
        head_dim = get("attention.key_length", None)
        for key, value, wanted in (
                ("attention.value_length", get("attention.value_length", head_dim), head_dim),
                ("rope.dimension_count", get("rope.dimension_count", None), head_dim or get("embedding_length") // heads),
                ("rope.scaling.type", get("rope.scaling.type", "none"), "none"), ("expert_count", get("expert_count", 0), 0)):
            if value is not None:
                demand(self.path, f"{arch}.{key}", value, wanted)
        embedding = self.tensors.get("model.embed_tokens.weight")
        if not embedding:
            raise Bad(f"{self.path}: token_embd.weight: this tensor is missing")
        return {
            "model_type": "mistral", "hidden_size": get("embedding_length"), "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads), "head_dim": head_dim, "vocab_size": embedding[1][0],
            "sliding_window": get("attention.sliding_window", None) or None, "max_position_embeddings": get("context_length"),
            "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
            "rope_theta": float(str(np.float32(get("rope.freq_base", 10000.0)))),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": m.get("tokenizer.ggml.bos_token_id"), "eos_token_id": m.get("tokenizer.ggml.eos_token_id")}

    def check(self, name, shape, reason="its metadata"):
        super().check(name, shape, reason)

    def read_rows(self, name, start, stop):
        """Rows of a tensor in Hugging Face's order as the bytes of the file: u8 [n, bytes of a row]."""
        _, offset, row = self.entries[name]
        order = self.orders.get(name)
        wanted = np.arange(start, stop) if order is None else order[start:stop]
        first, last = int(wanted.min()), int(wanted.max()) + 1
        try:
            with open(self.path, "rb") as file:
                file.seek(offset + first * row)
                data = file.read((last - first) * row)
        except OSError as error:
            raise Bad(f"{self.path}: {error.strerror}")
        if len(data) < (last - first) * row:
            raise Bad(f"{self.path}: became shorter while it was read")
        return np.frombuffer(data, np.uint8).reshape(-1, row)[wanted - first]

    def rows(self, name, start, stop):
        kind, _, row = self.entries[name]
        if kind == "Q6_K":
            return self.q6_k(self.read_rows(name, start, stop))
        if name in self.packed:
            return super().rows(name, start, stop)
        if len(self.tensors[name][1]) == 1:  # a vector is one row
            return self.read_rows(name, 0, 1).view(NUMPY[kind]).astype(np.float32).reshape(-1, 1)[start:stop]
        return self.read_rows(name, start, stop).view(NUMPY[kind]).astype(np.float32)

    def group_index(self, name):
        return np.arange(self.tensors[name][1][1]) // 32

    def bits(self, name):
        kind = self.entries[name][0]
        return {"4": "q4", "5": "q8", "8": "q8"}.get(kind[1]) if kind != "Q6_K" else None

    def doubts(self, name):
        """Q4_1 and Q5_1 have a smallest weight where we have a zero, -smallest / scale. It is rounded to FP16: by 2^-8 of a step where
        it is below 16, which is less than what rounding the weights to FP16 would do."""
        if self.entries[name][0].endswith("_1"):
            for piece in spans(*self.tensors[name][1]):
                _, _, zeros = self.codes(name, *piece)
                if not np.abs(half(zeros) - zeros).max() <= 2**-7:
                    return "zeros too large for FP16"
            if not self.notes:
                self.notes.append("smallest weights became zeros of FP16 (by 1/128 of a step at most; --dtype f32 keeps them)")
        return None

    def codes(self, name, start, stop):
        kind, size = self.entries[name][0], TYPES[TYPE_NUMBERS[self.entries[name][0]]][2]
        blocks = self.read_rows(name, start, stop).reshape(stop - start, -1, size)

        def halves(at):
            return finite(name, np.ascontiguousarray(blocks[..., at:at + 2]).view("<f2")[..., 0])

        scales = halves(0)
        if kind == "Q8_0":
            return (blocks[..., 2:] ^ 128).reshape(len(blocks), -1), scales, np.full_like(scales, 128)
        codes = np.concatenate([blocks[..., -16:] & 15, blocks[..., -16:] >> 4], -1)
        if kind[1] == "5":  # the fifth bits are 32 bits before the nibbles
            codes |= np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little") << 4
        if kind.endswith("_0"):
            zeros = np.full_like(scales, 8 if kind == "Q4_0" else 16)
        else:  # weight = scale * code + smallest
            smallest, constant = halves(2), scales == 0
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                zeros = np.where(constant, -1, -smallest / scales)
            scales = np.where(constant, smallest, scales)
            codes[constant] = 0
        return codes.reshape(len(blocks), -1), scales, zeros

    @staticmethod
    def q6_k(data):
        """Q6_K, in which llama.cpp leaves the classifier of files of other types: u8 [n, row] to f32 [n, in]. A block has 256 codes
        of 6 bits, a scale i8 for each 16 and one f16 for all."""
        blocks = data.reshape(len(data), -1, 210)
        low, high = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32), blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
        low = np.concatenate([low & 15, low >> 4], -2)  # [..., 2 halves of the block, 4, 32]
        codes = (low | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4).astype(np.float32) - 32
        scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
        scales *= np.ascontiguousarray(blocks[..., 208:]).view("<f2").astype(np.float32)
        return (codes.reshape(*blocks.shape[:2], 16, 16) * scales[..., None]).reshape(len(data), -1)

# ---------------------------------------------------------------------------- our own file (FORMAT.md)

FILE_TYPES = {"f32": 1, "f16": 2, "q8": 3, "q4": 4, "nf4": 5}
BITS = {"f32": 32, "f16": 16, "q8": 8, "q4": 4, "nf4": 4}
NF4_CODES = np.round(128 + 127 * NF4).astype(np.uint8)  # the codes of q8 that those of nf4 stand for


def tensor_bytes(dtype, group, rows, cols):
    """Bytes of a tensor in the file."""
    groups = -(-cols // group) if group else 0
    return -(-rows // 32) * (groups * (128 + 4 * group * BITS[dtype]) if group else 4 * cols * BITS[dtype])


def pack_panels(codes, scales, zeros, dtype, group):
    """The bytes of panels of "q8", "q4" or "nf4": codes u8 [n, cols], scales, zeros f16 [n, groups]; n a multiple of 32."""
    n, groups = scales.shape
    codes = np.pad(codes, ((0, 0), (0, groups * group - codes.shape[1]))).reshape(n // 32, 32, groups, group // 4, 4)
    codes = codes.transpose(0, 2, 3, 1, 4)  # [panels, groups, group / 4, 32, 4]
    if BITS[dtype] == 4:
        codes = codes[..., :16, :] | codes[..., 16:, :] << 4
    numbers = np.stack([scales, zeros]).reshape(2, n // 32, 32, groups).transpose(1, 3, 0, 2)  # [panels, groups, 2, 32]
    return np.concatenate([np.ascontiguousarray(numbers).view(np.uint8).reshape(n // 32, groups, 128),
                           codes.reshape(n // 32, groups, -1)], 2).tobytes()


def unpack_panels(data, cols, dtype, group):
    """The inverse, of bytes: codes u8 [n, cols]; scales, zeros f32 [n, groups]."""
    groups = -(-cols // group)
    data = np.frombuffer(data, np.uint8).reshape(-1, groups, 128 + 4 * group * BITS[dtype])
    numbers = np.ascontiguousarray(data[..., :128]).view("<f2").reshape(-1, groups, 2, 32).transpose(2, 0, 3, 1)
    codes = data[..., 128:].reshape(len(data), groups, group // 4, -1, 4)
    if BITS[dtype] == 4:
        codes = np.concatenate([codes & 15, codes >> 4], 3)
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(len(data) * 32, -1)[:, :cols]
    return codes, *numbers.reshape(2, -1, groups).astype(np.float32)


class Checkpoint(Packed):
    """A checkpoint of ours by the Hugging Face names. Attributes: config, the object for a config.json; t, the tokenizer as a
    namespace of pieces [(text, score, type)], prefix, byte_fallback, unk, bos and eos (ids); chat (FORMAT.md); title, its name."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        try:
            with opened(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                head = file.read(256)
                self.read_header(head)
                with form(path):
                    self.read_table(file.read(96 * self.n_tensors))
                    file.seek(self.tokenizer[0])
                    self.read_tokenizer(file.read(self.tokenizer[1]))
        except OSError as error:
            raise Bad(f"{path}: {error.strerror}")

    def read_header(self, head):
        if len(head) < 256 or head[:8] != b"mistralc":
            raise Bad(f"{self.path}: not a mistral.c checkpoint (make one with export.py)")
        (version, self.n_tensors, size, *self.tokenizer, dim, hidden, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, window,
         max_positions, norm_eps, rope_theta, self.chat, name) = struct.unpack("<IIQQQ9IfdI68s", head[8:160])
        if version != 1:
            raise Bad(f"{self.path}: version {version} of the format; this program reads version 1")
        if size != self.size:
            raise Bad(f"{self.path}: has {self.size} bytes, should have {size}: an incomplete copy?")
        if (not all((dim, hidden, n_layers, n_heads, n_kv_heads, head_dim, vocab_size)) or n_heads % n_kv_heads or head_dim % 2
                or self.n_tensors - 6 * n_layers not in (2, 3) or self.chat > 2 or sum(self.tokenizer) > size
                or 256 + 96 * self.n_tensors > self.tokenizer[0] or not 0 <= norm_eps < 1 or not 0 < rope_theta < 1e300):
            raise Bad(f"{self.path}: the header is damaged (make the checkpoint again)")
        self.title = name.rstrip(b"\0").decode(errors="replace")
        self.config = {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": dim, "intermediate_size": hidden,
            "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads, "head_dim": head_dim,
            "vocab_size": vocab_size, "sliding_window": window or None, "max_position_embeddings": max_positions or 4096 * 32,
            "rms_norm_eps": float(str(np.float32(norm_eps))), "rope_theta": rope_theta, "hidden_act": "silu",
            "tie_word_embeddings": self.n_tensors == 6 * n_layers + 2}

    def read_table(self, table):
        c, types = self.config, {number: name for name, number in FILE_TYPES.items()}
        dim, hidden, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        q_dim, kv_dim = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
        expected = [("token_embedding", dim, [("model.embed_tokens", c["vocab_size"])])]
        for i in range(c["num_hidden_layers"]):
            to, hf = f"layers.{i}.", f"model.layers.{i}."
            expected += [
                (to + "rms_att_weight", 1, [(hf + "input_layernorm", dim)]),
                (to + "wqkv", dim, [(hf + "self_attn.q_proj", q_dim), (hf + "self_attn.k_proj", kv_dim),
                                    (hf + "self_attn.v_proj", kv_dim)]),
                (to + "wo", q_dim, [(hf + "self_attn.o_proj", dim)]),
                (to + "rms_ffn_weight", 1, [(hf + "post_attention_layernorm", dim)]),
                (to + "w13", dim, [(hf + "mlp.gate_proj", hidden), (hf + "mlp.up_proj", hidden)]),
                (to + "w2", hidden, [(hf + "mlp.down_proj", dim)])]
        expected += [("rms_final_weight", 1, [("model.norm", dim)]), ("wcls", dim, [("lm_head", c["vocab_size"])])]
        self.places = {}  # Hugging Face name -> (type, group, columns, offset in the file, first row there)
        for i, (name, cols, sources) in enumerate(expected[:self.n_tensors]):
            found, kind, group, rows, *rest = struct.unpack("<48sIIQQQQ8x", table[96 * i:96 * i + 96])
            dtype, n = types.get(kind), sum(rows for _, rows in sources)
            if (found.rstrip(b"\0") != name.encode() or not dtype or group not in ((32, 64, 128) if BITS[dtype] < 16 else (0,))
                    or rest[2] != tensor_bytes(dtype, group, n, cols) or [rows, rest[0]] != [n, cols] or rest[1] + rest[2] > self.size):
                raise Bad(f"{self.path}: tensor {i}, {name}: its entry is damaged (make the checkpoint again)")
            first = 0
            for source, rows in sources:
                full = source + ".weight"
                self.tensors[full] = self.path, [rows, cols] if cols > 1 else [rows], "F16" if dtype == "f16" else "F32"
                self.places[full] = dtype, group, cols, rest[1], first
                if group:
                    self.packed[full] = name
                first += rows

    def read_tokenizer(self, data):
        kind, n, flags, unk, bos, *eos = struct.unpack_from("<IIIi4i", data)
        if kind != 1 or n > self.config["vocab_size"] or not 0 <= unk < n or max(bos, *eos) >= self.config["vocab_size"]:
            raise Bad(f"{self.path}: the tokenizer is damaged (make the checkpoint again)")
        pieces, at = [], 32
        for _ in range(n):
            score, kind, length = struct.unpack("<fHH", data[at:at + 8].ljust(8, b"\0"))
            if at + 8 + length > len(data) or kind not in (1, 2, 3, 4, 6) or not math.isfinite(score):
                raise Bad(f"{self.path}: the tokenizer is damaged (make the checkpoint again)")
            pieces.append((data[at + 8:at + 8 + length].decode(), score, kind))
            at += 8 + length
        self.t = SimpleNamespace(pieces=pieces, prefix=bool(flags & 1), byte_fallback=bool(flags & 2), unk=unk, bos=bos,
                                 eos=[id for id in eos if id >= 0])

    def read_panels(self, name, start, stop):
        """The bytes of the panels in which rows of a tensor are, and where the first of these rows is among theirs."""
        dtype, group, cols, offset, first = self.places[name]
        low, high = (first + start) // 32, -(-(first + stop) // 32)
        size = tensor_bytes(dtype, group, 32, cols)
        with open(self.path, "rb") as file:
            file.seek(offset + low * size)
            data = file.read((high - low) * size)
        if len(data) != (high - low) * size:
            raise Bad(f"{self.path}: became shorter while it was read")
        return data, first + start - 32 * low

    def rows(self, name, start, stop):
        if name in self.packed:
            return super().rows(name, start, stop)
        dtype, _, cols, *_ = self.places[name]
        data, skip = self.read_panels(name, start, stop)
        x = np.frombuffer(data, NUMPY[dtype.upper()]).reshape(-1, cols, 32).transpose(0, 2, 1).reshape(-1, cols)
        return x[skip:skip + stop - start].astype(np.float32)

    def group_index(self, name):
        dtype, group, cols, *_ = self.places[name]
        return np.arange(cols) // group

    def kind(self, name):
        """As Packed.kind(). No other program has our nf4, but as codes of q8 it is exact."""
        dtype, group, *_ = self.places[name]
        return ("q8" if dtype == "nf4" else dtype, group) if name in self.packed else None

    def codes(self, name, start, stop):
        dtype, group, cols, *_ = self.places[name]
        data, skip = self.read_panels(name, start, stop)
        codes, *numbers = (x[skip:skip + stop - start] for x in unpack_panels(data, cols, dtype, group))
        codes = NF4_CODES[codes] if dtype == "nf4" else codes
        return codes, *(finite(f"{self.path}: {name}", x) for x in numbers)


# ---------------------------------------------------------------------------- the way out


def chat_jinja(chat):
    """Mistral's chat template v1 or v3 (1 or 2), as chat mode of run has it, in Jinja; "" for 0."""
    question = ("", "'[INST] ' + system + message['content'] + ' [/INST]'", "'[INST]' + system + message['content'] + '[/INST]'")[chat]
    return question and (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{% set ns.system = message['content'] + '\\n\\n' %}{% elif message['role'] == 'user' %}{{ "
        + question.replace("system", "ns.system") + " }}{% set ns.system = '' %}{% else %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}")


# GGUF.


def gguf_type(weights, name, dtype):
    """The type in which a matrix goes to a GGUF file, and whether exactly; dtype: "f16", "f32", or None: as the codes allow."""
    rows, cols = weights.tensors[name][1]
    own, group = weights.kind(name) or (weights.tensors[name][2].lower(), 0)
    if dtype or not group or cols % 32:
        kind = (dtype or ("f16" if group else own)).upper()
        return kind, not group and kind in ("F32", own.upper())
    if own == "q4":
        middle = all((weights.codes(name, *piece)[2] == 8).all() for piece in spans(rows, cols))
        return ("Q4_0", True) if middle else ("Q4_1", False)
    for piece in spans(rows, cols):
        codes, _, zeros = weights.stored(name, *piece)
        levels = codes - zeros.repeat(group, 1)[:, :cols]
        if not ((levels == np.round(levels)) & (levels >= -128) & (levels <= 127)).all():
            return "Q8_0", False
    return "Q8_0", True


def gguf_rows(weights, name, kind, exact, start, stop):
    """Rows of a matrix as the bytes of a GGUF file's type."""
    if kind in NUMPY:
        return rounded(name, weights.rows(name, start, stop), kind).tobytes()
    n, cols, per = stop - start, weights.tensors[name][1][1], weights.kind(name)[1] // 32  # blocks of 32 in a group
    codes, scales, zeros = weights.stored(name, start, stop)
    scales, zeros = (x.repeat(per, 1)[:, :cols // 32] for x in (scales, zeros))
    codes = codes.reshape(n, -1, 32)

    def halves(x):
        return rounded(name, x, "F16")[..., None].view(np.uint8)

    if kind == "Q8_0":
        levels = codes - zeros[..., None]
        if not exact:  # as ggml rounds
            x = scales[..., None] * levels
            scales = np.abs(x).max(-1) / np.float32(127)
            levels = np.round(x * (1 / np.where(scales == 0, 1, scales))[..., None])
        parts = [halves(scales), levels.astype(np.int8).view(np.uint8)]
    else:
        smallest = [] if kind == "Q4_0" else [halves(-scales * zeros)]
        parts = [halves(scales), *smallest, codes[..., :16] | codes[..., 16:] << 4]
    return np.concatenate(parts, -1).tobytes()


def gguf_metadata(m, file_type):
    """The metadata of a GGUF file for a Checkpoint: [(key, type of the value, value)]; of lists [(key, type, [values])]."""
    c, t = m.config, m.t
    unused = [(f"[PAD{id}]", -1000.0, 5) for id in range(c["vocab_size"])]
    pieces = [piece if piece[0] else unused[id] for id, piece in enumerate(t.pieces)] + unused[len(t.pieces):]
    uint, real, text, flag = 4, 6, STRING, 7
    return [
        ("general.architecture", text, "llama"), ("general.name", text, m.title), ("general.file_type", uint, file_type),
        ("llama.context_length", uint, c["max_position_embeddings"]), ("llama.embedding_length", uint, c["hidden_size"]),
        ("llama.block_count", uint, c["num_hidden_layers"]), ("llama.feed_forward_length", uint, c["intermediate_size"]),
        ("llama.attention.head_count", uint, c["num_attention_heads"]),
        ("llama.attention.head_count_kv", uint, c["num_key_value_heads"]),
        ("llama.attention.key_length", uint, c["head_dim"]), ("llama.attention.value_length", uint, c["head_dim"]),
        ("llama.attention.layer_norm_rms_epsilon", real, c["rms_norm_eps"]), ("llama.rope.freq_base", real, c["rope_theta"]),
        ("llama.rope.dimension_count", uint, c["head_dim"]), ("llama.vocab_size", uint, c["vocab_size"]),
        *([("llama.attention.sliding_window", uint, c["sliding_window"])] if c["sliding_window"] else []),
        ("tokenizer.ggml.model", text, "llama"), ("tokenizer.ggml.pre", text, "default"),
        ("tokenizer.ggml.tokens", text, [piece[0] for piece in pieces]),
        ("tokenizer.ggml.scores", real, [piece[1] for piece in pieces]),
        ("tokenizer.ggml.token_type", 5, [piece[2] for piece in pieces]),
        *([("tokenizer.ggml.bos_token_id", uint, t.bos)] if t.bos >= 0 else []),
        *([("tokenizer.ggml.eos_token_id", uint, t.eos[0])] if t.eos else []),
        ("tokenizer.ggml.unknown_token_id", uint, t.unk), ("tokenizer.ggml.add_bos_token", flag, t.bos >= 0),
        ("tokenizer.ggml.add_eos_token", flag, False), ("tokenizer.ggml.add_space_prefix", flag, t.prefix),
        *([("tokenizer.chat_template", text, chat_jinja(m.chat))] if m.chat else [])]


def gguf_header(metadata, tensors):
    """A GGUF file up to its tensors' data. tensors: [(name, shape, type name, bytes)]."""
    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(kind, x):
        return string(x) if kind == STRING else struct.pack("<" + VALUES[kind], x)

    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, kind, x in metadata:
        parts.append(string(key))
        if isinstance(x, list):
            parts += [struct.pack("<IIQ", ARRAY, kind, len(x)), *(value(kind, each) for each in x)]
        else:
            parts += [struct.pack("<I", kind), value(kind, x)]
    offset = 0
    for name, shape, kind, size in tensors:
        parts.append(string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], TYPE_NUMBERS[kind], offset))
        offset += size + -size % 32
    header = b"".join(parts)
    return header + bytes(-len(header) % 32)


def write_gguf(m, file, dtype=None):
    """Write a Checkpoint as a GGUF file of architecture llama, for llama.cpp. dtype: "f16" or "f32" for the matrices, or None:
    Q8_0, Q4_0 or Q4_1 for codes, as they allow. Returns (bytes written, lines for the user)."""
    inverse = {**{hf: own for own, hf in GGUF_NAMES.items()}, **{hf: own for own, hf in GGUF_OUTSIDE.items()}}
    c, tensors, counts = m.config, [], {}
    if not 2**-126 <= c["rope_theta"] <= float(np.finfo(np.float32).max):
        raise Bad(f"{m.path}: rope_theta is {c['rope_theta']:g}, but in a GGUF file it is an FP32 number")
    for name, (_, shape, _) in m.tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        own = f"blk.{match[1]}.{inverse[match[2]]}" if match else inverse[name.removesuffix(".weight")]
        kind, exact = gguf_type(m, name, dtype) if len(shape) > 1 else ("F32", True)
        _, block, size = TYPES[TYPE_NUMBERS[kind]]
        tensors.append((name, own + ".weight", shape, kind, exact, math.prod(shape) // block * size))
        if len(shape) > 1:
            counts[kind, exact] = counts.get((kind, exact), 0) + 1
    file_type = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}[max(counts, key=counts.get)[0]]
    header = gguf_header(gguf_metadata(m, file_type), [(own, shape, kind, size) for _, own, shape, kind, _, size in tensors])
    file.write(header)
    done, total, started = len(header), len(header) + sum(size + -size % 32 for *_, size in tensors), time.monotonic()
    for name, _, shape, kind, exact, size in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # a head or several at a time: their rows change places
            step = max(1, 2**20 // (c["head_dim"] * shape[1])) * c["head_dim"]
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                data = np.frombuffer(gguf_rows(m, name, kind, exact, start, stop), np.uint8).reshape(stop - start, -1)
                file.write(data[rope_order((stop - start) // c["head_dim"], c["head_dim"])].tobytes())
        else:
            for piece in spans(*m.tensors[name][1]):
                file.write(gguf_rows(m, name, kind, exact, *piece))
        file.write(bytes(-size % 32))
        done += size + -size % 32
        progress(started, done, total)
    lines = [f"{n} matri{'x' if n == 1 else 'ces'}: {kind}" + ("" if exact else ", rounded") for (kind, exact), n in counts.items()]
    if c["sliding_window"]:
        lines.append(f"llama.cpp knows no window for this architecture: texts longer than {c['sliding_window']} tokens differ there")
    return done, lines


# A Hugging Face directory.


def named_pieces(t):
    """The pieces of a tokenizer, each with a text: an id that stands for nothing becomes a control piece of its own."""
    return [(text or f"<unused_{id}>", score, kind) for id, (text, score, kind) in enumerate(t.pieces)]


def added_tokens(t):
    """Those pieces that other tokenizers keep apart from the vocabulary: {id: its entry in their files}."""
    return {id: {"content": text, "special": kind != USER_DEFINED, "normalized": False, "lstrip": False, "rstrip": False,
                 "single_word": False}
            for id, (text, _, kind) in enumerate(named_pieces(t)) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}


def tokenizer_json(t):
    """The tokenizer t as the object in a tokenizer.json, which transformers prefers. Its merges are all pairs of pieces that make a
    piece, the best first, as transformers writes them."""
    vocab = {text: id for id, (text, _, _) in enumerate(named_pieces(t))}
    merges = [(score, len(text[:i]), len(text[i:]), text[:i], text[i:])
              for text, score, kind in t.pieces if kind == NORMAL for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    bos = [{"SpecialToken": {"id": t.pieces[t.bos][0], "type_id": 0}}] if 0 <= t.bos < len(t.pieces) else []
    text, second = ({"Sequence": {"id": id, "type_id": n}} for n, id in enumerate("AB"))
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, **token} for id, token in added_tokens(t).items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}] * t.prefix + [space]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [*bos, text], "pair": [*bos, text, *bos, second],
                           "special_tokens": {each["SpecialToken"]["id"]: {"id": each["SpecialToken"]["id"], "ids": [t.bos],
                                              "tokens": [each["SpecialToken"]["id"]]} for each in bos}},
        "decoder": {"type": "Sequence", "decoders": decoders + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * t.prefix},
        "model": {"type": "BPE", "dropout": None, "unk_token": t.pieces[t.unk][0], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": t.byte_fallback, "ignore_merges": False,
                  "vocab": vocab, "merges": [[left, right] for *_, left, right in merges]}}


def sentencepiece_model(t):
    """The tokenizer t as the bytes of a tokenizer.model."""
    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in named_pieces(t):
        proto.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(t.pieces), t.byte_fallback
    trainer.unk_id, trainer.unk_piece = t.unk, t.pieces[t.unk][0]
    trainer.bos_id, trainer.eos_id, trainer.pad_id = t.bos, t.eos[0] if t.eos else -1, -1
    for field, id in ("bos_piece", t.bos), ("eos_piece", trainer.eos_id):
        if 0 <= id < len(t.pieces):
            setattr(trainer, field, t.pieces[id][0])
    normalizer.name, normalizer.add_dummy_prefix = "identity", t.prefix
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return proto.SerializeToString()


def packed_settings(m):
    """(quantization_config, None) if all matrices of the layers fit GPTQ's or AWQ's format as they are, else (None, why not). GPTQ's is
    the first choice; 4 bits with zeros that are not all in the middle are AWQ's: vLLM refuses such GPTQ."""
    names = [name for name, (_, shape, _) in m.tensors.items() if name.startswith("model.layers.") and len(shape) > 1]
    kinds = {m.kind(name) for name in names}
    if len(kinds) > 1 or None in kinds:
        return None, "the layers' matrices are " + ("not quantized" if kinds == {None} else "of several types")
    (dtype, group), = kinds
    n = 32 // int(dtype[1])
    for name in names:
        rows, cols = m.tensors[name][1]
        if rows % n or cols % n or cols % group:
            return None, f"the shape [{rows}, {cols}] does not fit GPTQ's packing"
    low, high, symmetric = 2**32, -1, True
    for name in names:
        for piece in spans(*m.tensors[name][1]):
            zeros = m.codes(name, *piece)[2]
            if not (zeros == np.round(zeros)).all():
                return None, "zeros between whole numbers"
            low, high = min(low, zeros.min()), max(high, zeros.max())
            symmetric = symmetric and (zeros == 2**(int(dtype[1]) - 1)).all()
    if low < 0 or high >= 2**int(dtype[1]):  # version 1 could store one more, but some readers carry it into the next
        return None, "zeros out of range"
    if dtype == "q4" and not symmetric:
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": None}, None
    return {"quant_method": "gptq", "bits": int(dtype[1]), "group_size": group, "desc_act": False, "sym": bool(symmetric),
            "lm_head": False, "checkpoint_format": "gptq" if low >= 1 else "gptq_v2", "pack_dtype": "int32"}, None


def packed_parts(rows, cols, settings):
    """The parts of a packed tensor in GPTQ's or AWQ's format: {part: (type, shape)}."""
    n, groups = 32 // settings["bits"], cols // settings["group_size"]
    parts = {"qweight": ("I32", [cols // n, rows]), "qzeros": ("I32", [groups, rows // n]), "scales": ("F16", [groups, rows]),
             "g_idx": ("I32", [cols])}
    if settings["quant_method"] == "awq":
        parts["qweight"] = "I32", [cols, rows // n]
        del parts["g_idx"]
    return parts


def packed_module(m, name, settings):
    """The same with their values: {part: array}."""
    bits, (rows, cols), group, awq = settings["bits"], m.tensors[name][1], settings["group_size"], settings["quant_method"] == "awq"
    n, parts = 32 // bits, packed_parts(rows, cols, settings)
    order = np.argsort(AWQ.places) if awq else slice(None)  # of the numbers in a word

    def along_out(x):
        """[..., out] numbers as words."""
        return join_words(x.reshape(len(x), -1, n)[..., order], bits)

    words = np.empty(parts["qweight"][1], np.int32)
    scales, zeros = np.empty((2, cols // group, rows), np.float32)
    for start, stop in spans(rows, cols):
        codes, scale, zero = m.codes(name, start, stop)
        if awq:
            words[:, start // n:stop // n] = along_out(codes.T)
        else:
            words[:, start:stop] = join_words(codes.reshape(stop - start, -1, n), bits).T
        scales[:, start:stop], zeros[:, start:stop] = scale.T, zero.T
    less = settings.get("checkpoint_format") == "gptq"
    values = {"qweight": words, "qzeros": along_out((zeros - less).astype(np.uint32)), "scales": rounded(name, scales, "F16"),
              "g_idx": (np.arange(cols) // group).astype(np.int32)}
    return {part: values[part] for part in parts}


def write_hf(m, out, dtype=None):
    """Write a Checkpoint as the Hugging Face directory `out`: with GPTQ's or AWQ's format in the layers if their codes fit it and
    dtype is None, else with values of FP16 (or FP32, if dtype is "f32"). Returns (bytes of the weights, lines for the user)."""
    settings, reason = packed_settings(m) if dtype is None else (None, None)
    number = dtype or "f16"
    entries, lines = [], []  # entries: (name, type, shape, the tensor of m, its part if it is packed, or None)
    for name, (_, shape, _) in m.tensors.items():
        if settings and name.startswith("model.layers.") and len(shape) > 1:
            for part, (kind, size) in packed_parts(*shape, settings).items():
                entries.append((f"{name.removesuffix('weight')}{part}", kind, size, name, part))
        else:
            entries.append((name, number.upper(), shape, name, None))
    entries.sort(key=lambda entry: not entry[4])  # the sizes of packed parts are multiples of 4, so that each is aligned to its type
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, kind, shape, _, _ in entries:
        start, end = end, end + math.prod(shape) * (2 if kind == "F16" else 4)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    config = {**m.config, "torch_dtype": {"f16": "float16", "f32": "float32"}[number], "use_cache": True,
              "bos_token_id": m.t.bos if m.t.bos >= 0 else None,
              "eos_token_id": m.t.eos[0] if len(m.t.eos) == 1 else m.t.eos or None}
    if settings:
        config["quantization_config"] = settings
        lines.append(f"{settings['quant_method'].upper()}, {settings['bits']} bits in groups of {settings['group_size']}, "
                     f"{settings.get('checkpoint_format') or settings['version']}; the rest f16")
        if not settings.get("sym", True):
            lines.append("asymmetric: vLLM from 0.23 on refuses GPTQ of that kind (--dtype f16 is for all)")
    elif m.packed:
        lines.append(f"dequantized to {number}" + (f" for {reason}" if reason else ""))
    text = {id: m.t.pieces[id][0] for id in (m.t.bos, m.t.unk, *m.t.eos) if 0 <= id < len(m.t.pieces)}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": 10**30,
        "bos_token": text.get(m.t.bos), "eos_token": text.get(m.t.eos[0]) if m.t.eos else None, "unk_token": text[m.t.unk],
        "added_tokens_decoder": {str(id): token for id, token in added_tokens(m.t).items()}}
    if m.chat:
        tokenizer["chat_template"] = chat_jinja(m.chat)
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    started = time.monotonic()
    with new_directory(out) as temporary:
        def save(name, data):
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(data)

        module = None, None  # of the last packed tensor: its name and its parts
        with open(os.path.join(temporary, "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for _, kind, _, name, part in entries:
                if part:
                    if module[0] != name:
                        module = None, None
                        module = name, packed_module(m, name, settings)
                    file.write(module[1][part].tobytes())
                else:
                    for piece in spans(*m.tensors[name][1]):
                        file.write(rounded(name, m.rows(name, *piece), kind).tobytes())
                progress(started, file.tell() - 8 - len(header), end)
        save("tokenizer.model", sentencepiece_model(m.t))
        save("tokenizer.json", json.dumps(tokenizer_json(m.t), ensure_ascii=False).encode())
        save("tokenizer_config.json", json.dumps(tokenizer, indent=2, ensure_ascii=False).encode())
        save("config.json", json.dumps(config, indent=2).encode())
    return end, lines
