"""llama-server, as Ollama 0.33 and 0.34 start it, on the HTTP server inside the package xllamacpp.

The package has llama.cpp's own server but not the parser of its command line. This program maps the
flags that Ollama passes, and the environment that llama-server reads (LLAMA_ARG_...), onto the
package's parameters. What it does not know it refuses with exit status 2, since an ignored setting
would make a test measure something other than what it says.
"""

import os
import re
import signal
import sys

# The package lies beside this file.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "site"))

import xllamacpp as x  # noqa: E402

ON = {"on", "enabled", "true", "1"}
OFF = {"off", "disabled", "false", "0"}


def switch(text):
    """The value of a switch in the environment."""
    if text in ON:
        return True
    if text in OFF:
        return False
    raise ValueError("on or off is expected")


def choice(kind, prefix, **others):
    """A reader of the members of an enumeration that begin with prefix, by their names in lower case."""
    names = {m.name.removeprefix(prefix).lower(): m for m in kind if m.name.startswith(prefix)}
    names |= {name.replace("_", "-"): member for name, member in others.items()}

    def read(text):
        if text not in names:
            raise ValueError("one of %s is expected" % ", ".join(sorted(names)))
        return names[text]

    return read


flash_attention = choice(
    x.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_",
    on=x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    off=x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
)
load_mode = choice(x.llama_load_mode, "LLAMA_LOAD_MODE_", dio=x.llama_load_mode.LLAMA_LOAD_MODE_DIRECT_IO)
cache_type = choice(x.ggml_type, "GGML_TYPE_")
split_mode = choice(x.llama_split_mode, "LLAMA_SPLIT_MODE_")
speculation = choice(
    x.common_speculative_type, "COMMON_SPECULATIVE_TYPE_",
    draft_mtp=x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP,
    draft_dflash=x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH,
)


def attribute(path):
    """A setter of params.path."""
    *parents, last = path.split(".")

    def apply(params, value):
        for name in parents:
            params = getattr(params, name)
        setattr(params, last, value)

    return apply


def threads(params, n):
    params.cpuparams.n_threads = n
    params.cpuparams_batch.n_threads = n


def speculate(params, kind):
    params.speculative.types = [kind]


def adapter(params, path):
    info = x.CommonAdapterLoraInfo()
    info.path, info.scale = path, 1.0
    params.lora_adapters = [*params.lora_adapters, info]


def fit_target(params, mebibytes):
    params.fit_params_target = [mebibytes << 20] * len(params.fit_params_target)


# Each setting: its flags, its name in the environment, how its value is read (None: a flag without a
# value, which says the constant at the end), and what it sets.
SETTINGS = [
    (["--model", "-m"], "LLAMA_ARG_MODEL", str, attribute("model.path"), None),
    (["--port"], "LLAMA_ARG_PORT", int, attribute("port"), None),
    (["--host"], "LLAMA_ARG_HOST", str, attribute("hostname"), None),
    (["--no-webui"], "LLAMA_ARG_NO_WEBUI", None, attribute("ui"), False),
    (["--offline"], "LLAMA_OFFLINE", None, attribute("offline"), True),
    (["-c", "--ctx-size"], "LLAMA_ARG_CTX_SIZE", int, attribute("n_ctx"), None),
    (["-np", "--parallel"], "LLAMA_ARG_N_PARALLEL", int, attribute("n_parallel"), None),
    (["--log-verbosity", "-lv"], "LLAMA_ARG_LOG_VERBOSITY", int, attribute("verbosity"), None),
    (["--verbose", "-v"], None, None, attribute("verbosity"), 5),
    (["--no-jinja"], None, None, attribute("use_jinja"), False),
    (["--chat-template"], "LLAMA_ARG_CHAT_TEMPLATE", str, attribute("chat_template"), None),
    (["--load-mode"], "LLAMA_ARG_LOAD_MODE", load_mode, attribute("load_mode"), None),
    (["--cache-type-k", "-ctk"], "LLAMA_ARG_CACHE_TYPE_K", cache_type, attribute("cache_type_k"), None),
    (["--cache-type-v", "-ctv"], "LLAMA_ARG_CACHE_TYPE_V", cache_type, attribute("cache_type_v"), None),
    (["--flash-attn", "-fa"], "LLAMA_ARG_FLASH_ATTN", flash_attention, attribute("flash_attn_type"), None),
    (["--embedding", "--embeddings"], "LLAMA_ARG_EMBEDDINGS", None, attribute("embedding"), True),
    (["-b", "--batch-size"], "LLAMA_ARG_BATCH", int, attribute("n_batch"), None),
    (["-ub", "--ubatch-size"], "LLAMA_ARG_UBATCH", int, attribute("n_ubatch"), None),
    (["-ngl", "--n-gpu-layers"], "LLAMA_ARG_N_GPU_LAYERS", int, attribute("n_gpu_layers"), None),
    (["-t", "--threads"], "LLAMA_ARG_THREADS", int, threads, None),
    (["--split-mode"], "LLAMA_ARG_SPLIT_MODE", split_mode, attribute("split_mode"), None),
    (["--main-gpu"], "LLAMA_ARG_MAIN_GPU", int, attribute("main_gpu"), None),
    (["--context-shift"], "LLAMA_ARG_CONTEXT_SHIFT", None, attribute("ctx_shift"), True),
    (["--keep"], None, int, attribute("n_keep"), None),
    (["--mmproj"], "LLAMA_ARG_MMPROJ", str, attribute("mmproj.path"), None),
    (["--no-mmproj-offload"], "LLAMA_ARG_NO_MMPROJ_OFFLOAD", None, attribute("mmproj_use_gpu"), False),
    (["--image-min-tokens"], "LLAMA_ARG_IMAGE_MIN_TOKENS", int, attribute("image_min_tokens"), None),
    (["--lora"], None, str, adapter, None),
    (["--spec-type"], "LLAMA_ARG_SPEC_TYPE", speculation, speculate, None),
    (["--spec-draft-n-max"], "LLAMA_ARG_SPEC_DRAFT_N_MAX", int, attribute("speculative.draft.n_max"), None),
    (["--spec-draft-backend-sampling"], None, None, attribute("speculative.draft.backend_sampling"), True),
    (["--spec-draft-model"], "LLAMA_ARG_SPEC_DRAFT_MODEL", str, attribute("speculative.draft.mparams.path"), None),
    (["--fit-target"], "LLAMA_ARG_FIT_TARGET", int, fit_target, None),
    (["--slot-save-path"], None, str, attribute("slot_save_path"), None),
    (["--swa-full"], "LLAMA_ARG_SWA_FULL", None, attribute("swa_full"), True),
    (["--cache-ram", "-cram"], "LLAMA_ARG_CACHE_RAM", int, attribute("cache_ram_mib"), None),
    (["--cache-reuse"], "LLAMA_ARG_CACHE_REUSE", int, attribute("n_cache_reuse"), None),
    (["--ctx-checkpoints"], "LLAMA_ARG_CTX_CHECKPOINTS", int, attribute("n_ctx_checkpoints"), None),
    (["--metrics"], "LLAMA_ARG_ENDPOINT_METRICS", None, attribute("endpoint_metrics"), True),
    (["--props"], "LLAMA_ARG_ENDPOINT_PROPS", None, attribute("endpoint_props"), True),
    (["--slots"], "LLAMA_ARG_ENDPOINT_SLOTS", None, attribute("endpoint_slots"), True),
    # What relay_lines does for every line.
    (["--no-log-prefix"], None, None, lambda params, value: None, None),
    (["--no-log-timestamps"], None, None, lambda params, value: None, None),
]


def refuse(message):
    print("llama-server on xllamacpp: " + message, file=sys.stderr, flush=True)
    print("llama-server on xllamacpp: add it to llama_server.py, or build the engine from its source",
          file=sys.stderr, flush=True)
    sys.exit(2)


def from_environment(params, environ):
    known = {name: (read, apply, constant) for _, name, read, apply, constant in SETTINGS if name}
    for name in sorted(environ):
        if name not in known:
            if name.startswith("LLAMA_ARG_"):
                refuse("the environment has %s, which it does not know" % name)
            continue
        read, apply, constant = known[name]
        try:
            if read is not None:
                apply(params, read(environ[name]))
            elif switch(environ[name]):
                apply(params, constant)
            elif isinstance(constant, bool):
                apply(params, not constant)
        except (ValueError, OverflowError) as err:
            refuse("%s is %r: %s" % (name, environ[name], err))


def from_arguments(params, args):
    known = {flag: (read, apply, constant) for flags, _, read, apply, constant in SETTINGS for flag in flags}
    rest = iter(args)
    for flag in rest:
        if flag not in known:
            refuse("it does not know the flag %s" % flag)
        read, apply, constant = known[flag]
        if read is None:
            apply(params, constant)
            continue
        text = next(rest, None)
        if text is None:
            refuse("the flag %s needs a value" % flag)
        try:
            apply(params, read(text))
        except (ValueError, OverflowError) as err:
            refuse("%s is %r: %s" % (flag, text, err))


PREFIX = re.compile(rb"^\d+\.\d\d\.\d{3}\.\d{3} (?:[A-Z] )?")


def relay_lines():
    """Have a process of its own pass on what this one writes, line by line and without its prefix.

    The package writes the time, the level and the text of a line one by one, and cannot be told to
    leave out the first two. Ollama's own lines go to the same place and would come in between. It is
    a process since it must outlive this one: what the engine writes when it dies is what matters.
    """
    out = os.dup(2)
    reader, writer = os.pipe()
    if os.fork() != 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        for fd in (out, reader, writer):
            os.close(fd)
        return
    # It ends when this process has closed the pipe. In a group of its own nobody who waits for the
    # group of Ollama and the engine to end waits for it, and no signal to that group cuts it off.
    os.setpgid(0, 0)
    for fd in (1, 2, writer):
        os.close(fd)
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            try:
                os.write(out, PREFIX.sub(b"", line))
            except BrokenPipeError:
                break
    os._exit(0)


def main(args):
    # It is ended by signals, also while the engine loads a model, when Python runs no handler.
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_DFL)
    if "--list-devices" in args:
        # Ollama is told of none: models run on the processor (n_gpu_layers, below).
        print("Available devices:")
        return
    params = x.CommonParams()
    # The package for macOS would by itself use Metal, of which Ollama is not told.
    params.n_gpu_layers = 0
    from_environment(params, os.environ)
    from_arguments(params, args)
    relay_lines()
    print("system_info: " + x.get_system_info(), file=sys.stderr, flush=True)
    if not params.model.path:
        # Ollama looks for devices: it reads the line above and ends the process.
        signal.pause()
    try:
        server = x.Server(params)
    except RuntimeError as err:
        sys.exit("llama-server on xllamacpp: error: %s" % err)
    print("llama-server on xllamacpp %s: listening on %s" % (x.__version__, server.listening_address),
          file=sys.stderr, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
