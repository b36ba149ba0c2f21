"""Checkpoints of other programs, as export.py reads and writes them.

Read: Hugging Face directories quantized by GPTQ, AWQ or bitsandbytes, and GGUF files. Each is a Weights whose tensors have
the Hugging Face names and shapes [out, in], whatever the names, the packing and the order of rows in the file. Where a tensor
is stored as codes, a weight being scale * (code - zero) with one scale and zero for a group of inputs, as in our own file
(FORMAT.md), kind() says so and stored() gives the codes, so that they go over as they are. rows() gives the values.
Written: GGUF files, and Hugging Face directories with FP16 weights or in GPTQ's format, from a checkpoint of ours.

Sources: GPTQModel's qlinear/__init__.py and utils/model.py; AutoAWQ's modules/linear/gemm.py and utils/packing_utils.py;
bitsandbytes' functional.py (QuantState) and nn/modules.py; ggml's docs/gguf.md and ggml-quants.c; llama.cpp's
convert_hf_to_gguf.py.

Top to bottom: what they share, GPTQ, AWQ, bitsandbytes, GGUF, our own file, the way out.
"""
import json, math, os, re, struct, sys, time
from types import SimpleNamespace

import numpy as np
from lora_merge import NUMPY, Bad, Weights, demand, form, new_directory, progress, rounded, show
from sentencepiece import sentencepiece_model_pb2

# ---------------------------------------------------------------------------- what they share


def group_size(g_idx):
    """The largest of 128, 64 and 32 for which each run of so many columns is of one group and the runs fill the row; 32 need
    not fill it; None if there is none. g_idx: [in], the group of each column."""
    for size in 128, 64, 32:
        if len(g_idx) % size == 0 or size == 32:
            runs = np.pad(g_idx, (0, -len(g_idx) % size), mode="edge").reshape(-1, size)
            if (runs == runs[:, :1]).all():
                return size
    return None


def is_half(x):
    """Whether all of x, f32, are numbers of FP16."""
    with np.errstate(over="ignore"):
        return bool((x.astype(np.float16).astype(np.float32) == x).all())


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
        """The type of our file that holds the tensor's codes: "q4" or "q8"; None for values that are not on such a grid."""
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
                group = group_size(self.group_index(name))
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
        self.n_bits, self.group = settings.get("bits"), settings.get("group_size")
        if self.n_bits not in (4, 8) or type(self.n_bits) is not int:
            raise Bad(f"{where}.bits is {show(self.n_bits)} (4 and 8 are supported)")
        if type(self.group) is not int or not (self.group == -1 or 0 < self.group < 2**31):
            raise Bad(f"{where}.group_size is {show(self.group)} (a positive number, or -1, is expected)")
        self.claimed = settings.get("checkpoint_format") or "gptq"
        if self.claimed not in ("gptq", "gptq_v2"):
            raise Bad(f"{where}.checkpoint_format is {show(self.claimed)} (gptq and gptq_v2 are supported)")
        demand(where, "is_marlin_format", settings.get("is_marlin_format") or False, False)
        self.row_order, self.column_order = {}, {}  # of tensors that fold() reorders: [out], [in], where each row or column comes from
        super().__init__(directory, config, settings)
        self.version = self.find_version()

    def logical_shape(self, name):
        n = 32 // self.n_bits
        shape = self.part(name, "qweight", ["I32"])
        if len(shape) != 2:
            raise Bad(f"{self.packed[name]['qweight']}: the shape is {shape}, but a matrix is expected")
        cols, out = shape[0] * n, shape[1]
        groups = 1 if self.group == -1 else -(-cols // self.group)
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
        middles = []
        for name in self.packed:
            first = self.raw[self.packed[name]["qweight"]][1]
            n = min(first[0], 128 * self.n_bits // 32)
            with self.open(self.tensors[name][0]) as file:
                part = file.get_slice(self.packed[name]["qweight"])[:n]
            codes = split_words(part, self.n_bits).transpose(0, 2, 1).reshape(-1, first[1])
            groups = self.read_groups(name)[:len(codes)]
            zeros = self.read(name, "qzeros")
            with form(name):
                middles.append([codes.mean() - self.zeros(zeros, version)[groups].mean() for version in (1, 2)])
        claimed = 2 if self.claimed == "gptq_v2" else 1
        if not middles:
            return claimed
        off = np.abs(np.mean(middles, 0))
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
            return np.arange(cols) // (cols if self.group == -1 else self.group)
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

    def doubts(self, name):
        return None if is_half(self.load(name).scales) else "scales that are no FP16 numbers"

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
        self.group = settings.get("group_size", settings.get("q_group_size"))
        if type(self.group) is not int or not (self.group == -1 or 0 < self.group < 2**31):
            raise Bad(f"{where}.group_size is {show(self.group)} (a positive number, or -1, is expected)")
        super().__init__(directory, config, settings)

    def logical_shape(self, name):
        shape = self.part(name, "qweight", ["I32"])
        if len(shape) != 2:
            raise Bad(f"{self.packed[name]['qweight']}: the shape is {shape}, but a matrix is expected")
        cols, out = shape[0], shape[1] * 8
        groups = 1 if self.group == -1 else -(-cols // self.group)
        self.part(name, "scales", NUMPY, [groups, out])
        self.part(name, "qzeros", ["I32"], [groups, out // 8])
        self.no_bias(name)
        return [out, cols]

    def group_index(self, name):
        cols = self.tensors[name][1][1]
        return np.arange(cols) // (cols if self.group == -1 else self.group)

    def unpack(self, name):
        """A module's parts: words u32 [in, out / 8]; scales, zeros f32 [groups, out]."""
        zeros = split_words(self.read(name, "qzeros"), 4)[..., self.places]
        return SimpleNamespace(words=self.read(name, "qweight"), zeros=zeros.reshape(len(zeros), -1).astype(np.float32),
                               scales=finite(self.packed[name]["scales"], self.read(name, "scales")))

    def bits(self, name):
        return "q4"

    def doubts(self, name):
        return None if is_half(self.load(name).scales) else "scales that are no FP16 numbers"

    def codes(self, name, start, stop):
        m, first = self.load(name), start // 8  # whole words
        codes = split_words(m.words[:, first:-(-stop // 8)], 4)[..., self.places].reshape(len(m.words), -1)
        codes = codes[:, start - 8 * first:stop - 8 * first].T
        return codes, m.scales[:, start:stop].T, m.zeros[:, start:stop].T


# ---------------------------------------------------------------------------- bitsandbytes


class BitsAndBytes(PackedDirectory):
    """What bitsandbytes saves. INT8 (LLM.int8): weight i8 [out, in], SCB f32 [out], the rows' largest absolute values; a
    weight is SCB / 127 * code. NF4: weight u8 [out in / 2, 1], two codes a byte, the first in the high half; quant_map f32 [16],
    their values; absmax, a scale for each block of 64 (or so) weights of the flattened matrix. With double quantization absmax
    is u8, codes into nested_quant_map f32 [256], with scales nested_absmax for blocks of 256 and an offset."""
    pattern = r"(.+)\.(weight|weight\..+|SCB|weight_format|bias)"
    marks = {"SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4",
             "weight.quant_state.bitsandbytes__fp4"}
    state = "weight.quant_state.bitsandbytes__nf4"

    def __init__(self, directory, config, settings):
        self.states = {}  # of NF4 tensors: (blocksize, nested_blocksize, nested_offset)
        super().__init__(directory, config, settings)

    def logical_shape(self, name):
        parts = self.packed[name]
        self.no_bias(name)
        if parts.keys() & {"SCB", "weight_format"}:
            shape = self.part(name, "weight", ["I8"])
            if len(shape) != 2:
                raise Bad(f"{name}: the shape is {shape}, but a matrix is expected")
            self.part(name, "SCB", ["F32"], [shape[0]])
            if "weight_format" in parts:
                self.part(name, "weight_format", ["U8"], [])
                if self.read(name, "weight_format") != 0:
                    raise Bad(f"{parts['weight_format']}: is {self.read(name, 'weight_format')} (only 0, row by row, is supported)")
            return shape
        if "weight.quant_state.bitsandbytes__fp4" in parts:
            raise Bad(f"{name}: the type is fp4 (of bitsandbytes' 4-bit types nf4 is supported)")
        self.part(name, self.state, ["U8"])
        where = parts[self.state]
        with form(where):
            s = json.loads(self.read(name, self.state).tobytes())
            shape, block, nested = list(s["shape"]), s["blocksize"], s.get("nested_blocksize", 256)
            demand(where, "quant_type", s["quant_type"], "nf4")
            if not (len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in (*shape, block, nested))):
                raise ValueError(f"shape {show(shape)}, blocksize {show(block)}, nested_blocksize {show(nested)}")
            offset = float(s.get("nested_offset", 0))
        n = math.prod(shape)
        blocks = -(-n // block)
        self.part(name, "weight", ["U8"], [-(-n // 2), 1])
        self.part(name, "weight.quant_map", ["F32"], [16])
        self.part(name, "weight.absmax", ["U8"] if "weight.nested_absmax" in parts else ["F32"], [blocks])
        if "weight.nested_absmax" in parts:
            self.part(name, "weight.nested_absmax", ["F32"], [-(-blocks // nested)])
            self.part(name, "weight.nested_quant_map", ["F32"], [256])
        self.states[name] = block, nested, offset
        return shape

    def unpack(self, name):
        """A module's parts. INT8: scales f32 [out]. NF4: map f32 [16], absmax f32 [blocks], block, their size."""
        parts = self.packed[name]
        if "SCB" in parts:
            return SimpleNamespace(scales=finite(parts["SCB"], self.read(name, "SCB")) / np.float32(127))
        block, nested, offset = self.states[name]
        absmax = self.read(name, "weight.absmax")
        if "weight.nested_absmax" in parts:
            codes, scales = absmax, self.read(name, "weight.nested_absmax")
            absmax = self.read(name, "weight.nested_quant_map")[codes] * scales[np.arange(len(codes)) // nested] + np.float32(offset)
        return SimpleNamespace(map=finite(parts["weight.quant_map"], self.read(name, "weight.quant_map")),
                               absmax=finite(parts["weight.absmax"], absmax), block=block)

    def group_index(self, name):
        return np.zeros(self.tensors[name][1][1], int)

    def bits(self, name):
        return "q8" if "SCB" in self.packed[name] else None

    def doubts(self, name):
        """The f32 scale of a row is rounded to FP16: a row moves by 2^-11 of itself at most, as little as the numbers of FP16."""
        with np.errstate(over="ignore"):
            scales = self.load(name).scales
            large = np.abs(scales - scales.astype(np.float16).astype(np.float32)) > np.abs(scales) * 2**-10.99
        if large.any():
            return "scales out of FP16's range"
        if not self.notes:
            self.notes.append("scales of INT8 rows rounded to FP16 (by 0.05% at most; --dtype f32 keeps them)")
        return None

    def codes(self, name, start, stop):
        with self.open(self.raw[self.packed[name]["weight"]][0]) as file:
            codes = file.get_slice(self.packed[name]["weight"])[start:stop]
        scales = self.load(name).scales[start:stop, None]
        return codes.view(np.uint8) ^ np.uint8(128), scales, np.full_like(scales, 128)

    def rows(self, name, start, stop):
        if self.packed.get(name, {}).keys() & {"SCB"} or name not in self.packed:
            return super().rows(name, start, stop)
        m, cols = self.load(name), self.tensors[name][1][1]
        first, last = start * cols, stop * cols  # among the flattened weights
        with self.open(self.raw[self.packed[name]["weight"]][0]) as file:
            data = file.get_slice(self.packed[name]["weight"])[first // 2:-(-last // 2)]
        codes = np.concatenate([data >> 4, data & 15], 1).ravel()[first % 2:][:last - first]
        return (m.map[codes] * m.absmax[np.arange(first, last) // m.block]).reshape(stop - start, cols)


DIRECTORIES = {"gptq": GPTQ, "awq": AWQ, "bitsandbytes": BitsAndBytes}  # by quantization_config.quant_method

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
        rows, _ = self.tensors[name][1]
        if self.entries[name][0].endswith("_1"):
            for start in range(0, rows, 1024):
                _, _, zeros = self.codes(name, start, min(start + 1024, rows))
                with np.errstate(over="ignore"):
                    off = np.abs(zeros.astype(np.float16).astype(np.float32) - zeros).max()
                if not off <= 2**-7:
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

FILE_TYPES = {"f32": 1, "f16": 2, "q8": 3, "q4": 4}


def tensor_bytes(dtype, group, rows, cols):
    """Bytes of a tensor in the file."""
    bits = {"f32": 32, "f16": 16, "q8": 8, "q4": 4}[dtype]
    groups = -(-cols // group) if group else 0
    return -(-rows // 32) * (groups * (128 + 32 * group * bits // 8) if group else 32 * cols * bits // 8)


def pack_panels(codes, scales, zeros, dtype, group):
    """The bytes of panels of "q8" or "q4": codes u8 [n, cols], scales, zeros f16 [n, groups]; n a multiple of 32."""
    n, groups = scales.shape
    codes = np.pad(codes, ((0, 0), (0, groups * group - codes.shape[1]))).reshape(n // 32, 32, groups, group // 4, 4)
    codes = codes.transpose(0, 2, 3, 1, 4)  # [panels, groups, group / 4, 32, 4]
    if dtype == "q4":
        codes = codes[..., :16, :] | codes[..., 16:, :] << 4
    numbers = np.stack([scales, zeros]).reshape(2, n // 32, 32, groups).transpose(1, 3, 0, 2)  # [panels, groups, 2, 32]
    return np.concatenate([np.ascontiguousarray(numbers).view(np.uint8).reshape(n // 32, groups, 128),
                           codes.reshape(n // 32, groups, -1)], 2).tobytes()


def unpack_panels(data, cols, dtype, group):
    """The inverse, of bytes: codes u8 [n, cols]; scales, zeros f32 [n, groups]."""
    groups = -(-cols // group)
    data = np.frombuffer(data, np.uint8).reshape(-1, groups, 128 + 32 * group * int(dtype[1]) // 8)
    numbers = np.ascontiguousarray(data[..., :128]).view("<f2").reshape(-1, groups, 2, 32).transpose(2, 0, 3, 1)
    codes = data[..., 128:].reshape(len(data), groups, group // 4, -1, 4)
    if dtype == "q4":
        codes = np.concatenate([codes & 15, codes >> 4], 3)
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(len(data) * 32, -1)[:, :cols]
    return codes, *numbers.reshape(2, -1, groups).astype(np.float32)
