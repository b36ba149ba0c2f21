"""What speed.py and bench.py share: running a program once and reading its statistics, what a checkpoint is, the machine,
progress with the time left, and files that are whole or not there. Needs nothing but the standard library."""
import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time

BENCH = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(BENCH)
PEERS = os.path.join(BENCH, "peers.py")
TYPES = {1: "f32", 2: "f16", 3: "q8", 4: "q4", 5: "nf4"}        # FORMAT.md
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def say(message):
    print(message, file=sys.stderr, flush=True)


def outcome(name, main):
    """Runs a script's main() and ends the process: its status, or 1 and one line for what a user can do something about."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: stopped")
    except OSError as error:
        sys.exit(f"{name}: {error.filename}: {error.strerror}" if error.filename else f"{name}: {error}")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {error}")


def write_json(path, value):
    """Writes value as JSON; the file is whole or is not there. Makes its directory."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def digest(*parts):
    """A short fingerprint of strings and bytes: 12 hexadecimal digits."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else str(part).encode())
    return h.hexdigest()[:12]


def file_digest(path):
    """A fingerprint of a file: of all of it, or, above 64 MB, of its size and 64 pieces spread over it."""
    size, piece, n = os.path.getsize(path), 1 << 20, 64
    with open(path, "rb") as f:
        if size <= n * piece:
            return digest(str(size), f.read())
        parts = []
        for i in range(n):
            f.seek((size - piece) * i // (n - 1))
            parts.append(f.read(piece))
        return digest(str(size), *parts)


# --------------------------------------------------------------------------------------------------------------------
# Running a program

def execute(args, **options):
    """Runs a program; returns (what it printed, its messages). If it fails, or is not done after `timeout` seconds, raises a
    RuntimeError of one line, with the last line of its messages."""
    name = os.path.basename(args[1] if args[0] == sys.executable else args[0])
    try:
        done = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              errors="replace", **options)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{name}: not done after {error.timeout:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"{args[0]}: cannot be started: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise RuntimeError(last if last.startswith(name) else f"{name} ended with {ended}: {last}")
    return done.stdout, done.stderr


def read_statistics(path, program):
    """The JSON that a program was told to write; a RuntimeError if it did not."""
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError):
        raise RuntimeError(f"{os.path.basename(program)} ended well, but wrote no statistics") from None


def run_json(program, model, arguments, timeout=None):
    """What `run MODEL arguments -o FILE` writes to FILE, as a dict, and its messages (of -P). Raises RuntimeErrors."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "statistics.json")
        messages = execute([program, model, "-q", *map(str, arguments), "-o", path], timeout=timeout)[1]
        return read_statistics(path, program), messages


def generate(program, model, cell, threads, warmup=1, repeat=1, prompt="Hello", extra=(), timeout=None):
    """The statistics of run (README.md) for a cell (batch, prompt tokens, new tokens), without the sequences."""
    batch, n_in, n_out = cell
    result, _ = run_json(program, model, ["-E", "-i", prompt, "-b", batch, "-l", n_in, "-n", n_out, "-j", threads,
                                          "-w", warmup, "-r", repeat, *extra], timeout)
    del result["sequences"]
    return result


def ask_peer(python, name, task, timeout=None):
    """What a peer (peers.py) measures, in a process of its own: a list with a dict for each of task["cells"], with the names
    and units of run's statistics. python: the interpreter that has the peer's packages."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, file) for file in ("task.json", "statistics.json")]
        write_json(paths[0], task)
        execute([python, PEERS, "measure", name, *paths], timeout=timeout)
        return read_statistics(paths[1], PEERS)


def cost(cell, passes):
    """How long passes of a cell take, about, in tokens of prefill: a step takes as long as 10 of them, or as its tokens."""
    batch, n_in, n_out = cell
    return passes * (batch * n_in + n_out * max(batch, 10))


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints

def read_shape(path):
    """What a checkpoint's header and table (FORMAT.md) say: the model's dimensions; `name`; `type` and `group` of its matrices;
    and what a forward has to do: `ops` for a token, `ops_logits` more where its logits are wanted, `bytes` of weights to read.
    Raises a RuntimeError if the file is no checkpoint."""
    names = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "window", "max_positions"]
    with open(path, "rb") as f:
        header = f.read(256)
        if header[:8] != b"mistralc" or len(header) < 256:
            raise RuntimeError(f"{path}: not a checkpoint")
        shape = dict(zip(names, struct.unpack_from("<9I", header, 40)))
        shape["norm_eps"], shape["rope_theta"] = struct.unpack_from("<fd", header, 76)
        shape["name"] = header[92:160].split(b"\0")[0].decode(errors="replace")
        n_tensors, = struct.unpack_from("<I", header, 12)
        table = f.read(96 * n_tensors)
        if len(table) < 96 * n_tensors:
            raise RuntimeError(f"{path}: the table of tensors is cut off: an incomplete copy?")
    tensors = {}                        # name: ((type, group), operations of a product with a vector, bytes)
    for name, kind, group, rows, cols, _, size in struct.iter_unpack("<48sIIQQQQ8x", table):
        tensors[name.rstrip(b"\0").decode(errors="replace")] = (kind, group), 2 * rows * cols, size
    if not {"token_embedding", "layers.0.wqkv"} <= set(tensors):
        raise RuntimeError(f"{path}: no table of a model's tensors")
    classifier = "wcls" if "wcls" in tensors else "token_embedding"
    kind, shape["group"] = tensors["layers.0.wqkv"][0]
    shape["type"] = TYPES.get(kind, "?")
    shape["ops"] = sum(ops for name, (_, ops, _) in tensors.items() if ".w" in name)
    shape["ops_logits"] = tensors[classifier][1]
    shape["bytes"] = sum(size for _, _, size in tensors.values())
    if classifier == "wcls":            # of the embedding only a row a token is read
        shape["bytes"] -= tensors["token_embedding"][2]
    return shape


def need_room(directory, n_bytes):
    """Makes a directory; raises a RuntimeError if its disk has no room for files of n_bytes."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"{directory}: the directory cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK):
        raise RuntimeError(f"{directory}: cannot be written to: choose another directory")
    free = shutil.disk_usage(directory).free
    if n_bytes > free - 0.5e9:
        raise RuntimeError(f"{directory}: the files to be made need {n_bytes / 1e9:.1f} GB, free are {free / 1e9:.1f}: "
                           "choose fewer types of weights or another directory")


# --------------------------------------------------------------------------------------------------------------------
# The machine

def memory_bytes():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpus():
    """[{name, memory_bytes, driver}] of the GPUs that nvidia-smi lists; memory_bytes is None where it does not say."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = []
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if done.returncode == 0 and len(fields) == 3:
            name, mib, driver = fields
            found.append({"name": name, "memory_bytes": int(mib) << 20 if mib.isdigit() else None, "driver": driver})
    return found


def commit():
    """What `git describe` calls this version of the project; without git, a fingerprint of the sources that are measured."""
    if shutil.which("git") and os.path.exists(os.path.join(ROOT, ".git")):
        done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    names = ("run.c", "model.h", "simd.h", "report.h", "run_cuda.cu", "hopper.h", "quantize.c", "calibrate.h")
    files = [os.path.join(ROOT, name) for name in names]
    return "sources " + digest(*(file_digest(path) for path in files if os.path.exists(path)))


def machine():
    """{processor, cores, memory_gb, gpus, cuda, system, python, compiler, commit}, as far as they can be found out; cuda: the
    version of the CUDA Toolkit."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            processor = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), processor)

    def lines(*args):
        done = shutil.which(args[0]) and subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return done.stdout.strip().splitlines() if done else []

    release = [line.split("release", 1)[1].split(",")[0].strip() for line in lines("nvcc", "--version") if "release" in line]
    return {"processor": processor, "cores": CORES, "memory_gb": round(memory_bytes() / 1e9, 1), "gpus": gpus(),
            "cuda": "".join(release[:1]), "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(), "compiler": "".join(lines("cc", "--version")[:1]), "commit": commit()}


# --------------------------------------------------------------------------------------------------------------------
# Progress

def duration(seconds):
    """Seconds as people say them: 45 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """What is being done, the share that is done and the time left: a line that is rewritten on a terminal, elsewhere a new
    line every 30 seconds or for an item that takes as long. items: [(key, cost)] of all there is to do, in order; a key that
    comes again is expected to take what it took before, another its cost at the rate seen. A key's first word is what rates
    are kept for."""
    EVERY = 30      # seconds

    def __init__(self, items, known=None):
        self.items, self.known, self.rates = [(key, max(c, 1)) for key, c in items], dict(known or {}), {}
        self.total, self.said, self.began = sum(cost for _, cost in self.items), 0, None
        for key, c in self.items:           # rates of what an earlier run measured
            if key in self.known:
                self.learn(key, c, self.known[key])

    def learn(self, key, c, seconds):
        for group in (key.split()[0], ""):
            s, n = self.rates.get(group, (0, 0))
            self.rates[group] = s + seconds, n + c

    def expected(self, key, c):
        """Seconds that an item may take, or None as long as nothing is known."""
        s, n = self.rates.get(key.split()[0], self.rates.get("", (0, 0)))
        return self.known.get(key, c * s / n if n else None)

    def left(self):
        """Seconds that all items may take, or None as long as nothing is known."""
        return sum(self.expected(key, c) for key, c in self.items) if self.rates else None

    def start(self, key, more=""):
        """The next item, `key`, begins; `more` is said beside it."""
        self.began = time.monotonic()
        done = 1 - sum(c for _, c in self.items) / max(self.total, 1e-9)
        left = self.left()
        line = f"{key}{more}: {done:.0%} done" + (f", {duration(left)} left" if left is not None else "")
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K" + line)
            sys.stderr.flush()
        elif time.monotonic() - self.said > self.EVERY or (self.expected(*self.items[0]) or 0) > self.EVERY:
            self.said = time.monotonic()
            say(line)

    def end(self):
        """The item that began is done, well or not. Returns the seconds it took."""
        seconds = time.monotonic() - self.began
        key, c = self.items.pop(0)
        self.known[key] = seconds
        self.learn(key, c, seconds)
        return seconds

    @staticmethod
    def clear():
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
